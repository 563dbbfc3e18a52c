//! Runs an accepted request: KV transfer, pace, tokens, and the response as one body or as a stream of
//! events. `writer` turns tokens into events; `generate`, `chat` and `completions` define the bytes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use hyper::Response;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{self, Instant},
};

use super::{
    chat, completions,
    config::{DISCONNECT_POLL, Role, STREAM_DISCONNECT_POLL},
    errors, experts,
    generate::{self, Object, Part, Times},
    messages_api,
    openai::Envelope,
    output::{Finish, Output, PromptLogprobs, prompt_logprobs},
    request::{Endpoint, Item, Request, new_id},
    response::{self, DONE, ResponseBody, SimResponse, StreamItem},
    responses_api::{self, Settings},
    state::{Phase, State, bump},
    transfer::{Failure, cancelled, pause, transfer},
    writer::{Pace, Writer},
};

/// Bound on events that wait for a client that reads slowly.
const QUEUED_EVENTS: usize = 64;

/// The connection is closed without a response, as when the real process crashes.
#[derive(Debug)]
pub(crate) struct ClosedWithoutResponse;

/// A request in progress.
pub(crate) struct Run {
    pub state: Arc<State>,
    pub request: Request,
    pub id: String,
    /// Whether the head of a stream has been sent.
    started: AtomicBool,
    pub out: mpsc::Sender<StreamItem>,
}

/// Starts a generation. Returns as soon as the head of its response can be sent.
pub(crate) async fn respond(
    state: &Arc<State>,
    request: Request,
) -> Result<Response<ResponseBody>, ClosedWithoutResponse> {
    let rids = request.items.iter().map(|item| (item.rid.as_str(), &item.cancel));
    let admission = match state.admit(rids) {
        Ok(admission) => admission,
        Err(rid) => return Ok(refuse(&request, &format!("Duplicate request ID detected: {rid}"))),
    };
    let (out, mut items) = mpsc::channel(QUEUED_EVENTS);
    let endpoint = request.endpoint;
    let at_once = request.stream && endpoint.streams_at_once();
    let run = Arc::new(Run {
        state: Arc::clone(state),
        id: new_id(),
        started: AtomicBool::new(at_once),
        request,
        out: out.clone(),
    });
    let task = Arc::clone(&run);
    state.spawn(async move {
        let last = task.run_until_client_lost().await;
        // The request id must be free before the client can see the end of the response.
        drop(admission);
        let _ = task.out.send(last).await;
    });
    drop((out, run));
    if at_once {
        return Ok(response::stream(endpoint, None, items));
    }
    match items.recv().await {
        Some(StreamItem::Whole(response)) => Ok(response.into_response()),
        Some(StreamItem::Frame(first)) => Ok(response::stream(endpoint, Some(first), items)),
        Some(StreamItem::End) | None => Err(ClosedWithoutResponse),
    }
}

/// The response to an invalid value that is found before anything runs.
pub(crate) fn refuse(request: &Request, message: &str) -> Response<ResponseBody> {
    let endpoint = request.endpoint;
    if request.stream && endpoint.streams_at_once() {
        return refused_stream(endpoint, request.settings.as_deref(), &request.model, message);
    }
    errors::value(endpoint, message).into_response()
}

/// The stream of a request with an invalid value, on the APIs that begin a stream before they look at it.
pub(crate) fn refused_stream(
    endpoint: Endpoint,
    settings: Option<&Settings>,
    model: &str,
    message: &str,
) -> Response<ResponseBody> {
    let mut frames = match (endpoint, settings) {
        (Endpoint::Messages, _) => messages_api::failed_stream(model, 400, message).to_vec(),
        (_, Some(settings)) => {
            let [created, in_progress] = settings.first_events();
            vec![created, in_progress, settings.failed_event(message)]
        }
        _ => vec![response::event(&generate::error_event(message)), DONE.into()],
    };
    let first = frames.remove(0);
    let (out, events) = mpsc::channel(frames.len() + 1);
    // The channel is new and has capacity for all.
    for item in frames.into_iter().map(StreamItem::Frame).chain([StreamItem::End]) {
        let _ = out.try_send(item);
    }
    response::stream(endpoint, Some(first), events)
}

impl Run {
    /// Runs the generation; aborts it when the client's disconnect is noticed.
    async fn run_until_client_lost(self: &Arc<Self>) -> StreamItem {
        let work = self.work();
        tokio::pin!(work);
        let lost = async {
            self.out.closed().await;
            let streams = self.started.load(Ordering::Relaxed);
            let poll = if streams { STREAM_DISCONNECT_POLL } else { DISCONNECT_POLL };
            time::sleep(self.state.config.scaled(poll)).await;
        };
        tokio::select! {
            biased;
            last = &mut work => return last,
            () = lost => {}
        }
        self.request.items.iter().for_each(|item| self.state.cancel(&item.cancel));
        work.await
    }

    async fn work(self: &Arc<Self>) -> StreamItem {
        let result = if self.request.stream { self.streamed().await } else { self.complete().await };
        let counters = &self.state.counters;
        bump(if result.is_ok() { &counters.completed } else { &counters.failed });
        match result {
            Ok(out) => out,
            Err(failure) => StreamItem::Whole(self.failure_response(&failure)),
        }
    }

    fn failure_response(&self, failure: &Failure) -> SimResponse {
        errors::failure(self.request.endpoint, failure.status, &failure.message)
    }

    pub(crate) fn role(&self) -> Role {
        self.state.config.role
    }

    pub(crate) fn envelope(&self) -> Envelope<'_> {
        let object = match (self.request.endpoint, self.request.stream) {
            (Endpoint::Chat, true) => "chat.completion.chunk",
            (Endpoint::Chat, false) => "chat.completion",
            _ => "text_completion",
        };
        let created = self.request.arrived_at as u64;
        Envelope { id: &self.id, object, created, model: &self.request.model }
    }

    /// Runs `each` for all items concurrently. Results are in the items' order.
    async fn for_items<T, F>(
        self: &Arc<Self>,
        each: impl Fn(Arc<Self>, usize) -> F,
    ) -> Result<Vec<T>, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        if self.request.items.len() == 1 {
            return Ok(vec![each(Arc::clone(self), 0).await?]);
        }
        let mut tasks = JoinSet::new();
        for at in 0..self.request.items.len() {
            let task = each(Arc::clone(self), at);
            tasks.spawn(async move { (at, task.await) });
        }
        let mut results = Vec::with_capacity(tasks.len());
        while let Some(Ok((at, result))) = tasks.join_next().await {
            results.push((at, result?));
        }
        results.sort_by_key(|(at, _)| *at);
        Ok(results.into_iter().map(|(_, result)| result).collect())
    }

    async fn complete(self: &Arc<Self>) -> Result<StreamItem, Failure> {
        let produced = self.for_items(|run, at| async move { run.produce(at).await }).await?;
        let body = match self.request.endpoint {
            Endpoint::Generate => self.whole_generate(&produced),
            endpoint => {
                let n = self.request.n;
                let outputs: Vec<Output> =
                    produced.into_iter().flat_map(|(output, _)| std::iter::repeat_n(output, n)).collect();
                self.whole_openai(endpoint, &outputs)
            }
        };
        Ok(StreamItem::Whole(SimResponse::json(body)))
    }

    fn whole_openai(&self, endpoint: Endpoint, outputs: &[Output]) -> Vec<u8> {
        match (endpoint, &self.request.settings) {
            (Endpoint::Messages, _) => messages_api::whole(self, &outputs[0]),
            (_, Some(settings)) => responses_api::whole(self, settings, &outputs[0]),
            (Endpoint::Chat, _) => chat::whole(&self.envelope(), &self.request, self.role(), outputs),
            _ => completions::whole(&self.envelope(), &self.request, self.role(), outputs),
        }
    }

    fn whole_generate(&self, produced: &[(Output, Times)]) -> Vec<u8> {
        let list = self.request.batch || self.request.n > 1;
        let mut out = Vec::new();
        if list {
            out.push(b'[');
        }
        for (item, (output, times)) in self.request.items.iter().zip(produced) {
            let prompt = prompt_logprobs(item, self.role());
            let object = Object {
                role: self.role(),
                item,
                omits_lists: self.state.config.rust_front_end,
                prompt: &prompt,
                times: *times,
                index: None,
            };
            for _ in 0..self.request.n {
                if out.len() > 1 {
                    out.push(b',');
                }
                object.write(&mut out, output, Part::Whole);
            }
        }
        if list {
            out.push(b']');
        }
        out
    }

    /// Produces the output of one item, after the time that its tokens take.
    async fn produce(&self, at: usize) -> Result<(Output, Times), Failure> {
        let item = &self.request.items[at];
        let hash = transfer(&self.state, item, self.request.n).await?;
        let mut times = Times::now(&self.request);
        let _phase = Phase::enter(&self.state.gauges.running);
        let config = &self.state.config;
        let output = all_tokens(hash, item, config.role, usize::MAX);
        if config.role == Role::Prefill {
            pause(config.prefill_response_delay).await;
            return Ok((output, times));
        }
        let tokens = u32::try_from(output.produced.saturating_sub(1)).unwrap_or(u32::MAX);
        let begin = Instant::now();
        let whole = config.first_token.saturating_add(config.inter_token.saturating_mul(tokens));
        tokio::select! {
            biased;
            () = pause(whole) => {}
            () = cancelled(item) => return Ok((self.partial(hash, item, begin.elapsed()), times)),
        }
        times.first_token = times.forwarded + config.first_token.as_secs_f64();
        Ok((output, times))
    }

    /// The part of an output that was produced before an abort.
    fn partial(&self, hash: u64, item: &Item, elapsed: Duration) -> Output {
        let config = &self.state.config;
        let tokens = match elapsed.checked_sub(config.first_token) {
            None => 0,
            Some(spoken) => 1 + (spoken.as_secs_f64() / config.inter_token.as_secs_f64().max(1e-9)) as usize,
        };
        let mut output = all_tokens(hash, item, config.role, tokens);
        output.finish = Some(aborted());
        output
    }

    async fn streamed(self: &Arc<Self>) -> Result<StreamItem, Failure> {
        if let Some(settings) = &self.request.settings {
            self.send_frames(settings.first_events()).await;
        }
        let produced = self.for_items(|run, at| async move { run.stream_item(at).await }).await?;
        if self.request.endpoint.names_events() {
            return Ok(StreamItem::End);
        }
        // One for the whole response.
        if self.request.endpoint != Endpoint::Generate
            && let Some((_, Some(rows))) = produced.first()
        {
            self.send_event(self.envelope().experts_event(rows)).await;
        }
        if self.request.usage && self.request.endpoint != Endpoint::Generate {
            let prompt = self.request.items.iter().map(|item| item.prompt.tokens).sum();
            self.send_event(
                self.envelope().usage_event(prompt, produced.iter().map(|(tokens, _)| tokens).sum()),
            )
            .await;
        }
        let _ = self.out.send(StreamItem::Frame(DONE.into())).await;
        Ok(StreamItem::End)
    }

    pub(crate) async fn send_event(&self, payload: Vec<u8>) {
        self.started.store(true, Ordering::Relaxed);
        // A disconnect is noticed later, by the poll.
        let _ = self.out.send(StreamItem::Frame(response::event(&payload))).await;
    }

    /// Sends events that are complete, with their names.
    pub(crate) async fn send_frames(&self, frames: impl IntoIterator<Item = Bytes>) {
        for frame in frames {
            let _ = self.out.send(StreamItem::Frame(frame)).await;
        }
    }

    /// Streams one item; returns the number of tokens, and its rows of experts.
    async fn stream_item(&self, at: usize) -> Result<(usize, Option<String>), Failure> {
        let item = &self.request.items[at];
        let hash = match transfer(&self.state, item, self.request.n).await {
            Ok(hash) => hash,
            Err(failure) => return self.stream_failure(at, failure).await.map(|tokens| (tokens, None)),
        };
        let times = Times::now(&self.request);
        let _phase = Phase::enter(&self.state.gauges.running);
        if self.role() == Role::Prefill {
            pause(self.state.config.prefill_response_delay).await;
        }
        let mut samples = Vec::new();
        samples.resize_with(self.request.n, || Output::new(hash));
        let mut writer = Writer::new(self, at, item, times);
        writer.begin().await;
        let mut pace = Pace::new(self);
        let mut done = self.role() != Role::Prefill && item.sampling.max_new == 0;
        if done {
            writer.nothing(&mut samples).await;
        }
        while !done {
            let alive = pace.next(item).await;
            for (sample, output) in samples.iter_mut().enumerate() {
                writer.step(sample, output, alive).await;
                done = output.finish.is_some();
            }
        }
        let rows = samples.first().and_then(|output| experts::rows(item, self.role(), output));
        Ok((samples.iter().map(|output| output.produced).sum(), rows))
    }

    /// The end of a stream with names that fails before its first token.
    fn failed_frames(&self, failure: &Failure) -> Vec<Bytes> {
        match &self.request.settings {
            Some(settings) if failure.status == 400 => vec![settings.failed_event(&failure.message)],
            // The text of the web framework's exception.
            Some(settings) => {
                vec![settings.failed_event(&format!("{}: {}", failure.status, failure.message))]
            }
            None => {
                let model = &self.request.model;
                messages_api::failed_stream(model, failure.status, &failure.message).to_vec()
            }
        }
    }

    async fn stream_failure(&self, at: usize, failure: Failure) -> Result<usize, Failure> {
        if self.request.endpoint.names_events() {
            self.send_frames(self.failed_frames(&failure)).await;
            bump(&self.state.counters.failed);
            return Ok(0);
        }
        if self.request.endpoint != Endpoint::Generate {
            if !self.started.load(Ordering::Relaxed) {
                return Err(failure);
            }
            let response = self.failure_response(&failure);
            self.send_event([b"{\"error\":", &response.body[..], b"}"].concat()).await;
            return Ok(0);
        }
        let object = Object {
            role: self.role(),
            item: &self.request.items[at],
            omits_lists: false,
            prompt: &PromptLogprobs::default(),
            times: Times::now(&self.request),
            index: self.request.batch.then_some(at),
        };
        bump(&self.state.counters.failed);
        self.send_event(generate::failed(&object, &failure)).await;
        Ok(0)
    }
}

/// The finish reason of a generation that is aborted after its transfer.
pub(crate) fn aborted() -> Finish {
    Finish::Abort { message: "Aborted".to_owned(), status: None }
}

/// All tokens of an output, at most `limit`.
fn all_tokens(hash: u64, item: &Item, role: Role, limit: usize) -> Output {
    let mut output = Output::new(hash);
    if role != Role::Prefill && item.sampling.max_new == 0 {
        output.finish = Some(Finish::Length(0));
    }
    while output.finish.is_none() && output.produced < limit {
        output.push(item, role);
    }
    output
}

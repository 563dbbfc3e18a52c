//! The model's servers on loopback, in scaled time.
//!
//! All run on the caller's runtime and share its thread: what they do is to wait. A prefill server answers
//! when the model says that the KV cache is on decode, a decode server writes its first event with the first
//! token and the rest of the response at its end. Errors of a request are not simulated, but for those of a
//! server that stops; `sim` does that.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::super::model::{DecodeServer, PrefillServer, Prefilled};
use super::super::report::{Outcome, ServerLoad};
use super::super::simulation::{Fleet, Scenario};
use super::port::{Had, Port, Stop, stopped};
use super::text::{Received, read};
use crate::sim::Role;

/// A lock whose holder cannot panic in between.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The model's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    start: Instant,
    speed: f64,
}

impl Clock {
    /// A clock that starts now and goes `speed` times as fast as ours.
    pub(super) fn new(speed: f64) -> Self {
        Self { start: Instant::now(), speed }
    }

    /// Seconds of the model since the start.
    pub(super) fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * self.speed
    }

    /// The model's seconds in `seconds` of ours.
    pub(super) fn models(&self, seconds: f64) -> f64 {
        seconds * self.speed
    }

    /// Waits until the model's clock shows `at`.
    pub(super) async fn until(&self, at: f64) {
        sleep_until(self.start + Duration::from_secs_f64((at / self.speed).max(0.0))).await;
    }
}

/// What prefill tells decode of a request.
#[derive(Clone, Copy)]
struct Handover {
    transferred: f64,
    input: u64,
    /// The prefill server, and how often it had restarted.
    server: usize,
    epoch: u32,
}

/// Seconds until decode gives up on a prefill server that is gone: two heartbeats of SGLang.
const LOST_AFTER: f64 = 10.0;

/// A request that a prefill server took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// Its number in the trace.
    pub(super) index: usize,
    pub(super) server: usize,
    pub(super) at: f64,
    pub(super) input: u64,
    pub(super) cached: u64,
}

/// The first of the two servers that a room's request reached.
enum Waiting {
    Prefill(Handover),
    Decode(oneshot::Sender<Handover>),
}

/// A decode server's batch, and who waits for the end of which request.
struct Batch {
    server: DecodeServer,
    ends: HashMap<usize, oneshot::Sender<()>>,
    next: usize,
}

struct Decode {
    batch: Mutex<Batch>,
    changed: Notify,
}

pub(super) struct Shared {
    fleet: Fleet,
    clock: Clock,
    /// Whether `/v1/loads` is answered.
    loads: bool,
    prefill: Vec<Mutex<PrefillServer>>,
    decode: Vec<Decode>,
    rooms: Mutex<HashMap<u64, Waiting>>,
    taken: Mutex<Vec<Taken>>,
}

/// Running servers. Dropping them stops them.
pub(super) struct Servers {
    shared: Arc<Shared>,
    prefill: Vec<Port>,
    decode: Vec<Port>,
    /// Whether the first prefill server is one that a router is not told of at its start.
    first_joins: bool,
    _tasks: JoinSet<()>,
}

impl Servers {
    /// Listens on free ports of loopback.
    pub(super) async fn start(fleet: Fleet, clock: Clock, loads: bool) -> io::Result<Self> {
        let batch = || Batch { server: DecodeServer::new(fleet.model), ends: HashMap::new(), next: 0 };
        let decode = || Decode { batch: Mutex::new(batch()), changed: Notify::new() };
        let shared = Arc::new(Shared {
            fleet,
            clock,
            loads,
            prefill: fleet.prefill_servers().into_iter().map(Mutex::new).collect(),
            decode: (0..fleet.decode).map(|_| decode()).collect(),
            rooms: Mutex::default(),
            taken: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for index in 0..fleet.prefill {
            prefill.push(Port::open(shared.clone(), Role::Prefill, index)?);
        }
        for index in 0..fleet.decode {
            decode.push(Port::open(shared.clone(), Role::Decode, index)?);
            tasks.spawn(finish_requests(shared.clone(), index));
        }
        let first_joins = fleet.scenario == Scenario::Join;
        let mut servers = Self { shared, prefill, decode, first_joins, _tasks: tasks };
        if first_joins {
            servers.stop_first(Stop::Close).await?;
        }
        Ok(servers)
    }

    /// The prefill servers that a router is told of at its start.
    pub(super) fn prefill(&self) -> impl Iterator<Item = SocketAddr> {
        self.prefill.iter().skip(usize::from(self.first_joins)).map(|port| port.address)
    }

    /// The decode servers.
    pub(super) fn decode(&self) -> impl Iterator<Item = SocketAddr> {
        self.decode.iter().map(|port| port.address)
    }

    /// How many times as fast as ours their clock goes.
    pub(super) fn speed(&self) -> f64 {
        self.shared.clock.models(1.0)
    }

    /// Seconds of work that the first prefill server has.
    pub(super) fn first_has(&self) -> f64 {
        lock(&self.shared.prefill[0]).wait(self.shared.clock.now())
    }

    /// Stops the first prefill server, which loses its cache. Returns what it had not answered, and when it
    /// stopped.
    pub(super) async fn stop_first(&mut self, how: Stop) -> io::Result<(Vec<Had>, f64)> {
        // Whatever was transferred before this instant is on decode, and nothing else.
        let now = self.shared.clock.now();
        lock(&self.shared.prefill[0]).stop(now);
        Ok((self.prefill[0].close(how).await?, now))
    }

    /// Starts it again, with the same address. Returns its address.
    pub(super) fn start_first(&mut self) -> io::Result<SocketAddr> {
        lock(&self.shared.prefill[0]).up = true;
        self.prefill[0].open_again(self.shared.clone())?;
        Ok(self.prefill[0].address)
    }

    /// All requests that prefill servers took since `start`, in the order of their time since then.
    pub(super) fn taken(&self, start: f64) -> Vec<Taken> {
        let taken = lock(&self.shared.taken);
        let since = taken.iter().filter(|taken| taken.at >= start);
        since.map(|taken| Taken { at: taken.at - start, ..*taken }).collect()
    }

    /// What the servers have counted of requests of the trace, which started at `start`, as an outcome
    /// without times.
    pub(super) fn counts(&self, start: f64) -> Outcome {
        let (mut prefill, mut queues) = (Vec::new(), Vec::new());
        for server in &self.shared.prefill {
            let server = lock(server);
            prefill.push(ServerLoad { requests: server.requests, busy: server.busy });
            let queue = server.queue.iter().map(|(changed, empty)| (changed - start, empty - start));
            queues.push(queue.collect());
        }
        let decode = self.shared.decode.iter().map(|decode| lock(&decode.batch).server.requests);
        // A router's own probe has no number.
        let taken = lock(&self.shared.taken);
        let taken = taken.iter().filter(|taken| taken.index != usize::MAX);
        let tokens = taken.map(|taken| (taken.input, taken.cached));
        let (prompt_tokens, cached_tokens) = tokens.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        Outcome {
            prompt_tokens,
            cached_tokens,
            prefill,
            queues,
            decode_requests: decode.collect(),
            ..Outcome::default()
        }
    }
}

/// What a connection has not answered.
pub(super) type Unanswered = Arc<Mutex<Option<Had>>>;

/// Serves a connection until its peer closes it, or the server stops. Returns what it had not answered.
pub(super) async fn serve(
    stream: TcpStream,
    shared: Arc<Shared>,
    role: Role,
    index: usize,
    mut stop: watch::Receiver<Option<Stop>>,
) -> Option<Had> {
    let _ = stream.set_nodelay(true);
    let unanswered = Unanswered::default();
    let service = service_fn(|request| respond(request, shared.clone(), role, index, unanswered.clone()));
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let how = tokio::select! {
        biased;
        how = stopped(&mut stop) => how,
        // An error is a router that has closed the connection.
        _ = &mut connection => return None,
    };
    // Before its response is dropped, which is an answer otherwise.
    let had = lock(&unanswered).take();
    let parts = connection.into_parts();
    let had = had.or((!parts.read_buf.is_empty()).then_some(Had::Unread));
    // Not the runtime's stream, which looks at the socket only when it was told that something has arrived.
    let stream = parts.io.into_inner().into_std().ok()?;
    had.or(stop_stream(&stream, how))
}

/// Prepares a connection to be closed. Returns whether something has arrived that nobody has read.
pub(super) fn stop_stream(stream: &std::net::TcpStream, how: Stop) -> Option<Had> {
    let arrived = matches!(stream.peek(&mut [0]), Ok(1..));
    if how == Stop::Reset {
        let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }
    arrived.then_some(Had::Unread)
}

/// A response whose pieces come over a channel.
struct Pieces(mpsc::UnboundedReceiver<Bytes>, Unanswered);

impl Drop for Pieces {
    fn drop(&mut self) {
        lock(&self.1).take();
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

async fn respond(
    request: hyper::Request<Incoming>,
    shared: Arc<Shared>,
    role: Role,
    index: usize,
    unanswered: Unanswered,
) -> Result<Response<Pieces>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let is_chat = path.contains("chat");
    let (pieces, body) = mpsc::unbounded_channel();
    let mut response = Response::new(Pieces(body, unanswered.clone()));
    if request.method() != Method::POST {
        let json = information(&shared, role, index, &path);
        *response.status_mut() = if json.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
        let _ = pieces.send(json.unwrap_or_default().into());
        return Ok(response);
    }
    *lock(&unanswered) = Some(Had::Unread);
    let body = request.into_body().collect().await?.to_bytes();
    let Some(received) = read(&body) else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(response);
    };
    drop(body);
    *lock(&unanswered) = Some(Had::Request(received.index));
    let first = match role {
        Role::Prefill => {
            let Some(prefilled) = prefill(&shared, index, &received) else {
                // Its connection is about to end.
                return std::future::pending().await;
            };
            shared.clock.until(prefilled.transferred).await;
            let last = [usage(&received, 1, prefilled.cached), DONE.to_owned()].concat();
            let _ = pieces.send((event(is_chat, "x") + &last).into());
            None
        }
        Role::Decode | Role::Regular | Role::Encoder => {
            match decode(shared.clone(), index, &received).await {
                Some(first) => Some(first),
                None => {
                    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    let _ = pieces.send(LOST.into());
                    return Ok(response);
                }
            }
        }
    };
    if let Some((first_token, end)) = first {
        shared.clock.until(first_token).await;
        let _ = pieces.send(event(is_chat, "x").into());
        tokio::spawn(async move {
            let _ = end.await;
            let rest = event(is_chat, &"x".repeat(received.request.output as usize - 1));
            let _ = pieces.send((rest + &usage(&received, received.request.output, 0) + DONE).into());
        });
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, "text/event-stream; charset=utf-8".parse().expect("a header value"));
    Ok(response)
}

/// Puts the request into the queue, and tells decode. `None` if the server has just stopped.
fn prefill(shared: &Shared, index: usize, received: &Received) -> Option<Prefilled> {
    let noise = shared.fleet.noise(received.index);
    let at = shared.clock.now();
    let (prefilled, epoch) = {
        let mut server = lock(&shared.prefill[index]);
        if !server.up {
            return None;
        }
        (server.arrive(at, &received.request, noise), server.epoch)
    };
    let (input, transferred, cached) = (received.request.input, prefilled.transferred, prefilled.cached);
    let handover = Handover { transferred, input, server: index, epoch };
    lock(&shared.taken).push(Taken { index: received.index, server: index, at, input, cached });
    if let Some(room) = received.room {
        let mut rooms = lock(&shared.rooms);
        match rooms.remove(&room) {
            Some(Waiting::Decode(waiting)) => drop(waiting.send(handover)),
            _ => drop(rooms.insert(room, Waiting::Prefill(handover))),
        }
    }
    Some(prefilled)
}

/// Waits for prefill, and joins the batch. Returns when the first token comes, and what tells of the end, or
/// `None` if prefill has stopped before it had sent the KV cache.
async fn decode(
    shared: Arc<Shared>,
    index: usize,
    received: &Received,
) -> Option<(f64, oneshot::Receiver<()>)> {
    if let Some(handover) = handover(&shared, received.room).await {
        debug_assert_eq!(handover.input, received.request.input);
        shared.clock.until(handover.transferred).await;
        if shared.is_lost(handover) {
            shared.clock.until(shared.clock.now() + LOST_AFTER).await;
            return None;
        }
    }
    let Decode { batch, changed } = &shared.decode[index];
    let (ended, end) = oneshot::channel();
    let first_token = {
        let mut batch = lock(batch);
        let id = batch.next;
        batch.next += 1;
        batch.ends.insert(id, ended);
        batch.server.join(shared.clock.now(), id, received.request.input, received.request.output)
    };
    changed.notify_one();
    Some((first_token, end))
}

impl Shared {
    /// Whether the prefill server has stopped before `transferred`.
    fn is_lost(&self, handover: Handover) -> bool {
        let server = lock(&self.prefill[handover.server]);
        server.epoch != handover.epoch && server.stopped_at < handover.transferred
    }
}

async fn handover(shared: &Shared, room: Option<u64>) -> Option<Handover> {
    let room = room?;
    let waiting = {
        let mut rooms = lock(&shared.rooms);
        match rooms.remove(&room) {
            Some(Waiting::Prefill(handover)) => return Some(handover),
            _ => {
                let (sender, receiver) = oneshot::channel();
                rooms.insert(room, Waiting::Decode(sender));
                receiver
            }
        }
    };
    waiting.await.ok()
}

/// Ends the requests of a decode server when their time has come.
async fn finish_requests(shared: Arc<Shared>, index: usize) {
    let Decode { batch, changed } = &shared.decode[index];
    loop {
        let next = lock(batch).server.next_end();
        let until = async {
            match next {
                Some(next) => shared.clock.until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = changed.notified() => continue,
            () = until => {}
        }
        let mut batch = lock(batch);
        // Timers are up to a millisecond late, in which more than one may have ended.
        let now = shared.clock.now();
        while let Some(end) = batch.server.next_end().filter(|end| *end <= now) {
            let id = batch.server.end(end);
            if let Some(ended) = id.and_then(|id| batch.ends.remove(&id)) {
                let _ = ended.send(());
            }
        }
    }
}

/// What SGLang's decode says then.
const LOST: &str = r#"{"object":"error","message":"Decode transfer failed: lost connection with prefill instance","type":"Internal Server Error","param":null,"code":500}"#;
const DONE: &str = "data: [DONE]\n\n";

fn event(is_chat: bool, text: &str) -> String {
    let (object, choice) = if is_chat {
        ("chat.completion.chunk", format!(r#""delta":{{"role":"assistant","content":"{text}"}}"#))
    } else {
        ("text_completion", format!(r#""text":"{text}""#))
    };
    format!(
        "data: {{\"id\":\"lab\",\"object\":\"{object}\",\"created\":1,\"model\":\"lab\",\"choices\":[{{\"index\":0,{choice},\"finish_reason\":null}}]}}\n\n"
    )
}

/// The last event, as with `--enable-cache-report`.
fn usage(received: &Received, output: u64, cached: u64) -> String {
    let input = received.request.input;
    let total = input + output;
    format!(
        "data: {{\"id\":\"lab\",\"object\":\"usage\",\"created\":1,\"model\":\"lab\",\"choices\":[],\"usage\":{{\"prompt_tokens\":{input},\"total_tokens\":{total},\"completion_tokens\":{output},\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}}}\n\n"
    )
}

/// What routers ask a server before they send it a request.
fn information(shared: &Shared, role: Role, index: usize, path: &str) -> Option<String> {
    let (name, tokens) = (role.name(), shared.fleet.model.cache_tokens);
    Some(match path {
        "/health" | "/health_generate" => String::new(),
        "/v1/models" => {
            r#"{"object":"list","data":[{"id":"lab","object":"model","created":1,"owned_by":"sglang","root":"lab"}]}"#
                .to_owned()
        }
        "/get_server_info" | "/server_info" | "/get_model_info" | "/model_info" => format!(
            r#"{{"model_path":"lab","tokenizer_path":"lab","served_model_name":"lab","is_generation":true,"disaggregation_mode":"{name}","dp_size":1,"tp_size":1,"version":"0.5.10","disable_radix_cache":false,"enable_cache_report":true,"page_size":1,"max_total_num_tokens":{tokens}}}"#
        ),
        "/v1/loads" if shared.loads => loads(shared, role, index),
        // `/get_load` among them, as of SGLang 0.5.21.
        _ => return None,
    })
}

/// What a server says of its load, as SGLang 0.5.23 does: with `num_waiting_uncached_tokens`, from which
/// routers compute queues.
fn loads(shared: &Shared, role: Role, index: usize) -> String {
    let now = shared.clock.now();
    let model = shared.fleet.model;
    let (running, waiting, tokens, used) = if role == Role::Prefill {
        let server = lock(&shared.prefill[index]);
        // All but the one that is computed wait, and a prompt's tokens take about the same time each.
        let unfinished = server.queue.iter().rev().take_while(|(_, finish)| *finish > now).count() as u64;
        let tokens = (server.wait(now) * server.speed() * model.prefill_rate) as u64;
        (unfinished.min(1), unfinished.saturating_sub(1), tokens, 0)
    } else {
        let batch = lock(&shared.decode[index].batch);
        (batch.server.batch() as u64, 0, 0, batch.server.kv_tokens() as u64)
    };
    let usage = used as f64 / model.cache_tokens as f64;
    let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let (mode, capacity) = (role.name(), model.cache_tokens);
    format!(
        r#"{{"timestamp":"2026-01-01T00:00:00.000000+00:00","version":"0.5.23","accelerator":null,"num_accelerators":1,"loads":[{{"timestamp":{timestamp},"dp_rank":0,"num_running_reqs":{running},"num_waiting_reqs":{waiting},"num_waiting_uncached_tokens":{tokens},"num_used_tokens":{used},"num_total_tokens":{used},"max_total_num_tokens":{capacity},"max_running_requests":4096,"token_usage":{usage:.4},"gen_throughput":0.0,"cache_hit_rate":0.0,"utilization":0.0,"disaggregation":{{"mode":"{mode}","prefill_bootstrap_queue_reqs":0,"prefill_inflight_queue_reqs":0,"decode_prealloc_queue_reqs":0,"decode_transfer_queue_reqs":0,"decode_retracted_queue_reqs":0}}}}]}}"#
    )
}

//! The model's servers on loopback, in scaled time.
//!
//! All run on the caller's runtime and share its thread: what they do is to wait. A prefill server answers
//! when the model says that the KV cache is on decode, a decode server writes its first event with the first
//! token and the rest of the response at its end. Errors of a request are not simulated; `sim` does that.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::super::model::{DecodeServer, PrefillServer, Prefilled};
use super::super::report::{Outcome, ServerLoad};
use super::super::simulation::Fleet;
use super::text::{Received, read};
use crate::sim::Role;

/// A lock whose holder cannot panic in between.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

struct Shared {
    fleet: Fleet,
    clock: Clock,
    prefill: Vec<Mutex<PrefillServer>>,
    decode: Vec<Decode>,
    rooms: Mutex<HashMap<u64, Waiting>>,
    /// Tokens of all prompts, and those that were cached.
    tokens: Mutex<(u64, u64)>,
}

/// Running servers. Dropping them stops them.
pub(super) struct Servers {
    shared: Arc<Shared>,
    /// The addresses of the prefill servers.
    pub(super) prefill: Vec<SocketAddr>,
    /// The addresses of the decode servers.
    pub(super) decode: Vec<SocketAddr>,
    _tasks: JoinSet<()>,
}

impl Servers {
    /// Listens on free ports of loopback.
    pub(super) async fn start(fleet: Fleet, clock: Clock) -> io::Result<Self> {
        let batch = || Batch { server: DecodeServer::new(fleet.model), ends: HashMap::new(), next: 0 };
        let decode = || Decode { batch: Mutex::new(batch()), changed: Notify::new() };
        let shared = Arc::new(Shared {
            fleet,
            clock,
            prefill: fleet.prefill_servers().into_iter().map(Mutex::new).collect(),
            decode: (0..fleet.decode).map(|_| decode()).collect(),
            rooms: Mutex::default(),
            tokens: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for (role, count, addresses) in
            [(Role::Prefill, fleet.prefill, &mut prefill), (Role::Decode, fleet.decode, &mut decode)]
        {
            for index in 0..count {
                let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
                addresses.push(listener.local_addr()?);
                tasks.spawn(accept(listener, shared.clone(), role, index));
                if role == Role::Decode {
                    tasks.spawn(finish_requests(shared.clone(), index));
                }
            }
        }
        Ok(Self { shared, prefill, decode, _tasks: tasks })
    }

    /// What the servers have counted, as an outcome without times.
    pub(super) fn counts(&self) -> Outcome {
        let prefill = self.shared.prefill.iter().map(|server| {
            let server = lock(server);
            ServerLoad { requests: server.requests, busy: server.busy }
        });
        let decode = self.shared.decode.iter().map(|decode| lock(&decode.batch).server.requests);
        let (prompt_tokens, cached_tokens) = *lock(&self.shared.tokens);
        Outcome {
            prompt_tokens,
            cached_tokens,
            prefill: prefill.collect(),
            decode_requests: decode.collect(),
            ..Outcome::default()
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, role: Role, index: usize) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(connections.spawn(serve(stream, shared.clone(), role, index))),
            // Out of descriptors: connections that close free some.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>, role: Role, index: usize) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| respond(request, shared.clone(), role, index));
    // An error is a router that has closed the connection.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// A response whose pieces come over a channel.
struct Pieces(mpsc::UnboundedReceiver<Bytes>);

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
) -> Result<Response<Pieces>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let is_chat = path.contains("chat");
    let (pieces, body) = mpsc::unbounded_channel();
    let mut response = Response::new(Pieces(body));
    if request.method() != Method::POST {
        let json = information(&shared, role, &path);
        *response.status_mut() = if json.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
        let _ = pieces.send(json.unwrap_or_default().into());
        return Ok(response);
    }
    let body = request.into_body().collect().await?.to_bytes();
    let Some(received) = read(&body) else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(response);
    };
    drop(body);
    let first = match role {
        Role::Prefill => {
            let prefilled = prefill(&shared, index, &received);
            shared.clock.until(prefilled.transferred).await;
            let last = [usage(&received, 1, prefilled.cached), DONE.to_owned()].concat();
            let _ = pieces.send((event(is_chat, "x") + &last).into());
            None
        }
        Role::Decode | Role::Regular => Some(decode(shared.clone(), index, &received).await),
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

/// Puts the request into the queue, and tells decode.
fn prefill(shared: &Shared, index: usize, received: &Received) -> Prefilled {
    let noise = shared.fleet.noise(received.index);
    let prefilled = lock(&shared.prefill[index]).arrive(shared.clock.now(), &received.request, noise);
    let handover = Handover { transferred: prefilled.transferred, input: received.request.input };
    let mut tokens = lock(&shared.tokens);
    *tokens = (tokens.0 + received.request.input, tokens.1 + prefilled.cached);
    if let Some(room) = received.room {
        let mut rooms = lock(&shared.rooms);
        match rooms.remove(&room) {
            Some(Waiting::Decode(waiting)) => drop(waiting.send(handover)),
            _ => drop(rooms.insert(room, Waiting::Prefill(handover))),
        }
    }
    prefilled
}

/// Waits for prefill, and joins the batch. Returns when the first token comes, and what tells of the end.
async fn decode(shared: Arc<Shared>, index: usize, received: &Received) -> (f64, oneshot::Receiver<()>) {
    if let Some(handover) = handover(&shared, received.room).await {
        debug_assert_eq!(handover.input, received.request.input);
        shared.clock.until(handover.transferred).await;
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
    (first_token, end)
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
fn information(shared: &Shared, role: Role, path: &str) -> Option<String> {
    let (role, tokens) = (role.name(), shared.fleet.model.cache_tokens);
    Some(match path {
        "/health" | "/health_generate" => String::new(),
        "/v1/models" => {
            r#"{"object":"list","data":[{"id":"lab","object":"model","created":1,"owned_by":"sglang","root":"lab"}]}"#
                .to_owned()
        }
        "/get_server_info" | "/server_info" | "/get_model_info" | "/model_info" => format!(
            r#"{{"model_path":"lab","tokenizer_path":"lab","served_model_name":"lab","is_generation":true,"disaggregation_mode":"{role}","dp_size":1,"tp_size":1,"version":"0.5.10","disable_radix_cache":false,"enable_cache_report":true,"page_size":1,"max_total_num_tokens":{tokens}}}"#
        ),
        // `/get_load` among them, as of SGLang 0.5.21.
        _ => return None,
    })
}

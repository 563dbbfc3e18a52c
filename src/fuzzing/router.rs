//! The router over connections in memory, with a clock that jumps: a client that
//! sends anything, and two servers that answer anything, in any pieces.
//!
//! hyper's own server stands in for the `server` module, which wants sockets.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::{sleep, timeout};

use super::http::{Answer, answers};
use super::{DIALECTS, Input, cut_at_most, splice_stream};
use crate::proxy::{Limits, Proxy, Relay};
use crate::upstream::{Address, Fleet, HealthOptions, Pools, PrefillSpec, Random, Role, SocketOptions};
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{Dialect, Inspector};

/// What a connection holds that nobody has read.
const BUFFER: usize = 4 << 10;
/// Pieces of what one side sends: each wakes everybody.
const MAX_PIECES: usize = 40;
/// Longer than anything may take.
const FOREVER: Duration = Duration::from_secs(3_600);
/// How long a patient client waits for all answers before it says that it is done: longer than all limits.
const PATIENCE: Duration = Duration::from_secs(120);

/// Any request and any answers: the router comes to an end, writes nothing but answers, no more than there were
/// requests, and none looks complete that is not what decode has sent. The text is the client's, prefill's and
/// decode's.
pub fn router(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    fastrand::seed(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(Scene::new(&input).play());
}

/// What a server does on each of its connections.
#[derive(Clone)]
struct Script {
    /// Its answer to any request.
    answer: Arc<[u8]>,
    cuts: u8,
    /// Between two pieces of the answer.
    pause: Duration,
    /// It closes the connection behind its answer.
    closes: bool,
    /// Nobody listens.
    absent: bool,
}

impl Script {
    fn new(answer: &[u8], cuts: u8, options: u8) -> Self {
        // None, within and beyond the wait for a stream's first event, and beyond its silence.
        let pause = [0, 10, 150, 7_000][usize::from(options) % 4];
        Self {
            answer: answer.into(),
            cuts,
            pause: Duration::from_millis(pause),
            closes: options & 4 != 0,
            absent: options & 8 != 0 && options & 4 != 0,
        }
    }

    /// The same without pauses and cuts.
    fn at_once(&self) -> Self {
        Self { cuts: 0, pause: Duration::ZERO, ..self.clone() }
    }

    /// A connection to a server that plays this.
    fn connect(&self) -> io::Result<DuplexStream> {
        if self.absent {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = duplex(BUFFER);
        tokio::spawn(self.clone().play(theirs));
        Ok(ours)
    }

    async fn play(self, mut socket: DuplexStream) {
        while read_request(&mut socket).await.is_some() {
            for piece in cut_at_most(MAX_PIECES, &self.answer, self.cuts) {
                if socket.write_all(piece).await.is_err() {
                    return;
                }
                if !self.pause.is_zero() {
                    sleep(self.pause).await;
                }
            }
            if self.closes {
                return;
            }
        }
    }

    /// What hyper makes of the answer when it comes at once: the whole body of a 200.
    async fn reference(&self) -> Option<Bytes> {
        let io = TokioIo::new(self.at_once().connect().ok()?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        tokio::spawn(connection);
        let request = Request::post("/").body(Full::new(Bytes::from_static(b"{}"))).ok()?;
        let answer = timeout(PATIENCE, sender.send_request(request)).await.ok()?.ok()?;
        if answer.status() != 200 {
            return None;
        }
        let body = timeout(PATIENCE, answer.into_body().collect()).await.ok()?.ok()?;
        Some(body.to_bytes())
    }
}

/// Reads one request, which the router wrote: a head with a length, and the body.
async fn read_request(socket: &mut DuplexStream) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.ok()?);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    socket.read_exact(&mut body).await.ok()?;
    Some(())
}

/// What a client does when it has sent its requests.
#[derive(Clone, Copy, PartialEq)]
enum Client {
    /// Waits for all answers.
    Waits,
    /// Says at once that nothing more comes.
    ClosesItsHalf,
    /// Is gone with the first byte of an answer.
    Leaves,
}

struct Scene {
    requests: Vec<u8>,
    cuts: u8,
    client: Client,
    /// What a request that is surely one asks for.
    valid: Option<Option<Merge>>,
    prefill: Script,
    decode: Script,
}

impl Scene {
    fn new(input: &Input<'_>) -> Self {
        let [kind, cuts, prefill_options, decode_options] = input.options;
        let [text, prefill, decode] = input.parts();
        let dialect = DIALECTS[usize::from(kind) % DIALECTS.len()];
        let raw = kind & 0x80 != 0;
        let twice = if kind & 0x40 != 0 { 2 } else { 1 };
        Self {
            requests: if raw { text.to_vec() } else { request(dialect, text).repeat(twice) },
            cuts,
            client: [Client::Waits, Client::Waits, Client::ClosesItsHalf, Client::Leaves]
                [usize::from(kind >> 4) % 4],
            valid: if raw { None } else { merge_of(dialect, text) },
            prefill: Script::new(prefill, cuts.rotate_left(2), prefill_options),
            decode: Script::new(decode, cuts.rotate_left(4), decode_options),
        }
    }

    async fn play(self) {
        let asked = Arc::new(AtomicUsize::new(0));
        let (client, socket) = duplex(BUFFER);
        let connection = serve(self.proxy(), socket, Arc::clone(&asked));
        let (_, got) = timeout(FOREVER, async { tokio::join!(connection, self.converse(client)) })
            .await
            .expect("everything ends");
        if self.client == Client::Leaves {
            return;
        }
        let answers = answers(&got);
        // One more: hyper's word on something that it does not take for a request.
        assert!(answers.len() <= asked.load(Ordering::Relaxed) + 1, "more answers than requests");
        if self.client == Client::Waits && self.valid.is_some() {
            assert!(!answers.is_empty(), "no answer: {}", got.escape_ascii());
        }
        self.check(&answers).await;
    }

    fn proxy(&self) -> Proxy {
        let address = |url| Address::parse(url).expect("a URL");
        let prefill = PrefillSpec {
            address: address("http://prefill:1"),
            bootstrap_host: "prefill".into(),
            bootstrap_port: Some(8998),
        };
        let policies = (Arc::new(Random), Arc::new(Random));
        // Servers that fail are tried all the same: there are no others.
        let health = HealthOptions {
            enabled: true,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            failure_threshold: 1,
            success_threshold: 1,
        };
        let decode = vec![address("http://decode:2")];
        let fleet = Fleet::new(vec![prefill], decode, policies.0, policies.1, &health);
        let options = SocketOptions {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(4),
            max_idle: 2,
            buffer_size: None,
        };
        let (prefill, decode) = (self.prefill.clone(), self.decode.clone());
        let connect = move |server: &crate::upstream::Backend| match server.role() {
            Role::Prefill => prefill.connect(),
            Role::Decode => decode.connect(),
        };
        let pools = Pools::in_memory(2, &options, Box::new(connect));
        let limits = Limits {
            max_payload_size: 16 << 10,
            max_merge_size: 16 << 10,
            body_idle_timeout: Duration::from_secs(20),
            request_timeout: Duration::from_secs(30),
            stream_idle_timeout: Duration::from_secs(5),
            max_retries: 1,
            retry_on: vec![503],
        };
        Proxy::new(Arc::new(fleet), Arc::new(pools), limits)
    }

    /// Sends the requests and returns all that comes back.
    async fn converse(&self, socket: DuplexStream) -> Vec<u8> {
        let (mut reader, mut writer) = tokio::io::split(socket);
        let write = async {
            for piece in cut_at_most(MAX_PIECES, &self.requests, self.cuts) {
                if writer.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            if self.client == Client::Waits {
                sleep(PATIENCE).await;
            }
            let _ = writer.shutdown().await;
        };
        let mut got = Vec::new();
        if self.client == Client::Leaves {
            tokio::select! { _ = reader.read_u8() => {}, () = async { write.await; sleep(PATIENCE).await } => {} }
        } else {
            let _ = tokio::join!(write, reader.read_to_end(&mut got));
        }
        got
    }

    /// The first answer, if it is a complete 200: it is decode's, with prefill's lists if they were asked for. A
    /// later one may be something that a server said too much.
    async fn check(&self, answers: &[Answer]) {
        let Some(Answer { status: 200, body: Some(body) }) = answers.first() else { return };
        let decode = self.decode.reference().await;
        let decode = decode.expect("a complete answer is made of a complete answer");
        let prefill = self.prefill.reference().await;
        let merges =
            self.valid.map_or(vec![None, Some(Merge::Generate), Some(Merge::Echo)], |merge| vec![merge]);
        let expected = |merge: Option<Merge>| match merge {
            None => vec![decode.clone()],
            Some(merge) => merged(merge, prefill.as_ref(), &decode),
        };
        let is_expected = merges.into_iter().flat_map(expected).any(|expected| expected == body);
        assert!(is_expected, "{} is not {}", body.escape_ascii(), decode.escape_ascii());
    }
}

/// What a merge may make, of a stream or of a whole answer.
fn merged(merge: Merge, prefill: Option<&Bytes>, decode: &Bytes) -> Vec<Bytes> {
    let read = || PromptLogprobs::read(merge, prefill?).ok();
    let body = read().map(|lists| lists.splice_body(decode));
    let stream = read().map(|lists| splice_stream(lists, vec![decode]));
    body.into_iter().chain(stream).collect()
}

/// A request that is one, but for its body.
fn request(dialect: Dialect, body: &[u8]) -> Vec<u8> {
    let path = match dialect {
        Dialect::Generate => "/generate",
        Dialect::Chat => "/v1/chat/completions",
        Dialect::Completions => "/v1/completions",
    };
    let head = format!("POST {path} HTTP/1.1\r\nHost: router\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Which merge a body asks for, if it is one that the router takes.
fn merge_of(dialect: Dialect, body: &[u8]) -> Option<Option<Merge>> {
    let mut inspector = Inspector::new(dialect);
    inspector.feed(body).ok()?;
    inspector.finish().ok().map(|shape| shape.merge)
}

/// Serves a client's connection to its end.
async fn serve(proxy: Proxy, socket: DuplexStream, asked: Arc<AtomicUsize>) {
    let proxy = Arc::new(proxy);
    let service = service_fn(move |request| {
        asked.fetch_add(1, Ordering::Relaxed);
        answer(Arc::clone(&proxy), request)
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(90));
    // How it ended shows in what the client has got.
    let _ = builder.serve_connection(TokioIo::new(socket), service).await;
}

async fn answer(
    proxy: Arc<Proxy>,
    request: Request<Incoming>,
) -> io::Result<Response<Either<Relay, Full<Bytes>>>> {
    let dialect = match request.uri().path() {
        "/v1/chat/completions" => Dialect::Chat,
        "/v1/completions" => Dialect::Completions,
        _ => Dialect::Generate,
    };
    if ![Method::POST, Method::PUT].contains(request.method()) {
        return Err(io::Error::other("not routed to the proxy"));
    }
    Ok(match proxy.handle(dialect, request).await {
        Ok(answer) => answer.map(Either::Left),
        Err(error) => error.to_reply().map(Either::Right),
    })
}

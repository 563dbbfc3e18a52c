//! The router over connections in memory, with a clock that jumps: a client that
//! sends anything, and two servers that answer anything, in any pieces.
//!
//! Routes, limits and keys are left out: whatever is asked for, the proxy is asked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::http::{self, answers};
use super::{DIALECTS, Input, cut_at_most, splice_stream};
use crate::error::Error;
use crate::http1::{ClientTimeouts, HeadRejection, RequestHead, Stream};
use crate::observe::record::{Record, Recorder, RequestId};
use crate::proxy::{self, Proxy, RequestLimits};
use crate::server::{ClientResponseBody, error_response, relayed_response};
use crate::timer::Timer;
use crate::transport::{
    ClientResponse, ClientTransport, ConnectionHandler, Http1Engine, Protocol, RejectionResponse, Transport,
};
use crate::upstream::{
    Address, FleetSpec, HealthOptions, LiveFleet, Pools, PrefillSpec, Random, Role, SocketOptions,
};
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{BodyShape, Dialect, Inspector};

/// What a connection holds that nobody has read.
const BUFFER: usize = 4 << 10;
/// Pieces of what one side sends: each wakes everybody.
const MAX_PIECES: usize = 40;
/// Longer than anything may take.
const FOREVER: Duration = Duration::from_secs(3_600);
/// How long a patient client waits for all answers before it says that it is done: longer than all limits.
const PATIENCE: Duration = Duration::from_secs(120);

/// Any request and any answers: the router comes to an end, writes nothing but answers, no more than there were
/// requests, and none looks complete that is not what decode has sent. Where nothing is wrong the answer is complete.
/// The text is the client's, prefill's and decode's.
pub fn router(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    fastrand::seed(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(Scene::new(&input).play());
}

/// How an answer's body is marked off.
#[derive(Clone, Copy, PartialEq)]
enum Framing {
    /// As the input has it, head and all: right or wrong.
    Any,
    /// The input is the body, of JSON by name, behind a head that tells its length.
    Length,
    /// The input is the body, a stream of events by name, in chunks.
    Chunks,
}

impl Framing {
    fn frame(self, text: &[u8], cuts: u8) -> Vec<u8> {
        let typed = |kind| format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n");
        match self {
            Self::Any => text.to_vec(),
            Self::Length => {
                let head = format!("{}Content-Length: {}\r\n\r\n", typed("application/json"), text.len());
                [head.as_bytes(), text].concat()
            }
            Self::Chunks => {
                let head = format!("{}Transfer-Encoding: chunked\r\n\r\n", typed("text/event-stream"));
                [head.as_bytes(), &chunks(text, cuts), b"0\r\n\r\n"].concat()
            }
        }
    }
}

fn chunks(text: &[u8], cuts: u8) -> Vec<u8> {
    let pieces = cut_at_most(MAX_PIECES, text, cuts).into_iter().filter(|piece| !piece.is_empty());
    let chunk = |piece: &[u8]| [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
    pieces.flat_map(chunk).collect()
}

/// What a server does on each of its connections.
#[derive(Clone)]
struct Script {
    /// Its answer to any request.
    answer: Arc<[u8]>,
    framing: Framing,
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
        let framing = [Framing::Any, Framing::Length, Framing::Chunks, Framing::Any];
        let framing = framing[usize::from(options >> 4) % 4];
        Self {
            answer: framing.frame(answer, cuts.rotate_left(1)).into(),
            framing,
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

    /// Nothing is wrong with it: it answers, soon and in full.
    fn is_sound(&self) -> bool {
        self.framing != Framing::Any && !self.absent && self.pause < Duration::from_secs(1)
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

    async fn play(self, socket: DuplexStream) {
        let mut socket = BufReader::new(socket);
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

    /// What hyper makes of the answer when it comes at once: the whole body, if it is a success.
    async fn reference(&self) -> Option<Bytes> {
        let io = TokioIo::new(self.at_once().connect().ok()?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        tokio::spawn(connection);
        let request = Request::post("/").body(Full::new(Bytes::from_static(b"{}"))).ok()?;
        let answer = timeout(PATIENCE, sender.send_request(request)).await.ok()?.ok()?;
        if !answer.status().is_success() {
            return None;
        }
        let body = timeout(PATIENCE, answer.into_body().collect()).await.ok()?.ok()?;
        Some(body.to_bytes())
    }
}

/// Reads one request, which the router wrote: a head with a length, and the body.
async fn read_request(socket: &mut BufReader<DuplexStream>) -> Option<()> {
    let mut line = Vec::new();
    let mut length = 0;
    while line != b"\r\n" {
        line.clear();
        if socket.read_until(b'\n', &mut line).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&line).to_ascii_lowercase();
        if let Some(value) = text.strip_prefix("content-length: ") {
            length = value.trim_end().parse().expect("a length");
        }
    }
    socket.read_exact(&mut vec![0; length]).await.ok()?;
    Some(())
}

/// What a client does when it has sent its requests.
#[derive(Clone, Copy, PartialEq)]
enum FuzzClient {
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
    client: FuzzClient,
    /// What the request asks for, if it is surely one.
    valid: Option<BodyShape>,
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
            client: [FuzzClient::Waits, FuzzClient::Waits, FuzzClient::ClosesItsHalf, FuzzClient::Leaves]
                [usize::from(kind >> 4) % 4],
            valid: if raw { None } else { name_bit(dialect, text) },
            prefill: Script::new(prefill, cuts.rotate_left(2), prefill_options),
            decode: Script::new(decode, cuts.rotate_left(4), decode_options),
        }
    }

    async fn play(self) {
        let asked = Arc::new(AtomicUsize::new(0));
        let (client, socket) = duplex(BUFFER);
        let connection = serve(self.proxy(), socket, Arc::clone(&asked));
        let (_, got) = timeout(FOREVER, async { tokio::join!(connection, self.exchange_bytes(client)) })
            .await
            .expect("everything ends");
        if self.client == FuzzClient::Leaves {
            return;
        }
        let answers = answers(&got);
        // One more: a word on something that is no request.
        assert!(answers.len() <= asked.load(Ordering::Relaxed) + 1, "more answers than requests");
        if self.client == FuzzClient::Waits && self.valid.is_some() {
            assert!(!answers.is_empty(), "no answer: {}", got.escape_ascii());
        }
        if self.is_sound() {
            let is_complete = matches!(answers.first(), Some(http::Response { status: 200, body: Some(_) }));
            assert!(is_complete, "not answered: {}", got.escape_ascii());
        }
        self.check(&answers).await;
    }

    /// Nothing stands in the way of decode's answer. Prefill's events might: there may be a refusal in them.
    fn is_sound(&self) -> bool {
        let is_plain = |shape: &BodyShape| shape.merge.is_none() && !shape.many_samples;
        let prefill = self.prefill.is_sound() && self.prefill.framing == Framing::Length;
        let asks = self.client == FuzzClient::Waits && self.valid.as_ref().is_some_and(is_plain);
        asks && prefill && self.decode.is_sound()
    }

    fn proxy(&self) -> Proxy {
        let address = |url| Address::parse(url).expect("a URL");
        let prefill = PrefillSpec {
            address: address("http://prefill:1"),
            bootstrap_host: "prefill".into(),
            bootstrap_port: Some(8998),
        };
        // Servers that fail are tried all the same: there are no others.
        let health = HealthOptions {
            enabled: true,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            failure_threshold: 1,
            success_threshold: 1,
            startup_interval: Duration::from_secs(1),
            startup_timeout: Duration::from_secs(1),
        };
        let decode = vec![address("http://decode:2")];
        let fleet = LiveFleet::new(FleetSpec {
            prefill: vec![prefill],
            decode,
            prefill_policy: Arc::new(Random),
            decode_policy: Arc::new(Random),
            health,
        });
        let options = SocketOptions {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(4),
            max_idle: 2,
            buffer_size: None,
            engine: Http1Engine::Native,
            tls: Arc::default(),
        };
        let (prefill, decode) = (self.prefill.clone(), self.decode.clone());
        let connect = move |server: &crate::upstream::Backend| match server.role() {
            Role::Prefill => prefill.connect(),
            Role::Decode => decode.connect(),
        };
        let pools = Pools::in_memory(&options, Box::new(connect));
        let limits = RequestLimits {
            max_payload_size: 16 << 10,
            max_merge_size: 16 << 10,
            body_idle_timeout: Duration::from_secs(20),
            request_timeout: Duration::from_secs(30),
            stream_idle_timeout: Duration::from_secs(5),
            max_retries: 1,
            retry_on: vec![503],
        };
        Proxy::new(Arc::new(fleet), Arc::new(pools), Arc::new(ArcSwap::from_pointee(limits)))
    }

    /// Sends the requests and returns all that comes back.
    async fn exchange_bytes(&self, socket: DuplexStream) -> Vec<u8> {
        let (mut reader, mut writer) = tokio::io::split(socket);
        let write = async {
            for piece in cut_at_most(MAX_PIECES, &self.requests, self.cuts) {
                if writer.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            if self.client == FuzzClient::Waits {
                sleep(PATIENCE).await;
            }
            let _ = writer.shutdown().await;
        };
        let mut got = Vec::new();
        if self.client == FuzzClient::Leaves {
            tokio::select! { _ = reader.read_u8() => {}, () = async { write.await; sleep(PATIENCE).await } => {} }
        } else {
            let _ = tokio::join!(write, reader.read_to_end(&mut got));
        }
        got
    }

    /// The first answer, if it is a complete success: it is decode's, with prefill's lists if they were asked for. A
    /// later one may be something that a server said too much.
    async fn check(&self, answers: &[http::Response]) {
        let Some(http::Response { status: 200..300, body: Some(body) }) = answers.first() else {
            return;
        };
        let decode = self.decode.reference().await;
        let decode = decode.expect("a complete answer is made of a complete answer");
        let prefill = self.prefill.reference().await;
        let any = || vec![None, Some(Merge::Generate), Some(Merge::Echo)];
        let merges = self.valid.as_ref().map_or_else(any, |shape| vec![shape.merge]);
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
    let body = read().map(|lists| lists.splice_body(decode).into_bytes());
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

/// What a body asks for, if it is one that the router takes.
fn name_bit(dialect: Dialect, body: &[u8]) -> Option<BodyShape> {
    let mut inspector = Inspector::new(dialect);
    inspector.feed(body).ok()?;
    inspector.finish().ok()
}

/// Serves a client's connection to its end.
async fn serve(proxy: Proxy, socket: DuplexStream, asked: Arc<AtomicUsize>) {
    let timeouts = ClientTimeouts { head: Duration::from_secs(90), idle: Duration::from_secs(90) };
    let (_open, closing) = watch::channel(());
    let handler = Arc::new(ProxyHandler { proxy, asked });
    let transport = Transport::new(Http1Engine::Native, 1);
    // How it ended shows in what the client received.
    transport.serve(Stream::Memory(socket), Protocol::Http1, handler, timeouts, closing).await;
}

/// Answers every request with the proxy.
struct ProxyHandler {
    proxy: Proxy,
    asked: Arc<AtomicUsize>,
}

impl ProxyHandler {
    async fn handle<C: ClientTransport>(
        &self,
        client: &mut C,
        head: &RequestHead,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<Option<proxy::UpstreamResponse>, Error> {
        if let Some(reason) = head.reject_reason {
            return Err(Error::BadRequest(reason));
        }
        let dialect = match head.path() {
            "/v1/chat/completions" => Dialect::Chat,
            "/v1/completions" => Dialect::Completions,
            _ => Dialect::Generate,
        };
        let request = self.proxy.read(dialect, head, client, record, timer).await?;
        client.cancel_on_disconnect(self.proxy.dispatch(&request, None, record, timer)).await.transpose()
    }
}

impl ConnectionHandler for ProxyHandler {
    type Body = ClientResponseBody;

    async fn respond<C: ClientTransport>(
        &self,
        client: &mut C,
        head: RequestHead,
        timer: &mut Timer,
    ) -> Option<ClientResponse<ClientResponseBody>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut record = Recorder::new(Vec::new()).begin();
        Some(match self.handle(client, &head, &mut record, timer).await {
            Ok(response) => relayed_response(response?, None, record),
            Err(error) => error_response(&error, record),
        })
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn reject(&self, rejection: HeadRejection) -> RejectionResponse {
        let (status, json) = match rejection {
            HeadRejection::TooLarge => (Error::HeadTooLarge.status(), Error::HeadTooLarge.to_json()),
            HeadRejection::Malformed(what) => {
                let error = Error::BadRequest(what);
                (error.status(), error.to_json())
            }
            HeadRejection::Timeout(after) => {
                let error = Error::RequestTimeout { what: "the rest of the request head", after };
                (error.status(), error.to_json())
            }
        };
        RejectionResponse { status, json, request_id: RequestId::make().as_str().to_owned() }
    }

    fn relayed(&self, _: Duration) {}
}

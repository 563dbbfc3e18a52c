//! A router whose client and both servers are one thread, in lock step, so that every exchange is the same to
//! the router. These peers allocate nothing and spend a few instructions per step, so that what is counted in
//! the process is the router's.
//!
//! Included by the two that count: `tests/allocations.rs` and `benches/instructions.rs`.

#![allow(unreachable_pub, reason = "included in crates of their own")]

use std::hint::black_box;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use mini_lb::{CacheAware, Http1Engine, LeastLoad, MiniLbConfig, MiniLoadBalancer, RoundRobin};
use tracing::level_filters::LevelFilter;

/// A request of OpenAI's Python client: a head of eleven lines and a body of 300 bytes.
const REQUEST: &str = concat!(
    "POST /v1/chat/completions HTTP/1.1\r\nhost: router:8000\r\nconnection: keep-alive\r\n",
    "accept: application/json\r\naccept-encoding: gzip, deflate\r\nauthorization: Bearer sk-0123456789abcdef\r\n",
    "user-agent: OpenAI/Python 2.8.1\r\nx-stainless-lang: python\r\nx-stainless-retry-count: 0\r\n",
    "x-request-id: 5f2c1e0a9b7d4c63\r\ncontent-type: application/json\r\ncontent-length: 300\r\n\r\n",
    r#"{"model":"meta-llama/Llama-3.1-8B-Instruct","messages":[{"role":"system","content":"Answer in one sentence."},"#,
    r#"{"role":"user","content":"Why does a router for language models send each request to two servers at once?"}],"#,
    r#""temperature":0.2,"top_p":0.95,"max_tokens":64,"user":"user-0123","stream":"#,
);
const PLAIN: &str = "false}";
/// Padded to the length of `PLAIN`.
const STREAMING: &str = "true }";

const HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n";
/// 300 bytes of a body.
const COMPLETION: &str = concat!(
    "content-length: 300\r\ncontent-type: application/json\r\n\r\n",
    r#"{"id":"7c1e5f0b2a9d4e63","object":"chat.completion","created":1795305600,"model":"Llama-3.1-8B-Instruct","#,
    r#""choices":[{"index":0,"message":{"role":"assistant","content":"One computes; another generates it."},"#,
    r#""finish_reason":"stop"}],"usage":{"prompt_tokens":42,"total_tokens":49,"completion_tokens":7}}"#,
);
const STREAM_HEAD: &str =
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
/// One token of a chat stream, as a chunk of its own.
const EVENT: &str = concat!(
    "e5\r\n",
    r#"data: {"id":"7c1e5f0b2a9d4e63","object":"chat.completion.chunk","created":1795305600,"#,
    r#""model":"Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"#,
    r#""finish_reason":null,"matched_stop":null}]}"#,
    "\n\n\r\n",
);
const LAST_CHUNK: &str = "0\r\n\r\n";
/// How a response begins for the client.
const SUCCESS: &str = "HTTP/1.1 200 OK\r\n";

/// What a long request has more than a short one in its user's message: four blocks of a prompt.
const MORE: usize = 8 << 10;

/// Longer than any step takes.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A router with one worker between a client and two servers.
pub struct LockStep {
    client: TcpStream,
    prefill: Server,
    decode: Server,
    input: Box<[u8]>,
    pause: Duration,
    request: String,
    /// Allocated once.
    output: Vec<u8>,
}

impl LockStep {
    /// Starts a router that runs until the process ends. Its peers sleep for `pause` before each step, so
    /// that the router has become idle, as it does between the events of real peers.
    pub fn start(pause: Duration) -> Self {
        Self::start_with(pause, |config| config)
    }

    /// The same with limits, API keys, CORS and the access log on.
    pub fn start_with_limits(pause: Duration) -> Self {
        Self::start_with(pause, with_limits)
    }

    fn start_with(pause: Duration, options: fn(MiniLbConfig) -> MiniLbConfig) -> Self {
        let (prefill, decode) = (Server::new(), Server::new());
        let client = TcpStream::connect(router(&prefill, &decode, options)).expect("a listening router");
        set_options(&client);
        let (input, output) = (vec![0; 32 << 10].into(), Vec::with_capacity(16 << 10));
        Self { client, prefill, decode, input, pause, request: REQUEST.to_owned(), output }
    }

    /// The same with the default policies, which look at prompts.
    pub fn start_with_cache_aware(pause: Duration) -> Self {
        Self::start_with(pause, |config| config.prefill_policy(CacheAware::new()).decode_policy(LeastLoad))
    }

    /// The same with hyper for HTTP/1.1 on both sides.
    pub fn start_with_hyper(pause: Duration) -> Self {
        Self::start_with(pause, |config| config.http1_engine(Http1Engine::Hyper))
    }

    /// Sends longer requests from now on, of 8.5 KB.
    pub fn lengthen(&mut self) {
        let length = format!("content-length: {}", 300 + MORE);
        let more = format!("Why {}", "x".repeat(MORE - "Why ".len() + "Why".len()));
        self.request = REQUEST.replace("content-length: 300", &length).replace("Why", &more);
    }

    /// One request of 300 bytes with a response of 300 bytes.
    pub fn plain(&mut self) {
        self.send_request(PLAIN);
        self.pause_between_turns();
        self.prefill.respond(&[HEAD, COMPLETION]);
        self.pause_between_turns();
        self.decode.respond(&[HEAD, COMPLETION]);
        read(&mut self.client, &mut self.input, SUCCESS, "}}");
    }

    /// One stream; each token is written after the client has read the one before it.
    pub fn stream(&mut self, tokens: usize) {
        self.send_request(STREAMING);
        self.pause_between_turns();
        self.prefill.respond(&[HEAD, STREAM_HEAD, EVENT, LAST_CHUNK]);
        for token in 0..tokens {
            self.pause_between_turns();
            let is_first = token == 0;
            self.decode.respond(if is_first { &[HEAD, STREAM_HEAD, EVENT] } else { &[EVENT] });
            read(&mut self.client, &mut self.input, if is_first { SUCCESS } else { "" }, "\n\n\r\n");
        }
        self.pause_between_turns();
        self.decode.respond(&[LAST_CHUNK]);
        read(&mut self.client, &mut self.input, "", LAST_CHUNK);
    }

    /// Sends a request that both servers get.
    fn send_request(&mut self, end: &str) {
        self.pause_between_turns();
        self.output.clear();
        [&self.request, end].into_iter().for_each(|part| self.output.extend_from_slice(part.as_bytes()));
        self.client.write_all(&self.output).expect("an open connection");
        self.prefill.read_request(&mut self.input);
        self.decode.read_request(&mut self.input);
    }

    fn pause_between_turns(&self) {
        thread::sleep(self.pause);
    }
}

/// A limit of each kind, none of which is reached, API keys that the client satisfies, CORS origins, and the
/// access log.
fn with_limits(config: MiniLbConfig) -> MiniLbConfig {
    let config = config.max_concurrent_requests(1_000).rate_limit(1_000_000);
    let config = config.max_in_flight_per_prefill(1_000).max_in_flight_per_decode(1_000);
    let config = config.api_key("another").api_key("sk-0123456789abcdef");
    let config = config.worker_api_key("the servers'").worker_api_key_replaces_authorization(true);
    let config = config.cors_allowed_origins(["https://chat.example"]);
    config.access_log(true).request_log(LevelFilter::INFO, |line| drop(black_box(line.message())))
}

/// Starts a router between these servers and returns its address.
fn router(prefill: &Server, decode: &Server, options: fn(MiniLbConfig) -> MiniLbConfig) -> SocketAddr {
    let minute = Duration::from_secs(60);
    let config =
        MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), Some(8998))], vec![decode.url()], 60);
    let config = config.worker_threads(1).health_checks(false).policy(RoundRobin::default);
    let config = options(config.backend_idle_timeout(minute));
    let router = MiniLoadBalancer::new(config).expect("a valid configuration");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    listener.set_nonblocking(true).expect("a socket of tokio's");
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            router.serve(listener, std::future::pending()).await
        })
    });
    address
}

/// A server that takes its requests on one connection.
struct Server {
    listener: TcpListener,
    connection: Option<TcpStream>,
}

impl Server {
    fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").expect("a free port"), connection: None }
    }

    fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().expect("a bound address"))
    }

    fn read_request(&mut self, input: &mut [u8]) {
        let connection = self.connection.get_or_insert_with(|| {
            let (connection, _) = self.listener.accept().expect("the router's connection");
            set_options(&connection);
            connection
        });
        read(connection, input, "POST /v1/chat/completions ", "}");
    }

    fn respond(&mut self, parts: &[&str]) {
        write(self.connection.as_mut().expect("it has got a request"), parts);
    }
}

fn set_options(socket: &TcpStream) {
    socket.set_nodelay(true).expect("TCP_NODELAY");
    // A step that never happens must fail the test, not hang it.
    socket.set_read_timeout(Some(TIMEOUT)).expect("a timeout");
}

/// Writes these parts in one call.
fn write(socket: &mut TcpStream, parts: &[&str]) {
    let mut joined = [0; 2 << 10];
    let mut length = 0;
    for part in parts {
        joined[length..][..part.len()].copy_from_slice(part.as_bytes());
        length += part.len();
    }
    socket.write_all(&joined[..length]).expect("an open connection");
}

/// Reads a text that begins with `begin` until it ends with `end`.
fn read(socket: &mut TcpStream, input: &mut [u8], begin: &str, end: &str) {
    let mut length = 0;
    while !input[..length].ends_with(end.as_bytes()) {
        length += match socket.read(&mut input[length..]) {
            Ok(0) => panic!("closed behind {}", input[..length].escape_ascii()),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => panic!("{error} behind {}", input[..length].escape_ascii()),
        };
    }
    assert!(input.starts_with(begin.as_bytes()), "{}", input[..length].escape_ascii());
}

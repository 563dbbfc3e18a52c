//! HTTP/2 towards clients: who gets it, what one connection may do, and how it ends.

mod kit;

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Reason, RecvStream};
use hyper::header::CONTENT_LENGTH;
use hyper::{Method, Request, Response, StatusCode};
use kit::{Authority, Gate, Router, Step, Upstream, json, patiently, shake_hands};
use mini_lb::MiniLbConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const BODY: &str = r#"{"text":"a"}"#;
const OK: &str = r#"{"text":"hi"}"#;
const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SHORT: Duration = Duration::from_millis(300);

struct Front {
    prefill: Upstream,
    decode: Upstream,
    router: Router,
}

async fn front(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Front {
    front_of(Upstream::always(json("200 OK", OK)).await, options).await
}

async fn front_of(decode: Upstream, options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Front {
    let prefill = Upstream::always(json("200 OK", OK)).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| options(config.http2(true))).await;
    Front { prefill, decode, router }
}

impl Front {
    async fn client(&self) -> Client {
        Client::over(TcpStream::connect(self.router.address()).await.unwrap()).await
    }
}

/// One connection.
struct Client {
    send: SendRequest<Bytes>,
    /// Until it ends, and why.
    connection: JoinHandle<Result<(), h2::Error>>,
}

impl Client {
    async fn over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let mut builder = h2::client::Builder::new();
        let shaking = builder.initial_max_send_streams(1_000).handshake(io);
        let (send, connection): (_, Connection<_, Bytes>) = patiently("a handshake", shaking).await.unwrap();
        Self { send, connection: tokio::spawn(connection) }
    }

    /// Sends a request with its body.
    async fn start(&mut self, request: Request<()>, body: &str) -> h2::client::ResponseFuture {
        let mut send = patiently("a free stream", self.send.clone().ready()).await.unwrap();
        let (answer, mut stream) = send.send_request(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            stream.send_data(Bytes::copy_from_slice(body.as_bytes()), true).unwrap();
        }
        answer
    }

    async fn ask(&mut self, request: Request<()>, body: &str) -> (Response<()>, Vec<u8>) {
        let answer = self.start(request, body).await;
        let (head, mut body) = patiently("an answer", answer).await.unwrap().into_parts();
        let body = rest(&mut body).await.unwrap();
        (Response::from_parts(head, ()), body)
    }

    async fn post(&mut self, body: &str) -> (StatusCode, String) {
        let (answer, body) = self.ask(post(), body).await;
        (answer.status(), String::from_utf8(body).unwrap())
    }

    /// Waits for the connection's end.
    async fn ended(self) -> Result<(), h2::Error> {
        patiently("the connection's end", self.connection).await.unwrap()
    }
}

fn request(method: Method, path: &str) -> Request<()> {
    Request::builder().method(method).uri(format!("http://router{path}")).body(()).unwrap()
}

fn post() -> Request<()> {
    request(Method::POST, "/generate")
}

async fn rest(body: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = patiently("a body", body.data()).await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok(all)
}

fn code(body: &[u8]) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap();
    body["error"]["code"].as_str().unwrap().to_owned()
}

/// A stream of two events, the second of which waits for a gate.
async fn streaming(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |_| {
        vec![
            Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(gate.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await
}

// Who gets it.

#[tokio::test]
async fn a_client_that_begins_with_it_gets_it() {
    let front = front(|config| config).await;
    let mut client = front.client().await;
    for _ in 0..3 {
        assert_eq!(client.post(BODY).await, (StatusCode::OK, OK.to_owned()));
    }
    let (answer, body) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!((answer.status(), body.len()), (StatusCode::OK, 0));
    let seen = front.decode.seen();
    assert_eq!(seen.len(), 3);
    // What servers get is HTTP/1.1 as ever.
    assert_eq!(seen[0].head.start_line, "POST /generate HTTP/1.1");
    assert!(seen[0].json()["bootstrap_room"].is_u64());
    front.prefill.arrived(3).await;
    assert_eq!(front.prefill.opened(), 1, "one connection for one request after the other");
}

#[tokio::test]
async fn with_tls_the_handshake_decides() {
    let ca = Authority::new();
    let identity = ca.issue("router", &["localhost"]);
    let tls = |config: MiniLbConfig| config.tls(&identity.cert, &identity.key);
    let front = front(tls).await;
    for (alpn, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["h2"], "h2"), (&["http/1.1"], "http/1.1")] {
        let stream = shake_hands(front.router.address(), ca.client(alpn)).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(chosen.as_bytes()), "{alpn:?}");
        if chosen == "h2" {
            assert_eq!(Client::over(stream).await.post(BODY).await.0, StatusCode::OK);
        }
    }
    let without =
        Router::start_with(&[&front.prefill], &[&front.decode], |config| tls(config).http2(false)).await;
    let stream = shake_hands(without.address(), ca.client(&["h2", "http/1.1"])).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(shake_hands(without.address(), ca.client(&["h2"])).await.is_err());
}

#[tokio::test]
async fn other_clients_are_served_as_ever() {
    let front = front(|config| config.request_head_timeout(SHORT)).await;
    let mut client = front.router.client().await;
    for _ in 0..2 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    // What begins as HTTP/2 does, bit by bit, and is something else.
    for path in ["P", "PR", "PRI"] {
        let mut client = front.router.client().await;
        client.send(path).await;
        sleep(Duration::from_millis(30)).await;
        client.send(&"POST"[path.len().min(1)..]).await;
        client.send(" /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
        client.send(BODY).await;
        // POST is a method; PROST and the like are methods that the path does not take.
        assert_eq!(client.answer().await.status(), if path == "P" { 200 } else { 405 }, "{path}");
    }
    // And what never goes on.
    let mut slow = front.router.client().await;
    slow.send("PRI").await;
    let answer = slow.answer().await;
    assert_eq!((answer.status(), answer.code().as_str()), (408, "request_timeout"));
    let mut gone = front.router.client().await;
    gone.send("PRI *").await;
    drop(gone);
    assert_eq!(client.get("/health").await.status(), 200);
}

#[tokio::test]
async fn the_preface_may_come_in_pieces() {
    let front = front(|config| config).await;
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    for piece in PREFACE.as_bytes().chunks(5) {
        socket.write_all(piece).await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    // Settings of ours; those of the router are the answer.
    socket.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    patiently("settings", socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[3], 4, "{head:?}");
}

#[tokio::test]
async fn curl_gets_it() {
    let front = front(|config| config).await;
    for (option, version) in [("--http2-prior-knowledge", "2"), ("--http1.1", "1.1"), ("--http2", "1.1")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", option, "--max-time", "20", "-w", " %{http_code} %{http_version}"]);
        curl.args(["-d", BODY]).arg(format!("{}/generate", front.router.url()));
        let Some(output) = kit::run_curl(curl).await else { return };
        assert_eq!(output, format!("{OK} 200 {version}"), "{option}");
    }
}

// Requests.

#[tokio::test]
async fn requests_of_one_connection_do_not_wait_for_each_other() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode = Upstream::start(move |seen| {
        let answer = Step::Send(json("200 OK", &seen.json()["text"].to_string()));
        if seen.json()["text"] == "held" { vec![Step::Wait(held.clone()), answer] } else { vec![answer] }
    })
    .await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    let first = client.start(post(), r#"{"text":"held"}"#).await;
    for number in 0..20 {
        let text = format!("\"{number}\"");
        assert_eq!(client.post(&format!(r#"{{"text":{text}}}"#)).await, (StatusCode::OK, text));
    }
    gate.open();
    let mut body = patiently("the first answer", first).await.unwrap().into_body();
    assert_eq!(rest(&mut body).await.unwrap(), br#""held""#);
}

#[tokio::test]
async fn each_piece_of_a_stream_is_there_before_the_next() {
    let gate = Gate::new();
    let front = front_of(streaming(&gate).await, |config| config).await;
    let mut client = front.client().await;
    let answer = client.start(post(), r#"{"stream":true}"#).await;
    let mut body = patiently("a head", answer).await.unwrap().into_body();
    assert_eq!(patiently("an event", body.data()).await.unwrap().unwrap(), "data: 1\n\n");
    gate.open();
    assert_eq!(rest(&mut body).await.unwrap(), b"data: 2\n\n");
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let large = format!("\"{}\"", "y".repeat(4 << 20));
    let front = front_of(Upstream::always(json("200 OK", &large)).await, |config| config).await;
    let text = format!(r#"{{"text":"{}"}}"#, "x".repeat(4 << 20));
    let (answer, body) = front.client().await.ask(post(), &text).await;
    assert_eq!(answer.headers()[CONTENT_LENGTH], large.len().to_string());
    assert!(body == large.as_bytes());
    assert!(front.decode.only().await.body.starts_with(&text.as_bytes()[..text.len() - 1]));
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let front = front(|config| config).await;
    let (answer, body) = front.client().await.ask(request(Method::HEAD, "/nowhere"), "").await;
    assert_eq!((answer.status(), body.len()), (StatusCode::NOT_FOUND, 0));
    assert_ne!(answer.headers()[CONTENT_LENGTH], "0");
}

#[tokio::test]
async fn headers_reach_servers_as_those_of_http_1_do() {
    let front = front(|config| config).await;
    let mut request = post();
    for (name, value) in
        [("x-own", "1"), ("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers"), ("host", "router")]
    {
        request.headers_mut().append(name, value.parse().unwrap());
    }
    assert_eq!(front.client().await.ask(request, BODY).await.0.status(), StatusCode::OK);
    let head = front.decode.only().await.head;
    assert_eq!((head.header("x-own"), head.header("cookie")), (Some("1"), Some("a=1; b=2")));
    assert_eq!((head.header("te"), head.header("transfer-encoding")), (None, None));
    assert!(head.header("host").unwrap().starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn a_bad_request_is_refused_and_the_connection_goes_on() {
    let front = front(|config| config.max_payload_size(100)).await;
    let mut client = front.client().await;
    let mut two_hosts = post();
    two_hosts.headers_mut().insert("host", "elsewhere".parse().unwrap());
    let mut many = post();
    for number in 0..101 {
        many.headers_mut().insert(
            hyper::header::HeaderName::from_bytes(format!("x-{number}").as_bytes()).unwrap(),
            "1".parse().unwrap(),
        );
    }
    let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(100));
    for (request, body, status, expected) in [
        (two_hosts, BODY, 400, "bad_request"),
        (many, BODY, 400, "bad_request"),
        (post(), "[", 400, "invalid_json"),
        (post(), &long, 413, "body_too_large"),
        (request(Method::GET, "/nowhere"), "", 404, "not_found"),
        (request(Method::GET, "/generate"), "", 405, "method_not_allowed"),
    ] {
        let (answer, body) = client.ask(request, body).await;
        assert_eq!((answer.status().as_u16(), code(&body).as_str()), (status, expected));
        assert!(!answer.headers().contains_key("connection"));
    }
    // More than may be sent of a head is refused by number only.
    let mut large = post();
    large.headers_mut().insert("x-large", "x".repeat(70 << 10).parse().unwrap());
    assert_eq!(client.ask(large, "").await.0.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_body_that_stops_is_refused() {
    let front = front(|config| config.request_body_idle_timeout(SHORT)).await;
    let mut client = front.client().await;
    let mut send = client.send.clone().ready().await.unwrap();
    let (answer, mut body) = send.send_request(post(), false).unwrap();
    body.send_data(Bytes::from_static(b"{\"text\":"), false).unwrap();
    let (head, mut body) = patiently("an answer", answer).await.unwrap().into_parts();
    assert_eq!(head.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(code(&rest(&mut body).await.unwrap()), "request_timeout");
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_request_that_is_taken_back_ends_both_legs() {
    let prefill = Upstream::start(|_| vec![Step::Hang]).await;
    let decode = Upstream::start(|seen| {
        if seen.json()["stream"] == true {
            return vec![Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()), Step::Hang];
        }
        vec![Step::Hang]
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.http2(true)).await;
    let mut client = Client::over(TcpStream::connect(router.address()).await.unwrap()).await;
    // Before its answer, and in the middle of it.
    for (count, body) in [BODY, r#"{"stream":true}"#].into_iter().enumerate() {
        let mut send = client.send.clone().ready().await.unwrap();
        let (answer, mut stream) = send.send_request(post(), false).unwrap();
        stream.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
        prefill.arrived(count + 1).await;
        decode.arrived(count + 1).await;
        if count == 1 {
            let mut body = patiently("a head", answer).await.unwrap().into_body();
            patiently("an event", body.data()).await.unwrap().unwrap();
        }
        stream.send_reset(Reason::CANCEL);
        prefill.closed(count + 1).await;
        decode.closed(count + 1).await;
    }
    let (answer, _) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(answer.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_client_that_leaves_ends_all_its_legs() {
    let decode = Upstream::start(|_| vec![Step::Hang]).await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(client.start(post(), BODY).await);
    }
    front.decode.arrived(5).await;
    client.connection.abort();
    drop((client, answers));
    front.decode.closed(5).await;
}

#[tokio::test]
async fn a_stream_that_fails_says_why_and_is_reset() {
    let decode = Upstream::start(|_| {
        vec![Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()), Step::Close]
    })
    .await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    let answer = client.start(post(), r#"{"stream":true}"#).await;
    let mut body = patiently("a head", answer).await.unwrap().into_body();
    let mut text = Vec::new();
    let error = loop {
        match patiently("a body", body.data()).await.expect("no clean end") {
            Ok(data) => text.extend_from_slice(&data),
            Err(error) => break error,
        }
    };
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("data: 1\n\n") && text.contains("decode_closed"), "{text}");
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
    let (answer, _) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(answer.status(), StatusCode::OK);
}

// Limits.

#[tokio::test]
async fn a_connection_has_so_many_requests_at_a_time() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode =
        Upstream::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", OK))]).await;
    let front = front_of(decode, |config| config.http2_max_streams(3)).await;
    let mut client = front.client().await;
    // The settings have come with this.
    client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(client.connection_limit(), 3);
    let mut answers = Vec::new();
    for _ in 0..3 {
        answers.push(client.start(post(), BODY).await);
    }
    front.decode.arrived(3).await;
    let mut over = client.send.clone();
    let (fourth, mut body) = over.send_request(post(), false).unwrap();
    body.reserve_capacity(BODY.len());
    sleep(SHORT).await;
    assert_eq!(front.decode.seen().len(), 3);
    body.send_data(Bytes::from_static(BODY.as_bytes()), true).unwrap();
    gate.open();
    for answer in answers {
        assert_eq!(patiently("an answer", answer).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(patiently("the fourth answer", fourth).await.unwrap().status(), StatusCode::OK);
}

impl Client {
    fn connection_limit(&self) -> usize {
        self.send.current_max_send_streams()
    }
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// `POST /generate` to `r`: names and values of the static table, and two strings.
fn head_of_a_post() -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, 9];
    block.extend_from_slice(b"/generate");
    block.extend_from_slice(&[0x01, 1, b'r']);
    block
}

/// What comes until the connection ends; whether there was a GOAWAY, and its reason.
async fn goodbye(socket: &mut TcpStream) -> Option<u32> {
    let mut all = Vec::new();
    patiently("the connection's end", socket.read_to_end(&mut all)).await.ok();
    let (mut rest, mut reason) = (&all[..], None);
    while let [a, b, c, kind, _, _, _, _, _, behind @ ..] = rest {
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        let Some((payload, next)) = behind.split_at_checked(length) else { break };
        if *kind == 7 {
            reason = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
        rest = next;
    }
    reason
}

#[tokio::test]
async fn requests_that_are_taken_back_at_once_end_the_connection() {
    let front = front(|config| config).await;
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    let mut bytes = [PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat();
    for number in 0..5_000 {
        let stream = number * 2 + 1;
        bytes.extend(frame(1, 4, stream, &head_of_a_post()));
        bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    // The router may have ended it before all is written.
    let _ = socket.write_all(&bytes).await;
    assert_eq!(goodbye(&mut socket).await, Some(u32::from(Reason::ENHANCE_YOUR_CALM)));
    assert!(front.decode.seen().is_empty());
    assert_eq!(front.client().await.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_head_that_never_ends_ends_the_connection() {
    let front = front(|config| config).await;
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    let mut bytes = [PREFACE.as_bytes(), &frame(4, 0, 0, &[]), &frame(1, 0, 1, &head_of_a_post())].concat();
    // A literal header, again and again.
    let header = [&[0x00, 1, b'x', 100][..], &[b'y'; 100]].concat();
    for _ in 0..2_000 {
        bytes.extend(frame(9, 0, 1, &header.repeat(10)));
    }
    let _ = socket.write_all(&bytes).await;
    assert_eq!(goodbye(&mut socket).await, Some(u32::from(Reason::ENHANCE_YOUR_CALM)));
    assert_eq!(front.client().await.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_client_is_told_what_it_may_do() {
    let front = front(|config| config).await;
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    socket.write_all(&[PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat()).await.unwrap();
    let mut head = [0; 9];
    patiently("settings", socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[3], 4, "{head:?}");
    let mut settings = vec![0; usize::from(head[2])];
    patiently("settings", socket.read_exact(&mut settings)).await.unwrap();
    let value = |id: u16| {
        let mut settings = settings.chunks(6);
        let setting = settings.find(|setting| setting.starts_with(&id.to_be_bytes())).expect("a setting");
        u32::from_be_bytes(setting[2..].try_into().unwrap())
    };
    // Requests at a time, bytes of one that may be sent ahead, and of a head.
    assert_eq!((value(3), value(4), value(6)), (128, 256 << 10, 64 << 10));
    while head[3] != 8 {
        patiently("a window", socket.read_exact(&mut head)).await.unwrap();
        assert!(head[3] == 8 || head[..3] == [0; 3], "{head:?}");
    }
    let mut more = [0; 4];
    patiently("a window", socket.read_exact(&mut more)).await.unwrap();
    // What all requests together may send ahead, less what is so without a word.
    assert_eq!(u32::from_be_bytes(more) + 65_535, 1 << 20);
}

// The end.

#[tokio::test]
async fn an_idle_connection_is_ended_with_a_word() {
    let idle = SHORT * 3;
    let front = front(|config| config.client_idle_timeout(idle)).await;
    let mut client = front.client().await;
    // Longer together than the idle time, and each pause is a third of it.
    for _ in 0..4 {
        assert_eq!(client.post(BODY).await.0, StatusCode::OK);
        sleep(SHORT).await;
    }
    let begun = Instant::now();
    client.ended().await.expect("a clean end");
    // Twice the idle time at most, and what a busy machine adds.
    assert!(begun.elapsed() < idle * 2 + Duration::from_secs(2), "{:?}", begun.elapsed());
    // One that does not even say hello, and one that does not read on.
    for hello in ["", PREFACE] {
        let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
        socket.write_all(hello.as_bytes()).await.unwrap();
        goodbye(&mut socket).await;
    }
}

#[tokio::test]
async fn a_request_may_take_longer_than_a_pause_between_requests() {
    let gate = Gate::new();
    let front = front_of(streaming(&gate).await, |config| config.client_idle_timeout(SHORT)).await;
    let mut client = front.client().await;
    let answer = client.start(post(), r#"{"stream":true}"#).await;
    let mut body = patiently("a head", answer).await.unwrap().into_body();
    // Longer than it takes to end an idle connection, with all that is waited for then.
    sleep(SHORT * 6).await;
    gate.open();
    assert_eq!(rest(&mut body).await.unwrap(), b"data: 1\n\ndata: 2\n\n");
    client.ended().await.expect("a clean end");
}

#[tokio::test]
async fn a_shutdown_lets_requests_finish_and_takes_no_more() {
    let gate = Gate::new();
    let mut front = front_of(streaming(&gate).await, |config| config).await;
    let mut idle = front.client().await;
    assert_eq!(idle.ask(request(Method::GET, "/health"), "").await.0.status(), StatusCode::OK);
    let mut client = front.client().await;
    let answer = client.start(post(), r#"{"stream":true}"#).await;
    let mut body = patiently("a head", answer).await.unwrap().into_body();
    front.router.shut_down();
    idle.ended().await.expect("a clean end");
    gate.open();
    assert_eq!(rest(&mut body).await.unwrap(), b"data: 1\n\ndata: 2\n\n");
    client.ended().await.expect("a clean end");
    front.router.ended().await;
}

#[tokio::test]
async fn a_client_that_does_not_leave_does_not_delay_a_shutdown() {
    let front = front(|config| config).await;
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    socket.write_all(&[PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat()).await.unwrap();
    let mut settings = [0; 9];
    patiently("settings", socket.read_exact(&mut settings)).await.unwrap();
    // The grace period is 180 s.
    front.router.ended().await;
}

#[tokio::test]
async fn in_the_lame_duck_time_a_connection_is_good_for_one_more_request() {
    let mut front = front(|config| config.shutdown_lame_duck(Duration::from_secs(600))).await;
    let mut client = front.client().await;
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
    front.router.shut_down();
    let give_up = Instant::now() + kit::PATIENCE;
    loop {
        let mut asking = front.client().await;
        if asking.ask(request(Method::GET, "/ready"), "").await.0.status() == StatusCode::SERVICE_UNAVAILABLE
        {
            break;
        }
        assert!(Instant::now() < give_up, "still ready");
    }
    let (answer, body) = client.ask(post(), BODY).await;
    assert_eq!((answer.status(), body), (StatusCode::OK, OK.into()));
    assert_eq!(answer.headers().get("connection"), None);
    client.ended().await.expect("a clean end");
}

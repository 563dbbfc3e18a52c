//! HTTP/2 towards clients: negotiation, streams, limits, and the end of connections.

mod kit;

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Reason, RecvStream};
use hyper::header::CONTENT_LENGTH;
use hyper::{Method, Request, Response, StatusCode};
use kit::{Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, TestCa, json, tls_handshake, with_timeout};
use mini_lb::MiniLbConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const BODY: &str = r#"{"text":"a"}"#;
const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SHORT: Duration = Duration::from_millis(300);

struct Setup {
    prefill: ScriptedServer,
    decode: ScriptedServer,
    router: Router,
}

async fn setup(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Setup {
    setup_with_decode(ScriptedServer::always(json("200 OK", OK)).await, options).await
}

async fn setup_with_decode(
    decode: ScriptedServer,
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Setup {
    let prefill = ScriptedServer::always(json("200 OK", OK)).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| options(config.http2(true))).await;
    Setup { prefill, decode, router }
}

impl Setup {
    async fn client(&self) -> Client {
        Client::over(TcpStream::connect(self.router.address()).await.unwrap()).await
    }
}

/// An HTTP/2 connection.
struct Client {
    send: SendRequest<Bytes>,
    /// The result is why the connection ended.
    connection: JoinHandle<Result<(), h2::Error>>,
}

impl Client {
    async fn over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let mut builder = h2::client::Builder::new();
        let shaking = builder.initial_max_send_streams(1_000).handshake(io);
        let (send, connection): (_, Connection<_, Bytes>) =
            with_timeout("a handshake", shaking).await.unwrap();
        Self { send, connection: tokio::spawn(connection) }
    }

    /// Sends a request with its body.
    async fn send_request(&mut self, request: Request<()>, body: &str) -> h2::client::ResponseFuture {
        let mut send = with_timeout("a free stream", self.send.clone().ready()).await.unwrap();
        let (response, mut stream) = send.send_request(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            stream.send_data(Bytes::copy_from_slice(body.as_bytes()), true).unwrap();
        }
        response
    }

    async fn ask(&mut self, request: Request<()>, body: &str) -> (Response<()>, Vec<u8>) {
        let response = self.send_request(request, body).await;
        let (head, mut body) = with_timeout("a response", response).await.unwrap().into_parts();
        let body = read_to_end(&mut body).await.unwrap();
        (Response::from_parts(head, ()), body)
    }

    async fn post(&mut self, body: &str) -> (StatusCode, String) {
        let (response, body) = self.ask(post(), body).await;
        (response.status(), String::from_utf8(body).unwrap())
    }

    /// Waits for the connection's end.
    async fn wait_closed(self) -> Result<(), h2::Error> {
        with_timeout("the connection's end", self.connection).await.unwrap()
    }
}

fn request(method: Method, path: &str) -> Request<()> {
    Request::builder().method(method).uri(format!("http://router{path}")).body(()).unwrap()
}

fn post() -> Request<()> {
    request(Method::POST, "/generate")
}

async fn read_to_end(body: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = with_timeout("a body", body.data()).await {
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

/// A decode server with a stream of two events; the second waits for the gate.
async fn streaming(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |_| {
        vec![
            Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(gate.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await
}

// Negotiation.

#[tokio::test]
async fn prior_knowledge_preface_selects_http2() {
    let setup = setup(|config| config).await;
    let mut client = setup.client().await;
    for _ in 0..3 {
        assert_eq!(client.post(BODY).await, (StatusCode::OK, OK.to_owned()));
    }
    let (response, body) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!((response.status(), body.len()), (StatusCode::OK, 0));
    let seen = setup.decode.requests();
    assert_eq!(seen.len(), 3);
    // Backends get HTTP/1.1.
    assert_eq!(seen[0].head.start_line, "POST /generate HTTP/1.1");
    assert!(seen[0].json()["bootstrap_room"].is_u64());
    setup.prefill.wait_for_requests(3).await;
    assert_eq!(setup.prefill.connections(), 1, "one connection for one request after the other");
}

#[tokio::test]
async fn alpn_selects_http2_over_tls() {
    let ca = TestCa::new();
    let identity = ca.issue("router", &["localhost"]);
    let tls = |config: MiniLbConfig| config.tls(&identity.cert, &identity.key);
    let setup = setup(tls).await;
    for (alpn, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["h2"], "h2"), (&["http/1.1"], "http/1.1")] {
        let stream = tls_handshake(setup.router.address(), ca.client(alpn)).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(chosen.as_bytes()), "{alpn:?}");
        if chosen == "h2" {
            assert_eq!(Client::over(stream).await.post(BODY).await.0, StatusCode::OK);
        }
    }
    let without =
        Router::start_with(&[&setup.prefill], &[&setup.decode], |config| tls(config).http2(false)).await;
    let stream = tls_handshake(without.address(), ca.client(&["h2", "http/1.1"])).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(tls_handshake(without.address(), ca.client(&["h2"])).await.is_err());
}

#[tokio::test]
async fn http1_clients_are_served_on_the_same_port() {
    let setup = setup(|config| config.request_head_timeout(SHORT)).await;
    let mut client = setup.router.client().await;
    for _ in 0..2 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    // Prefixes of the preface that turn out to be something else.
    for path in ["P", "PR", "PRI"] {
        let mut client = setup.router.client().await;
        client.send(path).await;
        sleep(Duration::from_millis(30)).await;
        client.send(&"POST"[path.len().min(1)..]).await;
        client.send(" /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
        client.send(BODY).await;
        // POST is accepted; PROST and the like are valid methods that the path does not allow.
        assert_eq!(client.response().await.status(), if path == "P" { 200 } else { 405 }, "{path}");
    }
    // A prefix that never continues.
    let mut slow = setup.router.client().await;
    slow.send("PRI").await;
    let response = slow.response().await;
    assert_eq!((response.status(), response.error_code().as_str()), (408, "request_timeout"));
    let mut gone = setup.router.client().await;
    gone.send("PRI *").await;
    drop(gone);
    assert_eq!(client.get("/health").await.status(), 200);
}

#[tokio::test]
async fn preface_may_arrive_in_pieces() {
    let setup = setup(|config| config).await;
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    for piece in PREFACE.as_bytes().chunks(5) {
        socket.write_all(piece).await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    // An empty SETTINGS frame; the router responds with its own.
    socket.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    with_timeout("settings", socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[3], 4, "{head:?}");
}

#[tokio::test]
async fn curl_uses_http2() {
    let setup = setup(|config| config).await;
    for (option, version) in [("--http2-prior-knowledge", "2"), ("--http1.1", "1.1"), ("--http2", "1.1")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", option, "--max-time", "20", "-w", " %{http_code} %{http_version}"]);
        curl.args(["-d", BODY]).arg(format!("{}/generate", setup.router.url()));
        let Some(output) = kit::run_curl(curl).await else { return };
        assert_eq!(output, format!("{OK} 200 {version}"), "{option}");
    }
}

// Requests.

#[tokio::test]
async fn streams_of_one_connection_are_independent() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode = ScriptedServer::start(move |seen| {
        let response = Step::Send(json("200 OK", &seen.json()["text"].to_string()));
        if seen.json()["text"] == "held" { vec![Step::Wait(held.clone()), response] } else { vec![response] }
    })
    .await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    let first = client.send_request(post(), r#"{"text":"held"}"#).await;
    for number in 0..20 {
        let text = format!("\"{number}\"");
        assert_eq!(client.post(&format!(r#"{{"text":{text}}}"#)).await, (StatusCode::OK, text));
    }
    gate.open();
    let mut body = with_timeout("the first response", first).await.unwrap().into_body();
    assert_eq!(read_to_end(&mut body).await.unwrap(), br#""held""#);
}

#[tokio::test]
async fn stream_events_are_relayed_as_they_arrive() {
    let gate = Gate::new();
    let setup = setup_with_decode(streaming(&gate).await, |config| config).await;
    let mut client = setup.client().await;
    let response = client.send_request(post(), r#"{"stream":true}"#).await;
    let mut body = with_timeout("a head", response).await.unwrap().into_body();
    assert_eq!(with_timeout("an event", body.data()).await.unwrap().unwrap(), "data: 1\n\n");
    gate.open();
    assert_eq!(read_to_end(&mut body).await.unwrap(), b"data: 2\n\n");
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let large = format!("\"{}\"", "y".repeat(4 << 20));
    let setup =
        setup_with_decode(ScriptedServer::always(json("200 OK", &large)).await, |config| config).await;
    let text = format!(r#"{{"text":"{}"}}"#, "x".repeat(4 << 20));
    let (response, body) = setup.client().await.ask(post(), &text).await;
    assert_eq!(response.headers()[CONTENT_LENGTH], large.len().to_string());
    assert!(body == large.as_bytes());
    assert!(setup.decode.only_request().await.body.starts_with(&text.as_bytes()[..text.len() - 1]));
}

#[tokio::test]
async fn response_to_head_has_no_body() {
    let setup = setup(|config| config).await;
    let (response, body) = setup.client().await.ask(request(Method::HEAD, "/nowhere"), "").await;
    assert_eq!((response.status(), body.len()), (StatusCode::NOT_FOUND, 0));
    assert_ne!(response.headers()[CONTENT_LENGTH], "0");
}

#[tokio::test]
async fn headers_are_forwarded_as_http1_headers() {
    let setup = setup(|config| config).await;
    let mut request = post();
    for (name, value) in
        [("x-own", "1"), ("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers"), ("host", "router")]
    {
        request.headers_mut().append(name, value.parse().unwrap());
    }
    assert_eq!(setup.client().await.ask(request, BODY).await.0.status(), StatusCode::OK);
    let head = setup.decode.only_request().await.head;
    assert_eq!((head.header("x-own"), head.header("cookie")), (Some("1"), Some("a=1; b=2")));
    assert_eq!((head.header("te"), head.header("transfer-encoding")), (None, None));
    assert!(head.header("host").unwrap().starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn bad_requests_are_rejected_and_the_connection_stays_usable() {
    let setup = setup(|config| config.max_payload_size(100)).await;
    let mut client = setup.client().await;
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
        let (response, body) = client.ask(request, body).await;
        assert_eq!((response.status().as_u16(), code(&body).as_str()), (status, expected));
        assert!(!response.headers().contains_key("connection"));
    }
    // A head over the limit is rejected by hyper with a status only.
    let mut large = post();
    large.headers_mut().insert("x-large", "x".repeat(70 << 10).parse().unwrap());
    assert_eq!(client.ask(large, "").await.0.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn stalled_request_body_gets_408() {
    let setup = setup(|config| config.request_body_idle_timeout(SHORT)).await;
    let mut client = setup.client().await;
    let mut send = client.send.clone().ready().await.unwrap();
    let (response, mut body) = send.send_request(post(), false).unwrap();
    body.send_data(Bytes::from_static(b"{\"text\":"), false).unwrap();
    let (head, mut body) = with_timeout("a response", response).await.unwrap().into_parts();
    assert_eq!(head.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(code(&read_to_end(&mut body).await.unwrap()), "request_timeout");
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn an_error_is_sent_while_the_rest_of_the_body_is_withheld() {
    let setup = setup(|config| config.max_payload_size(1_000)).await;
    let mut client = setup.client().await;
    let too_long = || Request::builder().method(Method::POST).uri("http://router/generate");
    for (request, sent, status) in [
        (too_long().header(CONTENT_LENGTH, "2000").body(()).unwrap(), "{", StatusCode::PAYLOAD_TOO_LARGE),
        (post(), "nonsense", StatusCode::BAD_REQUEST),
        (request(Method::POST, "/nowhere"), "{", StatusCode::NOT_FOUND),
    ] {
        let mut send = client.send.clone().ready().await.unwrap();
        let (response, mut stream) = send.send_request(request, false).unwrap();
        stream.send_data(Bytes::from_static(sent.as_bytes()), false).unwrap();
        let (head, mut body) = with_timeout("a response", response).await.unwrap().into_parts();
        assert_eq!(head.status, status);
        // RFC 9113, section 8.1: a whole response, and then a reset that is no error.
        assert!(!read_to_end(&mut body).await.unwrap().is_empty());
        let reset = std::future::poll_fn(|cx| stream.poll_reset(cx));
        assert_eq!(with_timeout("a reset", reset).await.unwrap(), Reason::NO_ERROR);
        assert_eq!(client.post(BODY).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn stream_reset_closes_both_legs() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(|seen| {
        if seen.json()["stream"] == true {
            return vec![Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()), Step::Hang];
        }
        vec![Step::Hang]
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.http2(true)).await;
    let mut client = Client::over(TcpStream::connect(router.address()).await.unwrap()).await;
    // Before the response, and in the middle of it.
    for (count, body) in [BODY, r#"{"stream":true}"#].into_iter().enumerate() {
        let mut send = client.send.clone().ready().await.unwrap();
        let (response, mut stream) = send.send_request(post(), false).unwrap();
        stream.send_data(Bytes::from_static(body.as_bytes()), true).unwrap();
        prefill.wait_for_requests(count + 1).await;
        decode.wait_for_requests(count + 1).await;
        if count == 1 {
            let mut body = with_timeout("a head", response).await.unwrap().into_body();
            with_timeout("an event", body.data()).await.unwrap().unwrap();
        }
        stream.send_reset(Reason::CANCEL);
        prefill.wait_closed(count + 1).await;
        decode.wait_closed(count + 1).await;
    }
    let (response, _) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn client_disconnect_closes_all_its_legs() {
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    let mut responses = Vec::new();
    for _ in 0..5 {
        responses.push(client.send_request(post(), BODY).await);
    }
    setup.decode.wait_for_requests(5).await;
    client.connection.abort();
    drop((client, responses));
    setup.decode.wait_closed(5).await;
}

#[tokio::test]
async fn failed_stream_ends_with_an_error_event_and_a_reset() {
    let decode = ScriptedServer::start(|_| {
        vec![Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()), Step::Close]
    })
    .await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    let response = client.send_request(post(), r#"{"stream":true}"#).await;
    let mut body = with_timeout("a head", response).await.unwrap().into_body();
    let mut text = Vec::new();
    let error = loop {
        match with_timeout("a body", body.data()).await.expect("no clean end") {
            Ok(data) => text.extend_from_slice(&data),
            Err(error) => break error,
        }
    };
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("data: 1\n\n") && text.contains("decode_closed"), "{text}");
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
    let (response, _) = client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(response.status(), StatusCode::OK);
}

// Limits.

#[tokio::test]
async fn max_concurrent_streams_is_enforced() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode =
        ScriptedServer::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", OK))]).await;
    let setup = setup_with_decode(decode, |config| config.http2_max_streams(3)).await;
    let mut client = setup.client().await;
    // After a response, the SETTINGS have arrived.
    client.ask(request(Method::GET, "/health"), "").await;
    assert_eq!(client.connection_limit(), 3);
    let mut responses = Vec::new();
    for _ in 0..3 {
        responses.push(client.send_request(post(), BODY).await);
    }
    setup.decode.wait_for_requests(3).await;
    let mut over = client.send.clone();
    let (fourth, mut body) = over.send_request(post(), false).unwrap();
    body.reserve_capacity(BODY.len());
    sleep(SHORT).await;
    assert_eq!(setup.decode.requests().len(), 3);
    body.send_data(Bytes::from_static(BODY.as_bytes()), true).unwrap();
    gate.open();
    for response in responses {
        assert_eq!(with_timeout("a response", response).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!(with_timeout("the fourth response", fourth).await.unwrap().status(), StatusCode::OK);
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

/// A header block for `POST /generate` to `r`: entries of the static table and two literals.
fn head_of_a_post() -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, 9];
    block.extend_from_slice(b"/generate");
    block.extend_from_slice(&[0x01, 1, b'r']);
    block
}

/// Reads until the connection ends; returns the reason of its GOAWAY, if any.
async fn goodbye(socket: &mut TcpStream) -> Option<u32> {
    let mut all = Vec::new();
    with_timeout("the connection's end", socket.read_to_end(&mut all)).await.ok();
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
async fn rapid_resets_end_the_connection() {
    let setup = setup(|config| config).await;
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    let mut bytes = [PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat();
    for number in 0..5_000 {
        let stream = number * 2 + 1;
        bytes.extend(frame(1, 4, stream, &head_of_a_post()));
        bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    // The router may close the connection before everything is written.
    let _ = socket.write_all(&bytes).await;
    assert_eq!(goodbye(&mut socket).await, Some(u32::from(Reason::ENHANCE_YOUR_CALM)));
    assert!(setup.decode.requests().is_empty());
    assert_eq!(setup.client().await.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn endless_continuation_ends_the_connection() {
    let setup = setup(|config| config).await;
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    let mut bytes = [PREFACE.as_bytes(), &frame(4, 0, 0, &[]), &frame(1, 0, 1, &head_of_a_post())].concat();
    // The same literal header again and again.
    let header = [&[0x00, 1, b'x', 100][..], &[b'y'; 100]].concat();
    for _ in 0..2_000 {
        bytes.extend(frame(9, 0, 1, &header.repeat(10)));
    }
    let _ = socket.write_all(&bytes).await;
    assert_eq!(goodbye(&mut socket).await, Some(u32::from(Reason::ENHANCE_YOUR_CALM)));
    assert_eq!(setup.client().await.post(BODY).await.0, StatusCode::OK);
}

#[tokio::test]
async fn settings_announce_the_limits() {
    let setup = setup(|config| config).await;
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    socket.write_all(&[PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat()).await.unwrap();
    let mut head = [0; 9];
    with_timeout("settings", socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[3], 4, "{head:?}");
    let mut settings = vec![0; usize::from(head[2])];
    with_timeout("settings", socket.read_exact(&mut settings)).await.unwrap();
    let value = |id: u16| {
        let mut settings = settings.chunks(6);
        let setting = settings.find(|setting| setting.starts_with(&id.to_be_bytes())).expect("a setting");
        u32::from_be_bytes(setting[2..].try_into().unwrap())
    };
    // MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE.
    assert_eq!((value(3), value(4), value(6)), (128, 256 << 10, 64 << 10));
    while head[3] != 8 {
        with_timeout("a window", socket.read_exact(&mut head)).await.unwrap();
        assert!(head[3] == 8 || head[..3] == [0; 3], "{head:?}");
    }
    let mut more = [0; 4];
    with_timeout("a window", socket.read_exact(&mut more)).await.unwrap();
    // The connection window, of which 65,535 bytes are the default of the protocol.
    assert_eq!(u32::from_be_bytes(more) + 65_535, 1 << 20);
}

// End of a connection.

#[tokio::test]
async fn idle_connection_ends_with_goaway() {
    let idle = SHORT * 3;
    let setup = setup(|config| config.client_idle_timeout(idle)).await;
    let mut client = setup.client().await;
    // Longer together than the idle time, and each pause is a third of it.
    for _ in 0..4 {
        assert_eq!(client.post(BODY).await.0, StatusCode::OK);
        sleep(SHORT).await;
    }
    let begun = Instant::now();
    client.wait_closed().await.expect("a clean end");
    // Twice the idle time at most, and what a busy machine adds.
    assert!(begun.elapsed() < idle * 2 + Duration::from_secs(2), "{:?}", begun.elapsed());
    // A client that sends nothing, and one that sends only the preface.
    for hello in ["", PREFACE] {
        let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
        socket.write_all(hello.as_bytes()).await.unwrap();
        goodbye(&mut socket).await;
    }
}

#[tokio::test]
async fn idle_timeout_does_not_apply_to_open_requests() {
    let gate = Gate::new();
    let setup = setup_with_decode(streaming(&gate).await, |config| config.client_idle_timeout(SHORT)).await;
    let mut client = setup.client().await;
    let response = client.send_request(post(), r#"{"stream":true}"#).await;
    let mut body = with_timeout("a head", response).await.unwrap().into_body();
    // Longer than the idle timeout and the graceful close after it.
    sleep(SHORT * 6).await;
    gate.open();
    assert_eq!(read_to_end(&mut body).await.unwrap(), b"data: 1\n\ndata: 2\n\n");
    client.wait_closed().await.expect("a clean end");
}

#[tokio::test]
async fn shutdown_finishes_open_requests_and_takes_no_more() {
    let gate = Gate::new();
    let mut setup = setup_with_decode(streaming(&gate).await, |config| config).await;
    let mut idle = setup.client().await;
    assert_eq!(idle.ask(request(Method::GET, "/health"), "").await.0.status(), StatusCode::OK);
    let mut client = setup.client().await;
    let response = client.send_request(post(), r#"{"stream":true}"#).await;
    let mut body = with_timeout("a head", response).await.unwrap().into_body();
    setup.router.begin_shutdown();
    idle.wait_closed().await.expect("a clean end");
    gate.open();
    assert_eq!(read_to_end(&mut body).await.unwrap(), b"data: 1\n\ndata: 2\n\n");
    client.wait_closed().await.expect("a clean end");
    setup.router.wait_shutdown().await;
}

#[tokio::test]
async fn idle_client_does_not_delay_shutdown() {
    let setup = setup(|config| config).await;
    let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
    socket.write_all(&[PREFACE.as_bytes(), &frame(4, 0, 0, &[])].concat()).await.unwrap();
    let mut settings = [0; 9];
    with_timeout("settings", socket.read_exact(&mut settings)).await.unwrap();
    // The grace period is 180 s.
    setup.router.wait_shutdown().await;
}

#[tokio::test]
async fn lame_duck_connection_serves_one_more_request() {
    let mut setup = setup(|config| config.shutdown_lame_duck(Duration::from_secs(600))).await;
    let mut client = setup.client().await;
    assert_eq!(client.post(BODY).await.0, StatusCode::OK);
    setup.router.begin_shutdown();
    let give_up = Instant::now() + kit::TIMEOUT;
    loop {
        let mut asking = setup.client().await;
        if asking.ask(request(Method::GET, "/ready"), "").await.0.status() == StatusCode::SERVICE_UNAVAILABLE
        {
            break;
        }
        assert!(Instant::now() < give_up, "still ready");
    }
    let (response, body) = client.ask(post(), BODY).await;
    assert_eq!((response.status(), body), (StatusCode::OK, OK.into()));
    assert_eq!(response.headers().get("connection"), None);
    client.wait_closed().await.expect("a clean end");
}

//! A client that closes its connection is noticed, whatever it has sent before and whatever its request waits
//! for: both legs end, or its place in the queue is free.

mod kit;

use std::io::Write;
use std::time::Duration;

use kit::{
    Client, Router, STREAM_HEAD, ScriptedServer, Step, TestCa, TlsClient, chunk, json, ok_server,
    with_timeout,
};
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const LOGPROBS: &str = r#"{"text":"","meta_info":{"input_token_logprobs":[[null,1,null],[-0.5,2,null]],"output_token_logprobs":[]}}"#;
const EVENT: &str = "data: {\"text\":\"a\",\"meta_info\":{\"input_token_logprobs\":[]}}\n\n";

/// What a request waits for when its client leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// For the response of either server.
    Response,
    /// For the next event of a stream.
    Event,
    /// For the first event of a stream whose head was sent.
    FirstEvent,
    /// For prefill's logprobs: decode has responded.
    MergePrefill,
    /// For the rest of decode's response, with prefill's logprobs in hand.
    MergeDecode,
    /// For the next of decode's events, which are merged.
    MergeEvent,
}

impl Waiting {
    const ALL: [Self; 6] = [
        Self::Response,
        Self::Event,
        Self::FirstEvent,
        Self::MergePrefill,
        Self::MergeDecode,
        Self::MergeEvent,
    ];

    fn body(self) -> &'static str {
        match self {
            Self::Response => r#"{"text":"a"}"#,
            Self::Event | Self::FirstEvent => r#"{"text":"a","stream":true}"#,
            Self::MergePrefill | Self::MergeDecode => {
                r#"{"text":"a","return_logprob":true,"logprob_start_len":0}"#
            }
            Self::MergeEvent => r#"{"text":"a","stream":true,"return_logprob":true,"logprob_start_len":0}"#,
        }
    }

    fn prefill(self) -> Vec<Step> {
        match self {
            Self::MergeDecode => vec![Step::Send(json("200 OK", LOGPROBS))],
            Self::MergeEvent => {
                let event = chunk(&format!("data: {LOGPROBS}\n\n"));
                let end = [&chunk("data: [DONE]\n\n")[..], b"0\r\n\r\n"].concat();
                vec![Step::Send([STREAM_HEAD.as_bytes(), &event, &end].concat())]
            }
            _ => vec![Step::Hang],
        }
    }

    fn decode(self) -> Vec<Step> {
        let sent = match self {
            Self::Response => return vec![Step::Hang],
            Self::FirstEvent => STREAM_HEAD.into(),
            Self::Event | Self::MergeEvent => [STREAM_HEAD.as_bytes(), &chunk(EVENT)].concat(),
            Self::MergePrefill => json("200 OK", r#"{"text":"a","meta_info":{"input_token_logprobs":[]}}"#),
            Self::MergeDecode => b"HTTP/1.1 200 OK\r\ncontent-length: 60\r\n\r\n{\"text\"".to_vec(),
        };
        vec![Step::Send(sent), Step::Hang]
    }

    /// The last that the client gets before the wait.
    fn awaited(self) -> &'static str {
        match self {
            Self::Event | Self::MergeEvent => "\n\n",
            Self::FirstEvent => "\r\n\r\n",
            Self::Response | Self::MergePrefill | Self::MergeDecode => "",
        }
    }

    /// Whether prefill's connection is still in use during the wait.
    fn holds_prefill(self) -> bool {
        !matches!(self, Self::MergeDecode | Self::MergeEvent)
    }
}

/// What a client sends behind its request before it leaves.
fn behind() -> Vec<(&'static str, Vec<u8>)> {
    let get = "GET /health HTTP/1.1\r\nhost: r\r\n\r\n";
    let post = |length: usize| {
        let body = "x".repeat(length);
        format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {length}\r\n\r\n{body}")
    };
    vec![
        ("nothing", Vec::new()),
        ("CR LF", b"\r\n".to_vec()),
        ("LF", b"\n".to_vec()),
        ("CR", b"\r".to_vec()),
        ("30 kB of empty lines", "\r\n".repeat(15_000).into()),
        ("a request", get.into()),
        ("an empty line and a request", format!("\r\n{get}").into()),
        ("twenty requests", get.repeat(20).into()),
        ("half a head", get[..20].into()),
        // More than is read ahead, and less than a socket's receive buffer.
        ("a request of 40 kB", post(40_000).into()),
    ]
}

fn request(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {length}\r\n\r\n{body}").into()
}

struct Pair {
    prefill: ScriptedServer,
    decode: ScriptedServer,
}

impl Pair {
    async fn start(waiting: Waiting) -> Self {
        let prefill = ScriptedServer::start(move |_| waiting.prefill()).await;
        Self { prefill, decode: ScriptedServer::start(move |_| waiting.decode()).await }
    }

    async fn wait_for_requests(&self, count: usize) {
        self.prefill.wait_for_requests(count).await;
        self.decode.wait_for_requests(count).await;
    }
}

#[tokio::test]
async fn both_legs_end_when_the_client_leaves_whatever_it_has_sent() {
    for waiting in Waiting::ALL {
        let pair = Pair::start(waiting).await;
        let router = Router::start(&[&pair.prefill], &[&pair.decode]).await;
        let mut count = 0;
        for (name, behind) in behind() {
            // With the request, and after it; with a FIN, and with a RST.
            for (together, reset) in [(true, false), (false, false), (true, true), (false, true)] {
                count += 1;
                let mut client = router.client().await;
                let sent = request(waiting.body());
                client.send(if together { [&sent[..], &behind].concat() } else { sent }).await;
                pair.wait_for_requests(count).await;
                client.read_until(waiting.awaited()).await;
                if !together {
                    client.send(&behind).await;
                }
                if reset {
                    client.reset_on_drop();
                }
                drop(client);
                let what = format!("{waiting:?}, {name}, together {together}, reset {reset}");
                with_timeout(&what, pair.decode.wait_closed(count)).await;
                if waiting.holds_prefill() {
                    with_timeout(&what, pair.prefill.wait_closed(count)).await;
                }
            }
        }
        router.wait_idle().await;
        assert_eq!(pair.decode.requests().len(), count, "no pipelined request of a client that left");
    }
}

#[tokio::test]
async fn both_legs_end_when_a_tls_client_leaves_whatever_it_has_sent() {
    let ca = TestCa::new();
    let identity = ca.issue("router", &["localhost"]);
    for waiting in Waiting::ALL {
        let pair = Pair::start(waiting).await;
        let router = Router::start_with(&[&pair.prefill], &[&pair.decode], |config| {
            config.tls(&identity.cert, &identity.key)
        })
        .await;
        let mut count = 0;
        for (name, behind) in behind() {
            // With a close_notify and a FIN, as most clients do; with a FIN only; with a RST.
            for end in ["close_notify", "FIN", "RST"] {
                count += 1;
                let mut client = TlsClient::connect(router.address(), ca.client(&[])).await;
                client.send([&request(waiting.body())[..], &behind].concat()).await;
                pair.wait_for_requests(count).await;
                if !waiting.awaited().is_empty() {
                    client.read_until(waiting.awaited()).await;
                }
                match end {
                    "close_notify" => client.stream.shutdown().await.unwrap(),
                    "RST" => {
                        let socket = SockRef::from(client.stream.get_ref().0);
                        socket.set_linger(Some(Duration::ZERO)).unwrap();
                    }
                    _ => {}
                }
                drop(client);
                let what = format!("{waiting:?}, {name}, {end}");
                with_timeout(&what, pair.decode.wait_closed(count)).await;
                if waiting.holds_prefill() {
                    with_timeout(&what, pair.prefill.wait_closed(count)).await;
                }
            }
        }
        assert_eq!(pair.decode.requests().len(), count);
    }
}

#[tokio::test]
async fn place_in_the_queue_is_free_when_the_client_leaves_whatever_it_has_sent() {
    let (prefill, decode) = (ok_server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.max_concurrent_requests(1)).await;
    let mut first = router.client().await;
    first.send(request(Waiting::Response.body())).await;
    decode.wait_for_requests(1).await;
    for (name, behind) in behind() {
        for reset in [false, true] {
            let mut client: Client = router.client().await;
            client.send([&request(Waiting::Response.body())[..], &behind].concat()).await;
            router.wait_queued(1).await;
            if reset {
                client.reset_on_drop();
            }
            drop(client);
            with_timeout(name, router.wait_queued(0)).await;
        }
    }
    assert_eq!(decode.requests().len(), 1);
}

/// An HTTP/2 client with one request, and its socket.
struct Http2Client {
    connection: JoinHandle<Result<(), h2::Error>>,
    _response: h2::client::ResponseFuture,
    socket: std::net::TcpStream,
}

impl Http2Client {
    async fn send(router: &Router, body: &'static str) -> Self {
        let socket = std::net::TcpStream::connect(router.address()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let stream = TcpStream::from_std(socket.try_clone().unwrap()).unwrap();
        let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = hyper::Request::post("http://router/generate").body(()).unwrap();
        let (response, mut stream) = send.send_request(request, false).unwrap();
        stream.send_data(bytes::Bytes::from_static(body.as_bytes()), true).unwrap();
        Self { connection, _response: response, socket }
    }

    /// Ends the connection, behind the first part of a frame of 16 bytes if `in_frame` is set.
    async fn leave(mut self, in_frame: bool, reset: bool) {
        if in_frame {
            self.socket.write_all(b"\0\0\x10\x06\0\0\0\0\0half").unwrap();
        }
        if reset {
            SockRef::from(&self.socket).set_linger(Some(Duration::ZERO)).unwrap();
        }
        // The task holds the other copy of the socket.
        self.connection.abort();
        let _ = self.connection.await;
    }
}

#[tokio::test]
async fn both_legs_end_when_an_http2_client_leaves() {
    for waiting in Waiting::ALL {
        let pair = Pair::start(waiting).await;
        let router = Router::start_with(&[&pair.prefill], &[&pair.decode], |config| config.http2(true)).await;
        let mut count = 0;
        for (in_frame, reset) in [(false, false), (true, false), (false, true), (true, true)] {
            count += 1;
            let client = Http2Client::send(&router, waiting.body()).await;
            pair.wait_for_requests(count).await;
            client.leave(in_frame, reset).await;
            let what = format!("{waiting:?}, in a frame {in_frame}, reset {reset}");
            with_timeout(&what, pair.decode.wait_closed(count)).await;
            if waiting.holds_prefill() {
                with_timeout(&what, pair.prefill.wait_closed(count)).await;
            }
        }
    }
}

#[tokio::test]
async fn place_in_the_queue_is_free_when_an_http2_client_leaves() {
    let (prefill, decode) = (ok_server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.http2(true).max_concurrent_requests(1))
            .await;
    let mut first = router.client().await;
    first.send(request(Waiting::Response.body())).await;
    decode.wait_for_requests(1).await;
    for (in_frame, reset) in [(false, false), (true, false), (false, true), (true, true)] {
        let client = Http2Client::send(&router, Waiting::Response.body()).await;
        router.wait_queued(1).await;
        client.leave(in_frame, reset).await;
        with_timeout("a free place", router.wait_queued(0)).await;
    }
}

#[tokio::test]
async fn pipelined_requests_that_were_read_ahead_are_answered() {
    let decode = ScriptedServer::start(|_| {
        // So that the requests behind the first are read while it is answered.
        vec![Step::Pause(Duration::from_millis(20)), Step::Send(json("200 OK", kit::OK))]
    })
    .await;
    let prefill = ok_server().await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let large = format!(r#"{{"text":"{}"}}"#, "x".repeat(40_000));
    let bodies = [Waiting::Response.body(), &large, Waiting::Response.body()];
    let mut client = router.client().await;
    for separator in ["", "\r\n", "\r\n\r\n"] {
        let requests = bodies.map(request).join(separator.as_bytes());
        // In pieces of any size, each of which is read ahead when it arrives.
        for piece in requests.chunks(9_000) {
            client.send(piece).await;
            tokio::task::yield_now().await;
        }
        for _ in bodies {
            assert_eq!(client.response().await.text(), kit::OK);
        }
    }
    assert!(!client.has_unread_bytes());
    let sent: Vec<usize> =
        decode.requests().iter().map(|seen| seen.json()["text"].as_str().unwrap().len()).collect();
    assert_eq!(sent, [1, 40_000, 1].repeat(3));
}

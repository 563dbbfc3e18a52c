//! The router's front: how long a client may wait with what, which heads are
//! refused, and what a panic ends.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kit::{Client, Gate, Router, Step, Upstream, json, patiently};
use mini_lb::{Backend, Choice, MiniLbConfig, Policy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep};

const GOOD: &str = r#"{"text":"a"}"#;
/// A time that is over soon.
const SHORT: Duration = Duration::from_millis(300);
/// A time that no test reaches.
const LONG: Duration = Duration::from_secs(60);
const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

struct Front {
    prefill: Upstream,
    decode: Upstream,
    router: Router,
}

async fn front(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Front {
    let answer = json("200 OK", r#"{"done":true}"#);
    let (prefill, decode) = (Upstream::always(answer.clone()).await, Upstream::always(answer).await);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    Front { prefill, decode, router }
}

/// Waits of these lengths for a head, within a body, and for the next request.
fn waits(head: Duration, body: Duration, idle: Duration) -> impl FnOnce(MiniLbConfig) -> MiniLbConfig {
    move |config| config.request_head_timeout(head).request_body_idle_timeout(body).client_idle_timeout(idle)
}

/// Sends bytes and returns all that comes until the router closes the connection.
async fn until_closed(router: &Router, bytes: impl AsRef<[u8]>) -> String {
    let mut socket = TcpStream::connect(router.address()).await.unwrap();
    socket.write_all(bytes.as_ref()).await.unwrap();
    rest(&mut socket).await
}

async fn rest(socket: &mut TcpStream) -> String {
    let mut all = Vec::new();
    patiently("the connection's end", socket.read_to_end(&mut all)).await.unwrap();
    String::from_utf8(all).unwrap()
}

/// Asserts that an answer is an error of the router's own, the last on its connection.
fn assert_last(answer: &str, status: &str, code: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("an answer: {answer:?}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}");
    assert!(head.contains("\r\nconnection: close"), "{head}");
    assert!(head.contains("\r\ncontent-type: application/json"), "{head}");
    let error = serde_json::from_str::<serde_json::Value>(body).unwrap_or_else(|_| panic!("JSON: {body}"));
    assert_eq!(error["error"]["code"], code, "{body}");
}

async fn post(client: &mut Client) {
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

// Waiting for a request.

#[tokio::test]
async fn idle_connections_are_closed_without_a_word() {
    // Longer than any of these clients may be held up between two of its steps by a busy machine.
    let front = front(waits(LONG, LONG, SHORT * 3)).await;
    let mut clients = Vec::new();
    for number in 0..200 {
        let mut client = front.router.client().await;
        match number % 4 {
            0 => {}
            1 => assert_eq!(client.get("/health").await.status(), 200),
            2 => post(&mut client).await,
            // A body that comes later than its head.
            _ => {
                client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
                client.send(GOOD).await;
                assert_eq!(client.answer().await.status(), 200);
            }
        }
        clients.push(client);
    }
    for mut client in clients {
        assert!(client.head_or_end().await.is_none());
        assert!(!client.has_leftovers());
    }
}

#[tokio::test]
async fn the_idle_time_counts_from_the_last_answer() {
    let idle = SHORT * 3;
    let front = front(waits(LONG, LONG, idle)).await;
    let mut client = front.router.client().await;
    let started = Instant::now();
    // Pauses of a ninth: a busy machine may lengthen them.
    while started.elapsed() < idle * 2 {
        post(&mut client).await;
        sleep(idle / 9).await;
    }
    assert!(client.head_or_end().await.is_none());
}

#[tokio::test]
async fn an_answer_may_take_longer_than_a_head_or_a_pause_between_requests() {
    let gates = [Gate::new(), Gate::new()];
    let steps = {
        let [first, second] = gates.clone();
        move |_: &_| {
            let chunk = |text: &str| Step::Send(format!("{:x}\r\n{text}\r\n", text.len()).into());
            let head = Step::Send(STREAM_HEAD.into());
            let end = Step::Send(b"0\r\n\r\n".to_vec());
            vec![
                Step::Wait(first.clone()),
                head,
                chunk("data: a\n\n"),
                Step::Wait(second.clone()),
                chunk("b"),
                end,
            ]
        }
    };
    let (prefill, decode) = (Upstream::always(json("200 OK", "{}")).await, Upstream::start(steps).await);
    let router = Router::start_with(&[&prefill], &[&decode], waits(SHORT, SHORT, SHORT)).await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], br#"{"text":"a","stream":true}"#).await;
    sleep(SHORT * 3).await;
    gates[0].open();
    client.read_until("data: a").await;
    sleep(SHORT * 3).await;
    gates[1].open();
    let answer = client.answer().await;
    assert_eq!((answer.text(), answer.complete), ("data: a\n\nb", true));
    // And it is usable after that.
    post(&mut client).await;
}

#[tokio::test]
async fn an_answer_that_is_read_slowly_is_not_cut_by_the_idle_time() {
    // The router has all of it long before the client does, as the kernel takes little.
    const SIZE: usize = 300 << 10;
    const KERNEL: usize = 8 << 10;
    let whole = json("200 OK", &"x".repeat(SIZE));
    let (prefill, decode) = (Upstream::always(json("200 OK", "{}")).await, Upstream::always(whole).await);
    // Shorter than the whole takes, 30 pauses of a twentieth, and much longer than a pause.
    let idle = SHORT * 3;
    let options = |config| waits(SHORT, SHORT, idle)(config).socket_buffer_size(KERNEL);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(u32::try_from(KERNEL).unwrap()).unwrap();
    let mut socket = socket.connect(router.address()).await.unwrap();
    let request = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut piece = vec![0; SIZE / 30];
    for _ in 0..30 {
        sleep(idle / 20).await;
        patiently("more of the answer", socket.read_exact(&mut piece)).await.unwrap();
    }
    assert!(rest(&mut socket).await.ends_with('x'), "the rest, and then a close for being idle");
}

#[tokio::test]
async fn a_head_that_comes_too_slowly_gets_a_408() {
    let front = front(waits(SHORT * 3, LONG, LONG)).await;
    // The router's clock cannot start before this one.
    let started = Instant::now();
    let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
    let mut answer = String::new();
    // One byte after the other, without a pause that would be long by itself.
    for byte in b"POST /generate HTTP/1.1\r\nhost: router\r\n".iter().cycle() {
        let mut buffer = [0; 1024];
        if let Ok(read) = tokio::time::timeout(Duration::from_millis(100), socket.read(&mut buffer)).await {
            answer += std::str::from_utf8(&buffer[..read.unwrap()]).unwrap();
            break;
        }
        assert!(started.elapsed() < SHORT * 30, "the head is endless");
        socket.write_all(&[*byte]).await.unwrap();
    }
    answer += &rest(&mut socket).await;
    assert!(started.elapsed() >= SHORT * 3);
    assert_last(&answer, "408 Request Timeout", "request_timeout");
    assert!(answer.contains("the rest of the request's head did not come within 900ms"), "{answer}");
}

#[tokio::test]
async fn a_head_that_stops_gets_a_408_wherever_it_stands() {
    let front = front(waits(SHORT, LONG, LONG)).await;
    let part = "GET /health HT";
    let whole = "GET /health HTTP/1.1\r\nhost: r\r\n\r\n";
    let with_body = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    for before in ["", "\r\n", whole, &with_body, &whole.repeat(3)] {
        // In the same write, so that the beginning is read together with what is before it.
        let all = until_closed(&front.router, format!("{before}{part}")).await;
        let last = &all[all.rfind("HTTP/1.1 ").unwrap()..];
        assert_last(last, "408 Request Timeout", "request_timeout");
        assert_eq!(all.matches("HTTP/1.1 200 OK\r\n").count(), before.matches("HTTP/1.1").count());
    }
    // And while a request is under way.
    let gate = Gate::new();
    let script = {
        let gate = gate.clone();
        move |_: &_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", "{}"))]
    };
    let decode = Upstream::start(script).await;
    let router = Router::start_with(&[&front.prefill], &[&decode], waits(SHORT, LONG, LONG)).await;
    let mut client = router.client().await;
    client.send(&with_body).await;
    decode.arrived(1).await;
    client.send(part).await;
    sleep(SHORT * 2).await;
    gate.open();
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(client.answer().await.status(), 408);
    // And in a write of its own.
    let mut client = front.router.client().await;
    post(&mut client).await;
    client.send(part).await;
    assert_eq!(client.answer().await.status(), 408);
    client.closed().await;
}

#[tokio::test]
async fn empty_lines_between_requests_are_no_beginning_of_a_head() {
    let front = front(waits(SHORT, LONG, SHORT * 6)).await;
    let mut client = front.router.client().await;
    post(&mut client).await;
    client.send("\r\n").await;
    sleep(SHORT * 2).await;
    post(&mut client).await;
    client.send("\r\n").await;
    assert!(client.head_or_end().await.is_none());
}

// Waiting for a body.

#[tokio::test]
async fn a_body_may_be_slow_as_long_as_it_goes_on() {
    // Shorter than the body takes, 12 pauses of a ninth, and much longer than a pause.
    let limit = SHORT * 3;
    let front = front(waits(limit, limit, limit)).await;
    let mut client = front.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n").await;
    for byte in GOOD.as_bytes() {
        sleep(limit / 9).await;
        client.send([*byte]).await;
    }
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(front.decode.only().await.json()["text"], "a");
    post(&mut client).await;
}

#[tokio::test]
async fn a_large_body_may_be_slow_as_long_as_it_goes_on() {
    // Shorter than the body takes, 11 pauses of a ninth, and much longer than a pause.
    let limit = SHORT * 3;
    let front = front(waits(limit, limit, limit)).await;
    let body = format!(r#"{{"text":"{}"}}"#, "a".repeat(300 << 10));
    let mut client = front.router.client().await;
    client
        .send(format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {}\r\n\r\n", body.len()))
        .await;
    for piece in body.as_bytes().chunks(30 << 10) {
        sleep(limit / 9).await;
        client.send(piece).await;
    }
    assert_eq!(client.answer().await.status(), 200);
    let seen = front.decode.only().await.body;
    assert!(
        seen.starts_with(body.trim_end_matches('}').as_bytes()) && seen.ends_with(b"}"),
        "all of it came"
    );
    post(&mut client).await;
}

#[tokio::test]
async fn a_body_that_stops_gets_a_408() {
    let front = front(waits(LONG, SHORT, LONG)).await;
    for (target, begun) in [
        ("/generate", "content-length: 12\r\n\r\n{\"text\""),
        ("/generate", "content-length: 12\r\n\r\n"),
        ("/generate", "content-length: 1000000\r\n\r\n{\"text\""),
        ("/v1/completions", "transfer-encoding: chunked\r\n\r\n3\r\n{\"a\r\n"),
        // Bodies that nobody wants.
        ("/flush_cache", "content-length: 12\r\n\r\n{"),
        ("/nowhere", "content-length: 12\r\n\r\n{"),
    ] {
        let answer =
            until_closed(&front.router, format!("POST {target} HTTP/1.1\r\nhost: r\r\n{begun}")).await;
        assert_last(&answer, "408 Request Timeout", "request_timeout");
        assert!(answer.contains("more of the request's body did not come within 300ms"), "{answer}");
    }
    assert!(front.prefill.seen().is_empty() && front.decode.seen().is_empty());
}

// Heads.

#[tokio::test]
async fn heads_that_are_unusual_but_clear_are_accepted() {
    let front = front(|config| config).await;
    let good_body = format!("content-length: 12\r\n\r\n{GOOD}");
    let chunked = "\r\n\r\nC;name=\"value\"\r\n{\"text\":\"a\"}\r\n0\r\nx-trailer: 1\r\n\r\n";
    let many = "x-a: 1\r\n".repeat(98);
    for (what, request) in [
        ("Host is empty", "GET /health HTTP/1.1\r\nhost:\r\n\r\n".to_owned()),
        ("Host with a port", "GET /health HTTP/1.1\r\nHOST: [::1]:80\r\n\r\n".to_owned()),
        ("empty lines before", "\r\n\r\nGET /health HTTP/1.1\r\nhost: r\r\n\r\n".to_owned()),
        ("bare line feeds", "GET /health HTTP/1.1\nhost: r\n\n".to_owned()),
        ("absolute form", "GET http://other/health?a HTTP/1.1\r\nhost: r\r\n\r\n".to_owned()),
        ("99 headers", format!("GET /health HTTP/1.1\r\nhost: r\r\n{many}\r\n")),
        ("HTTP/1.0 keep-alive", "GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n".to_owned()),
        (
            "one length, twice",
            format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n{good_body}"),
        ),
        ("chunked", format!("POST /generate HTTP/1.1\r\nhost: r\r\nTransfer-Encoding: \tChunked {chunked}")),
        ("an upgrade", format!("POST /generate HTTP/1.1\r\nhost: r\r\nupgrade: h2c\r\n{good_body}")),
    ] {
        let mut client = front.router.client().await;
        client.send(request).await;
        assert_eq!(client.answer().await.status(), 200, "{what}");
        post(&mut client).await;
    }
}

/// Requests that a lenient reader takes and this router does not, each with its reason.
const REFUSED: [(&str, &str); 14] = [
    ("GET /health HTTP/1.1\r\n\r\n", "no Host"),
    ("GET http://r/health HTTP/1.1\r\n\r\n", "no Host"),
    ("GET /health HTTP/1.1\r\nhost: r\r\nhost: r\r\n\r\n", "more than one Host"),
    ("GET /health HTTP/1.0\r\nhost: r\r\nhost: s\r\n\r\n", "more than one Host"),
    ("GET /health HTTP/1.1\r\nhost: a b\r\n\r\n", "not a host"),
    ("GET /health HTTP/1.1\r\nhost: user@r\r\n\r\n", "not a host"),
    ("GET /health HTTP/1.1\r\nhost: r/x\r\n\r\n", "not a host"),
    (
        "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "chunked, once",
    ),
    (
        "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        "chunked, once",
    ),
    (
        "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "chunked, once",
    ),
    (
        "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "chunked, once",
    ),
    ("OPTIONS * HTTP/1.1\r\nhost: r\r\n\r\n", "not a path"),
    ("CONNECT r:80 HTTP/1.1\r\nhost: r\r\n\r\n", "not a path"),
    ("GET ftp://r/health HTTP/1.1\r\nhost: r\r\n\r\n", "not a path"),
];

#[tokio::test]
async fn heads_that_could_be_read_in_two_ways_get_a_400_and_a_closed_connection() {
    let front = front(|config| config).await;
    for (request, why) in REFUSED {
        // What follows must not be answered.
        let followed = format!("{request}GET /health HTTP/1.1\r\nhost: r\r\n\r\n");
        let answer = until_closed(&front.router, followed).await;
        assert_last(&answer.replace("HTTP/1.0", "HTTP/1.1"), "400 Bad Request", "bad_request");
        assert!(answer.contains(why), "{request}{answer}");
    }
    assert!(front.prefill.seen().is_empty() && front.decode.seen().is_empty());
}

#[tokio::test]
async fn what_is_no_http_head_gets_an_error_and_a_closed_connection() {
    let front = front(|config| config).await;
    let get = |headers: &str| format!("GET /health HTTP/1.1\r\nhost: r\r\n{headers}\r\n").into_bytes();
    let post =
        |headers: &str| format!("POST /generate HTTP/1.1\r\nhost: r\r\n{headers}\r\n{GOOD}").into_bytes();
    let long_target = format!("GET /{} HTTP/1.1\r\nhost: r\r\n\r\n", "x".repeat(65_535));
    let bad = ("400 Bad Request", "bad_request");
    let too_large = ("431 Request Header Fields Too Large", "head_too_large");
    let inputs: [(Vec<u8>, (&str, &str)); 25] = [
        (get("x: a\0b\r\n"), bad),
        (get("x: a\rb\r\n"), bad),
        (get("x: a\r\n b\r\n"), bad),
        (get("x : a\r\n"), bad),
        (get(" x: a\r\n"), bad),
        (get("x\r\n"), bad),
        (get(": a\r\n"), bad),
        (b"GET  /health HTTP/1.1\r\nhost: r\r\n\r\n".to_vec(), bad),
        (b"GET /he alth HTTP/1.1\r\nhost: r\r\n\r\n".to_vec(), bad),
        (b"GET /health\r\n\r\n".to_vec(), bad),
        (b"GET /health HTTP/2.0\r\nhost: r\r\n\r\n".to_vec(), bad),
        (b"GET /health HTTP/1.2\r\nhost: r\r\n\r\n".to_vec(), bad),
        (b"G\0T /health HTTP/1.1\r\nhost: r\r\n\r\n".to_vec(), bad),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), bad),
        (post("content-length: 12\r\ncontent-length: 13\r\n"), bad),
        (post("content-length: 12, 12\r\n"), bad),
        (post("content-length: +12\r\n"), bad),
        (post("content-length: -1\r\n"), bad),
        (post("content-length: 0x0c\r\n"), bad),
        (post("content-length: 99999999999999999999\r\n"), bad),
        (post("transfer-encoding: gzip\r\n"), bad),
        (post("transfer-encoding: chunked, gzip\r\n"), bad),
        (get(&"x: a\r\n".repeat(100)), too_large),
        (get(&format!("x: {}\r\n", "a".repeat(64 << 10))), too_large),
        (long_target.into_bytes(), too_large),
    ];
    for (input, (status, code)) in inputs {
        let answer = until_closed(&front.router, input).await;
        assert_last(&answer, status, code);
    }
    assert!(front.prefill.seen().is_empty() && front.decode.seen().is_empty());
}

#[tokio::test]
async fn a_head_of_64_kib_is_the_longest() {
    let front = front(|config| config).await;
    let head = |length: usize| {
        let around = "GET /health HTTP/1.1\r\nhost: r\r\nx: \r\n\r\n".len();
        format!("GET /health HTTP/1.1\r\nhost: r\r\nx: {}\r\n\r\n", "a".repeat(length - around))
    };
    let mut client = front.router.client().await;
    client.send(head(64 << 10)).await;
    assert_eq!(client.answer().await.status(), 200);
    client.send(head((64 << 10) + 1)).await;
    assert_eq!(client.answer().await.status(), 431);
    client.closed().await;
}

#[tokio::test]
async fn http_2_by_prior_knowledge_gets_a_400() {
    let front = front(|config| config).await;
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for bytes in [preface.to_owned(), format!("{preface}\0\0\0\x04\0\0\0\0\0")] {
        let answer = until_closed(&front.router, bytes).await;
        assert_last(&answer, "400 Bad Request", "bad_request");
    }
}

#[tokio::test]
async fn a_length_beside_chunks_does_not_count_and_the_connection_is_closed() {
    let front = front(|config| config).await;
    for headers in
        ["content-length: 5\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 5"]
    {
        let request = format!(
            "POST /generate HTTP/1.1\r\nhost: r\r\n{headers}\r\n\r\nc\r\n{GOOD}\r\n0\r\n\r\n\
             GET /health HTTP/1.1\r\nhost: r\r\n\r\n"
        );
        let answer = until_closed(&front.router, request).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("connection: close"),
            "{answer}"
        );
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    }
    assert_eq!(front.decode.seen().len(), 2);
    assert!(front.decode.seen().iter().all(|seen| seen.json()["text"] == "a"));
}

#[tokio::test]
async fn chunks_that_are_malformed_get_a_400_and_a_closed_connection() {
    let front = front(|config| config).await;
    for target in ["/generate", "/flush_cache"] {
        for body in [
            "x\r\n{}\r\n0\r\n\r\n",
            "-2\r\n{}\r\n0\r\n\r\n",
            "0x2\r\n{}\r\n0\r\n\r\n",
            "\r\n{}\r\n0\r\n\r\n",
            "2 2\r\n{}\r\n0\r\n\r\n",
            "11111111111111112\r\n{}\r\n0\r\n\r\n",
            "2\n{}\n0\n\n",
            "2\r{}\r\n0\r\n\r\n",
            "2\r\n{}0\r\n\r\n",
            "1\r\n{}\r\n0\r\n\r\n",
            "2;a\nb\r\n{}\r\n0\r\n\r\n",
        ] {
            let head = format!("POST {target} HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n");
            let answer = until_closed(&front.router, head + body).await;
            assert_last(&answer, "400 Bad Request", "body_read");
        }
    }
    assert!(front.prefill.seen().is_empty() && front.decode.seen().is_empty());
}

// Connections.

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let front = front(|config| config).await;
    let mut client = front.router.client().await;
    let generate = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    let nowhere = "GET /nowhere HTTP/1.1\r\nhost: r\r\n\r\n";
    let bad = "POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 3\r\n\r\nbad";
    client.send([nowhere, &generate, bad, &generate, nowhere].concat().repeat(4)).await;
    for _ in 0..4 {
        for status in [404, 200, 400, 200, 404] {
            assert_eq!(client.answer().await.status(), status);
        }
    }
    assert!(!client.has_leftovers());
    assert_eq!(front.decode.seen().len(), 8);
}

#[tokio::test]
async fn http_1_0_gets_an_answer_that_ends_with_the_connection() {
    let chunks = format!("{STREAM_HEAD}7\r\ndata: a\r\n0\r\n\r\n");
    let (prefill, decode) = (Upstream::always(json("200 OK", "{}")).await, Upstream::always(chunks).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for keep_alive in ["", "connection: keep-alive\r\n"] {
        let request = format!("POST /generate HTTP/1.0\r\ncontent-length: 12\r\n{keep_alive}\r\n{GOOD}");
        let answer = until_closed(&router, request).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200 OK\r\n") && !head.contains("transfer-encoding"), "{head}");
        assert_eq!(body, "data: a");
    }
    let whole = until_closed(&router, "GET /health HTTP/1.0\r\n\r\n").await;
    assert!(whole.starts_with("HTTP/1.0 200 OK\r\n"), "{whole}");
    let chunked = "POST /generate HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let answer = until_closed(&router, chunked).await;
    assert!(answer.starts_with("HTTP/1.0 400 Bad Request\r\n") && answer.contains("HTTP/1.0"), "{answer}");
}

#[tokio::test]
async fn an_answer_before_the_end_of_its_request_is_not_lost() {
    let front = front(|config| config.max_payload_size(100)).await;
    let mut client = TcpStream::connect(front.router.address()).await.unwrap();
    let head = "POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 999999999999\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    // More than the sockets' buffers hold: it arrives only because the router reads on.
    for _ in 0..32 {
        client.write_all(&[b'x'; 1 << 20]).await.expect("the router still reads");
    }
    client.shutdown().await.unwrap();
    assert_last(&rest(&mut client).await, "413 Payload Too Large", "body_too_large");
}

#[tokio::test]
async fn an_answer_of_which_nothing_is_taken_ends_with_the_idle_time() {
    // More than the kernel holds for a client that does not read.
    const SIZE: usize = 8 << 20;
    let endless = |_: &_| {
        let chunk = format!("{:x}\r\n{}\r\n", 64 << 10, "x".repeat(64 << 10));
        let chunks = (0..SIZE / (64 << 10)).map(|_| Step::Send(chunk.clone().into_bytes()));
        std::iter::once(Step::Send(STREAM_HEAD.into())).chain(chunks).chain([Step::Hang]).collect()
    };
    for step in ["stream", "whole"] {
        let (prefill, decode) = (
            Upstream::always(json("200 OK", "{}")).await,
            match step {
                "stream" => Upstream::start(endless).await,
                _ => Upstream::always(json("200 OK", &"x".repeat(SIZE))).await,
            },
        );
        let router = Router::start_with(&[&prefill], &[&decode], waits(LONG, LONG, SHORT)).await;
        let mut client = router.client().await;
        // Before the answer begins, and so before the idle time does.
        let started = Instant::now();
        client.start("POST", "/generate", &[], GOOD.as_bytes()).await;
        decode.arrived(1).await;
        // The server sees the end of its connection, although the client is still there.
        decode.closed(1).await;
        assert!(started.elapsed() >= SHORT, "{step}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn headers_pass_as_they_were_written() {
    let answer =
        "HTTP/1.1 200 Fine\r\nServer: a\r\nX-Two:  2\r\nX-One: 1\r\nx-two: 3\r\nContent-Length: 2\r\n\r\n{}";
    let (prefill, decode) = (Upstream::always(answer).await, Upstream::always(answer).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let request = format!(
        "POST /generate HTTP/1.1\r\nHost: r\r\nX-B:\t1\r\nX-Request-ID: r-1\r\nx-a: 2\r\nX-b: 3\r\n\
         Content-Type: application/json\r\nConnection: close\r\nContent-Length: 12\r\n\r\n{GOOD}"
    );
    let got = until_closed(&router, request).await;
    let lines =
        "HTTP/1.1 200 Fine\r\nServer: a\r\nX-Two:  2\r\nX-One: 1\r\nx-two: 3\r\nContent-Length: 2\r\n";
    assert!(got.starts_with(lines), "{got}");
    assert!(
        got.contains("\r\nx-request-id: r-1\r\ndate: "),
        "a server without a clock gets the router's: {got}"
    );
    for seen in [prefill.only().await, decode.only().await] {
        let headers: Vec<String> =
            seen.head.headers.iter().skip(2).map(|(name, value)| format!("{name}: {value}")).collect();
        let sent = ["X-B: 1", "X-Request-ID: r-1", "x-a: 2", "X-b: 3", "Content-Type: application/json"];
        assert_eq!(headers, sent);
    }
}

// A panic.

/// Panics while the flag is up.
struct Moody(Arc<AtomicBool>);

impl Policy for Moody {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        assert!(!self.0.load(Ordering::SeqCst), "in a bad mood");
        &choice.servers()[0]
    }
}

#[tokio::test]
async fn a_panic_ends_one_request_and_no_other() {
    let gate = Gate::new();
    let script = {
        let gate = gate.clone();
        move |_: &_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", r#"{"late":1}"#))]
    };
    let (prefill, decode) = (Upstream::always(json("200 OK", "{}")).await, Upstream::start(script).await);
    let angry = Arc::new(AtomicBool::new(false));
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        // Decode's: prefill has been chosen when it panics.
        config.decode_policy(Moody(Arc::clone(&angry)))
    })
    .await;
    let mut other = router.client().await;
    other.start("POST", "/generate", &[], GOOD.as_bytes()).await;
    decode.arrived(1).await;

    angry.store(true, Ordering::SeqCst);
    let request = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    for _ in 0..3 {
        let answer = until_closed(&router, &request).await;
        assert_last(&answer, "500 Internal Server Error", "internal");
        assert!(!answer.contains("mood"), "{answer}");
    }
    angry.store(false, Ordering::SeqCst);

    gate.open();
    assert_eq!(other.answer().await.json()["late"], 1);
    post(&mut other).await;
    router.idle().await;
    assert_eq!(prefill.seen().len(), 2, "nothing of the three reached a server");
}

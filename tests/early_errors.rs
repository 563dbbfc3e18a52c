//! A request that is rejected gets its error at once, while the rest of its body is still to come; what comes
//! is then discarded, and the connection serves the next request.

mod kit;

use std::time::Duration;

use kit::raw::{Setup, read_to_end};
use kit::{Client, Gate, Router, ScriptedServer, Step, json, with_timeout};
use mini_lb::MiniLbConfig;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

const GOOD: &str = r#"{"text":"a"}"#;
const LIMIT: usize = 1 << 20;
/// Over soon, so that a test waits for it.
const SHORT: Duration = Duration::from_millis(300);
/// Longer than any test.
const LONG: Duration = Duration::from_secs(60);
/// Most bytes that are discarded after a response.
const MAX_DISCARDED: usize = 64 << 20;

/// A request that is rejected when `sent` has arrived, whatever `rest` is.
struct Rejected {
    head: &'static str,
    sent: Vec<u8>,
    rest: Vec<u8>,
    error: (u16, &'static str),
}

impl Rejected {
    fn new(
        head: &'static str,
        sent: impl Into<Vec<u8>>,
        rest: impl Into<Vec<u8>>,
        error: (u16, &'static str),
    ) -> Self {
        Self { head, sent: sent.into(), rest: rest.into(), error }
    }
}

/// As a chunk without the line end behind it.
fn open_chunk(size: usize) -> Vec<u8> {
    [format!("{size:x}\r\n").as_bytes(), &vec![b'x'; size]].concat()
}

const POST: &str = "POST /generate HTTP/1.1\r\nhost: r\r\nauthorization: Bearer key\r\n";
const CHUNKED: &str = "transfer-encoding: chunked\r\n\r\n";

fn rejected() -> Vec<Rejected> {
    let too_large = (413, "body_too_large");
    let no_json = (400, "invalid_json");
    // More than a body buffer, so that the fault is in the middle of one.
    let late_fault = format!(r#"{{"text":"{}" nonsense"#, "a".repeat(200 << 10));
    let text = r#"{"text":""#;
    vec![
        Rejected::new("content-length: 3000000\r\n\r\n", "", vec![b'x'; 3_000_000], too_large),
        Rejected::new("content-length: 3000000\r\n\r\n", text, vec![b'x'; 3_000_000 - text.len()], too_large),
        Rejected::new(
            CHUNKED,
            [b"9\r\n{\"text\":\"\r\n".to_vec(), open_chunk(LIMIT)].concat(),
            "\r\n2\r\n\"}\r\n0\r\n\r\n",
            too_large,
        ),
        Rejected::new("content-length: 500000\r\n\r\n", "nonsense", vec![b'x'; 500_000 - 8], no_json),
        Rejected::new("content-length: 30\r\n\r\n", "nonsense", vec![b'x'; 22], no_json),
        Rejected::new(CHUNKED, "8\r\nnonsense\r\n", "1\r\nx\r\n0\r\n\r\n", no_json),
        Rejected::new(
            "content-length: 1000000\r\n\r\n",
            late_fault.clone(),
            vec![b'x'; 1_000_000 - late_fault.len()],
            no_json,
        ),
        Rejected::new(
            "content-encoding: gzip\r\ncontent-length: 12\r\n\r\n",
            "",
            GOOD,
            (415, "unsupported_encoding"),
        ),
    ]
}

async fn start(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Setup {
    let limited =
        |config: MiniLbConfig| config.max_payload_size(LIMIT).api_key("key").request_body_idle_timeout(LONG);
    Setup::start(|config| options(limited(config))).await
}

/// Reads the error, sends the rest, and uses the connection once more.
async fn assert_early(client: &mut Client, case: &Rejected, what: &str) {
    let response = client.response().await;
    assert_eq!((response.status(), response.error_code().as_str()), case.error, "{what}");
    assert_eq!(response.head.header("connection"), None, "{what}");
    client.send(&case.rest).await;
    assert!(!client.has_unread_bytes(), "{what}");
    client.send(format!("{POST}content-length: {}\r\n\r\n{GOOD}", GOOD.len())).await;
    assert_eq!(client.response().await.status(), 200, "{what}");
}

#[tokio::test]
async fn an_error_is_sent_while_the_rest_of_the_body_is_withheld() {
    let setup = start(|config| config).await;
    // One connection for all: each leaves it in order.
    let mut client = setup.router.client().await;
    for case in rejected() {
        client.send([POST.as_bytes(), case.head.as_bytes(), &case.sent].concat()).await;
        assert_early(&mut client, &case, case.head).await;
    }
}

#[tokio::test]
async fn a_fault_behind_the_head_is_an_error_although_the_rest_is_withheld() {
    let setup = start(|config| config).await;
    for case in rejected().into_iter().filter(|case| case.error == (400, "invalid_json")) {
        let mut client = setup.router.client().await;
        // The router has read the head when it asks for the body.
        client.send(format!("{POST}expect: 100-continue\r\n{}", case.head)).await;
        assert_eq!(client.head().await.start_line, "HTTP/1.1 100 Continue");
        client.send(&case.sent).await;
        assert_early(&mut client, &case, case.head).await;
    }
}

#[tokio::test]
async fn an_error_that_needs_no_body_is_sent_before_it() {
    let setup = start(|config| config).await;
    let mut client = setup.router.client().await;
    for (head, error) in [
        ("POST /generate HTTP/1.1\r\nhost: r\r\n", (401, "unauthorized")),
        ("POST /nowhere HTTP/1.1\r\nhost: r\r\nauthorization: Bearer key\r\n", (404, "not_found")),
        (
            "DELETE /generate HTTP/1.1\r\nhost: r\r\nauthorization: Bearer key\r\n",
            (405, "method_not_allowed"),
        ),
    ] {
        let case = Rejected::new("content-length: 900000\r\n\r\n", "", vec![b'x'; 900_000], error);
        client.send([head, case.head].concat()).await;
        assert_early(&mut client, &case, head).await;
        // A body that will not be read is not asked for.
        let mut careful = setup.router.client().await;
        careful.send(format!("{head}expect: 100-continue\r\n{}", case.head)).await;
        let response = careful.response().await;
        assert_eq!((response.status(), response.error_code().as_str()), error, "{head}");
        assert_eq!(response.head.header("connection"), Some("close"), "{head}");
        careful.wait_closed().await;
    }
}

#[tokio::test]
async fn a_full_queue_is_an_error_before_the_body() {
    let gate = Gate::new();
    let held = gate.clone();
    let prefill = ScriptedServer::always(json("200 OK", "{}")).await;
    let decode =
        ScriptedServer::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", "{}"))])
            .await;
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(0);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = router.client().await;
    first.send_request("POST", "/generate", &[], GOOD.as_bytes()).await;
    decode.wait_for_requests(1).await;
    let mut second = router.client().await;
    second.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 900000\r\n\r\n{").await;
    assert_eq!(second.response().await.error_code(), "queue_full");
    gate.open();
    assert_eq!(first.response().await.status(), 200);
    second.send(vec![b'x'; 900_000 - 1]).await;
    assert_eq!(second.post("/generate", GOOD).await.status(), 200);
}

#[tokio::test]
async fn a_client_that_sends_no_more_after_an_error_is_disconnected() {
    let setup = start(|config| config.request_body_idle_timeout(SHORT)).await;
    for case in rejected() {
        let mut client = setup.router.client().await;
        client.send([POST.as_bytes(), case.head.as_bytes(), &case.sent].concat()).await;
        assert_eq!(client.response().await.error_code(), case.error.1);
        assert!(client.head_or_eof().await.is_none(), "one response");
    }
}

#[tokio::test]
async fn a_client_that_is_answered_and_then_closed_gets_its_error_whole() {
    let setup = start(|config| config).await;
    for version in ["1.0", "1.1"] {
        let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
        let head = format!(
            "POST /generate HTTP/{version}\r\nhost: r\r\nauthorization: Bearer key\r\nconnection: close\r\n"
        );
        socket.write_all(format!("{head}content-length: 3000000\r\n\r\n").as_bytes()).await.unwrap();
        if !kit::skip_on_hyper("it does not close its side before the client has sent everything") {
            let response = read_to_end(&mut socket).await;
            assert!(response.contains("\r\nconnection: close\r\n"), "{response}");
            assert!(response.contains("body_too_large"), "{response}");
        }
        // It takes longer than the router reads after a close that was announced.
        for _ in 0..3 {
            tokio::time::sleep(SHORT * 2).await;
            with_timeout("the router to read", socket.write_all(&vec![b'x'; 1_000_000])).await.unwrap();
        }
        if kit::skip_on_hyper("it does not close its side before the client has sent everything") {
            assert!(read_to_end(&mut socket).await.contains("body_too_large"));
        }
    }
}

#[tokio::test]
async fn the_connection_closes_when_too_much_would_be_discarded() {
    let setup = start(|config| config).await;
    let mut client = setup.router.client().await;
    client.send([POST, CHUNKED, "8\r\nnonsense\r\n"].concat()).await;
    assert_eq!(client.response().await.status(), 400);
    let chunk = [open_chunk(LIMIT), b"\r\n".to_vec()].concat();
    let mut sent = 0;
    while client.try_send(&chunk).await {
        sent += LIMIT;
        // What the kernel holds, and what is read in the second after the close, is on top.
        assert!(sent < 64 * MAX_DISCARDED, "the router reads on");
    }
    assert!(sent >= MAX_DISCARDED, "{sent}");
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_a_body_that_is_discarded() {
    let setup = start(|config| config).await;
    let mut client = setup.router.client().await;
    client.send([POST, "content-length: 500000\r\n\r\nnonsense"].concat()).await;
    assert_eq!(client.response().await.status(), 400);
    let begun = Instant::now();
    setup.router.wait_shutdown().await;
    assert!(begun.elapsed() < LONG / 4, "{:?}", begun.elapsed());
    client.wait_closed().await;
}

//! Connections of clients: pipelining, HTTP/1.0, responses before a request's end, and what a panic ends.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kit::raw::{Setup, assert_final_error, read_to_end, send_and_read_to_end};
use kit::{Client, Gate, Router, STREAM_HEAD, ScriptedServer, Step, json};
use mini_lb::{Backend, Choice, Policy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const GOOD: &str = r#"{"text":"a"}"#;

async fn post(client: &mut Client) {
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let setup = Setup::start(|config| config).await;
    let mut client = setup.router.client().await;
    let generate = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    let nowhere = "GET /nowhere HTTP/1.1\r\nhost: r\r\n\r\n";
    let bad = "POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 3\r\n\r\nbad";
    client.send([nowhere, &generate, bad, &generate, nowhere].concat().repeat(4)).await;
    for _ in 0..4 {
        for status in [404, 200, 400, 200, 404] {
            assert_eq!(client.response().await.status(), status);
        }
    }
    assert!(!client.has_unread_bytes());
    assert_eq!(setup.decode.requests().len(), 8);
}

#[tokio::test]
async fn http_1_0_response_is_delimited_by_close() {
    let chunks = format!("{STREAM_HEAD}7\r\ndata: a\r\n0\r\n\r\n");
    let (prefill, decode) =
        (ScriptedServer::always(json("200 OK", "{}")).await, ScriptedServer::always(chunks).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for keep_alive in ["", "connection: keep-alive\r\n"] {
        let request = format!("POST /generate HTTP/1.0\r\ncontent-length: 12\r\n{keep_alive}\r\n{GOOD}");
        let response = send_and_read_to_end(&router, request).await;
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200 OK\r\n") && !head.contains("transfer-encoding"), "{head}");
        assert_eq!(body, "data: a");
    }
    let whole = send_and_read_to_end(&router, "GET /health HTTP/1.0\r\n\r\n").await;
    assert!(whole.starts_with("HTTP/1.0 200 OK\r\n"), "{whole}");
    if kit::skip_on_hyper("its own errors have no body and are HTTP/1.1") {
        return;
    }
    let chunked = "POST /generate HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let response = send_and_read_to_end(&router, chunked).await;
    assert!(
        response.starts_with("HTTP/1.0 400 Bad Request\r\n") && response.contains("HTTP/1.0"),
        "{response}"
    );
}

#[tokio::test]
async fn cut_response_to_http_1_0_is_reset() {
    for cut in [Step::Close, Step::Reset] {
        let begun = Step::Send(format!("{STREAM_HEAD}9\r\ndata: a\n\n\r\n").into());
        let decode = ScriptedServer::start(move |_| vec![begun.clone(), cut.clone()]).await;
        let prefill = ScriptedServer::always(json("200 OK", "{}")).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = TcpStream::connect(router.address()).await.unwrap();
        let request = format!("POST /generate HTTP/1.0\r\ncontent-length: 12\r\n\r\n{GOOD}");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut received = Vec::new();
        let end = client.read_to_end(&mut received).await;
        // An orderly end would be the end of the body.
        let error = end.expect_err("the client sees that the response is not complete");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn early_response_is_not_lost_while_the_client_still_sends() {
    let setup = Setup::start(|config| config.max_payload_size(100)).await;
    let mut client = TcpStream::connect(setup.router.address()).await.unwrap();
    let head = "POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 999999999999\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    // More than the sockets' buffers hold, so it arrives only if the router keeps reading.
    for _ in 0..32 {
        client.write_all(&[b'x'; 1 << 20]).await.expect("the router still reads");
    }
    client.shutdown().await.unwrap();
    assert_final_error(&read_to_end(&mut client).await, "413 Payload Too Large", "body_too_large");
}

#[tokio::test]
async fn header_case_and_order_are_preserved() {
    if kit::skip_on_hyper("header names become lower case, and equal names stand together") {
        return;
    }
    let response =
        "HTTP/1.1 200 Fine\r\nServer: a\r\nX-Two:  2\r\nX-One: 1\r\nx-two: 3\r\nContent-Length: 2\r\n\r\n{}";
    let (prefill, decode) = (ScriptedServer::always(response).await, ScriptedServer::always(response).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let request = format!(
        "POST /generate HTTP/1.1\r\nHost: r\r\nX-B:\t1\r\nX-Request-ID: r-1\r\nx-a: 2\r\nX-b: 3\r\n\
         Content-Type: application/json\r\nConnection: close\r\nContent-Length: 12\r\n\r\n{GOOD}"
    );
    let got = send_and_read_to_end(&router, request).await;
    let lines =
        "HTTP/1.1 200 Fine\r\nServer: a\r\nX-Two:  2\r\nX-One: 1\r\nx-two: 3\r\nContent-Length: 2\r\n";
    assert!(got.starts_with(lines), "{got}");
    assert!(
        got.contains("\r\nx-request-id: r-1\r\ndate: "),
        "a server without a clock gets the router's: {got}"
    );
    // The router reads prefill's response, and asks for plain text.
    for (seen, added) in [
        (prefill.only_request().await, &["accept-encoding: identity"][..]),
        (decode.only_request().await, &[]),
    ] {
        let headers: Vec<String> =
            seen.head.headers.iter().skip(2).map(|(name, value)| format!("{name}: {value}")).collect();
        let sent = ["X-B: 1", "X-Request-ID: r-1", "x-a: 2", "X-b: 3", "Content-Type: application/json"];
        assert_eq!(headers, [&sent[..], added].concat());
    }
}

/// Panics while the flag is set.
struct Moody(Arc<AtomicBool>);

impl Policy for Moody {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        assert!(!self.0.load(Ordering::SeqCst), "in a bad mood");
        &choice.servers()[0]
    }
}

#[tokio::test]
async fn panic_fails_one_request_only() {
    let gate = Gate::new();
    let script = {
        let gate = gate.clone();
        move |_: &_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", r#"{"late":1}"#))]
    };
    let (prefill, decode) =
        (ScriptedServer::always(json("200 OK", "{}")).await, ScriptedServer::start(script).await);
    let angry = Arc::new(AtomicBool::new(false));
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        // Of decode, so that prefill has been chosen when it panics.
        config.decode_policy(Moody(Arc::clone(&angry)))
    })
    .await;
    let mut other = router.client().await;
    other.send_request("POST", "/generate", &[], GOOD.as_bytes()).await;
    decode.wait_for_requests(1).await;

    angry.store(true, Ordering::SeqCst);
    let request = format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 12\r\n\r\n{GOOD}");
    for _ in 0..3 {
        let response = send_and_read_to_end(&router, &request).await;
        assert_final_error(&response, "500 Internal Server Error", "internal");
        assert!(!response.contains("mood"), "{response}");
    }
    angry.store(false, Ordering::SeqCst);

    gate.open();
    assert_eq!(other.response().await.json()["late"], 1);
    post(&mut other).await;
    router.wait_idle().await;
    assert_eq!(prefill.requests().len(), 2, "the three requests that panicked reached no server");
}

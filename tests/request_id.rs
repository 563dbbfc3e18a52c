//! The name of a request: whose it is, and that everybody hears the same one.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use kit::{Client, Program, Router, Step, Upstream, json};

const BODY: &[u8] = br#"{"text":"x"}"#;

async fn well() -> Upstream {
    let answer = b"HTTP/1.1 200 OK\r\nx-request-id: the-servers\r\nX-Request-Id: its-second\r\ncontent-length: 2\r\n\r\n{}";
    Upstream::always(*answer).await
}

/// Sends a request with these headers: what the client and both servers were told.
async fn told(headers: &[(&str, &str)], args: &[&str]) -> String {
    let (prefill, decode) = (well().await, well().await);
    let program = Program::between(&prefill, &decode, args).await;
    let mut client = program.client().await;
    client.start("POST", "/generate", headers, BODY).await;
    let answer = client.answer().await;
    let id = answer.head.header("x-request-id").expect("a name").to_owned();
    kit::patiently("the prefill leg", async {
        while prefill.seen().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for server in [&prefill, &decode] {
        assert_eq!(server.only().await.head.header("x-request-id"), Some(id.as_str()), "{headers:?}");
    }
    id
}

fn is_made(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[tokio::test]
async fn a_clients_name_reaches_both_servers_and_comes_back_once() {
    assert_eq!(told(&[("X-Request-ID", "r-1/2.3_4:5")], &[]).await, "r-1/2.3_4:5");
    assert_eq!(told(&[("x-request-id", "first"), ("x-request-id", "second")], &[]).await, "first");
    assert_eq!(told(&[("x-request-id", "r"), ("connection", "x-request-id")], &[]).await, "r");
    assert_eq!(told(&[("x-trace-id", "t"), ("x-correlation-id", "c")], &[]).await, "c");
}

#[tokio::test]
async fn a_missing_or_bad_name_is_replaced() {
    let long = "a".repeat(129);
    for bad in ["a b", "a\"b", "", "\u{e4}", long.as_str()] {
        let id = told(&[("x-request-id", bad)], &[]).await;
        assert!(is_made(&id), "{bad}: {id}");
    }
    let [one, other] = [told(&[], &[]).await, told(&[], &[]).await];
    assert!(is_made(&one) && one != other, "{one} {other}");
}

#[tokio::test]
async fn the_headers_that_are_looked_at_can_be_chosen() {
    let args = ["--request-id-headers", "x-mine", "x-other"];
    assert_eq!(told(&[("x-request-id", "r"), ("x-other", "o")], &args).await, "o");
    assert!(is_made(&told(&[("x-request-id", "r")], &args).await));
    for (name, why) in [("authorization", "that header holds a secret"), ("a:b", "not the name of a header")]
    {
        let mut program = Program::spawn("http://a:1", "http://b:1", &["--request-id-headers", name]);
        assert_eq!(program.exit_code().await, Some(2));
        let said = format!("error: --request-id-headers {name}: {why}");
        assert!(program.lines()[0].starts_with(&said), "{:?}", program.lines());
    }
}

#[tokio::test]
async fn every_answer_has_a_name() {
    let prefill = Upstream::start(|_| vec![Step::Hang]).await;
    let decode = Upstream::always(json("500 Internal Server Error", "{}")).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.request_head_timeout(std::time::Duration::from_millis(300))
    })
    .await;
    for (method, target, body, status) in [
        ("POST", "/generate", &b"no JSON"[..], 400),
        ("POST", "/generate", BODY, 500),
        ("GET", "/generate", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/health", b"", 200),
        ("GET", "/ready", b"", 200),
    ] {
        let mut client = router.client().await;
        client.start(method, target, &[("x-request-id", "r")], body).await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.head.header("x-request-id")), (status, Some("r")), "{target}");
    }
    for (head, status) in [
        (&b"GET /health HTTP/1.1\r\n\r\n"[..], 400),
        (b"GET /health HTTP/1.1\r\nhost:", 408),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ] {
        let mut client: Client = router.client().await;
        client.send(head).await;
        let answer = client.answer().await;
        assert_eq!(answer.status(), status);
        assert!(answer.head.header("x-request-id").is_some_and(is_made), "{:?}", answer.head);
    }
}

//! Request ids: taken from the client or generated, and the same for both backends, the client and the log.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use kit::{Client, Router, RouterProcess, ScriptedServer, Step, json};

const BODY: &[u8] = br#"{"text":"x"}"#;

async fn ok_server() -> ScriptedServer {
    let response = b"HTTP/1.1 200 OK\r\nx-request-id: the-servers\r\nX-Request-Id: its-second\r\ncontent-length: 2\r\n\r\n{}";
    ScriptedServer::always(*response).await
}

/// Sends a request with these headers. Returns the id, which the client and both servers must agree on.
async fn id_of(headers: &[(&str, &str)], args: &[&str]) -> String {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let program = RouterProcess::between(&prefill, &decode, args).await;
    let mut client = program.client().await;
    client.send_request("POST", "/generate", headers, BODY).await;
    let response = client.response().await;
    let id = response.head.header("x-request-id").expect("a name").to_owned();
    kit::with_timeout("the prefill leg", async {
        while prefill.requests().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for server in [&prefill, &decode] {
        assert_eq!(server.only_request().await.head.header("x-request-id"), Some(id.as_str()), "{headers:?}");
    }
    id
}

fn is_generated(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[tokio::test]
async fn client_request_id_reaches_both_backends_and_returns_once() {
    assert_eq!(id_of(&[("X-Request-ID", "r-1/2.3_4:5")], &[]).await, "r-1/2.3_4:5");
    assert_eq!(id_of(&[("x-request-id", "first"), ("x-request-id", "second")], &[]).await, "first");
    assert_eq!(id_of(&[("x-request-id", "r"), ("connection", "x-request-id")], &[]).await, "r");
    assert_eq!(id_of(&[("x-trace-id", "t"), ("x-correlation-id", "c")], &[]).await, "c");
}

#[tokio::test]
async fn missing_or_invalid_request_id_is_replaced() {
    let long = "a".repeat(129);
    for bad in ["a b", "a\"b", "", "\u{e4}", long.as_str()] {
        let id = id_of(&[("x-request-id", bad)], &[]).await;
        assert!(is_generated(&id), "{bad}: {id}");
    }
    let [one, other] = [id_of(&[], &[]).await, id_of(&[], &[]).await];
    assert!(is_generated(&one) && one != other, "{one} {other}");
}

#[tokio::test]
async fn request_id_headers_are_configurable() {
    let args = ["--request-id-headers", "x-mine", "x-other"];
    assert_eq!(id_of(&[("x-request-id", "r"), ("x-other", "o")], &args).await, "o");
    assert!(is_generated(&id_of(&[("x-request-id", "r")], &args).await));
    for (name, why) in [("authorization", "that header holds a secret"), ("a:b", "not the name of a header")]
    {
        let mut program = RouterProcess::spawn("http://a:1", "http://b:1", &["--request-id-headers", name]);
        assert_eq!(program.exit_code().await, Some(2));
        let said = format!("error: --request-id-headers {name}: {why}");
        assert!(program.lines()[0].starts_with(&said), "{:?}", program.lines());
    }
}

#[tokio::test]
async fn every_response_has_a_request_id() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::always(json("500 Internal Server Error", "{}")).await;
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
        client.send_request(method, target, &[("x-request-id", "r")], body).await;
        let response = client.response().await;
        assert_eq!(
            (response.status(), response.head.header("x-request-id")),
            (status, Some("r")),
            "{target}"
        );
    }
    for (head, status) in [
        (&b"GET /health HTTP/1.1\r\n\r\n"[..], 400),
        (b"GET /health HTTP/1.1\r\nhost:", 408),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ] {
        if head.starts_with(b"PRI") && kit::skip_on_hyper("it closes the connection without a response") {
            continue;
        }
        let mut client: Client = router.client().await;
        client.send(head).await;
        let response = client.response().await;
        assert_eq!(response.status(), status);
        assert!(response.head.header("x-request-id").is_some_and(is_generated), "{:?}", response.head);
    }
}

//! Invalid requests get a 400, 404, 405, 413 or 415 with a code, and the connection stays usable.

mod kit;

use kit::{Client, Response, Router, ScriptedServer, json};

const GOOD: &str = r#"{"text":"a"}"#;

struct Pair {
    prefill: ScriptedServer,
    decode: ScriptedServer,
    router: Router,
}

async fn pair(max_payload_size: usize) -> Pair {
    let response = json("200 OK", "{}");
    let (prefill, decode) =
        (ScriptedServer::always(response.clone()).await, ScriptedServer::always(response).await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.max_payload_size(max_payload_size)).await;
    Pair { prefill, decode, router }
}

/// Status, code and message of an error in the format of OpenAI's API.
fn error_parts(response: &Response) -> (u16, String, String) {
    assert_eq!(response.head.header("content-type"), Some("application/json"));
    let error = &response.json()["error"];
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error.as_object().unwrap().contains_key("param"));
    (response.status(), response.error_code(), error["message"].as_str().unwrap().to_owned())
}

async fn assert_usable(client: &mut Client) {
    assert!(!client.has_unread_bytes());
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

#[tokio::test]
async fn non_object_body_gets_400_with_the_reason() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    let deep = format!(r#"{{"a":{}"#, "[".repeat(100_000));
    let bodies: [(&[u8], &str); 14] = [
        (b"", "the body is empty; a JSON object is expected"),
        (b" \n", "the body is empty; a JSON object is expected"),
        (b"\xEF\xBB\xBF{}", "the body begins with a byte order mark, which JSON does not allow"),
        (b"[1]", "the body must be a JSON object, not an array"),
        (b"\"text\"", "the body must be a JSON object, not a string"),
        (b"1", "the body must be a JSON object, not a number"),
        (b"null", "the body must be a JSON object, not null"),
        (b"text=a", "the body is not JSON: expected '{' at byte 0"),
        (b"{\"a\":\"\xFF\"}", "the body is not UTF-8 at byte 6"),
        (b"{\"a\":1", "the body is not JSON: it ends at byte 6 inside the object"),
        (b"{\"a\":1}}", "the body is not JSON: expected nothing after the object at byte 7"),
        (b"{\"a\" 1}", "the body is not JSON: expected ':' at byte 5"),
        (b"{\"a\":nope}", "the body is not JSON: expected a JSON value at byte 5"),
        (deep.as_bytes(), "the body is nested deeper than 1024 levels at byte 1028"),
    ];
    for (body, message) in bodies {
        let response = client.post("/generate", body).await;
        assert_eq!(error_parts(&response), (400, "invalid_json".into(), message.into()));
        assert_usable(&mut client).await;
    }
    // Only the valid requests in between.
    pair.prefill.wait_for_requests(14).await;
    assert_eq!((pair.prefill.requests().len(), pair.decode.requests().len()), (14, 14));
}

#[tokio::test]
async fn an_n_of_one_or_in_another_place_asks_for_one_sample() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for (path, body) in [
        ("/v1/chat/completions", r#"{"messages":[],"n":1}"#),
        ("/v1/chat/completions", r#"{"messages":[{"n":2}]}"#),
        ("/generate", r#"{"text":"a","n":2,"sampling_params":{"n":1}}"#),
    ] {
        assert_eq!(client.post(path, body).await.status(), 200, "{path} {body}");
    }
    pair.prefill.wait_for_requests(3).await;
    assert_eq!((pair.prefill.requests().len(), pair.decode.requests().len()), (3, 3));
}

#[tokio::test]
async fn oversized_body_gets_413_and_the_connection_stays_usable() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    let just_right = format!(r#"{{"text":"{}"}}"#, "x".repeat(100 - 11));
    assert_eq!(just_right.len(), 100);
    assert_eq!(client.post("/generate", &just_right).await.status(), 200);
    for size in [101, 5_000, 3 << 20] {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(size - 11));
        let response = client.post("/generate", body).await;
        let message =
            "the request body is larger than the limit of 100 bytes (--max-payload-size)".to_owned();
        assert_eq!(error_parts(&response), (413, "body_too_large".into(), message));
        assert_usable(&mut client).await;
    }
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    for _ in 0..20 {
        client.send(format!("10\r\n{}\r\n", "x".repeat(16))).await;
    }
    client.send("0\r\n\r\n").await;
    // The body is not JSON either; which of the two is reported does not matter.
    assert!([400, 413].contains(&client.response().await.status()));
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn oversized_chunked_body_gets_413() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    client.send("9\r\n{\"text\":\"\r\n").await;
    for _ in 0..20 {
        client.send(format!("10\r\n{}\r\n", "x".repeat(16))).await;
    }
    client.send("2\r\n\"}\r\n0\r\n\r\n").await;
    assert_eq!((client.response().await.status()), 413);
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn expect_100_continue_gets_100_before_the_body() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    let head = "POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n";
    client.send(head).await;
    assert_eq!(client.head().await.start_line, "HTTP/1.1 100 Continue");
    client.send(GOOD).await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(pair.decode.only_request().await.head.header("expect"), None);
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn expect_100_continue_with_an_oversized_body_gets_413_at_once() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 101\r\n\r\n")
        .await;
    let response = client.response().await;
    assert_eq!((response.status(), response.head.header("connection")), (413, Some("close")));
    client.wait_closed().await;
}

#[tokio::test]
async fn huge_body_gets_413_unread_and_closes_the_connection() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 999999999999\r\n\r\n{").await;
    let response = client.response().await;
    assert_eq!((response.status(), response.head.header("connection")), (413, Some("close")));
    client.wait_closed().await;
}

#[tokio::test]
async fn compressed_body_gets_415() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for (name, value) in [("content-encoding", "gzip"), ("x-body-compressed", "zstd")] {
        client.send_request("POST", "/generate", &[(name, value)], b"\x1f\x8b\x08").await;
        let response = client.response().await;
        assert_eq!((response.status(), response.error_code()), (415, "unsupported_encoding".into()));
        assert_usable(&mut client).await;
    }
}

#[tokio::test]
async fn unknown_paths_get_404_and_wrong_methods_405_with_allow() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for path in
        ["/nothing", "/v1", "/generate/x", "/v1/embedding", "/v1/models/..", "/healthzz", "/%67enerate"]
    {
        let response = client.post(path, r#"{"text":"a"}"#).await;
        assert_eq!((response.status(), response.error_code()), (404, "not_found".into()), "{path}");
    }
    for (method, path, allow) in [
        ("GET", "/generate", "POST, PUT"),
        ("DELETE", "/generate", "POST, PUT"),
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("GET", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/health_generate", "GET, HEAD"),
        ("PUT", "/flush_cache", "GET, POST"),
        ("POST", "/server_info", "GET, HEAD"),
        ("POST", "/get_server_info", "GET, HEAD"),
        ("POST", "/model_info", "GET, HEAD"),
        ("POST", "/get_model_info", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/v1/models/", "GET, HEAD"),
        ("GET", "/v1/embeddings", "POST"),
        ("PUT", "/start_profile", "GET, POST"),
    ] {
        client.send_request(method, path, &[], b"{}").await;
        let response = client.response().await;
        assert_eq!((response.status(), response.head.header("allow")), (405, Some(allow)), "{method} {path}");
        assert_eq!(response.error_code(), "method_not_allowed");
    }
    assert_usable(&mut client).await;
    pair.prefill.wait_for_requests(1).await;
    assert_eq!(pair.prefill.requests().len(), 1, "nothing else reached a server");
}

#[tokio::test]
async fn bad_request_affects_no_other_connection() {
    let pair = pair(1 << 20).await;
    let (mut bad, mut good) = (pair.router.client().await, pair.router.client().await);
    for _ in 0..50 {
        bad.send_request("POST", "/generate", &[], b"nonsense").await;
        good.send_request("POST", "/generate", &[], GOOD.as_bytes()).await;
        assert_eq!((bad.response().await.status(), good.response().await.status()), (400, 200));
    }
}

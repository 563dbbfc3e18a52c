//! What is wrong with a request is said in a 400 (or 413, 415, 404, 405) with a
//! code, and the connection stays usable.

mod kit;

use kit::{Answer, Client, Router, Upstream, json};

const GOOD: &str = r#"{"text":"a"}"#;

struct Pair {
    prefill: Upstream,
    decode: Upstream,
    router: Router,
}

async fn pair(max_payload_size: usize) -> Pair {
    let answer = json("200 OK", "{}");
    let (prefill, decode) = (Upstream::always(answer.clone()).await, Upstream::always(answer).await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.max_payload_size(max_payload_size)).await;
    Pair { prefill, decode, router }
}

/// The error's code and message, in the shape that OpenAI's clients read.
fn said(answer: &Answer) -> (u16, String, String) {
    assert_eq!(answer.head.header("content-type"), Some("application/json"));
    let error = &answer.json()["error"];
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error.as_object().unwrap().contains_key("param"));
    (answer.status(), answer.code(), error["message"].as_str().unwrap().to_owned())
}

async fn assert_usable(client: &mut Client) {
    assert!(!client.has_leftovers());
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

#[tokio::test]
async fn a_body_that_is_no_json_object_gets_a_400_that_says_why() {
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
        let answer = client.post("/generate", body).await;
        assert_eq!(said(&answer), (400, "invalid_json".into(), message.into()));
        assert_usable(&mut client).await;
    }
    // Only the good ones in between.
    pair.prefill.arrived(14).await;
    assert_eq!((pair.prefill.seen().len(), pair.decode.seen().len()), (14, 14));
}

#[tokio::test]
async fn more_than_one_sample_is_refused_because_decode_would_hang() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for (path, body) in [
        ("/v1/chat/completions", r#"{"messages":[],"n":2}"#),
        ("/v1/completions", r#"{"prompt":"a","n":3}"#),
        ("/generate", r#"{"text":"a","sampling_params":{"n":2}}"#),
        ("/generate", r#"{"text":["a","b"],"sampling_params":[{"n":1},{"n":2}]}"#),
    ] {
        let answer = client.post(path, body).await;
        assert_eq!((answer.status(), answer.code()), (400, "n_not_supported".into()), "{path} {body}");
    }
    assert!(pair.prefill.seen().is_empty() && pair.decode.seen().is_empty());
    for (path, body) in [
        ("/v1/chat/completions", r#"{"messages":[],"n":1}"#),
        ("/v1/chat/completions", r#"{"messages":[{"n":2}]}"#),
        ("/generate", r#"{"text":"a","n":2,"sampling_params":{"n":1}}"#),
    ] {
        assert_eq!(client.post(path, body).await.status(), 200, "{path} {body}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_gets_a_413_and_the_connection_stays_usable() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    let just_right = format!(r#"{{"text":"{}"}}"#, "x".repeat(100 - 11));
    assert_eq!(just_right.len(), 100);
    assert_eq!(client.post("/generate", &just_right).await.status(), 200);
    for size in [101, 5_000, 3 << 20] {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(size - 11));
        let answer = client.post("/generate", body).await;
        let message = "the body is over the limit of 100 bytes".to_owned();
        assert_eq!(said(&answer), (413, "body_too_large".into(), message));
        assert_usable(&mut client).await;
    }
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    for _ in 0..20 {
        client.send(format!("10\r\n{}\r\n", "x".repeat(16))).await;
    }
    client.send("0\r\n\r\n").await;
    // The first sixteen bytes are no JSON either; which of the two is said does not matter.
    assert!([400, 413].contains(&client.answer().await.status()));
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_gets_a_413() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    client.send("9\r\n{\"text\":\"\r\n").await;
    for _ in 0..20 {
        client.send(format!("10\r\n{}\r\n", "x".repeat(16))).await;
    }
    client.send("2\r\n\"}\r\n0\r\n\r\n").await;
    assert_eq!((client.answer().await.status()), 413);
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn a_client_that_expects_100_continue_gets_it_before_it_sends() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    let head = "POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n";
    client.send(head).await;
    assert_eq!(client.head().await.start_line, "HTTP/1.1 100 Continue");
    client.send(GOOD).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(pair.decode.only().await.head.header("expect"), None);
    assert_usable(&mut client).await;
}

#[tokio::test]
async fn a_client_that_expects_100_continue_for_too_much_gets_a_413_at_once() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 101\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.head.header("connection")), (413, Some("close")));
    client.closed().await;
}

#[tokio::test]
async fn a_body_far_over_the_limit_is_refused_unread_and_the_connection_closed() {
    let pair = pair(100).await;
    let mut client = pair.router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 999999999999\r\n\r\n{").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.head.header("connection")), (413, Some("close")));
    client.closed().await;
}

#[tokio::test]
async fn a_compressed_body_gets_a_415() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for (name, value) in [("content-encoding", "gzip"), ("x-body-compressed", "zstd")] {
        client.start("POST", "/generate", &[(name, value)], b"\x1f\x8b\x08").await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.code()), (415, "unsupported_encoding".into()));
        assert_usable(&mut client).await;
    }
}

#[tokio::test]
async fn unknown_paths_are_404_and_wrong_methods_405_with_allow() {
    let pair = pair(1 << 20).await;
    let mut client = pair.router.client().await;
    for path in ["/", "/v1", "/generate/", "/v1/embeddings", "/v1/models/", "/healthz", "/%67enerate"] {
        let answer = client.post(path, r#"{"text":"a"}"#).await;
        assert_eq!((answer.status(), answer.code()), (404, "not_found".into()), "{path}");
    }
    for (method, path, allow) in [
        ("GET", "/generate", "POST, PUT"),
        ("DELETE", "/generate", "POST, PUT"),
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("GET", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/health_generate", "GET"),
        ("GET", "/flush_cache", "POST"),
        ("POST", "/server_info", "GET"),
        ("POST", "/get_server_info", "GET"),
        ("POST", "/model_info", "GET"),
        ("POST", "/get_model_info", "GET"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/tiny", "GET"),
    ] {
        client.start(method, path, &[], b"{}").await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.head.header("allow")), (405, Some(allow)), "{method} {path}");
        assert_eq!(answer.code(), "method_not_allowed");
    }
    assert_usable(&mut client).await;
    pair.prefill.arrived(1).await;
    assert_eq!(pair.prefill.seen().len(), 1, "nothing else reached a server");
}

#[tokio::test]
async fn a_bad_request_harms_no_other_connection() {
    let pair = pair(1 << 20).await;
    let (mut bad, mut good) = (pair.router.client().await, pair.router.client().await);
    for _ in 0..50 {
        bad.start("POST", "/generate", &[], b"nonsense").await;
        good.start("POST", "/generate", &[], GOOD.as_bytes()).await;
        assert_eq!((bad.answer().await.status(), good.answer().await.status()), (400, 200));
    }
}

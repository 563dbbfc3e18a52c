//! What of HTTP/1.1 is accepted from clients: request heads, framing, and the chunked decoder.

mod kit;

use kit::Client;
use kit::raw::{Setup, assert_final_error, send_and_read_to_end};

const GOOD: &str = r#"{"text":"a"}"#;

async fn post(client: &mut Client) {
    assert_eq!(client.post("/generate", GOOD).await.status(), 200);
}

#[tokio::test]
async fn unusual_but_unambiguous_heads_are_accepted() {
    let setup = Setup::start(|config| config).await;
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
        let mut client = setup.router.client().await;
        client.send(request).await;
        assert_eq!(client.response().await.status(), 200, "{what}");
        post(&mut client).await;
    }
}

/// Requests that lenient parsers accept, each with the reason why it is rejected.
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
async fn ambiguous_heads_get_400_and_a_closed_connection() {
    let setup = Setup::start(|config| config).await;
    for (request, why) in REFUSED {
        // A request behind it must get no response.
        let followed = format!("{request}GET /health HTTP/1.1\r\nhost: r\r\n\r\n");
        let response = send_and_read_to_end(&setup.router, followed).await;
        assert_final_error(&response.replace("HTTP/1.0", "HTTP/1.1"), "400 Bad Request", "bad_request");
        assert!(response.contains(why), "{request}{response}");
    }
    assert!(setup.prefill.requests().is_empty() && setup.decode.requests().is_empty());
}

#[tokio::test]
async fn malformed_heads_get_a_json_error_and_a_closed_connection() {
    if kit::skip_on_hyper("its response to a malformed head has no body") {
        return;
    }
    let setup = Setup::start(|config| config).await;
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
        let response = send_and_read_to_end(&setup.router, input).await;
        assert_final_error(&response, status, code);
    }
    assert!(setup.prefill.requests().is_empty() && setup.decode.requests().is_empty());
}

#[tokio::test]
async fn request_head_limit_is_64_kib() {
    let setup = Setup::start(|config| config).await;
    let head = |length: usize| {
        let around = "GET /health HTTP/1.1\r\nhost: r\r\nx: \r\n\r\n".len();
        format!("GET /health HTTP/1.1\r\nhost: r\r\nx: {}\r\n\r\n", "a".repeat(length - around))
    };
    let mut client = setup.router.client().await;
    client.send(head(64 << 10)).await;
    assert_eq!(client.response().await.status(), 200);
    client.send(head((64 << 10) + 1)).await;
    assert_eq!(client.response().await.status(), 431);
    client.wait_closed().await;
}

#[tokio::test]
async fn http2_preface_gets_400_when_http2_is_off() {
    if kit::skip_on_hyper("it closes the connection without a response") {
        return;
    }
    let setup = Setup::start(|config| config).await;
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for bytes in [preface.to_owned(), format!("{preface}\0\0\0\x04\0\0\0\0\0")] {
        let response = send_and_read_to_end(&setup.router, bytes).await;
        assert_final_error(&response, "400 Bad Request", "bad_request");
    }
}

#[tokio::test]
async fn content_length_beside_chunked_is_ignored_and_closes_the_connection() {
    let setup = Setup::start(|config| config).await;
    for headers in
        ["content-length: 5\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 5"]
    {
        let request = format!(
            "POST /generate HTTP/1.1\r\nhost: r\r\n{headers}\r\n\r\nc\r\n{GOOD}\r\n0\r\n\r\n\
             GET /health HTTP/1.1\r\nhost: r\r\n\r\n"
        );
        let response = send_and_read_to_end(&setup.router, request).await;
        assert!(
            response.starts_with("HTTP/1.1 200 OK\r\n") && response.contains("connection: close"),
            "{response}"
        );
        assert_eq!(response.matches("HTTP/1.1").count(), 1, "{response}");
    }
    assert_eq!(setup.decode.requests().len(), 2);
    assert!(setup.decode.requests().iter().all(|seen| seen.json()["text"] == "a"));
}

#[tokio::test]
async fn malformed_chunks_get_400_and_a_closed_connection() {
    let setup = Setup::start(|config| config).await;
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
            let response = send_and_read_to_end(&setup.router, head + body).await;
            assert_final_error(&response, "400 Bad Request", "body_read");
        }
    }
    assert!(setup.prefill.requests().is_empty() && setup.decode.requests().is_empty());
}

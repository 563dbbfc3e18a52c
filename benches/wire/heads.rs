//! Heads: read from one side and written to the other.

use divan::Bencher;
use mini_lb::internals;

/// What OpenAI's client for Python sends.
const REQUEST: &str = "POST /v1/chat/completions HTTP/1.1\r\nHost: router:8000\r\nAccept: application/json\r\n\
    Accept-Encoding: gzip, deflate\r\nAuthorization: Bearer sk-0123456789abcdef\r\nConnection: keep-alive\r\n\
    Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.1\r\nX-Request-Id: 5f2c1e0a9b7d4c63\r\n\
    X-Stainless-Lang: python\r\nContent-Length: 300\r\n\r\n";

/// What SGLang sends at the start of a stream.
const RESPONSE: &str = "HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n\
    content-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n";

#[divan::bench]
fn forward_request_head_10_headers(bencher: Bencher<'_, '_>) {
    let host = "prefill-1:30000";
    bencher.bench_local(|| internals::forward_request_head(REQUEST.as_bytes(), host));
}

#[divan::bench]
fn forward_response_head_4_headers(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| internals::forward_response_head(RESPONSE.as_bytes()));
}

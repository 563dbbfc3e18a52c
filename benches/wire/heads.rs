//! Heads: which headers pass, and how they are written for both legs.

use divan::Bencher;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use mini_lb::internals;

/// What the official client for Python sends, but for `Host` and length.
const REQUEST: [(&str, &str); 8] = [
    ("accept", "application/json"),
    ("accept-encoding", "gzip, deflate"),
    ("authorization", "Bearer sk-0123456789abcdef"),
    ("connection", "keep-alive"),
    ("content-type", "application/json"),
    ("user-agent", "OpenAI/Python 2.8.1"),
    ("x-request-id", "5f2c1e0a9b7d4c63"),
    ("x-stainless-lang", "python"),
];

const ANSWER: [(&str, &str); 4] = [
    ("date", "Sun, 22 Nov 2026 00:00:00 GMT"),
    ("server", "uvicorn"),
    ("content-type", "text/event-stream; charset=utf-8"),
    ("transfer-encoding", "chunked"),
];

fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
    let line = |line: &(&'static str, &'static str)| {
        (HeaderName::from_static(line.0), HeaderValue::from_static(line.1))
    };
    lines.iter().map(line).collect()
}

#[divan::bench]
fn write_head_of_8_headers_for_both_legs(bencher: Bencher<'_, '_>) {
    let (headers, host) = (headers(&REQUEST), HeaderValue::from_static("prefill-1:30000"));
    bencher.bench_local(|| internals::write_head(&headers, &host));
}

#[divan::bench]
fn filter_answer_of_4_headers(bencher: Bencher<'_, '_>) {
    let headers = headers(&ANSWER);
    bencher.with_inputs(|| headers.clone()).bench_local_values(internals::filter_answer);
}

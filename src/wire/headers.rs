//! Which headers pass the router, in both directions.
//!
//! End-to-end headers pass as they are. What is left out belongs to one
//! connection (RFC 9110, section 7.6.1), is made anew (`Host`, lengths), or would
//! let a client steer a server past the router (`x-override-*`).

use hyper::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, HeaderMap, HeaderName,
    HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// Headers of one connection that `Connection` need not name.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The name of a request, which the router makes if a client does not.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// With `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1` a server takes rooms, ranks and ids from these.
const OVERRIDE_PREFIX: &str = "x-override-";
/// Chooses a data-parallel rank on OpenAI routes; a client's choice would reach both legs.
const DATA_PARALLEL_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");
/// Says that SGLang should decompress the body, which the router must read first.
const BODY_COMPRESSED: HeaderName = HeaderName::from_static("x-body-compressed");

/// Writes those of a client's headers that a leg has too, a line each; the leg's own `Host` and length are not among
/// them. A request with a JSON body gets a content type if it has none: SGLang refuses JSON without it, and the body was
/// seen to be JSON. A type that the client chose itself is the client's.
pub(crate) fn write_for_backend(headers: &HeaderMap, is_json: bool, into: &mut Vec<u8>) {
    let listed = listed(headers);
    for (name, value) in headers {
        if !is_own(name) && !listed.contains(name) {
            write_line(name.as_str().as_bytes(), value.as_bytes(), into);
        }
    }
    if is_json && !headers.contains_key(CONTENT_TYPE) {
        write_line(b"content-type", b"application/json", into);
    }
}

fn write_line(name: &[u8], value: &[u8], into: &mut Vec<u8>) {
    for part in [name, b": ", value, b"\r\n"] {
        into.extend_from_slice(part);
    }
}

/// Whether a client's header is not for servers, whoever sends it.
fn is_own(name: &HeaderName) -> bool {
    const OWN: [HeaderName; 4] = [HOST, CONTENT_LENGTH, EXPECT, DATA_PARALLEL_RANK];
    OWN.contains(name) || HOP_BY_HOP.contains(name) || name.as_str().starts_with(OVERRIDE_PREFIX)
}

/// Turns a server's headers into those for the client.
pub(crate) fn for_client(headers: &mut HeaderMap) {
    // The body was framed by its encoding, which ends here: a length beside it is not the body's (RFC 9112, section
    // 6.3), and would cut it off.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    remove_hop_by_hop(headers);
}

/// The encoding of a body that the router cannot read, as the client named it.
pub(crate) fn unreadable_encoding(headers: &HeaderMap) -> Option<&HeaderValue> {
    let encoded =
        headers.get(CONTENT_ENCODING).filter(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"));
    encoded.or_else(|| headers.get(BODY_COMPRESSED))
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    // Most answers have none, and looking is cheaper than removing.
    if !headers.keys().any(|name| HOP_BY_HOP.contains(name)) {
        return;
    }
    for name in listed(headers).iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The headers named in `Connection`. The body's framing and the request's name are not the peer's to switch off here,
/// and what is no header name can't name a header.
fn listed(headers: &HeaderMap) -> Vec<HeaderName> {
    let lists = headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes);
    let names = lists.flat_map(|list| list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii));
    names
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .filter(|name| *name != CONTENT_LENGTH && *name != REQUEST_ID)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn sorted(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The lines that a leg gets, in alphabetical order.
    fn written(headers: &HeaderMap, is_json: bool) -> Vec<String> {
        let mut text = Vec::new();
        write_for_backend(headers, is_json, &mut text);
        let text = String::from_utf8(text).unwrap();
        let mut lines: Vec<String> = text.split_terminator("\r\n").map(str::to_owned).collect();
        lines.sort();
        lines
    }

    #[test]
    fn end_to_end_headers_pass_and_others_do_not() {
        let request = headers(&[
            ("authorization", "Bearer k"),
            ("traceparent", "00-1"),
            ("x-request-id", "r"),
            ("x-smg-routing-key", "s"),
            ("x-custom", "c"),
            ("content-type", "application/json; charset=utf-8"),
            ("host", "router"),
            ("content-length", "3"),
            ("expect", "100-continue"),
            ("connection", "keep-alive, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("proxy-authorization", "Basic x"),
            ("x-override-bootstrap-room", "1"),
            ("x-override-rid", "a"),
            ("x-data-parallel-rank", "0"),
        ]);
        assert_eq!(
            written(&request, true),
            [
                "authorization: Bearer k",
                "content-type: application/json; charset=utf-8",
                "traceparent: 00-1",
                "x-custom: c",
                "x-request-id: r",
                "x-smg-routing-key: s"
            ]
        );
    }

    #[test]
    fn a_missing_content_type_becomes_json() {
        assert_eq!(written(&HeaderMap::new(), true), ["content-type: application/json"]);
        assert!(written(&HeaderMap::new(), false).is_empty());
    }

    #[test]
    fn repeated_end_to_end_headers_keep_their_order() {
        let request = headers(&[("x-a", "1"), ("x-a", "2"), ("x-override-rid", "r")]);
        assert_eq!(written(&request, false), ["x-a: 1", "x-a: 2"]);
    }

    #[test]
    fn an_answer_keeps_its_length_even_if_connection_names_it() {
        let mut answer =
            headers(&[("connection", "close, content-length, x-hop"), ("x-hop", "1"), ("date", "d")]);
        answer.insert(CONTENT_LENGTH, HeaderValue::from_static("5"));
        for_client(&mut answer);
        assert_eq!(sorted(&answer), ["content-length", "date"]);
    }

    #[test]
    fn a_length_beside_an_encoding_does_not_pass() {
        for encoding in ["chunked", "unknown"] {
            let mut answer = headers(&[("transfer-encoding", encoding), ("content-length", "5")]);
            for_client(&mut answer);
            assert!(answer.is_empty());
        }
    }

    #[test]
    fn compressed_bodies_are_recognised() {
        assert!(unreadable_encoding(&headers(&[("content-encoding", "identity")])).is_none());
        assert_eq!(unreadable_encoding(&headers(&[("content-encoding", "gzip")])).unwrap(), "gzip");
        assert_eq!(unreadable_encoding(&headers(&[("x-body-compressed", "zstd")])).unwrap(), "zstd");
    }
}

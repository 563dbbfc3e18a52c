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

/// With `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1` a server takes rooms, ranks and ids from these.
const OVERRIDE_PREFIX: &str = "x-override-";
/// Chooses a data-parallel rank on OpenAI routes; a client's choice would reach both legs.
const DATA_PARALLEL_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");
/// Says that SGLang should decompress the body, which the router must read first.
const BODY_COMPRESSED: HeaderName = HeaderName::from_static("x-body-compressed");

/// Turns a client's headers into those of a leg, all but `Host`.
pub(crate) fn for_backend(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
    for name in [HOST, CONTENT_LENGTH, EXPECT, DATA_PARALLEL_RANK] {
        headers.remove(name);
    }
    remove_listed(headers, |name| name.as_str().starts_with(OVERRIDE_PREFIX));
}

/// Like [`for_backend`], for a request with a JSON body. SGLang refuses JSON without this content type, and the
/// body was seen to be JSON; a type that the client chose itself is the client's.
pub(crate) fn for_backend_json(headers: &mut HeaderMap) {
    for_backend(headers);
    headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
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

/// Whether the body is a stream of server-sent events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    const KIND: &[u8] = b"text/event-stream";
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.get(..KIND.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(KIND))
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers.get_all(CONNECTION).iter().flat_map(names).collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// The names listed in a `Connection` header. The body's framing is not the peer's to switch off here, and what
/// is no header name can't name a header.
fn names(value: &HeaderValue) -> impl Iterator<Item = HeaderName> {
    let listed = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    listed.filter_map(|name| HeaderName::from_bytes(name).ok()).filter(|name| *name != CONTENT_LENGTH)
}

fn remove_listed(headers: &mut HeaderMap, listed: impl Fn(&HeaderName) -> bool) {
    if headers.keys().any(&listed) {
        let names: Vec<HeaderName> = headers.keys().filter(|name| listed(name)).cloned().collect();
        for name in names {
            headers.remove(name);
        }
    }
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

    #[test]
    fn end_to_end_headers_pass_and_others_do_not() {
        let mut request = headers(&[
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
        for_backend_json(&mut request);
        assert_eq!(
            sorted(&request),
            ["authorization", "content-type", "traceparent", "x-custom", "x-request-id", "x-smg-routing-key"]
        );
        assert_eq!(request[CONTENT_TYPE], "application/json; charset=utf-8");
    }

    #[test]
    fn a_missing_content_type_becomes_json() {
        let mut request = HeaderMap::new();
        for_backend_json(&mut request);
        assert_eq!(request[CONTENT_TYPE], "application/json");
    }

    #[test]
    fn repeated_end_to_end_headers_keep_their_order() {
        let mut request = headers(&[("x-a", "1"), ("x-a", "2"), ("x-override-rid", "r")]);
        for_backend(&mut request);
        assert_eq!(request.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
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

//! Which headers are forwarded, in both directions.
//!
//! End-to-end headers are forwarded unchanged. Left out are headers of a single connection (RFC 9110,
//! section 7.6.1), headers that the router writes itself (`Host`, lengths), and headers by which a client
//! could control a backend past the router (`x-override-*`).

use hyper::header::{COOKIE, HeaderMap, HeaderName, HeaderValue};

use crate::http1::{HeaderId, RawHeaders};

/// The request id's header, which the router generates if the client sends none.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Writes the headers of a client's request that each leg gets, one line each; the leg's own `Host` and
/// length are not among them.
///
/// A JSON body gets a content type if it has none: SGLang answers 400 without it, and the body has been
/// checked to be JSON. A content type that the client chose is not changed.
pub(crate) fn write_for_backend(headers: &RawHeaders, is_json: bool, into: &mut Vec<u8>) {
    write_except(headers, is_not_for_backends, into);
    if is_json && !headers.has(HeaderId::ContentType) {
        write_line(b"content-type", b"application/json", into);
    }
}

/// Writes the headers of a backend's response that the client gets, one line each. `x-request-id` is not
/// among them: the router writes its own.
pub(crate) fn write_for_client(headers: &RawHeaders, into: &mut Vec<u8>) {
    let has_encoding = headers.has(HeaderId::TransferEncoding);
    let is_left_out = |name| is_not_for_clients(name, has_encoding) || name == HeaderId::RequestId;
    write_except(headers, is_left_out, into);
}

/// Removes the headers of a backend's response that the client does not get.
pub(crate) fn retain_for_client(headers: &mut RawHeaders) {
    // Few responses have such headers. Looking for them is a test of three bits.
    if ![HeaderId::Connection, HeaderId::TransferEncoding, HeaderId::HopByHop]
        .iter()
        .any(|name| headers.has(*name))
    {
        return;
    }
    let has_encoding = headers.has(HeaderId::TransferEncoding);
    let listed: Vec<Vec<u8>> = listed_in_connection(headers).into_iter().map(<[u8]>::to_vec).collect();
    headers.retain(|line| {
        let is_listed = listed.iter().any(|name| name.eq_ignore_ascii_case(line.name));
        !is_listed && !is_not_for_clients(line.id, has_encoding)
    });
}

/// A transfer encoding ends at the router. A length beside it is not the body's (RFC 9112, section 6.3): a
/// client that took it for the body's would truncate the body there.
fn is_not_for_clients(name: HeaderId, has_encoding: bool) -> bool {
    name.is_hop_by_hop() || (has_encoding && name == HeaderId::ContentLength)
}

/// Writes all lines except those that are left out or that `Connection` lists.
fn write_except(headers: &RawHeaders, is_left_out: impl Fn(HeaderId) -> bool, into: &mut Vec<u8>) {
    let listed = listed_in_connection(headers);
    for line in headers.iter() {
        let is_listed = || listed.iter().any(|name| name.eq_ignore_ascii_case(line.name));
        if !is_left_out(line.id) && !is_listed() {
            into.extend_from_slice(line.text);
            into.extend_from_slice(b"\r\n");
        }
    }
}

pub(crate) fn write_line(name: &[u8], value: &[u8], into: &mut Vec<u8>) {
    for part in [name, b": ", value, b"\r\n"] {
        into.extend_from_slice(part);
    }
}

/// The encoding of a body that the router cannot read, as the client named it.
pub(crate) fn unreadable_encoding(headers: &RawHeaders) -> Option<&[u8]> {
    let encoding = headers.get(HeaderId::ContentEncoding).filter(|value| is_compressed(value));
    // SGLang decompresses such a body (`SGLANG_ENABLE_REQUEST_DECOMPRESSION`), but the router has to add
    // fields to it before.
    encoding.or_else(|| headers.get(HeaderId::BodyCompressed))
}

/// The registered codings of content (RFC 9110, section 8.4.1, and the IANA registry) that browsers, SDKs and
/// servers use.
const CODINGS: [&[u8]; 7] = [b"gzip", b"x-gzip", b"deflate", b"br", b"zstd", b"compress", b"x-compress"];

/// Whether a `Content-Encoding` names a compression. An empty one, `identity`, `none` or a charset is sent by
/// careless clients with plain JSON, and SGLang does not look at the header at all. A body in a coding that
/// is not known here is refused as no JSON.
fn is_compressed(value: &[u8]) -> bool {
    let mut codings = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    codings.any(|coding| CODINGS.iter().any(|known| known.eq_ignore_ascii_case(coding)))
}

/// Whether a client's header must not reach a backend.
fn is_not_for_backends(name: HeaderId) -> bool {
    // `x-override-*` replaces the bootstrap fields on servers that allow it, and `x-data-parallel-rank` is a
    // rank of one server that would reach both legs.
    let is_control = matches!(name, HeaderId::Override | HeaderId::DataParallelRank);
    is_control
        || name.is_hop_by_hop()
        || matches!(name, HeaderId::Host | HeaderId::ContentLength | HeaderId::Expect)
}

/// The headers that `Connection` lists, which end at the router (RFC 9110, section 7.6.1). The body's length
/// and the request id cannot be removed that way: the router's handling of both depends on them.
fn listed_in_connection(headers: &RawHeaders) -> Vec<&[u8]> {
    let is_removable = |name: &&[u8]| {
        let known = HeaderId::of(name);
        // Hop-by-hop headers are removed anyway.
        !known.is_hop_by_hop() && ![HeaderId::ContentLength, HeaderId::RequestId].contains(&known)
    };
    headers.connection_options().filter(is_removable).collect()
}

/// Cookies may come as several headers over HTTP/2; servers speak HTTP/1.1, where they must be one (RFC 9113,
/// 8.2.3).
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> RawHeaders {
        pairs.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    /// The lines that a backend gets, in alphabetical order.
    fn written(headers: &RawHeaders, is_json: bool) -> Vec<String> {
        let mut text = Vec::new();
        write_for_backend(headers, is_json, &mut text);
        let text = String::from_utf8(text).unwrap();
        let mut lines: Vec<String> = text.split_terminator("\r\n").map(str::to_owned).collect();
        lines.sort();
        lines
    }

    #[test]
    fn only_end_to_end_headers_reach_a_backend() {
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
    fn a_json_body_without_a_content_type_gets_one() {
        assert_eq!(written(&RawHeaders::default(), true), ["content-type: application/json"]);
        assert!(written(&RawHeaders::default(), false).is_empty());
    }

    #[test]
    fn repeated_end_to_end_headers_keep_their_order() {
        let request = headers(&[("x-a", "1"), ("x-a", "2"), ("x-override-rid", "r")]);
        assert_eq!(written(&request, false), ["x-a: 1", "x-a: 2"]);
    }

    /// The lines of a response that a client gets, in alphabetical order. Both ways must agree.
    fn forwarded(pairs: &[(&'static str, &'static str)]) -> Vec<String> {
        let (mut text, mut retained) = (Vec::new(), headers(pairs));
        write_for_client(&retained, &mut text);
        retain_for_client(&mut retained);
        let mut lines: Vec<String> =
            String::from_utf8(text).unwrap().split_terminator("\r\n").map(str::to_owned).collect();
        assert!(retained.iter().map(|line| line.text).eq(lines.iter().map(String::as_bytes)));
        lines.sort();
        lines
    }

    #[test]
    fn a_length_that_connection_lists_is_forwarded() {
        let connection = ("connection", "close, content-length, x-hop");
        let response =
            [connection, ("x-hop", "1"), ("date", "d"), ("content-length", "5"), ("keep-alive", "a")];
        assert_eq!(forwarded(&response), ["content-length: 5", "date: d"]);
    }

    #[test]
    fn a_length_beside_a_transfer_encoding_is_not_forwarded() {
        for encoding in ["chunked", "unknown"] {
            assert!(forwarded(&[("transfer-encoding", encoding), ("content-length", "5")]).is_empty());
        }
    }

    #[test]
    fn a_backends_request_id_is_not_forwarded() {
        let mut text = Vec::new();
        write_for_client(&headers(&[("X-Request-Id", "theirs"), ("connection", "x-request-id")]), &mut text);
        assert!(text.is_empty());
    }

    #[test]
    fn compressed_bodies_are_recognised() {
        let encoding = |name, value| unreadable_encoding(&headers(&[(name, value)])).map(<[u8]>::to_vec);
        for plain in ["Identity", "", "none", "utf-8", "identity, "] {
            assert_eq!(encoding("content-encoding", plain), None, "{plain}");
        }
        for compressed in ["gzip", "GZIP", "identity, br", "x-gzip"] {
            assert_eq!(encoding("Content-Encoding", compressed).unwrap(), compressed.as_bytes());
        }
        assert_eq!(encoding("x-body-compressed", "zstd").unwrap(), b"zstd");
    }
}

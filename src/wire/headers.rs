//! Which headers are forwarded, in both directions.
//!
//! End-to-end headers are forwarded unchanged. Left out are headers of a single connection (RFC 9110,
//! section 7.6.1), headers that the router writes itself (`Host`, lengths), and headers by which a client
//! could control a backend past the router (`x-override-*`).

use std::ops::Range;

use hyper::header::{COOKIE, HeaderMap, HeaderName, HeaderValue};

use crate::http1::{HeaderId, RawHeader, RawHeaders};

/// The request id's header, which the router generates if the client sends none.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Writes the headers of a client's request that each leg gets, one line each; the leg's own `Host` and
/// length are not among them.
///
/// A JSON body gets a content type if it has none: SGLang answers 400 without it, and the body has been
/// checked to be JSON. A content type that the client chose is not changed.
///
/// Returns where `Accept-Encoding` is, or belongs: several lines are written next to each other, which has no
/// effect (RFC 9110, section 5.3), so that they can be replaced as one.
pub(crate) fn write_for_backend(headers: &RawHeaders, is_json: bool, into: &mut Vec<u8>) -> Range<usize> {
    let mut encodings: Option<Range<usize>> = None;
    for line in lines_except(headers, is_not_for_backends) {
        let start = into.len();
        into.extend_from_slice(line.text);
        into.extend_from_slice(b"\r\n");
        if line.id == HeaderId::AcceptEncoding {
            let first = encodings.get_or_insert(start..start);
            // From its place, behind the other lines, to that of the first: usually it is the first.
            let length = into.len() - start;
            into[first.end..].rotate_right(length);
            first.end += length;
        }
    }
    if is_json && !headers.has(HeaderId::ContentType) {
        write_line(b"content-type", b"application/json", into);
    }
    encodings.unwrap_or(into.len()..into.len())
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
    for line in lines_except(headers, is_left_out) {
        into.extend_from_slice(line.text);
        into.extend_from_slice(b"\r\n");
    }
}

fn lines_except(
    headers: &RawHeaders,
    is_left_out: impl Fn(HeaderId) -> bool,
) -> impl Iterator<Item = RawHeader<'_>> {
    let listed = listed_in_connection(headers);
    headers.iter().filter(move |line| {
        let is_listed = || listed.iter().any(|name| name.eq_ignore_ascii_case(line.name));
        !is_left_out(line.id) && !is_listed()
    })
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

/// Whether a response's body is in a coding, so that the router must not add text to it. Unlike a request's,
/// an unknown coding counts: the client may know it.
pub(crate) fn is_encoded(headers: &RawHeaders) -> bool {
    let is_coding = |coding: &[u8]| {
        ![&b""[..], b"identity", b"none"].iter().any(|known| known.eq_ignore_ascii_case(coding.trim_ascii()))
    };
    let lines = headers.iter().filter(|line| line.id == HeaderId::ContentEncoding);
    headers.has(HeaderId::ContentEncoding)
        && lines.flat_map(|line| line.value.split(|byte| *byte == b',')).any(is_coding)
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

    #[test]
    fn the_lines_of_accept_encoding_stand_together() {
        let text_of = |pairs| {
            let mut text = b"GET".to_vec();
            let at = write_for_backend(&headers(pairs), true, &mut text);
            let found = String::from_utf8(text[at.clone()].to_vec()).unwrap();
            text.drain(at);
            (found, String::from_utf8(text).unwrap())
        };
        let json = "content-type: application/json\r\n";
        for (sent, encodings, others) in [
            (&[("a", "1"), ("b", "2")][..], "", "GETa: 1\r\nb: 2\r\n"),
            (
                &[("a", "1"), ("Accept-Encoding", "gzip"), ("b", "2")],
                "Accept-Encoding: gzip\r\n",
                "GETa: 1\r\nb: 2\r\n",
            ),
            (
                &[
                    ("accept-encoding", "x"),
                    ("a", "1"),
                    ("ACCEPT-ENCODING", "br"),
                    ("b", "2"),
                    ("accept-encoding", ""),
                ],
                "accept-encoding: x\r\nACCEPT-ENCODING: br\r\naccept-encoding: \r\n",
                "GETa: 1\r\nb: 2\r\n",
            ),
            (&[("connection", "accept-encoding"), ("accept-encoding", "br")], "", "GET"),
        ] {
            assert_eq!(text_of(sent), (encodings.to_owned(), format!("{others}{json}")));
        }
    }

    #[test]
    fn encoded_responses_are_recognised() {
        let is_encoded = |values: &[&'static str]| {
            let lines = values.iter().map(|value| ("Content-Encoding", value.as_bytes()));
            is_encoded(&lines.collect())
        };
        for plain in [&[][..], &[""], &["identity"], &["None"], &["identity, "], &["", "Identity"]] {
            assert!(!is_encoded(plain), "{plain:?}");
        }
        for encoded in [&["gzip"][..], &["BR"], &["identity, zstd"], &["identity", "deflate"], &["dcb"]] {
            assert!(is_encoded(encoded), "{encoded:?}");
        }
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

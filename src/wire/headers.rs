//! Which headers pass the router, in both directions.
//!
//! End-to-end headers pass as they are. What is left out belongs to one
//! connection (RFC 9110, section 7.6.1), is made anew (`Host`, lengths), or would
//! let a client steer a server past the router (`x-override-*`).

use hyper::header::HeaderName;

use crate::http1::{HeaderId, RawHeaders};

/// The name of a request, which the router makes if a client does not.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Writes those of a client's headers that a leg has too, a line each; the leg's own `Host` and length are not among
/// them. A request with a JSON body gets a content type if it has none: SGLang refuses JSON without it, and the body was
/// seen to be JSON. A type that the client chose itself is the client's.
pub(crate) fn write_for_backend(fields: &RawHeaders, is_json: bool, into: &mut Vec<u8>) {
    write_but(fields, is_own, into);
    if is_json && !fields.has(HeaderId::ContentType) {
        write_line(b"content-type", b"application/json", into);
    }
}

/// Writes those of a server's headers that the client gets, a line each. The request's name is not among them: it is
/// the router's.
pub(crate) fn write_for_client(fields: &RawHeaders, into: &mut Vec<u8>) {
    let is_encoded = fields.has(HeaderId::TransferEncoding);
    write_but(fields, |name| is_not_passed_back(name, is_encoded) || name == HeaderId::RequestId, into);
}

/// Removes those of a server's headers that the client does not get. Most answers have none of them.
pub(crate) fn retain_for_client(fields: &mut RawHeaders) {
    if ![HeaderId::Connection, HeaderId::TransferEncoding, HeaderId::HopByHop]
        .iter()
        .any(|name| fields.has(*name))
    {
        return;
    }
    let is_encoded = fields.has(HeaderId::TransferEncoding);
    let listed: Vec<Vec<u8>> = listed(fields).into_iter().map(<[u8]>::to_vec).collect();
    fields.retain(|line| {
        let is_listed = listed.iter().any(|name| name.eq_ignore_ascii_case(line.name));
        !is_listed && !is_not_passed_back(line.known, is_encoded)
    });
}

/// The body was framed by its encoding, if it had one, which ends here: a length beside it is not the body's (RFC 9112,
/// section 6.3), and would cut it off.
fn is_not_passed_back(name: HeaderId, is_encoded: bool) -> bool {
    name.is_hop_by_hop() || (is_encoded && name == HeaderId::ContentLength)
}

/// Writes all lines but those that are left out, or that `Connection` lists.
fn write_but(fields: &RawHeaders, is_left_out: impl Fn(HeaderId) -> bool, into: &mut Vec<u8>) {
    let listed = listed(fields);
    for line in fields.iter() {
        let is_listed = || listed.iter().any(|name| name.eq_ignore_ascii_case(line.name));
        if !is_left_out(line.known) && !is_listed() {
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
pub(crate) fn unreadable_encoding(fields: &RawHeaders) -> Option<&[u8]> {
    let encoded =
        fields.get(HeaderId::ContentEncoding).filter(|value| !value.eq_ignore_ascii_case(b"identity"));
    // SGLang would decompress the body, which the router must read first.
    encoded.or_else(|| fields.get(HeaderId::BodyCompressed))
}

/// Whether a client's header is not for servers, whoever sends it.
fn is_own(name: HeaderId) -> bool {
    // The rank would reach both legs.
    let steers = matches!(name, HeaderId::Override | HeaderId::DataParallelRank);
    steers
        || name.is_hop_by_hop()
        || matches!(name, HeaderId::Host | HeaderId::ContentLength | HeaderId::Expect)
}

/// The headers named in `Connection`. The body's framing and the request's name are not the peer's to switch off here.
fn listed(fields: &RawHeaders) -> Vec<&[u8]> {
    let may_be = |name: &&[u8]| {
        let known = HeaderId::of(name);
        !known.is_hop_by_hop() && ![HeaderId::ContentLength, HeaderId::RequestId].contains(&known)
    };
    fields.connection_options().filter(may_be).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(pairs: &[(&'static str, &'static str)]) -> RawHeaders {
        pairs.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    /// The lines that a leg gets, in alphabetical order.
    fn written(fields: &RawHeaders, is_json: bool) -> Vec<String> {
        let mut text = Vec::new();
        write_for_backend(fields, is_json, &mut text);
        let text = String::from_utf8(text).unwrap();
        let mut lines: Vec<String> = text.split_terminator("\r\n").map(str::to_owned).collect();
        lines.sort();
        lines
    }

    #[test]
    fn end_to_end_headers_pass_and_others_do_not() {
        let request = fields(&[
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
        assert_eq!(written(&RawHeaders::default(), true), ["content-type: application/json"]);
        assert!(written(&RawHeaders::default(), false).is_empty());
    }

    #[test]
    fn repeated_end_to_end_headers_keep_their_order() {
        let request = fields(&[("x-a", "1"), ("x-a", "2"), ("x-override-rid", "r")]);
        assert_eq!(written(&request, false), ["x-a: 1", "x-a: 2"]);
    }

    /// The lines that a client gets of a server's, in alphabetical order, whichever way they are passed on.
    fn passed(pairs: &[(&'static str, &'static str)]) -> Vec<String> {
        let (mut text, mut retained) = (Vec::new(), fields(pairs));
        write_for_client(&retained, &mut text);
        retain_for_client(&mut retained);
        let mut lines: Vec<String> =
            String::from_utf8(text).unwrap().split_terminator("\r\n").map(str::to_owned).collect();
        assert!(retained.iter().map(|line| line.text).eq(lines.iter().map(String::as_bytes)));
        lines.sort();
        lines
    }

    #[test]
    fn an_answer_keeps_its_length_even_if_connection_names_it() {
        let connection = ("connection", "close, content-length, x-hop");
        let answer =
            [connection, ("x-hop", "1"), ("date", "d"), ("content-length", "5"), ("keep-alive", "a")];
        assert_eq!(passed(&answer), ["content-length: 5", "date: d"]);
    }

    #[test]
    fn a_length_beside_an_encoding_does_not_pass() {
        for encoding in ["chunked", "unknown"] {
            assert!(passed(&[("transfer-encoding", encoding), ("content-length", "5")]).is_empty());
        }
    }

    #[test]
    fn a_requests_name_is_the_routers() {
        let mut text = Vec::new();
        write_for_client(&fields(&[("X-Request-Id", "theirs"), ("connection", "x-request-id")]), &mut text);
        assert!(text.is_empty());
    }

    #[test]
    fn compressed_bodies_are_recognised() {
        let encoding = |name, value| unreadable_encoding(&fields(&[(name, value)])).map(<[u8]>::to_vec);
        assert_eq!(encoding("content-encoding", "Identity"), None);
        assert_eq!(encoding("Content-Encoding", "gzip").unwrap(), b"gzip");
        assert_eq!(encoding("x-body-compressed", "zstd").unwrap(), b"zstd");
    }
}

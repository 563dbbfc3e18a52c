//! A request as it goes to a server, byte for byte.
//!
//! The head is written out once for all servers that get the request; what
//! differs between them is the host and the body's length.

use bytes::Bytes;
use hyper::Method;
use hyper::header::{HeaderMap, HeaderValue};
use hyper::http::uri::PathAndQuery;

use super::body::LegBody;
use super::headers;

/// What a request says to every server.
pub(crate) struct RequestHead {
    /// Up to the host's name.
    begin: Vec<u8>,
    /// Header lines, and the empty line.
    end: Vec<u8>,
    /// Without a length the method would say that there is no body.
    says_length: bool,
}

impl RequestHead {
    /// A request with those of a client's headers that pass. One with a JSON body gets a content type if it has none.
    pub(crate) fn new(
        method: &Method,
        target: Option<&PathAndQuery>,
        headers: &HeaderMap,
        is_json: bool,
    ) -> Self {
        // RFC 9112, section 3.2.1: path and query.
        let target = target.map_or("/", PathAndQuery::as_str);
        let mut end = Vec::with_capacity(512);
        headers::write_for_backend(headers, is_json, &mut end);
        end.extend_from_slice(b"\r\n");
        Self {
            begin: [method.as_str().as_bytes(), b" ", target.as_bytes(), b" HTTP/1.1\r\nhost: "].concat(),
            end,
            // RFC 9110, section 8.6.
            says_length: [Method::POST, Method::PUT, Method::PATCH].contains(method),
        }
    }

    /// The request to one server; `lines` are header lines, each with its end, that no other one gets.
    pub(crate) fn to(&self, host: &HeaderValue, lines: &[u8], body: LegBody) -> LegRequest {
        const LENGTH: &[u8] = b"\r\ncontent-length: ";
        let mut digits = itoa::Buffer::new();
        let length = digits.format(body.len()).as_bytes();
        let has_length = self.says_length || !body.is_empty();
        let (name, length) = if has_length { (LENGTH, length) } else { (&b""[..], &b""[..]) };
        let head = [&self.begin, host.as_bytes(), name, length, b"\r\n", lines, &self.end].concat();
        LegRequest { head: head.into(), body }
    }
}

/// A request to one server.
#[derive(Debug, Default)]
pub(crate) struct LegRequest {
    pub(crate) head: Bytes,
    pub(crate) body: LegBody,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(method: &Method, target: &'static str, body: LegBody) -> String {
        let target = PathAndQuery::from_static(target);
        let mut headers = HeaderMap::new();
        headers.insert("x-a", HeaderValue::from_static("1"));
        headers.insert("host", HeaderValue::from_static("router"));
        let head = RequestHead::new(method, Some(&target), &headers, false);
        String::from_utf8(head.to(&HeaderValue::from_static("h:1"), b"", body).head.to_vec()).unwrap()
    }

    #[test]
    fn a_request_says_its_length_unless_its_method_says_that_there_is_none() {
        let empty = LegBody::default;
        assert_eq!(
            written(&Method::GET, "/a?b=%20", empty()),
            "GET /a?b=%20 HTTP/1.1\r\nhost: h:1\r\nx-a: 1\r\n\r\n"
        );
        for method in [Method::POST, Method::PUT] {
            let expected =
                format!("{method} /a HTTP/1.1\r\nhost: h:1\r\ncontent-length: 0\r\nx-a: 1\r\n\r\n");
            assert_eq!(written(&method, "/a", empty()), expected);
        }
        let body = LegBody::new(vec![Bytes::from_static(b"ab"), Bytes::from_static(b"c")]);
        assert_eq!(
            written(&Method::POST, "/", body),
            "POST / HTTP/1.1\r\nhost: h:1\r\ncontent-length: 3\r\nx-a: 1\r\n\r\n"
        );
    }
}

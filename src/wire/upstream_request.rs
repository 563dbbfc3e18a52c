//! A request as it goes to a server, byte for byte.
//!
//! The head is written out once for all servers that get the request; what
//! differs between them is the host and the body's length.

use hyper::Method;
use hyper::header::HeaderValue;

use super::body::COPY_UP_TO;
use super::headers;
use crate::http1::{OutgoingBody, OutgoingRequest, RawHeaders};

/// What a request says to every server.
pub(crate) struct UpstreamHead {
    /// The request line, the host's name, all other header lines, and the empty line.
    text: Vec<u8>,
    /// Where in it the host itself goes, and the lines that not all servers get.
    host_at: usize,
    /// Without a length the method would say that there is no body.
    says_length: bool,
}

impl UpstreamHead {
    /// A request with those of a client's headers that pass. One with a JSON body gets a content type if it has none. The
    /// target is path and query (RFC 9112, section 3.2.1).
    pub(crate) fn new(method: &Method, target: &str, fields: &RawHeaders, is_json: bool) -> Self {
        let mut text = Vec::with_capacity(512);
        for part in [method.as_str(), " ", target, " HTTP/1.1\r\nhost: "] {
            text.extend_from_slice(part.as_bytes());
        }
        let host_at = text.len();
        headers::write_for_backend(fields, is_json, &mut text);
        text.extend_from_slice(b"\r\n");
        // RFC 9110, section 8.6.
        let says_length = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        Self { text, host_at, says_length }
    }

    /// The request to one server; `lines` are header lines, each with its end, that no other one gets. A small body is
    /// copied behind the head, so that both are handed over as one.
    pub(crate) fn to(&self, host: &HeaderValue, lines: &[u8], body: &OutgoingBody) -> OutgoingRequest {
        const LENGTH: &[u8] = b"\r\ncontent-length: ";
        let mut digits = itoa::Buffer::new();
        let length = digits.format(body.len()).as_bytes();
        let has_length = self.says_length || !body.is_empty();
        let (name, length) = if has_length { (LENGTH, length) } else { (&b""[..], &b""[..]) };
        let (begin, end) = self.text.split_at(self.host_at);
        let head = [begin, host.as_bytes(), name, length, b"\r\n", lines, end];
        let copied = if body.len() <= COPY_UP_TO { body.pieces() } else { &[] };
        let parts = || head.into_iter().chain(copied.iter().map(|piece| &piece[..]));
        let mut text = Vec::with_capacity(parts().map(<[u8]>::len).sum());
        parts().for_each(|part| text.extend_from_slice(part));
        let body = if copied.is_empty() { body.clone() } else { OutgoingBody::default() };
        OutgoingRequest::new(text.into(), body)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn written(method: &Method, target: &'static str, body: OutgoingBody) -> String {
        let fields = [("x-a", &b"1"[..]), ("host", b"router")].into_iter().collect();
        let head = UpstreamHead::new(method, target, &fields, false);
        String::from_utf8(head.to(&HeaderValue::from_static("h:1"), b"", &body).into_parts().0.to_vec())
            .unwrap()
    }

    #[test]
    fn a_request_says_its_length_unless_its_method_says_that_there_is_none() {
        let empty = OutgoingBody::default;
        assert_eq!(
            written(&Method::GET, "/a?b=%20", empty()),
            "GET /a?b=%20 HTTP/1.1\r\nhost: h:1\r\nx-a: 1\r\n\r\n"
        );
        for method in [Method::POST, Method::PUT] {
            let expected =
                format!("{method} /a HTTP/1.1\r\nhost: h:1\r\ncontent-length: 0\r\nx-a: 1\r\n\r\n");
            assert_eq!(written(&method, "/a", empty()), expected);
        }
        let body = OutgoingBody::new(vec![Bytes::from_static(b"ab"), Bytes::from_static(b"c")]);
        assert_eq!(
            written(&Method::POST, "/", body),
            "POST / HTTP/1.1\r\nhost: h:1\r\ncontent-length: 3\r\nx-a: 1\r\n\r\nabc"
        );
    }
}

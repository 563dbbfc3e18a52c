//! A request as it is sent to a backend, byte for byte.
//!
//! The head is rendered once for all backends that get the request. What differs between them is the host,
//! the body's length, header lines of one leg only, and in which coding the response may be.

use std::ops::Range;

use hyper::Method;

use super::body::COPY_UP_TO;
use super::headers;
use crate::http1::{OutgoingBody, OutgoingRequest, RawHeaders};

/// Where requests to one backend go.
#[derive(Debug)]
pub(crate) struct UpstreamTarget {
    /// The `Host` header.
    host: Box<str>,
    /// What comes before the path that the client asked for. Nearly always empty.
    base_path: Box<str>,
}

impl UpstreamTarget {
    pub(crate) fn new(host: &str, base_path: &str) -> Self {
        Self { host: host.into(), base_path: base_path.into() }
    }
}

/// The part of a request's head that is the same for every backend.
pub(crate) struct UpstreamHead {
    /// The request line, `host: `, all other header lines, and the empty line.
    text: Vec<u8>,
    /// Where in the text the path is, which a base path belongs before.
    path_at: usize,
    /// Where the host belongs, and after it the lines that differ between backends.
    host_at: usize,
    /// Where in it the client's `Accept-Encoding` is.
    encodings: Range<usize>,
    /// An empty body needs `content-length: 0`: the method implies that there may be a body.
    always_has_length: bool,
}

impl UpstreamHead {
    /// A request with the end-to-end headers of a client's. A JSON body gets a content type if it has none.
    /// `target` is path and query (RFC 9112, section 3.2.1).
    pub(crate) fn new(method: &Method, target: &str, headers: &RawHeaders, is_json: bool) -> Self {
        // Enough for the heads of the usual clients, so that the text is not reallocated as it grows.
        let mut text = Vec::with_capacity(512);
        for part in [method.as_str(), " ", target, " HTTP/1.1\r\nhost: "] {
            text.extend_from_slice(part.as_bytes());
        }
        let (path_at, host_at) = (method.as_str().len() + 1, text.len());
        let encodings = headers::write_for_backend(headers, is_json, &mut text);
        text.extend_from_slice(b"\r\n");
        // RFC 9110, section 8.6: a user agent should send a length if the method anticipates content.
        let always_has_length = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        Self { text, path_at, host_at, encodings, always_has_length }
    }

    /// The request to one backend, whose response only the client reads. `lines` are header lines, each with
    /// its CR LF, for this backend only.
    ///
    /// A body of up to [`COPY_UP_TO`] bytes is copied behind the head, so that one buffer is written.
    pub(crate) fn for_backend(
        &self,
        target: &UpstreamTarget,
        lines: &[u8],
        body: &OutgoingBody,
    ) -> OutgoingRequest {
        self.request(target, lines, &self.text[self.encodings.clone()], body)
    }

    /// The same to a backend whose response the router reads: instead of the client's `Accept-Encoding` it
    /// gets one that asks for plain text. Without one a server might choose any coding (RFC 9110, section
    /// 12.5.3).
    pub(crate) fn for_readable_response(
        &self,
        target: &UpstreamTarget,
        lines: &[u8],
        body: &OutgoingBody,
    ) -> OutgoingRequest {
        self.request(target, lines, b"accept-encoding: identity\r\n", body)
    }

    fn request(
        &self,
        target: &UpstreamTarget,
        lines: &[u8],
        encodings: &[u8],
        body: &OutgoingBody,
    ) -> OutgoingRequest {
        const LENGTH: &[u8] = b"\r\ncontent-length: ";
        let mut digits = itoa::Buffer::new();
        let length = digits.format(body.len()).as_bytes();
        let has_length = self.always_has_length || !body.is_empty();
        let (name, length) = if has_length { (LENGTH, length) } else { (&b""[..], &b""[..]) };
        let (method, path) = (&self.text[..self.path_at], &self.text[self.path_at..self.host_at]);
        let before = &self.text[self.host_at..self.encodings.start];
        let after = &self.text[self.encodings.end..];
        let (base_path, host) = (target.base_path.as_bytes(), target.host.as_bytes());
        let head = [method, base_path, path, host, name, length, b"\r\n", lines, before, encodings, after];
        let copied = if body.len() <= COPY_UP_TO { body.pieces() } else { &[] };
        let parts = || head.into_iter().chain(copied.iter().map(|chunk| &chunk[..]));
        // Summed first: one allocation of the exact size.
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
        let headers = [("x-a", &b"1"[..]), ("host", b"router")].into_iter().collect();
        let head = UpstreamHead::new(method, target, &headers, false);
        String::from_utf8(
            head.for_backend(&UpstreamTarget::new("h:1", ""), b"", &body).into_parts().0.to_vec(),
        )
        .unwrap()
    }

    #[test]
    fn an_empty_body_has_a_length_if_the_method_anticipates_content() {
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

    #[test]
    fn a_base_path_is_put_before_the_path() {
        let head = UpstreamHead::new(&Method::GET, "/a?b=/c", &RawHeaders::default(), false);
        let target = UpstreamTarget::new("h:1", "/llm-a");
        let request = head.for_backend(&target, b"", &OutgoingBody::default());
        assert_eq!(&request.into_parts().0[..], b"GET /llm-a/a?b=/c HTTP/1.1\r\nhost: h:1\r\n\r\n");
    }

    #[test]
    fn a_response_that_the_router_reads_is_asked_for_in_plain_text() {
        let requests = |sent: &[(&'static str, &'static str)]| {
            let headers = sent.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
            let head = UpstreamHead::new(&Method::GET, "/", &headers, false);
            let (host, body) = (UpstreamTarget::new("h", ""), OutgoingBody::default());
            let text = |request: OutgoingRequest| {
                let text = String::from_utf8(request.into_parts().0.to_vec()).unwrap();
                text.strip_prefix("GET / HTTP/1.1\r\nhost: h\r\n").unwrap().to_owned()
            };
            let passed_on = text(head.for_backend(&host, b"t: 1\r\n", &body));
            (passed_on, text(head.for_readable_response(&host, b"t: 1\r\n", &body)))
        };
        for (sent, passed_on, read) in [
            (&[][..], "t: 1\r\n\r\n", "t: 1\r\naccept-encoding: identity\r\n\r\n"),
            (
                &[("a", "1"), ("Accept-Encoding", "gzip"), ("b", "2"), ("accept-encoding", "br")],
                "t: 1\r\na: 1\r\nAccept-Encoding: gzip\r\naccept-encoding: br\r\nb: 2\r\n\r\n",
                "t: 1\r\na: 1\r\naccept-encoding: identity\r\nb: 2\r\n\r\n",
            ),
        ] {
            assert_eq!(requests(sent), (passed_on.to_owned(), read.to_owned()));
        }
    }
}

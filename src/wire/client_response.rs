//! The head of the response that a client gets.

use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, DATE, HeaderName, HeaderValue};
use hyper::http::response;

use super::headers;
use crate::http1::{HeaderId, RawHeaders, ResponseHead};

/// Status and headers of a response.
#[derive(Debug)]
pub(crate) enum ClientResponseHead {
    /// A backend's. Its headers stay raw lines: a header map would be built and read back once a request.
    Upstream(ResponseHead),
    /// The router's own. Boxed, because it is rare and every head is moved several times.
    Own(Box<response::Parts>),
}

impl ClientResponseHead {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Upstream(head) => head.status,
            Self::Own(head) => head.status,
        }
    }

    /// Changes the status, and drops the backend's reason phrase, which belongs to its own status.
    pub(crate) fn set_status(&mut self, status: StatusCode) {
        match self {
            Self::Upstream(head) => (head.status, head.reason) = (status, None),
            Self::Own(head) => head.status = status,
        }
    }

    /// Removes all lines of a name.
    pub(crate) fn remove(&mut self, name: &HeaderName) {
        match self {
            Self::Upstream(head) => end_to_end(&mut head.headers).remove(name.as_str()),
            Self::Own(head) => {
                head.headers.remove(name);
            }
        }
    }

    /// Replaces all lines of a name with this one.
    pub(crate) fn set(&mut self, name: HeaderName, value: HeaderValue) {
        match self {
            Self::Upstream(head) => end_to_end(&mut head.headers).set(name.as_str(), value.as_bytes()),
            Self::Own(head) => {
                head.headers.insert(name, value);
            }
        }
    }

    /// Adds a line.
    pub(crate) fn add(&mut self, name: HeaderName, value: HeaderValue) {
        match self {
            Self::Upstream(head) => {
                end_to_end(&mut head.headers).add(name.as_str().as_bytes(), value.as_bytes());
            }
            Self::Own(head) => {
                head.headers.append(name, value);
            }
        }
    }

    /// Whether there may be CORS headers (`Access-Control-*`). Of a backend's head that is known since it
    /// was parsed; the router's own is rare and not searched.
    pub(crate) fn may_have_cors_headers(&self) -> bool {
        match self {
            Self::Upstream(head) => head.headers.has(HeaderId::AccessControl),
            Self::Own(_) => true,
        }
    }

    /// The head with a header map, as hyper's server wants it for HTTP/2.
    pub(crate) fn into_parts(self) -> response::Parts {
        match self {
            Self::Upstream(mut head) => {
                headers::retain_for_client(&mut head.headers);
                head.into_parts()
            }
            Self::Own(head) => *head,
        }
    }

    /// Whether the head has the body's length.
    pub(crate) fn has_length(&self) -> bool {
        match self {
            // Beside a transfer encoding the length is not forwarded; see `headers`.
            Self::Upstream(head) => {
                head.headers.has(HeaderId::ContentLength) && !head.headers.has(HeaderId::TransferEncoding)
            }
            Self::Own(head) => head.headers.contains_key(CONTENT_LENGTH),
        }
    }

    /// Whether the head has a date. The router adds one otherwise (RFC 9110, section 6.6.1).
    pub(crate) fn has_date(&self) -> bool {
        match self {
            Self::Upstream(head) => head.headers.has(HeaderId::Date),
            Self::Own(head) => head.headers.contains_key(DATE),
        }
    }

    /// Writes the status line and the headers of an HTTP/1 response, without the empty line that ends the
    /// head: the connection adds its own headers before it.
    pub(crate) fn write(&self, is_http_11: bool, into: &mut Vec<u8>) {
        let reason = match self {
            Self::Upstream(head) => head.reason.as_deref(),
            Self::Own(_) => None,
        };
        let status = self.status();
        // The phrase of a status without a usual one may be empty (RFC 9112, section 4).
        let reason = reason.or(status.canonical_reason()).unwrap_or_default();
        // The version is the router's, not the backend's (RFC 9110, section 2.5).
        let version = if is_http_11 { &b"HTTP/1.1 "[..] } else { b"HTTP/1.0 " };
        for part in [version, status.as_str().as_bytes(), b" ", reason.as_bytes(), b"\r\n"] {
            into.extend_from_slice(part);
        }
        match self {
            Self::Upstream(head) => headers::write_for_client(&head.headers, into),
            Self::Own(head) => {
                for (name, value) in &head.headers {
                    headers::write_line(name.as_str().as_bytes(), value.as_bytes(), into);
                }
            }
        }
    }
}

/// A backend's headers without those of its connection. Must precede any change: else a header that the
/// router adds would be removed later because the backend's `Connection` lists its name.
fn end_to_end(headers: &mut RawHeaders) -> &mut RawHeaders {
    headers::retain_for_client(headers);
    headers
}

impl Default for ClientResponseHead {
    fn default() -> Self {
        Self::Upstream(ResponseHead::default())
    }
}

impl From<ResponseHead> for ClientResponseHead {
    fn from(head: ResponseHead) -> Self {
        Self::Upstream(head)
    }
}

impl From<response::Parts> for ClientResponseHead {
    fn from(head: response::Parts) -> Self {
        Self::Own(Box::new(head))
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;
    use crate::http1::read_response_head;

    fn upstream(text: &str) -> ClientResponseHead {
        read_response_head(text.as_bytes(), 0).unwrap().unwrap().head.into()
    }

    fn written(head: &ClientResponseHead, is_http_11: bool) -> String {
        let mut text = Vec::new();
        head.write(is_http_11, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_backends_head_keeps_its_reason_and_header_case() {
        let head = upstream(
            "HTTP/1.0 404 Nothing here\r\nServer:  a\r\nX-Two: 2\r\nConnection: x-gone\r\nX-Gone: 3\r\n\r\n",
        );
        assert_eq!(written(&head, true), "HTTP/1.1 404 Nothing here\r\nServer:  a\r\nX-Two: 2\r\n");
        let usual = upstream("HTTP/1.1 200 OK\r\n\r\n");
        assert_eq!(written(&usual, false), "HTTP/1.0 200 OK\r\n");
        assert_eq!(written(&upstream("HTTP/1.1 299 \r\n\r\n"), true), "HTTP/1.1 299 \r\n");
    }

    #[test]
    fn changing_one_header_keeps_the_others() {
        let mut head =
            upstream("HTTP/1.1 418 Short\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\nX-B: 2\r\n\r\n");
        assert!(!head.has_date());
        head.set(HeaderName::from_static("x-b"), HeaderValue::from_static("3"));
        head.set(DATE, HeaderValue::from_static("now"));
        head.add(HeaderName::from_static("x-b"), HeaderValue::from_static("4"));
        assert!(head.has_date() && !head.has_length());
        let changed = "X-A: 1\r\nx-b: 3\r\ndate: now\r\nx-b: 4\r\n";
        assert_eq!(written(&head, true), format!("HTTP/1.1 418 Short\r\n{changed}"));
        head.remove(&HeaderName::from_static("x-b"));
        head.set_status(StatusCode::IM_A_TEAPOT);
        assert_eq!(written(&head, true), "HTTP/1.1 418 I'm a teapot\r\nX-A: 1\r\ndate: now\r\n");
        assert_eq!(head.into_parts().headers.len(), 2);
    }

    #[test]
    fn added_headers_are_kept_although_connection_lists_their_names() {
        let mut head = upstream(
            "HTTP/1.1 200 OK\r\nConnection: x-a\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n",
        );
        head.set(HeaderName::from_static("x-a"), HeaderValue::from_static("2"));
        head.set(CONTENT_LENGTH, HeaderValue::from_static("3"));
        assert!(head.has_length());
        assert_eq!(written(&head, true), "HTTP/1.1 200 OK\r\nx-a: 2\r\ncontent-length: 3\r\n");
    }

    #[test]
    fn a_length_beside_a_transfer_encoding_does_not_count() {
        assert!(upstream("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").has_length());
        let both = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n";
        assert!(!upstream(both).has_length());
    }
}

//! The head of the answer that a client gets.

use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, DATE, HeaderName, HeaderValue};
use hyper::http::response;

use super::headers;
use crate::http1::{HeaderId, RawHeaders, ResponseHead};

/// Status and headers of an answer.
#[derive(Debug)]
pub(crate) enum ClientResponseHead {
    /// A server's: its headers are put into no map.
    Passed(ResponseHead),
    /// The router's own.
    Made(Box<response::Parts>),
}

impl ClientResponseHead {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Passed(head) => head.status,
            Self::Made(head) => head.status,
        }
    }

    pub(crate) fn set_status(&mut self, status: StatusCode) {
        match self {
            Self::Passed(head) => (head.status, head.reason) = (status, None),
            Self::Made(head) => head.status = status,
        }
    }

    /// Removes all lines of a name.
    pub(crate) fn remove(&mut self, name: &HeaderName) {
        match self {
            Self::Passed(head) => own(&mut head.fields).remove(name.as_str()),
            Self::Made(head) => {
                head.headers.remove(name);
            }
        }
    }

    /// Makes a line the only one of its name.
    pub(crate) fn set(&mut self, name: HeaderName, value: HeaderValue) {
        match self {
            Self::Passed(head) => own(&mut head.fields).set(name.as_str(), value.as_bytes()),
            Self::Made(head) => {
                head.headers.insert(name, value);
            }
        }
    }

    /// Adds a line.
    pub(crate) fn add(&mut self, name: HeaderName, value: HeaderValue) {
        match self {
            Self::Passed(head) => own(&mut head.fields).add(name.as_str().as_bytes(), value.as_bytes()),
            Self::Made(head) => {
                head.headers.append(name, value);
            }
        }
    }

    /// Whether it may have a line that browsers ask for (`Access-Control-…`).
    pub(crate) fn may_say_who_reads(&self) -> bool {
        match self {
            Self::Passed(head) => head.fields.has(HeaderId::AccessControl),
            Self::Made(_) => true,
        }
    }

    /// The same for whoever wants a map.
    pub(crate) fn into_parts(self) -> response::Parts {
        match self {
            Self::Passed(mut head) => {
                headers::retain_for_client(&mut head.fields);
                head.into_parts()
            }
            Self::Made(head) => *head,
        }
    }

    /// Whether it says how long the body is.
    pub(crate) fn has_length(&self) -> bool {
        match self {
            // Beside an encoding it does not pass.
            Self::Passed(head) => {
                head.fields.has(HeaderId::ContentLength) && !head.fields.has(HeaderId::TransferEncoding)
            }
            Self::Made(head) => head.headers.contains_key(CONTENT_LENGTH),
        }
    }

    pub(crate) fn has_date(&self) -> bool {
        match self {
            Self::Passed(head) => head.fields.has(HeaderId::Date),
            Self::Made(head) => head.headers.contains_key(DATE),
        }
    }

    /// Writes the status line and the headers as HTTP/1 has them, without the empty line that ends a head.
    pub(crate) fn write(&self, is_http_11: bool, into: &mut Vec<u8>) {
        let reason = match self {
            Self::Passed(head) => head.reason.as_deref(),
            Self::Made(_) => None,
        };
        let status = self.status();
        let reason = reason.or(status.canonical_reason()).unwrap_or_default();
        let version = if is_http_11 { &b"HTTP/1.1 "[..] } else { b"HTTP/1.0 " };
        for part in [version, status.as_str().as_bytes(), b" ", reason.as_bytes(), b"\r\n"] {
            into.extend_from_slice(part);
        }
        match self {
            Self::Passed(head) => headers::write_for_client(&head.fields, into),
            Self::Made(head) => {
                for (name, value) in &head.headers {
                    headers::write_line(name.as_str().as_bytes(), value.as_bytes(), into);
                }
            }
        }
    }
}

/// The fields of a server's that clients get: to be changed, and not to be taken for what its connection's were.
fn own(fields: &mut RawHeaders) -> &mut RawHeaders {
    headers::retain_for_client(fields);
    fields
}

impl Default for ClientResponseHead {
    fn default() -> Self {
        Self::Passed(ResponseHead::default())
    }
}

impl From<ResponseHead> for ClientResponseHead {
    fn from(head: ResponseHead) -> Self {
        Self::Passed(head)
    }
}

impl From<response::Parts> for ClientResponseHead {
    fn from(head: response::Parts) -> Self {
        Self::Made(Box::new(head))
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;
    use crate::http1::read_response_head;

    fn passed(text: &str) -> ClientResponseHead {
        read_response_head(text.as_bytes(), 0).unwrap().unwrap().head.into()
    }

    fn written(head: &ClientResponseHead, is_http_11: bool) -> String {
        let mut text = Vec::new();
        head.write(is_http_11, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_servers_head_is_written_as_it_came() {
        let head = passed(
            "HTTP/1.0 404 Nothing here\r\nServer:  a\r\nX-Two: 2\r\nConnection: x-gone\r\nX-Gone: 3\r\n\r\n",
        );
        assert_eq!(written(&head, true), "HTTP/1.1 404 Nothing here\r\nServer:  a\r\nX-Two: 2\r\n");
        let usual = passed("HTTP/1.1 200 OK\r\n\r\n");
        assert_eq!(written(&usual, false), "HTTP/1.0 200 OK\r\n");
        assert_eq!(written(&passed("HTTP/1.1 299 \r\n\r\n"), true), "HTTP/1.1 299 \r\n");
    }

    #[test]
    fn a_head_that_is_changed_keeps_the_rest() {
        let mut head = passed("HTTP/1.1 418 Short\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\nX-B: 2\r\n\r\n");
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
    fn what_is_added_is_not_taken_for_the_connections() {
        let mut head = passed(
            "HTTP/1.1 200 OK\r\nConnection: x-a\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n",
        );
        head.set(HeaderName::from_static("x-a"), HeaderValue::from_static("2"));
        head.set(CONTENT_LENGTH, HeaderValue::from_static("3"));
        assert!(head.has_length());
        assert_eq!(written(&head, true), "HTTP/1.1 200 OK\r\nx-a: 2\r\ncontent-length: 3\r\n");
    }

    #[test]
    fn a_length_beside_an_encoding_is_none() {
        assert!(passed("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").has_length());
        let both = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n";
        assert!(!passed(both).has_length());
    }
}

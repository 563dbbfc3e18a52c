//! The head of the answer that a client gets.

use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, DATE, HeaderMap};
use hyper::http::response;

use super::headers;
use super::message::{Head, Known, Reason};

/// Status and headers of an answer.
#[derive(Debug)]
pub(crate) enum ReplyHead {
    /// A server's: the headers of most answers are never put into a map.
    Passed(Head),
    /// The router's own, or a server's that is changed by name.
    Made(Box<response::Parts>),
}

impl ReplyHead {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Passed(head) => head.status,
            Self::Made(head) => head.status,
        }
    }

    /// What is to be changed.
    pub(crate) fn made(&mut self) -> &mut response::Parts {
        if let Self::Passed(head) = self {
            *self = Self::Made(made(std::mem::take(head)));
        }
        match self {
            Self::Made(head) => head,
            Self::Passed(_) => unreachable!("it was made just now"),
        }
    }

    /// Headers to be changed by name.
    pub(crate) fn headers_mut(&mut self) -> &mut HeaderMap {
        &mut self.made().headers
    }

    /// The same for whoever wants a map.
    pub(crate) fn into_parts(self) -> response::Parts {
        match self {
            Self::Passed(head) => *made(head),
            Self::Made(head) => *head,
        }
    }

    /// Whether it says how long the body is.
    pub(crate) fn has_length(&self) -> bool {
        match self {
            // Beside an encoding it does not pass.
            Self::Passed(head) => {
                head.fields.has(Known::ContentLength) && !head.fields.has(Known::TransferEncoding)
            }
            Self::Made(head) => head.headers.contains_key(CONTENT_LENGTH),
        }
    }

    pub(crate) fn has_date(&self) -> bool {
        match self {
            Self::Passed(head) => head.fields.has(Known::Date),
            Self::Made(head) => head.headers.contains_key(DATE),
        }
    }

    /// Writes the status line and the headers as HTTP/1 has them, without the empty line that ends a head.
    pub(crate) fn write(&self, is_http_11: bool, into: &mut Vec<u8>) {
        let reason = match self {
            Self::Passed(head) => head.reason.as_ref(),
            Self::Made(head) => head.extensions.get::<Reason>(),
        };
        let status = self.status();
        let reason = reason.map_or(status.canonical_reason().unwrap_or_default(), |Reason(own)| own);
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

/// A server's head, of which the headers that are not for clients are gone.
fn made(mut head: Head) -> Box<response::Parts> {
    headers::retain_for_client(&mut head.fields);
    Box::new(head.into_parts())
}

impl Default for ReplyHead {
    fn default() -> Self {
        Self::Passed(Head::default())
    }
}

impl From<Head> for ReplyHead {
    fn from(head: Head) -> Self {
        Self::Passed(head)
    }
}

impl From<response::Parts> for ReplyHead {
    fn from(head: response::Parts) -> Self {
        Self::Made(Box::new(head))
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::super::message::read_head;
    use super::*;

    fn passed(text: &str) -> ReplyHead {
        read_head(text.as_bytes(), true).unwrap().unwrap().head.into()
    }

    fn written(head: &ReplyHead, is_http_11: bool) -> String {
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
        head.headers_mut().insert("x-b", HeaderValue::from_static("3"));
        head.headers_mut().insert("date", HeaderValue::from_static("now"));
        assert!(head.has_date() && !head.has_length());
        assert_eq!(written(&head, true), "HTTP/1.1 418 Short\r\nx-a: 1\r\nx-b: 3\r\ndate: now\r\n");
        assert_eq!(head.into_parts().status, 418);
    }

    #[test]
    fn a_length_beside_an_encoding_is_none() {
        assert!(passed("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").has_length());
        let both = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n";
        assert!(!passed(both).has_length());
    }
}

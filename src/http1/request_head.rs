//! The head of a request: request line and headers, and the framing of the body that follows from them.
//!
//! A head that two parsers could read differently is never guessed at: it is parsed, with a `reject_reason`,
//! and the caller responds with an error. Routes and error codes are not known here.

use std::mem::MaybeUninit;

use hyper::http::request;
use hyper::http::uri::{PathAndQuery, Uri};
use hyper::{Method, Version};

use super::framing::is_token;
use super::{BodyDecoder, HeaderId, MAX_HEAD, MAX_HEADERS, RawHeaders, end_of_head, one_length};

/// The head of a request, over any version of HTTP.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    pub(crate) target: PathAndQuery,
    pub(crate) headers: RawHeaders,
    /// Why the request must be rejected. Kept beside the head, so that the rejection
    /// can be logged with its id.
    pub(crate) reject_reason: Option<&'static str>,
}

/// The framing of a request over HTTP/1: how its body is read, and whether the connection is used again.
#[derive(Debug, Clone)]
pub(crate) struct RequestFraming {
    pub(crate) body: BodyDecoder,
    /// The client understands chunked framing (RFC 9112, section 7.1: not before HTTP/1.1).
    pub(crate) is_http_11: bool,
    /// The connection may carry another request.
    pub(crate) keeps_alive: bool,
    /// The client waits for `100 Continue` before it sends the body (RFC 9110, section 10.1.1).
    pub(crate) expects_continue: bool,
}

/// Why a head cannot be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadError {
    Malformed(&'static str),
    TooLarge,
}

impl RequestHead {
    pub(crate) fn path(&self) -> &str {
        self.target.path()
    }

    pub(crate) fn query(&self) -> Option<&str> {
        self.target.query()
    }

    /// Converts a request that hyper has read. Over HTTP/2 `:authority` replaces `Host`, or must equal it
    /// (RFC 9113, section 8.3.1).
    pub(crate) fn from_parts(head: &request::Parts) -> Self {
        let headers: RawHeaders =
            head.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let reject_reason = if headers.len() > MAX_HEADERS {
            Some("there are more than 100 headers")
        } else if head.version == Version::HTTP_2 {
            let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
            check_host(&headers, authority, authority.is_none())
        } else {
            let is_http_11 = head.version == Version::HTTP_11;
            // hyper accepts `Transfer-Encoding: chunked` twice, which another parser may read differently.
            check_host(&headers, None, is_http_11).or_else(|| framing(&headers, is_http_11).err())
        };
        let reject_reason = reject_reason.or_else(|| check_target(&head.uri));
        let target = head.uri.path_and_query().cloned().unwrap_or_else(root);
        Self { method: head.method.clone(), target, headers, reject_reason }
    }
}

/// Parses a head that the router wrote itself, for an engine that takes parsed
/// heads. Returns also its length.
pub(crate) fn parse_outgoing_head(text: &[u8]) -> Option<(RequestHead, usize)> {
    // A client's headers, and the few that the router adds: id, key, trace, length.
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS + 16];
    let mut parsed = httparse::Request::new(&mut []);
    let parsing = parsed.parse_with_uninit_headers(text, &mut lines);
    let Ok(httparse::Status::Complete(length)) = parsing else { return None };
    let method = Method::from_bytes(parsed.method?.as_bytes()).ok()?;
    let target = parsed.path?.parse().ok()?;
    let headers = RawHeaders::parsed(&text[..length], parsed.headers);
    Some((RequestHead { method, target, headers, reject_reason: None }, length))
}

/// Parses the head of a request. `None`: it is incomplete. Returns also its length, with an empty line before
/// it, which is skipped (RFC 9112, section 2.2). The end of the head is not before `searched`; 0 means that
/// this is the first call, at which most heads are complete.
pub(crate) fn read_request_head(
    input: &[u8],
    searched: usize,
) -> Result<Option<(RequestHead, RequestFraming, usize)>, HeadError> {
    // After the first call search first, so that a head in many small reads is
    // parsed once, not once per read.
    let parsed = if searched == 0 || end_of_head(input, searched).is_some() { parse(input)? } else { None };
    match parsed {
        Some((.., length)) if length > MAX_HEAD => Err(HeadError::TooLarge),
        None if input.len() >= MAX_HEAD => Err(HeadError::TooLarge),
        None => check_start(input).map(|()| None),
        parsed => Ok(parsed),
    }
}

/// Longest method. The longest in IANA's registry, UPDATEREDIRECTREF, has 17 letters.
const MAX_METHOD: usize = 32;

/// Rejects at once what cannot become a request, such as a TLS handshake. Otherwise the client would see
/// nothing but the timeout of the head.
fn check_start(input: &[u8]) -> Result<(), HeadError> {
    let method = input.iter().take_while(|byte| **byte != b' ').take(MAX_METHOD + 1);
    let is_method = method.clone().all(|byte| is_token(*byte)) && method.count() <= MAX_METHOD;
    // The first half of an empty line before the request line.
    if is_method || input == b"\r" {
        Ok(())
    } else {
        Err(HeadError::Malformed("it does not start with a method"))
    }
}

/// `None`: the head is incomplete.
fn parse(input: &[u8]) -> Result<Option<(RequestHead, RequestFraming, usize)>, HeadError> {
    // httparse would report a wrong version, which is less clear. This is a client with
    // prior knowledge of HTTP/2.
    if input.starts_with(b"PRI * HTTP/2.0\r\n") {
        return Err(HeadError::Malformed("HTTP/2 is not enabled on this listener"));
    }
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(input, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
        Err(error) => return Err(HeadError::Malformed(parse_error(error))),
    };
    let method = parsed.method.filter(|method| method.len() <= MAX_METHOD);
    let method = method.and_then(|method| Method::from_bytes(method.as_bytes()).ok());
    let method = method.ok_or(HeadError::Malformed("its method is invalid"))?;
    let (target, reject_reason) = target(parsed.path.unwrap_or_default())?;
    let is_http_11 = parsed.version == Some(1);
    let headers = RawHeaders::parsed(&input[..length], parsed.headers);
    let reject_reason = check_host(&headers, None, is_http_11).or(reject_reason);
    let (body, reject_reason) = match framing(&headers, is_http_11) {
        Ok(body) => (body, reject_reason),
        // Nothing is read as a body: the connection closes after the rejection.
        Err(reason) => (BodyDecoder::ended(), Some(reason)),
    };
    let has_option =
        |wanted: &[u8]| headers.connection_options().any(|option| option.eq_ignore_ascii_case(wanted));
    // Both framings at once may be an attempt at request smuggling. Transfer-Encoding decides, and the
    // connection closes after the response (RFC 9112, section 6.1).
    let is_doubtful = reject_reason.is_some()
        || (headers.has(HeaderId::TransferEncoding) && headers.has(HeaderId::ContentLength));
    let keeps_alive = !is_doubtful && !has_option(b"close") && (is_http_11 || has_option(b"keep-alive"));
    let expects_continue = is_http_11 && expects_continue(&headers);
    let head = RequestHead { method, target, headers, reject_reason };
    Ok(Some((head, RequestFraming { body, is_http_11, keeps_alive, expects_continue }, length)))
}

/// Whether the client waits for `100 Continue`. The caller knows that it is not HTTP/1.0, in which an
/// expectation is ignored (RFC 9110, section 10.1.1).
fn expects_continue(headers: &RawHeaders) -> bool {
    headers.get(HeaderId::Expect).is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue"))
}

fn parse_error(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::Version => "its version is not HTTP/1.1 or HTTP/1.0",
        httparse::Error::Token => "its method or its target is malformed",
        httparse::Error::NewLine => "its request line is malformed",
        _ => "a header is malformed",
    }
}

fn root() -> PathAndQuery {
    PathAndQuery::from_static("/")
}

/// The request target, and why it must be rejected.
fn target(text: &str) -> Result<(PathAndQuery, Option<&'static str>), HeadError> {
    let malformed = HeadError::Malformed("its target is malformed");
    // The targets of nearly all requests need no allocation.
    const COMMON: [&str; 3] = ["/v1/chat/completions", "/generate", "/v1/completions"];
    if let Some(common) = COMMON.iter().find(|common| **common == text) {
        return Ok((PathAndQuery::from_static(common), None));
    }
    if text.starts_with('/') {
        return text.parse().map(|target| (target, None)).map_err(|_| malformed);
    }
    let uri: Uri = text.parse().map_err(|_| malformed)?;
    let reject_reason = check_target(&uri);
    Ok((uri.into_parts().path_and_query.unwrap_or_else(root), reject_reason))
}

/// A target must be a path or a whole URL (RFC 9112, sections 3.2.1 and 3.2.2). The authority form is for
/// forward proxies, and the asterisk form names no resource that the router has.
fn check_target(target: &Uri) -> Option<&'static str> {
    let is_supported = match target.scheme_str() {
        None => target.authority().is_none() && target.path().starts_with('/'),
        Some(scheme) => ["http", "https"].contains(&scheme),
    };
    if is_supported { None } else { Some("the request target is not a path") }
}

/// One `Host` header in HTTP/1.1, one or none in HTTP/1.0 (RFC 9112, section 3.2).
fn check_host(headers: &RawHeaders, authority: Option<&[u8]>, is_required: bool) -> Option<&'static str> {
    let mut hosts = headers.all(HeaderId::Host);
    match (hosts.next(), hosts.next()) {
        (None, _) if is_required => Some("there is no Host header"),
        (None, _) => None,
        (Some(_), Some(_)) => Some("there is more than one Host header"),
        (Some(host), None) if !is_host(host) => Some("the Host header is not a host"),
        (Some(host), None) if authority.is_some_and(|authority| !host.eq_ignore_ascii_case(authority)) => {
            Some("the Host header and :authority differ")
        }
        (Some(_), None) => None,
    }
}

/// Whether all bytes may be part of a host and port (RFC 3986, section 3.2.2), which may be empty. User
/// information (`@`) and paths are what a proxy before or behind the router could read differently.
fn is_host(value: &[u8]) -> bool {
    let is_host_byte = |byte: &u8| {
        matches!(
            byte,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'%' | b'!' | b'$' | b'&' | b'\''
                ..=b',' | b';' | b'=' | b':' | b'[' | b']'
        )
    };
    value.iter().all(is_host_byte)
}

/// The framing of the body (RFC 9112, section 6.3).
fn framing(headers: &RawHeaders, is_http_11: bool) -> Result<BodyDecoder, &'static str> {
    let mut codings = headers.all(HeaderId::TransferEncoding);
    match (codings.next(), codings.next()) {
        (None, _) => {
            let length = one_length(headers.all(HeaderId::ContentLength));
            Ok(BodyDecoder::length(length.map_err(|()| "its Content-Length is not one number")?.unwrap_or(0)))
        }
        // Any other coding, or two lines of it, a proxy before the router may have read differently.
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => {
            if is_http_11 {
                Ok(BodyDecoder::chunked())
            } else {
                Err("Transfer-Encoding is not allowed in HTTP/1.0")
            }
        }
        _ => Err("the only supported Transfer-Encoding is chunked, once"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method, target, and length of the head.
    type Read = (String, String, usize);

    /// Parses a head that arrives in one read, and in reads of 1 to 7 bytes, which must all give the same.
    fn read(text: &str) -> Result<Option<Read>, HeadError> {
        let whole = read_request_head(text.as_bytes(), 0);
        for step in 1..8 {
            let (mut received, mut searched) = (0, 0);
            let in_parts = loop {
                received = (received + step).min(text.len());
                let read = read_request_head(&text.as_bytes()[..received], searched);
                if !matches!(read, Ok(None)) || received == text.len() {
                    break read;
                }
                searched = received.saturating_sub(3);
            };
            let shown =
                |read: &Result<Option<(RequestHead, RequestFraming, usize)>, HeadError>| format!("{read:?}");
            // In parts, another error may be found first than in the whole.
            assert!(whole.is_err() == in_parts.is_err(), "in reads of {step}: {in_parts:?}");
            assert!(whole.is_err() || shown(&in_parts) == shown(&whole), "in reads of {step}: {in_parts:?}");
        }
        whole.map(|read| {
            read.map(|(head, _, length)| (head.method.to_string(), head.target.to_string(), length))
        })
    }

    fn framing_of(text: &str) -> RequestFraming {
        read_request_head(text.as_bytes(), 0).unwrap().unwrap().1
    }

    fn reject_reason(text: &str) -> Option<&'static str> {
        read_request_head(text.as_bytes(), 0).unwrap().unwrap().0.reject_reason
    }

    #[test]
    fn a_head_ends_with_an_empty_line() {
        let seen =
            |method: &str, target: &str, length| Ok(Some((method.to_owned(), target.to_owned(), length)));
        assert_eq!(read("GET /a?b HTTP/1.1\r\nhost: r\r\n\r\nbody"), seen("GET", "/a?b", 30));
        assert_eq!(read("POST /generate HTTP/1.0\nhost: r\n\n"), seen("POST", "/generate", 33));
        assert_eq!(read("GET http://h:1/a?b HTTP/1.1\r\nhost: r\r\n\r\n"), seen("GET", "/a?b", 40));
        assert_eq!(read("GET http://h:1 HTTP/1.1\r\nhost: r\r\n\r\n"), seen("GET", "/", 36));
        for part in ["G", "GET /", "GET / HTTP/1.1\r\nhost: r\r\n", "GET / HTTP/1.1\r\nhost: r\r\n\r", "\r"] {
            assert_eq!(read(part), Ok(None), "{part}");
        }
    }

    #[test]
    fn what_cannot_become_a_request_is_malformed_at_its_first_byte() {
        for text in ["\x16\x03\x01", "{\"a\":1}", &"x".repeat(MAX_METHOD + 1), "\0"] {
            assert!(matches!(read(text), Err(HeadError::Malformed(_))), "{text:?}");
        }
        assert_eq!(read(&"x".repeat(MAX_METHOD)), Ok(None));
        // Found by fuzzing: this was accepted if it arrived in one read.
        let long = format!("{} / HTTP/1.1\r\nhost: r\r\n\r\n", "x".repeat(MAX_METHOD + 1));
        assert!(matches!(read(&long), Err(HeadError::Malformed(_))));
        let preface = read("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert_eq!(preface, Err(HeadError::Malformed("HTTP/2 is not enabled on this listener")));
    }

    #[test]
    fn a_head_is_bounded_in_bytes_and_in_headers() {
        let of =
            |length: usize| format!("GET / HTTP/1.1\r\nhost: r\r\nx: {}\r\n\r\n", "a".repeat(length - 32));
        let read =
            |text: &str| read_request_head(text.as_bytes(), 0).map(|read| read.map(|(.., length)| length));
        assert_eq!(read(&of(MAX_HEAD)), Ok(Some(MAX_HEAD)));
        assert_eq!(read(&of(MAX_HEAD + 1)), Err(HeadError::TooLarge));
        assert_eq!(read(&of(MAX_HEAD + 9)[..MAX_HEAD]), Err(HeadError::TooLarge));
        let lines = |count| format!("GET / HTTP/1.1\r\n{}\r\n", "host: r\r\n".repeat(count));
        assert!(read(&lines(MAX_HEADERS)).is_ok());
        assert_eq!(read(&lines(MAX_HEADERS + 1)), Err(HeadError::TooLarge));
    }

    #[test]
    fn a_connection_is_kept_alive_by_the_version_or_by_the_client() {
        for (head, keeps_alive) in [
            ("GET / HTTP/1.1\r\nhost: r\r\n", true),
            ("GET / HTTP/1.1\r\nhost: r\r\nconnection: a, Close\r\n", false),
            ("GET / HTTP/1.0\r\n", false),
            ("GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n", true),
            ("GET / HTTP/1.0\r\nconnection: keep-alive, close\r\n", false),
            ("GET / HTTP/1.1\r\n", false),
            ("GET / HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n", false),
        ] {
            assert_eq!(framing_of(&format!("{head}\r\n")).keeps_alive, keeps_alive, "{head}");
        }
    }

    #[test]
    fn a_body_is_framed_by_one_length_or_by_chunks() {
        let framed = |lines: &str| format!("POST / HTTP/1.1\r\nhost: r\r\n{lines}\r\n");
        for (lines, body) in [
            ("", BodyDecoder::length(0)),
            ("content-length: 7\r\n", BodyDecoder::length(7)),
            ("content-length: 7\r\ncontent-length: 7\r\n", BodyDecoder::length(7)),
            ("Transfer-Encoding: CHUNKED\r\n", BodyDecoder::chunked()),
        ] {
            let text = framed(lines);
            assert_eq!((framing_of(&text).body, reject_reason(&text)), (body, None), "{lines}");
        }
        for lines in
            ["content-length: 7\r\ncontent-length: 8\r\n", "content-length:\r\n", "content-length: +7\r\n"]
        {
            assert_eq!(
                reject_reason(&framed(lines)),
                Some("its Content-Length is not one number"),
                "{lines}"
            );
        }
        let http_10 = "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(reject_reason(http_10), Some("Transfer-Encoding is not allowed in HTTP/1.0"));
        assert!(framing_of(&framed("expect: 100-Continue\r\n")).expects_continue);
        assert!(!framing_of(&framed("expect: 200-ok\r\n")).expects_continue);
    }
}

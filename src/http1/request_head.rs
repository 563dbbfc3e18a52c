//! A client's request line and headers, and what they say of the body and of the connection.
//!
//! A head that two programs could read in two ways is never guessed at: what is
//! wrong with it is its reject_reason, and it is for the caller to refuse it.

use std::mem::MaybeUninit;

use hyper::http::request;
use hyper::http::uri::{PathAndQuery, Uri};
use hyper::{Method, Version};

use super::framing::is_name;
use super::{BodyDecoder, HeaderId, MAX_HEAD, MAX_HEADERS, RawHeaders, end_of_head, one_length};

/// What a client asks for, over whichever version of HTTP.
#[derive(Debug, Clone)]
pub(crate) struct RequestHead {
    pub(crate) method: Method,
    pub(crate) target: PathAndQuery,
    pub(crate) fields: RawHeaders,
    /// Why it must not be answered.
    pub(crate) reject_reason: Option<&'static str>,
}

/// What a request over HTTP/1 says of its body, and of what comes behind it.
#[derive(Debug, Clone)]
pub(crate) struct RequestFraming {
    pub(crate) body: BodyDecoder,
    /// The client understands an answer in chunks.
    pub(crate) is_http_11: bool,
    /// The connection may have another request.
    pub(crate) keeps_alive: bool,
    /// The client waits for a word before it sends the body.
    pub(crate) expects_continue: bool,
}

/// What is no head of a request.
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

    /// A request that hyper has read. Over HTTP/2 `:authority` stands for `Host`, or says the same (RFC 9113,
    /// section 8.3.1).
    pub(crate) fn from_parts(head: &request::Parts) -> Self {
        let fields: RawHeaders =
            head.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let reject_reason = if fields.len() > MAX_HEADERS {
            Some("there are more than 100 headers")
        } else if head.version == Version::HTTP_2 {
            let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
            check_host(&fields, authority, authority.is_none())
        } else {
            let is_http_11 = head.version == Version::HTTP_11;
            // hyper takes `Transfer-Encoding: chunked` twice, which another server may read in another way.
            check_host(&fields, None, is_http_11).or_else(|| body(&fields, is_http_11).err())
        };
        let reject_reason = reject_reason.or_else(|| check_target(&head.uri));
        let target = head.uri.path_and_query().cloned().unwrap_or_else(root);
        Self { method: head.method.clone(), target, fields, reject_reason }
    }
}

/// Parses a head that the router wrote itself, which may be longer than a client's. Returns its length.
pub(crate) fn parse_outgoing_head(text: &[u8]) -> Option<(RequestHead, usize)> {
    // A client's headers, and the few that the router adds.
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS + 16];
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(text, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        _ => return None,
    };
    let method = Method::from_bytes(parsed.method?.as_bytes()).ok()?;
    let target = parsed.path?.parse().ok()?;
    let fields = RawHeaders::parsed(&text[..length], parsed.headers);
    Some((RequestHead { method, target, fields, reject_reason: None }, length))
}

/// Reads the head of a request, if all of it has come, and says how many bytes it has. An empty line before it has been
/// skipped. Nothing before `searched` can be its end; what has not been searched at all is read at once.
pub(crate) fn read_request_head(
    input: &[u8],
    searched: usize,
) -> Result<Option<(RequestHead, RequestFraming, usize)>, HeadError> {
    // A head that comes in many parts is not read once a part.
    let read = if searched == 0 || end_of_head(input, searched).is_some() { parse(input)? } else { None };
    match read {
        Some((.., length)) if length > MAX_HEAD => Err(HeadError::TooLarge),
        None if input.len() >= MAX_HEAD => Err(HeadError::TooLarge),
        None => check_beginning(input).map(|()| None),
        read => Ok(read),
    }
}

/// Longest method. The longest that is registered has 17 letters.
const MAX_METHOD: usize = 32;

/// What does not begin as a request does is refused at once, not waited for.
fn check_beginning(input: &[u8]) -> Result<(), HeadError> {
    let method = input.iter().take_while(|byte| **byte != b' ').take(MAX_METHOD + 1);
    let is_good = method.clone().all(|byte| is_name(*byte)) && method.count() <= MAX_METHOD;
    // Half of an empty line may be in front.
    if is_good || input == b"\r" {
        Ok(())
    } else {
        Err(HeadError::Malformed("it does not begin with a method"))
    }
}

/// `None`: the head goes on.
fn parse(input: &[u8]) -> Result<Option<(RequestHead, RequestFraming, usize)>, HeadError> {
    if input.starts_with(b"PRI * HTTP/2.0\r\n") {
        return Err(HeadError::Malformed("HTTP/2 is not spoken here"));
    }
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(input, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
        Err(error) => return Err(HeadError::Malformed(what(error))),
    };
    let method = parsed.method.filter(|method| method.len() <= MAX_METHOD);
    let method = method.and_then(|method| Method::from_bytes(method.as_bytes()).ok());
    let method = method.ok_or(HeadError::Malformed("its method is none"))?;
    let (target, reject_reason) = target(parsed.path.unwrap_or_default())?;
    let is_http_11 = parsed.version == Some(1);
    let fields = RawHeaders::parsed(&input[..length], parsed.headers);
    let reject_reason = check_host(&fields, None, is_http_11).or(reject_reason);
    let (body, reject_reason) = match body(&fields, is_http_11) {
        Ok(body) => (body, reject_reason),
        Err(what) => (BodyDecoder::ended(), Some(what)),
    };
    let option =
        |wanted: &[u8]| fields.connection_options().any(|option| option.eq_ignore_ascii_case(wanted));
    // A length beside chunks is the sign of somebody who reads them otherwise (RFC 9112, section 6.1).
    let is_doubtful = reject_reason.is_some()
        || (fields.has(HeaderId::TransferEncoding) && fields.has(HeaderId::ContentLength));
    let keeps_alive = !is_doubtful && !option(b"close") && (is_http_11 || option(b"keep-alive"));
    let expects_continue = is_http_11
        && fields
            .get(HeaderId::Expect)
            .is_some_and(|expected| expected.eq_ignore_ascii_case(b"100-continue"));
    let head = RequestHead { method, target, fields, reject_reason };
    Ok(Some((head, RequestFraming { body, is_http_11, keeps_alive, expects_continue }, length)))
}

fn what(error: httparse::Error) -> &'static str {
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

/// What is asked for, and what is wrong with it.
fn target(text: &str) -> Result<(PathAndQuery, Option<&'static str>), HeadError> {
    let malformed = HeadError::Malformed("its target is malformed");
    // What nearly all ask for needs no memory.
    const USUAL: [&str; 3] = ["/v1/chat/completions", "/generate", "/v1/completions"];
    if let Some(usual) = USUAL.iter().find(|usual| **usual == text) {
        return Ok((PathAndQuery::from_static(usual), None));
    }
    if text.starts_with('/') {
        return text.parse().map(|target| (target, None)).map_err(|_| malformed);
    }
    let uri: Uri = text.parse().map_err(|_| malformed)?;
    let reject_reason = check_target(&uri);
    Ok((uri.into_parts().path_and_query.unwrap_or_else(root), reject_reason))
}

/// A path, or a whole URL (RFC 9112, sections 3.2.1 and 3.2.2). The other two forms are for proxies and for `OPTIONS`.
fn check_target(target: &Uri) -> Option<&'static str> {
    let is_known = match target.scheme_str() {
        None => target.authority().is_none() && target.path().starts_with('/'),
        Some(scheme) => ["http", "https"].contains(&scheme),
    };
    if is_known { None } else { Some("the request target is not a path") }
}

/// RFC 9112, section 3.2: one `Host` in HTTP/1.1, one or none in HTTP/1.0.
fn check_host(fields: &RawHeaders, authority: Option<&[u8]>, must: bool) -> Option<&'static str> {
    let mut hosts = fields.all(HeaderId::Host);
    match (hosts.next(), hosts.next()) {
        (None, _) if must => Some("there is no Host header"),
        (None, _) => None,
        (Some(_), Some(_)) => Some("there is more than one Host header"),
        (Some(host), None) if !is_host(host) => Some("the Host header is not a host"),
        (Some(host), None) if authority.is_some_and(|authority| !host.eq_ignore_ascii_case(authority)) => {
            Some("the Host header and :authority differ")
        }
        (Some(_), None) => None,
    }
}

/// Whether all characters may be part of a host and a port (RFC 3986, section 3.2.2). It may be empty.
fn is_host(value: &[u8]) -> bool {
    let may_be_part = |byte: &u8| {
        matches!(
            byte,
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'%' | b'!' | b'$' | b'&' | b'\''
                ..=b',' | b';' | b'=' | b':' | b'[' | b']'
        )
    };
    value.iter().all(may_be_part)
}

/// How the body is framed (RFC 9112, section 6.3).
fn body(fields: &RawHeaders, is_http_11: bool) -> Result<BodyDecoder, &'static str> {
    let mut codings = fields.all(HeaderId::TransferEncoding);
    match (codings.next(), codings.next()) {
        (None, _) => {
            let length = one_length(fields.all(HeaderId::ContentLength));
            Ok(BodyDecoder::length(length.map_err(|()| "its Content-Length is not one number")?.unwrap_or(0)))
        }
        // Whoever came before may have understood another coding, or two, in another way.
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => {
            if is_http_11 {
                Ok(BodyDecoder::chunked())
            } else {
                Err("Transfer-Encoding is not known in HTTP/1.0")
            }
        }
        _ => Err("the only Transfer-Encoding that is understood is chunked, once"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Seen = (String, String, usize);

    /// What is read of a head that comes in pieces of any length: method, target, and how many bytes it has.
    fn read(text: &str) -> Result<Option<Seen>, HeadError> {
        let whole = read_request_head(text.as_bytes(), 0);
        for step in 1..8 {
            let (mut come, mut searched) = (0, 0);
            let pieces = loop {
                come = (come + step).min(text.len());
                let read = read_request_head(&text.as_bytes()[..come], searched);
                if !matches!(read, Ok(None)) || come == text.len() {
                    break read;
                }
                searched = come.saturating_sub(3);
            };
            let shown =
                |read: &Result<Option<(RequestHead, RequestFraming, usize)>, HeadError>| format!("{read:?}");
            // What is malformed may be seen before all of it is there.
            assert!(whole.is_err() == pieces.is_err(), "in pieces of {step}: {pieces:?}");
            assert!(whole.is_err() || shown(&pieces) == shown(&whole), "in pieces of {step}: {pieces:?}");
        }
        whole.map(|read| {
            read.map(|(head, _, length)| (head.method.to_string(), head.target.to_string(), length))
        })
    }

    fn manner(text: &str) -> RequestFraming {
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
    fn what_does_not_begin_like_a_request_is_refused_at_once() {
        for text in ["\x16\x03\x01", "{\"a\":1}", &"x".repeat(MAX_METHOD + 1), "\0"] {
            assert!(matches!(read(text), Err(HeadError::Malformed(_))), "{text:?}");
        }
        assert_eq!(read(&"x".repeat(MAX_METHOD)), Ok(None));
        // Found by fuzzing: taken if all of it came at once.
        let long = format!("{} / HTTP/1.1\r\nhost: r\r\n\r\n", "x".repeat(MAX_METHOD + 1));
        assert!(matches!(read(&long), Err(HeadError::Malformed(_))));
        let preface = read("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert_eq!(preface, Err(HeadError::Malformed("HTTP/2 is not spoken here")));
    }

    #[test]
    fn a_head_is_bounded() {
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
    fn a_connection_goes_on_if_client_and_version_say_so() {
        for (head, goes_on) in [
            ("GET / HTTP/1.1\r\nhost: r\r\n", true),
            ("GET / HTTP/1.1\r\nhost: r\r\nconnection: a, Close\r\n", false),
            ("GET / HTTP/1.0\r\n", false),
            ("GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n", true),
            ("GET / HTTP/1.0\r\nconnection: keep-alive, close\r\n", false),
            ("GET / HTTP/1.1\r\n", false),
            ("GET / HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n", false),
        ] {
            assert_eq!(manner(&format!("{head}\r\n")).keeps_alive, goes_on, "{head}");
        }
    }

    #[test]
    fn a_body_is_framed_by_one_length_or_in_chunks() {
        let framed = |lines: &str| format!("POST / HTTP/1.1\r\nhost: r\r\n{lines}\r\n");
        for (lines, body) in [
            ("", BodyDecoder::length(0)),
            ("content-length: 7\r\n", BodyDecoder::length(7)),
            ("content-length: 7\r\ncontent-length: 7\r\n", BodyDecoder::length(7)),
            ("Transfer-Encoding: CHUNKED\r\n", BodyDecoder::chunked()),
        ] {
            let text = framed(lines);
            assert_eq!((manner(&text).body, reject_reason(&text)), (body, None), "{lines}");
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
        let old = "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(reject_reason(old), Some("Transfer-Encoding is not known in HTTP/1.0"));
        assert!(manner(&framed("expect: 100-Continue\r\n")).expects_continue);
        assert!(!manner(&framed("expect: 200-ok\r\n")).expects_continue);
    }
}

//! The head of a response: status line and headers, and the framing of the body that follows from them.
//!
//! A head that two parsers could read differently is an error, never a guess. Reading the bytes is for the
//! connection; what a status means is for the caller.

use std::mem::MaybeUninit;

use hyper::ext::ReasonPhrase;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::response;
use hyper::{Response, StatusCode, Version};

use super::{
    BodyDecoder, HeaderId, MAX_HEAD, MAX_HEADERS, MalformedMessage, RawHeaders, end_of_head, one_length,
};

/// A parsed response head, the framing of the body, and whether the connection is used again.
#[derive(Debug)]
pub(crate) struct ParsedResponse {
    pub(crate) head: ResponseHead,
    /// For the bytes after the head.
    pub(crate) decoder: BodyDecoder,
    /// The server keeps the connection open, and the end of the body is known without a close.
    pub(crate) keeps_alive: bool,
    /// Length of the head in bytes, with the interim responses before it.
    pub(crate) length: usize,
}

/// Status and header lines.
#[derive(Debug, Default)]
pub(crate) struct ResponseHead {
    pub(crate) status: StatusCode,
    /// The content type is `text/event-stream`. Stored, because it is read several times per response.
    pub(crate) is_event_stream: bool,
    pub(crate) headers: RawHeaders,
    /// The reason phrase, if it differs from the standard one of the status.
    pub(crate) reason: Option<Box<str>>,
}

impl ResponseHead {
    /// Converts a response that hyper has read.
    pub(crate) fn from_parts(head: response::Parts) -> Self {
        let headers: RawHeaders =
            head.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let is_event_stream = headers.get(HeaderId::ContentType).is_some_and(is_event_stream_type);
        let reason = head.extensions.get::<ReasonPhrase>();
        let reason = reason.and_then(|reason| std::str::from_utf8(reason.as_bytes()).ok());
        Self { status: head.status, is_event_stream, headers, reason: reason.map(Into::into) }
    }

    /// Converts to what hyper takes.
    pub(crate) fn into_parts(self) -> response::Parts {
        let (mut parts, ()) = Response::new(()).into_parts();
        parts.status = self.status;
        parts.headers = HeaderMap::with_capacity(self.headers.len());
        for line in self.headers.iter() {
            // Never skips a line: httparse accepts only what these accept.
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_bytes(line.name), HeaderValue::from_bytes(line.value))
            {
                parts.headers.append(name, value);
            }
        }
        // HTTP/2 has none (RFC 9113, section 8.3.2), and hyper ignores it there.
        let reason = self.reason.and_then(|reason| ReasonPhrase::try_from(reason.as_bytes()).ok());
        reason.map(|reason| parts.extensions.insert(reason));
        parts
    }
}

/// Parses the head of a response. `None`: it is incomplete. Interim responses (1xx) before it are skipped
/// (RFC 9110, section 15.2). If `searched` bytes of the input were there at the last call, the end of the
/// head is searched for first, so that a head in many small reads is parsed once instead of once per read.
pub(crate) fn read_response_head(
    mut input: &[u8],
    searched: usize,
) -> Result<Option<ParsedResponse>, MalformedMessage> {
    let mut skipped = 0;
    loop {
        check_start(input)?;
        let parsed = if searched == 0 || end_of_head(input, 0).is_some() { parse(input)? } else { None };
        let too_long = Err(MalformedMessage("its head is too long"));
        let Some(mut response) = parsed else {
            // A server must not make the router buffer for ever, with one head or with many interim ones.
            return if skipped + input.len() >= MAX_HEAD { too_long } else { Ok(None) };
        };
        if skipped + response.length > MAX_HEAD {
            return too_long;
        }
        match response.head.status {
            // What follows would not be HTTP. The router never sends Upgrade, so no server may send this.
            StatusCode::SWITCHING_PROTOCOLS => return Err(MalformedMessage("it switches protocols")),
            status if status.is_informational() => {
                skipped += response.length;
                input = &input[response.length..];
            }
            _ => {
                response.length += skipped;
                return Ok(Some(response));
            }
        }
    }
}

/// Rejects at once what cannot become a response, such as a TLS alert. Otherwise the router would wait for
/// the end of a head until the request times out.
fn check_start(input: &[u8]) -> Result<(), MalformedMessage> {
    const START: &[u8] = b"HTTP/1.";
    let start = &input[..input.len().min(START.len())];
    if START.starts_with(start) { Ok(()) } else { Err(MalformedMessage("it does not start with HTTP/1")) }
}

/// `None`: the head is incomplete.
fn parse(input: &[u8]) -> Result<Option<ParsedResponse>, MalformedMessage> {
    let mut lines = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, input, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(MalformedMessage("it has too many headers")),
        Err(_) => return Err(MalformedMessage("its head is malformed")),
    };
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(MalformedMessage("its status code is invalid"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let headers = RawHeaders::parsed(&input[..length], parsed.headers);
    let decoder = decoder(status, version, &headers)?;
    // Both framings at once may be an attempt to smuggle a response. Transfer-Encoding decides, and the
    // connection is not used again (RFC 9112, section 6.3, rule 3).
    let has_two_lengths = headers.has(HeaderId::TransferEncoding) && headers.has(HeaderId::ContentLength);
    // An HTTP/1.0 server may offer keep-alive too. SGLang speaks 1.1, so that is not worth the code.
    let keeps_alive = version == Version::HTTP_11
        && !headers.connection_options().any(|option| option.eq_ignore_ascii_case(b"close"))
        && !has_two_lengths
        && decoder != BodyDecoder::until_close();
    let is_event_stream = headers.get(HeaderId::ContentType).is_some_and(is_event_stream_type);
    let reason = uncommon_reason(status, parsed.reason);
    let head = ResponseHead { status, is_event_stream, headers, reason };
    Ok(Some(ParsedResponse { head, decoder, keeps_alive, length }))
}

fn uncommon_reason(status: StatusCode, reason: Option<&str>) -> Option<Box<str>> {
    // Most servers send the standard phrase, and then nothing is allocated.
    let reason = reason.filter(|reason| status.canonical_reason() != Some(reason))?;
    Some(reason.into())
}

/// Whether a content type is that of server-sent events, whatever its parameters.
fn is_event_stream_type(content_type: &[u8]) -> bool {
    const MEDIA_TYPE: &[u8] = b"text/event-stream";
    // SGLang appends `; charset=utf-8`.
    content_type.get(..MEDIA_TYPE.len()).is_some_and(|start| start.eq_ignore_ascii_case(MEDIA_TYPE))
}

/// The framing of the body (RFC 9112, section 6.3). Stricter in one point: a transfer coding other than
/// `chunked` alone is an error, because the router could not pass the body on decoded.
fn decoder(
    status: StatusCode,
    version: Version,
    headers: &RawHeaders,
) -> Result<BodyDecoder, MalformedMessage> {
    // Rule 1: these have no body, whatever the headers are.
    if status.is_informational() || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return Ok(BodyDecoder::length(0));
    }
    let mut codings = headers.all(HeaderId::TransferEncoding);
    match (codings.next(), codings.next()) {
        (Some(coding), None) if coding.trim_ascii().eq_ignore_ascii_case(b"chunked") => {
            // Section 6.1: the framing of an HTTP/1.0 message with Transfer-Encoding counts as faulty.
            return if version == Version::HTTP_11 {
                Ok(BodyDecoder::chunked())
            } else {
                Err(MalformedMessage("it has Transfer-Encoding in HTTP/1.0"))
            };
        }
        (Some(_), _) => return Err(MalformedMessage("its transfer coding is not chunked")),
        (None, _) => {}
    }
    let length = one_length(headers.all(HeaderId::ContentLength));
    let length = length.map_err(|()| MalformedMessage("its Content-Length is not one number"))?;
    // Rule 8: without either header the body ends with the connection.
    Ok(length.map_or_else(BodyDecoder::until_close, BodyDecoder::length))
}

//! Status line and headers, and what they say of the body.

use std::mem::MaybeUninit;

use hyper::ext::ReasonPhrase;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::response;
use hyper::{Response, StatusCode, Version};

use super::{
    BodyDecoder, HeaderId, MAX_HEAD, MAX_HEADERS, MalformedMessage, RawHeaders, end_of_head, one_length,
};

/// An answer whose head has come.
#[derive(Debug)]
pub(crate) struct ParsedResponse {
    pub(crate) head: ResponseHead,
    /// For what follows the head.
    pub(crate) decoder: BodyDecoder,
    /// The server means to keep the connection, and the body's end will be known.
    pub(crate) keeps_alive: bool,
    /// Bytes of the head.
    pub(crate) length: usize,
}

/// Status and header lines.
#[derive(Debug, Default)]
pub(crate) struct ResponseHead {
    pub(crate) status: StatusCode,
    /// The body is a stream of server-sent events.
    pub(crate) is_event_stream: bool,
    pub(crate) fields: RawHeaders,
    /// What the server says of the status in words, if they are not the usual ones.
    pub(crate) reason: Option<Box<str>>,
}

impl ResponseHead {
    /// A response that hyper has read.
    pub(crate) fn from_parts(head: response::Parts) -> Self {
        let fields: RawHeaders =
            head.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        let is_event_stream = fields.get(HeaderId::ContentType).is_some_and(names_event_stream);
        let reason = head.extensions.get::<ReasonPhrase>();
        let reason = reason.and_then(|reason| std::str::from_utf8(reason.as_bytes()).ok());
        Self { status: head.status, is_event_stream, fields, reason: reason.map(Into::into) }
    }

    /// The same with its headers in a map, for HTTP/2.
    pub(crate) fn into_parts(self) -> response::Parts {
        let (mut parts, ()) = Response::new(()).into_parts();
        parts.status = self.status;
        parts.headers = HeaderMap::with_capacity(self.fields.len());
        for line in self.fields.iter() {
            // httparse has let nothing else pass.
            if let (Ok(name), Ok(value)) =
                (HeaderName::from_bytes(line.name), HeaderValue::from_bytes(line.value))
            {
                parts.headers.append(name, value);
            }
        }
        parts
    }
}

/// Reads the head of a response, if all of it has come. Interim responses (1xx) before it are skipped. If some of the
/// input was `searched` before, the end is looked for first: a head that comes in many parts is not parsed once a part.
pub(crate) fn read_response_head(
    mut input: &[u8],
    searched: usize,
) -> Result<Option<ParsedResponse>, MalformedMessage> {
    let mut skipped = 0;
    loop {
        check_beginning(input)?;
        let answer = if searched == 0 || end_of_head(input, 0).is_some() { parse(input)? } else { None };
        let too_long = Err(MalformedMessage("its head is too long"));
        let Some(mut answer) = answer else {
            return if skipped + input.len() >= MAX_HEAD { too_long } else { Ok(None) };
        };
        if skipped + answer.length > MAX_HEAD {
            return too_long;
        }
        match answer.head.status {
            StatusCode::SWITCHING_PROTOCOLS => return Err(MalformedMessage("it switches protocols")),
            status if status.is_informational() => {
                skipped += answer.length;
                input = &input[answer.length..];
            }
            _ => {
                answer.length += skipped;
                return Ok(Some(answer));
            }
        }
    }
}

/// What does not begin as an answer does is refused at once, not waited for.
fn check_beginning(input: &[u8]) -> Result<(), MalformedMessage> {
    const BEGIN: &[u8] = b"HTTP/1.";
    let begin = &input[..input.len().min(BEGIN.len())];
    if BEGIN.starts_with(begin) {
        Ok(())
    } else {
        Err(MalformedMessage("it does not begin with a version of HTTP/1"))
    }
}

/// `None`: the head goes on.
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
    let status = status.ok_or(MalformedMessage("its status is none"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let fields = RawHeaders::parsed(&input[..length], parsed.headers);
    let decoder = decoder(status, version, &fields)?;
    let has_two_lengths = fields.has(HeaderId::TransferEncoding) && fields.has(HeaderId::ContentLength);
    let keeps_alive = version == Version::HTTP_11
        && !fields.connection_options().any(|option| option.eq_ignore_ascii_case(b"close"))
        && !has_two_lengths
        && decoder != BodyDecoder::until_close();
    let is_event_stream = fields.get(HeaderId::ContentType).is_some_and(names_event_stream);
    let reason = uncommon_reason(status, parsed.reason);
    let head = ResponseHead { status, is_event_stream, fields, reason };
    Ok(Some(ParsedResponse { head, decoder, keeps_alive, length }))
}

fn uncommon_reason(status: StatusCode, reason: Option<&str>) -> Option<Box<str>> {
    let reason = reason.filter(|reason| status.canonical_reason() != Some(reason))?;
    Some(reason.into())
}

/// Whether a content type is that of server-sent events.
fn names_event_stream(content_type: &[u8]) -> bool {
    const KIND: &[u8] = b"text/event-stream";
    content_type.get(..KIND.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(KIND))
}

/// How the body is framed (RFC 9112, section 6.3).
fn decoder(
    status: StatusCode,
    version: Version,
    fields: &RawHeaders,
) -> Result<BodyDecoder, MalformedMessage> {
    if status.is_informational() || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return Ok(BodyDecoder::length(0));
    }
    let mut codings = fields.all(HeaderId::TransferEncoding);
    match (codings.next(), codings.next()) {
        (Some(coding), None) if coding.trim_ascii().eq_ignore_ascii_case(b"chunked") => {
            // Section 6.1: whoever sends it as HTTP/1.0 does not know what it says.
            return if version == Version::HTTP_11 {
                Ok(BodyDecoder::chunked())
            } else {
                Err(MalformedMessage("it is chunked and HTTP/1.0"))
            };
        }
        (Some(_), _) => return Err(MalformedMessage("its transfer coding is not chunked")),
        (None, _) => {}
    }
    let length = one_length(fields.all(HeaderId::ContentLength));
    let length = length.map_err(|()| MalformedMessage("its length is not one number"))?;
    Ok(length.map_or_else(BodyDecoder::until_close, BodyDecoder::length))
}

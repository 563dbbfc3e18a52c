//! Status line and headers, and what they say of the body.

use std::mem::MaybeUninit;
use std::ops::Range;

use bytes::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::response;
use hyper::{Response, StatusCode, Version};

use super::{BadAnswer, Decoder, MAX_HEAD, MAX_HEADERS};

/// An answer whose head has come.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: Head,
    /// For what follows the head.
    pub(crate) decoder: Decoder,
    /// The server means to keep the connection, and the body's end will be known.
    pub(crate) keeps_alive: bool,
    /// Bytes of the head.
    pub(crate) length: usize,
}

/// Status and headers. The headers are put into a map only for an answer that is passed on: most of prefill's are not.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    /// The body is a stream of server-sent events.
    pub(crate) is_event_stream: bool,
    version: Version,
    reason: Option<ReasonPhrase>,
    text: Bytes,
    /// Where in the text names and values are.
    fields: Vec<(Range<usize>, Range<usize>)>,
}

impl Head {
    pub(crate) fn into_parts(self) -> response::Parts {
        let (mut parts, ()) = Response::new(()).into_parts();
        (parts.status, parts.version) = (self.status, self.version);
        parts.headers = HeaderMap::with_capacity(self.fields.len());
        for (name, value) in self.fields {
            let name = HeaderName::from_bytes(&self.text[name]);
            let value = HeaderValue::from_maybe_shared(self.text.slice(value));
            // httparse has let nothing else pass.
            if let (Ok(name), Ok(value)) = (name, value) {
                parts.headers.append(name, value);
            }
        }
        if let Some(reason) = self.reason {
            parts.extensions.insert(reason);
        }
        parts
    }
}

/// Reads the head of an answer, if all of it has come. Interim answers before it are skipped.
pub(crate) fn read_head(mut input: &[u8]) -> Result<Option<Answer>, BadAnswer> {
    let mut skipped = 0;
    loop {
        let Some(length) = end_of_head(input)? else {
            let is_too_long = skipped + input.len() >= MAX_HEAD;
            return if is_too_long { Err(BadAnswer("its head is too long")) } else { Ok(None) };
        };
        let answer = parse(&input[..length], skipped + length)?;
        match answer.head.status {
            StatusCode::SWITCHING_PROTOCOLS => return Err(BadAnswer("it switches protocols")),
            status if status.is_informational() => {
                skipped += length;
                input = &input[length..];
            }
            _ => return Ok(Some(answer)),
        }
    }
}

/// Where the empty line ends. What does not begin as an answer does is refused at once, not waited for.
fn end_of_head(input: &[u8]) -> Result<Option<usize>, BadAnswer> {
    const BEGIN: &[u8] = b"HTTP/1.";
    let begin = &input[..input.len().min(BEGIN.len())];
    if !BEGIN.starts_with(begin) {
        return Err(BadAnswer("it does not begin with a version of HTTP/1"));
    }
    let ends = memchr::memchr_iter(b'\n', input).find_map(|at| match &input[at + 1..] {
        [b'\r', b'\n', ..] => Some(at + 3),
        [b'\n', ..] => Some(at + 2),
        _ => None,
    });
    Ok(ends)
}

type Fields<'a> = [httparse::Header<'a>];

fn parse(head: &[u8], length: usize) -> Result<Answer, BadAnswer> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    match config.parse_response_with_uninit_headers(&mut parsed, head, &mut fields) {
        Ok(httparse::Status::Complete(end)) if end == head.len() => {}
        Ok(_) => return Err(BadAnswer("its head ends early")),
        Err(httparse::Error::TooManyHeaders) => return Err(BadAnswer("it has too many headers")),
        Err(_) => return Err(BadAnswer("its head is malformed")),
    }
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(BadAnswer("its status is none"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let fields: &Fields<'_> = parsed.headers;
    let decoder = decoder(status, version, fields)?;
    let has_two_lengths = has(fields, TRANSFER_ENCODING) && has(fields, CONTENT_LENGTH);
    let keeps_alive = version == Version::HTTP_11
        && !closes(fields)
        && !has_two_lengths
        && decoder != Decoder::until_close();
    let head = Head {
        status,
        is_event_stream: values(fields, "content-type").next().is_some_and(names_event_stream),
        version,
        reason: uncommon_reason(status, parsed.reason),
        text: Bytes::copy_from_slice(head),
        fields: fields
            .iter()
            .map(|field| (place(head, field.name.as_bytes()), place(head, field.value)))
            .collect(),
    };
    Ok(Answer { head, decoder, keeps_alive, length })
}

fn uncommon_reason(status: StatusCode, reason: Option<&str>) -> Option<ReasonPhrase> {
    let reason = reason.filter(|reason| status.canonical_reason() != Some(reason))?;
    ReasonPhrase::try_from(reason.to_owned()).ok()
}

/// Where a part of a text is in it.
fn place(text: &[u8], part: &[u8]) -> Range<usize> {
    let begin = part.as_ptr() as usize - text.as_ptr() as usize;
    begin..begin + part.len()
}

/// Whether a content type is that of server-sent events.
fn names_event_stream(content_type: &[u8]) -> bool {
    const KIND: &[u8] = b"text/event-stream";
    content_type.get(..KIND.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(KIND))
}

const CONNECTION: &str = "connection";
const CONTENT_LENGTH: &str = "content-length";
const TRANSFER_ENCODING: &str = "transfer-encoding";

fn values<'a>(fields: &Fields<'a>, name: &str) -> impl Iterator<Item = &'a [u8]> {
    fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
}

fn has(fields: &Fields<'_>, name: &str) -> bool {
    values(fields, name).next().is_some()
}

/// How the body is framed (RFC 9112, section 6.3).
fn decoder(status: StatusCode, version: Version, fields: &Fields<'_>) -> Result<Decoder, BadAnswer> {
    if status.is_informational() || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return Ok(Decoder::length(0));
    }
    let mut codings = values(fields, TRANSFER_ENCODING);
    match (codings.next(), codings.next()) {
        (Some(coding), None) if coding.trim_ascii().eq_ignore_ascii_case(b"chunked") => {
            // Section 6.1: whoever sends it as HTTP/1.0 does not know what it says.
            return if version == Version::HTTP_11 {
                Ok(Decoder::chunked())
            } else {
                Err(BadAnswer("it is chunked and HTTP/1.0"))
            };
        }
        (Some(_), _) => return Err(BadAnswer("its transfer coding is not chunked")),
        (None, _) => {}
    }
    let mut lengths = values(fields, CONTENT_LENGTH).map(length);
    let Some(length) = lengths.next() else { return Ok(Decoder::until_close()) };
    if length.is_none() || lengths.any(|other| other != length) {
        return Err(BadAnswer("its length is not one number"));
    }
    Ok(length.map_or_else(Decoder::until_close, Decoder::length))
}

fn length(value: &[u8]) -> Option<u64> {
    // `parse` takes a plus sign.
    if !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn closes(fields: &Fields<'_>) -> bool {
    let is_close = |option: &[u8]| option.trim_ascii().eq_ignore_ascii_case(b"close");
    values(fields, CONNECTION).flat_map(|list| list.split(|byte| *byte == b',')).any(is_close)
}

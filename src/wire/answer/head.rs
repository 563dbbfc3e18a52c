//! Status line and headers, and what they say of the body.

use std::mem::MaybeUninit;

use bytes::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use hyper::http::response;
use hyper::{Response, StatusCode, Version};

use super::{BadAnswer, Decoder, MAX_HEAD, MAX_HEADERS};

/// An answer whose head has come.
pub(crate) struct Answer {
    pub(crate) head: response::Parts,
    /// For what follows the head.
    pub(crate) decoder: Decoder,
    /// The server means to keep the connection, and the body's end will be known.
    pub(crate) keeps_alive: bool,
    /// Bytes of the head.
    pub(crate) length: usize,
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

fn parse(head: &[u8], length: usize) -> Result<Answer, BadAnswer> {
    let mut headers = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    match config.parse_response_with_uninit_headers(&mut parsed, head, &mut headers) {
        Ok(httparse::Status::Complete(end)) if end == head.len() => {}
        Ok(_) => return Err(BadAnswer("its head ends early")),
        Err(httparse::Error::TooManyHeaders) => return Err(BadAnswer("it has too many headers")),
        Err(_) => return Err(BadAnswer("its head is malformed")),
    }
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(BadAnswer("its status is none"))?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let headers = header_map(head, parsed.headers)?;
    let decoder = decoder(status, version, &headers)?;
    let has_two_lengths = headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH);
    let keeps_alive = version == Version::HTTP_11
        && !closes(&headers)
        && !has_two_lengths
        && decoder != Decoder::until_close();
    let (mut head, ()) = Response::new(()).into_parts();
    if parsed.reason != status.canonical_reason()
        && let Ok(reason) = ReasonPhrase::try_from(parsed.reason.unwrap_or_default().to_owned())
    {
        head.extensions.insert(reason);
    }
    (head.status, head.version, head.headers) = (status, version, headers);
    Ok(Answer { head, decoder, keeps_alive, length })
}

/// The values share one copy of the head.
fn header_map(head: &[u8], parsed: &[httparse::Header<'_>]) -> Result<HeaderMap, BadAnswer> {
    let shared = Bytes::copy_from_slice(head);
    let mut headers = HeaderMap::with_capacity(parsed.len());
    for header in parsed {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let begin = header.value.as_ptr() as usize - head.as_ptr() as usize;
        let value = HeaderValue::from_maybe_shared(shared.slice(begin..begin + header.value.len()));
        match (name, value) {
            (Ok(name), Ok(value)) => headers.append(name, value),
            _ => return Err(BadAnswer("it has a malformed header")),
        };
    }
    Ok(headers)
}

/// How the body is framed (RFC 9112, section 6.3).
fn decoder(status: StatusCode, version: Version, headers: &HeaderMap) -> Result<Decoder, BadAnswer> {
    if status.is_informational() || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status) {
        return Ok(Decoder::length(0));
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (Some(coding), None) if coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") => {
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
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter().map(length);
    let Some(length) = lengths.next() else { return Ok(Decoder::until_close()) };
    if length.is_none() || lengths.any(|other| other != length) {
        return Err(BadAnswer("its length is not one number"));
    }
    Ok(length.map_or_else(Decoder::until_close, Decoder::length))
}

fn length(value: &HeaderValue) -> Option<u64> {
    let digits = value.to_str().ok()?;
    // `parse` takes a plus sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

fn closes(headers: &HeaderMap) -> bool {
    let is_close = |option: &[u8]| option.trim_ascii().eq_ignore_ascii_case(b"close");
    let lists = headers.get_all(CONNECTION).iter();
    lists.flat_map(|list| list.as_bytes().split(|byte| *byte == b',')).any(is_close)
}

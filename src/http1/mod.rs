//! HTTP/1.1, and nothing else: heads, body framing, and both sides of a connection.
//!
//! Input may be cut anywhere. RFC 9112 is read strictly: what two parsers could read differently is an error,
//! because that is how requests are smuggled (section 11.2). Routes, the router's error codes, records and
//! metrics are not known here; `transport` makes this the native one of its engines.

mod body_buffer;
mod client;
mod close;
mod close_watch;
mod framing;
mod headers;
mod io;
mod outgoing;
mod request_head;
mod response_head;
mod response_writer;
mod server;
#[cfg(test)]
mod tests;

pub(crate) use body_buffer::sweep;
use body_buffer::{BODY_BUFFER_SIZE, BodyBuffer};
pub(crate) use client::{BodyProgress, ClientConnection, ConnError, SendError, WriteTiming};
pub(crate) use close::{LINGER, close, half_close, linger, reject, reset};
pub(crate) use close_watch::CloseWatch;
pub(crate) use framing::BodyDecoder;
pub(crate) use headers::{HeaderId, RawHeader, RawHeaders, name_bit};
pub(crate) use io::Stream;
pub(crate) use outgoing::{OutgoingBody, OutgoingRequest};
pub(crate) use request_head::{
    HeadError, RequestFraming, RequestHead, parse_outgoing_head, read_request_head,
};
pub(crate) use response_head::{ParsedResponse, ResponseHead, read_response_head};
pub(crate) use response_writer::{HeadSummary, Incomplete, OutgoingResponse, WriteOptions, WriteOutcome};
pub(crate) use server::{
    BodyReadError, BodyTimeouts, ClientTimeouts, HeadRejection, NextRequest, ServerConnection, memory_of_body,
};

/// Largest head in bytes; for a response, the final head and the interim ones together.
pub(crate) const MAX_HEAD: usize = 64 << 10;
/// Most header lines of a head. hyper's default limit too.
pub(crate) const MAX_HEADERS: usize = 100;
/// Most bytes of one chunk-size line besides its size, and of a body's trailers. SGLang and its clients send
/// neither extensions nor trailers. hyper has the same limit, for the extensions of a whole body.
const MAX_IGNORED: usize = 16 << 10;

/// A message that is not valid HTTP, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MalformedMessage(pub(crate) &'static str);

/// Where the empty line at the end of a head ends. The search starts at `from`. A bare LF counts as a line
/// end, as it does for httparse (RFC 9112, section 2.2).
fn end_of_head(input: &[u8], from: usize) -> Option<usize> {
    memchr::memchr_iter(b'\n', &input[from..]).map(|at| from + at).find_map(|at| match &input[at + 1..] {
        [b'\r', b'\n', ..] => Some(at + 3),
        [b'\n', ..] => Some(at + 2),
        _ => None,
    })
}

/// The value of one or several `Content-Length` lines, which must all be the same number (RFC 9112, section
/// 6.3, rule 5).
fn one_length<'a>(mut lengths: impl Iterator<Item = &'a [u8]>) -> Result<Option<u64>, ()> {
    let Some(first) = lengths.next() else { return Ok(None) };
    let length = length(first).ok_or(())?;
    if lengths.all(|other| self::length(other) == Some(length)) { Ok(Some(length)) } else { Err(()) }
}

/// Only digits are valid (RFC 9110, section 8.6); `u64::from_str` would accept a plus sign.
fn length(value: &[u8]) -> Option<u64> {
    let digit = |number: u64, digit: &u8| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    };
    if value.is_empty() { None } else { value.iter().try_fold(0, digit) }
}

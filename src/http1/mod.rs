//! HTTP/1.1, and nothing else: heads, framing of bodies, and a connection's two sides.
//!
//! Bytes may come cut anywhere. RFC 9112 is read strictly: what two parties could read in two
//! ways is not guessed at. Nothing here knows a route, an error code of ours, a record or a
//! metric; the room `transport` makes this one of its engines.

mod body_buffer;
mod client;
mod close;
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
pub(crate) use close::{LINGER, close, linger, reject};
pub(crate) use framing::BodyDecoder;
#[cfg(any(test, fuzzing))]
pub(crate) use headers::RawHeader;
pub(crate) use headers::{HeaderId, RawHeaders, name_bit};
pub(crate) use io::Stream;
pub(crate) use outgoing::{OutgoingBody, OutgoingRequest};
pub(crate) use request_head::{
    HeadError, RequestFraming, RequestHead, parse_outgoing_head, read_request_head,
};
pub(crate) use response_head::{ParsedResponse, ResponseHead, read_response_head};
pub(crate) use response_writer::{HeadSummary, Incomplete, OutgoingResponse, WriteOptions, WriteOutcome};
pub(crate) use server::{BodyReadError, ClientTimeouts, HeadRejection, NextRequest, ServerConnection};

/// Largest head; of a server, of all heads that come before a body together.
pub(crate) const MAX_HEAD: usize = 64 << 10;
/// Most header lines of a head.
pub(crate) const MAX_HEADERS: usize = 100;
/// Most bytes of a body's chunk extensions and trailers, all in all: SGLang and its clients send neither.
const MAX_IGNORED: usize = 16 << 10;

/// What came is not HTTP: what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MalformedMessage(pub(crate) &'static str);

/// Where the empty line ends that ends a head, if it does. Nothing before `from` needs to be looked at.
fn end_of_head(input: &[u8], from: usize) -> Option<usize> {
    memchr::memchr_iter(b'\n', &input[from..]).map(|at| from + at).find_map(|at| match &input[at + 1..] {
        [b'\r', b'\n', ..] => Some(at + 3),
        [b'\n', ..] => Some(at + 2),
        _ => None,
    })
}

/// The one number that all of these are, or `None`.
fn one_length<'a>(mut lengths: impl Iterator<Item = &'a [u8]>) -> Result<Option<u64>, ()> {
    let Some(first) = lengths.next() else { return Ok(None) };
    let length = length(first).ok_or(())?;
    if lengths.all(|other| self::length(other) == Some(length)) { Ok(Some(length)) } else { Err(()) }
}

/// Digits only: `parse` takes a plus sign.
fn length(value: &[u8]) -> Option<u64> {
    let digit = |number: u64, digit: &u8| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    };
    if value.is_empty() { None } else { value.iter().try_fold(0, digit) }
}

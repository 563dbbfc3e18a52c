//! Body framing (RFC 9112, section 6): by length, chunked, or until the connection closes.
//!
//! A decoder only finds the body's bytes in the input. Which framing a message has is decided where its head
//! is parsed, and reading and keeping the bytes is for the connection.

use std::ops::Range;

use super::{MAX_HEADERS, MAX_IGNORED, MalformedMessage};

/// Finds a body's bytes in its framing. It buffers nothing, so the input may be cut anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BodyDecoder {
    /// The bytes that remain.
    Length(u64),
    Chunked(ChunkedDecoder),
    /// For responses only: a request body always has a known end (RFC 9112, section 6.3, rule 7).
    UntilClose,
}

/// Most digits of a chunk size that is read at once: below 4 GiB.
const MAX_PLAIN_DIGITS: usize = 8;

/// The state of a chunked body (RFC 9112, section 7.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChunkedDecoder {
    state: State,
    /// The size read so far, then the bytes that remain of the chunk.
    size: u64,
    /// Bytes of the current chunk-size line besides its size, or of the trailers so far. They are bounded
    /// because they carry no body: without a bound a peer could send them for ever.
    ignored: usize,
    trailers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first digit of a chunk size.
    Size,
    Digits,
    /// White space after a chunk size: an extension or the end of the line follows.
    Space,
    Extension,
    /// After the CR of a chunk size line.
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line, or of the empty line after the trailers.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Ended,
}

impl BodyDecoder {
    /// The decoder of an empty body.
    pub(crate) fn ended() -> Self {
        Self::Length(0)
    }

    pub(crate) fn length(bytes: u64) -> Self {
        Self::Length(bytes)
    }

    pub(super) fn until_close() -> Self {
        Self::UntilClose
    }

    pub(crate) fn chunked() -> Self {
        Self::Chunked(ChunkedDecoder { state: State::Size, size: 0, ignored: 0, trailers: 0 })
    }

    /// Finds the next bytes of the body in `input`, which is consumed up to their end. An empty range means
    /// that the framing has been consumed up to the end of the body or of the input; what follows belongs to
    /// the next message.
    pub(crate) fn next(&mut self, input: &[u8]) -> Result<Range<usize>, MalformedMessage> {
        let decoder = match self {
            Self::Length(remaining) => return Ok(0..take(remaining, input.len())),
            Self::Chunked(decoder) => decoder,
            Self::UntilClose => return Ok(0..input.len()),
        };
        let start = decoder.skip_framing(input)?;
        Ok(start..start + decoder.take_data(input.len() - start))
    }

    /// Appends the body's bytes in `input` to `body`. Returns how many bytes of the input belong to the body
    /// or its framing; the others belong to the next message.
    pub(crate) fn decode(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, MalformedMessage> {
        let mut at = 0;
        while !self.is_ended() {
            let data = self.next(&input[at..])?;
            body.extend_from_slice(&input[at..][data.clone()]);
            at += data.end;
            // The rest of the input was framing.
            if data.is_empty() {
                break;
            }
        }
        Ok(at)
    }

    /// Whether the body is complete. A body until close is complete only after [`close`](Self::close).
    pub(crate) fn is_ended(&self) -> bool {
        match self {
            Self::Length(remaining) => *remaining == 0,
            Self::Chunked(decoder) => decoder.state == State::Ended,
            Self::UntilClose => false,
        }
    }

    /// The bytes that remain, if the message has a `Content-Length`.
    pub(crate) fn remaining(&self) -> Option<u64> {
        match self {
            Self::Length(remaining) => Some(*remaining),
            Self::Chunked(_) | Self::UntilClose => None,
        }
    }

    /// Notes that the peer closed the connection. Returns whether the body is complete: one with a length or
    /// in chunks that is cut off here is not, and must not be passed on as if it were (RFC 9112, section 8).
    pub(crate) fn close(&mut self) -> bool {
        if *self == Self::UntilClose {
            *self = Self::Length(0);
        }
        self.is_ended()
    }
}

impl ChunkedDecoder {
    /// Consumes framing up to the next byte of data. Returns its length.
    fn skip_framing(&mut self, input: &[u8]) -> Result<usize, MalformedMessage> {
        let mut at = self.skip_plain_framing(input);
        while at < input.len() && ![State::Data, State::Ended].contains(&self.state) {
            self.state = self.step(input[at])?;
            at += 1;
        }
        Ok(at)
    }

    /// Consumes the end of a chunk, and a [plain size](plain_size), as far as they are complete in the input.
    /// What is left is for [`step`](Self::step), with which a token would take 6 % more instructions.
    fn skip_plain_framing(&mut self, input: &[u8]) -> usize {
        let mut at = 0;
        if self.state == State::DataCr && input.starts_with(b"\r\n") {
            (self.state, at) = (State::Size, 2);
        }
        if self.state == State::Size
            && let Some((size, length)) = plain_size(&input[at..])
        {
            (self.state, self.size, self.ignored) = (State::Data, size, 0);
            at += length;
        }
        at
    }

    /// Consumes up to `max` bytes of the current chunk. Returns how many.
    fn take_data(&mut self, max: usize) -> usize {
        if self.state != State::Data {
            return 0;
        }
        let taken = take(&mut self.size, max);
        if self.size == 0 {
            self.state = State::DataCr;
        }
        taken
    }

    /// The state after one byte of framing. Stricter than some servers: line ends must be CR LF and nothing
    /// may precede a size, because a lenient reading of either is how requests are smuggled (RFC 9112,
    /// section 11.2).
    fn step(&mut self, byte: u8) -> Result<State, MalformedMessage> {
        use State::*;
        Ok(match (self.state, byte) {
            (Size | Digits, byte) if byte.is_ascii_hexdigit() => {
                self.add_digit(byte)?;
                // A leading zero. Other digits are bounded by the size's 64 bits.
                if self.size == 0 { self.ignore(Digits)? } else { Digits }
            }
            // White space before an extension (RFC 9112, section 7.1.1) or as padding cannot be misread.
            (Digits | Space, b' ' | b'\t') => self.ignore(Space)?,
            (Digits | Space, b';') => self.ignore(Extension)?,
            (Digits | Space | Extension, b'\r') => SizeLf,
            // A bare LF in an extension would end the line for a parser that accepts LF as a line end.
            (Extension, byte) if byte != b'\n' => self.ignore(Extension)?,
            (SizeLf, b'\n') => {
                // Bounded by line and not by body: a stream may run for hours, and a server that pads each
                // chunk size or extends it sends a little with every event.
                self.ignored = 0;
                // The last chunk has size 0 and no data.
                if self.size == 0 { Trailer } else { Data }
            }
            (DataCr, b'\r') => DataLf,
            (DataLf, b'\n') => Size,
            (Trailer, b'\r') => EndLf,
            // Trailers are read and dropped. SGLang sends none, and to merge them into the headers is unsafe
            // (RFC 9110, section 6.5.1).
            (Trailer, byte) if is_token(byte) => {
                self.trailers += 1;
                self.ignore(TrailerName)?
            }
            (TrailerName, b':') => self.ignore(TrailerValue)?,
            (TrailerName, byte) if is_token(byte) => self.ignore(TrailerName)?,
            (TrailerValue, b'\r') => TrailerLf,
            // No control characters: a lenient parser could take a bare CR for the end of the line.
            (TrailerValue, byte) if byte == b'\t' || !byte.is_ascii_control() => self.ignore(TrailerValue)?,
            (TrailerLf, b'\n') => Trailer,
            (EndLf, b'\n') => Ended,
            (Size | Digits | Space | Extension | SizeLf, _) => {
                return Err(MalformedMessage("a chunk size is malformed"));
            }
            // After so many bytes there must be CR LF. Anything else means that size and data disagree.
            (DataCr | DataLf, _) => return Err(MalformedMessage("a chunk is longer than its size")),
            _ => return Err(MalformedMessage("its trailers are malformed")),
        })
    }

    /// Checked: a size that wraps around would end the chunk too early.
    fn add_digit(&mut self, digit: u8) -> Result<(), MalformedMessage> {
        let digit = u64::from(char::from(digit).to_digit(16).unwrap_or(0));
        let size = self.size.checked_mul(16).and_then(|size| size.checked_add(digit));
        self.size = size.ok_or(MalformedMessage("a chunk size is too large"))?;
        Ok(())
    }

    /// Counts a byte that is neither data nor needed to find it.
    fn ignore(&mut self, next: State) -> Result<State, MalformedMessage> {
        self.ignored += 1;
        if self.ignored > MAX_IGNORED || self.trailers > MAX_HEADERS {
            return Err(MalformedMessage("its chunk extensions or trailers are too long"));
        }
        Ok(next)
    }
}

/// A chunk's size and the length of its line, if that has a few digits and nothing else. Not of the last
/// chunk, which has size 0.
fn plain_size(input: &[u8]) -> Option<(u64, usize)> {
    let digits = input.iter().take(MAX_PLAIN_DIGITS).map_while(|&byte| char::from(byte).to_digit(16));
    let (size, count) = digits.fold((0, 0), |(size, count), digit| (size << 4 | u64::from(digit), count + 1));
    (size > 0 && input[count..].starts_with(b"\r\n")).then_some((size, count + 2))
}

/// Takes up to `max` of the remaining bytes. Returns how many.
fn take(remaining: &mut u64, max: usize) -> usize {
    let taken = max.min(usize::try_from(*remaining).unwrap_or(usize::MAX));
    *remaining -= taken as u64;
    taken
}

/// Whether a byte may be in a method or in the name of a header: a `tchar` (RFC 9110, section 5.6.2).
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

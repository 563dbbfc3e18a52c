//! A body out of its framing: of a length, chunked, or up to the connection's end.

use std::ops::Range;

use super::{MAX_HEADERS, MAX_IGNORED, MalformedMessage};

/// Takes a body's bytes out of its framing. It keeps nothing of them: whatever comes is used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BodyDecoder {
    /// So many bytes are to come.
    Length(u64),
    Chunked(Chunked),
    UntilClose,
}

/// Where a chunked body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunked {
    state: State,
    /// Of the chunk whose size is being read, or what is left of it.
    size: u64,
    /// Bytes of extensions and trailers so far.
    ignored: usize,
    trailers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before a size's first digit.
    Size,
    Digits,
    /// White space after a size: an extension or the line's end follows.
    Space,
    Extension,
    /// Behind the CR of a size's line.
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the beginning of a trailer's line.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Ended,
}

impl BodyDecoder {
    /// Of no body.
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
        Self::Chunked(Chunked { state: State::Size, size: 0, ignored: 0, trailers: 0 })
    }

    /// Finds the body's next bytes in `input`, which counts as read up to their end. Without any, all that belongs to
    /// the body's framing has been read: what is behind it is not this message's, or there is nothing.
    pub(crate) fn next(&mut self, input: &[u8]) -> Result<Range<usize>, MalformedMessage> {
        let chunk = match self {
            Self::Length(left) => return Ok(0..take(left, input.len())),
            Self::Chunked(chunked) => chunked,
            Self::UntilClose => return Ok(0..input.len()),
        };
        let at = chunk.skip_framing(input)?;
        Ok(at..at + chunk.take_data(input.len() - at))
    }

    /// Appends what is body of `input` to `body`. Returns how many bytes belong to the body or its framing: those behind
    /// them are not this message's.
    pub(crate) fn decode(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, MalformedMessage> {
        let mut at = 0;
        while !self.is_ended() {
            let data = self.next(&input[at..])?;
            body.extend_from_slice(&input[at..][data.clone()]);
            at += data.end;
            if data.is_empty() {
                break;
            }
        }
        Ok(at)
    }

    /// Whether all of the body has come. Of one that ends with the connection this is not known before.
    pub(crate) fn is_ended(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunked) => chunked.state == State::Ended,
            Self::UntilClose => false,
        }
    }

    /// What is to come, where that was announced.
    pub(crate) fn remaining(&self) -> Option<u64> {
        match self {
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::UntilClose => None,
        }
    }

    /// The connection has ended. Whether the body has too.
    pub(crate) fn close(&mut self) -> bool {
        if *self == Self::UntilClose {
            *self = Self::Length(0);
        }
        self.is_ended()
    }
}

impl Chunked {
    /// Reads framing up to the next byte of data. Returns how many bytes it has.
    fn skip_framing(&mut self, input: &[u8]) -> Result<usize, MalformedMessage> {
        let mut at = 0;
        while at < input.len() && ![State::Data, State::Ended].contains(&self.state) {
            self.state = self.step(input[at])?;
            at += 1;
        }
        Ok(at)
    }

    /// Reads so many bytes of data, or fewer if the chunk has not as many. Returns how many it has.
    fn take_data(&mut self, most: usize) -> usize {
        if self.state != State::Data {
            return 0;
        }
        let taken = take(&mut self.size, most);
        if self.size == 0 {
            self.state = State::DataCr;
        }
        taken
    }

    /// Takes one byte of framing.
    fn step(&mut self, byte: u8) -> Result<State, MalformedMessage> {
        use State::*;
        Ok(match (self.state, byte) {
            (Size | Digits, byte) if byte.is_ascii_hexdigit() => {
                self.add_digit(byte)?;
                Digits
            }
            (Digits | Space, b' ' | b'\t') => self.ignore(Space)?,
            (Digits | Space, b';') => self.ignore(Extension)?,
            (Digits | Space | Extension, b'\r') => SizeLf,
            (Extension, byte) if byte != b'\n' => self.ignore(Extension)?,
            (SizeLf, b'\n') if self.size == 0 => Trailer,
            (SizeLf, b'\n') => Data,
            (DataCr, b'\r') => DataLf,
            (DataLf, b'\n') => Size,
            (Trailer, b'\r') => EndLf,
            (Trailer, byte) if is_name(byte) => {
                self.trailers += 1;
                self.ignore(TrailerName)?
            }
            (TrailerName, b':') => self.ignore(TrailerValue)?,
            (TrailerName, byte) if is_name(byte) => self.ignore(TrailerName)?,
            (TrailerValue, b'\r') => TrailerLf,
            (TrailerValue, byte) if byte == b'\t' || !byte.is_ascii_control() => self.ignore(TrailerValue)?,
            (TrailerLf, b'\n') => Trailer,
            (EndLf, b'\n') => Ended,
            (Size | Digits | Space | Extension | SizeLf, _) => {
                return Err(MalformedMessage("a chunk's size is malformed"));
            }
            (DataCr | DataLf, _) => return Err(MalformedMessage("a chunk is longer than its size")),
            _ => return Err(MalformedMessage("its trailers are malformed")),
        })
    }

    fn add_digit(&mut self, digit: u8) -> Result<(), MalformedMessage> {
        let digit = u64::from(char::from(digit).to_digit(16).unwrap_or(0));
        let size = self.size.checked_mul(16).and_then(|size| size.checked_add(digit));
        self.size = size.ok_or(MalformedMessage("a chunk's size is too large"))?;
        Ok(())
    }

    fn ignore(&mut self, next: State) -> Result<State, MalformedMessage> {
        self.ignored += 1;
        if self.ignored > MAX_IGNORED || self.trailers > MAX_HEADERS {
            return Err(MalformedMessage("its chunk extensions or trailers are too long"));
        }
        Ok(next)
    }
}

/// Takes so many of what is left, or all of it. Returns how many.
fn take(left: &mut u64, most: usize) -> usize {
    let taken = most.min(usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= taken as u64;
    taken
}

/// Whether a byte may be in a field's name (RFC 9110, section 5.6.2).
pub(super) fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

//! A body out of its framing: of a length, chunked, or up to the connection's end.

use super::{BadAnswer, MAX_HEADERS, MAX_IGNORED};

/// Takes a body's bytes out of its framing. It keeps nothing of them: whatever comes is used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decoder {
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

impl Decoder {
    /// Of no body.
    pub(crate) fn ended() -> Self {
        Self::Length(0)
    }

    pub(super) fn length(bytes: u64) -> Self {
        Self::Length(bytes)
    }

    pub(super) fn until_close() -> Self {
        Self::UntilClose
    }

    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked { state: State::Size, size: 0, ignored: 0, trailers: 0 })
    }

    /// Appends what is body of `input` to `body`. Returns how many bytes belong to the body or its framing: those behind
    /// them are not this answer's.
    pub(crate) fn decode(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, BadAnswer> {
        Ok(match self {
            Self::Length(left) => {
                let used = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= used as u64;
                body.extend_from_slice(&input[..used]);
                used
            }
            Self::Chunked(chunked) => chunked.decode(input, body)?,
            Self::UntilClose => {
                body.extend_from_slice(input);
                input.len()
            }
        })
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
    fn decode(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, BadAnswer> {
        let mut at = 0;
        while at < input.len() && self.state != State::Ended {
            if self.state == State::Data {
                let taken = (input.len() - at).min(usize::try_from(self.size).unwrap_or(usize::MAX));
                body.extend_from_slice(&input[at..at + taken]);
                at += taken;
                self.size -= taken as u64;
                if self.size == 0 {
                    self.state = State::DataCr;
                }
                continue;
            }
            self.state = self.step(input[at])?;
            at += 1;
        }
        Ok(at)
    }

    /// Takes one byte of framing.
    fn step(&mut self, byte: u8) -> Result<State, BadAnswer> {
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
                return Err(BadAnswer("a chunk's size is malformed"));
            }
            (DataCr | DataLf, _) => return Err(BadAnswer("a chunk is longer than its size")),
            _ => return Err(BadAnswer("its trailers are malformed")),
        })
    }

    fn add_digit(&mut self, digit: u8) -> Result<(), BadAnswer> {
        let digit = u64::from(char::from(digit).to_digit(16).unwrap_or(0));
        let size = self.size.checked_mul(16).and_then(|size| size.checked_add(digit));
        self.size = size.ok_or(BadAnswer("a chunk's size is too large"))?;
        Ok(())
    }

    fn ignore(&mut self, next: State) -> Result<State, BadAnswer> {
        self.ignored += 1;
        if self.ignored > MAX_IGNORED || self.trailers > MAX_HEADERS {
            return Err(BadAnswer("its chunk extensions or trailers are too long"));
        }
        Ok(next)
    }
}

/// Whether a byte may be in a field's name (RFC 9110, section 5.6.2).
fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

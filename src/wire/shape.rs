//! One look at a request body, as it arrives: what matters to a router, and
//! where to cut.
//!
//! [`Inspector`] takes the body in pieces, cut anywhere, and keeps a few bytes of
//! it. It reads the names at the top level and the handful of values that steer
//! the router; everything nested is skipped, because SGLang validates it. What it
//! must not do is read another top level than a strict parser would: names are
//! unescaped, brackets must match, scalars must be JSON, the text must be UTF-8.

mod cut;
mod facts;
mod strict;

use std::fmt;
use std::ops::Range;

use cut::{Cutter, MAX_CUTS};
use facts::{Facts, Kept, Name};
use strict::{Brackets, MAX_DEPTH, Utf8, is_json, unescape};

use super::json::{find_string_special, find_structural, is_whitespace};
use super::logprobs::Merge;

/// Bytes kept of a name. A longer name is none of ours: `bootstrap_pair_key` spelled in `\u` escapes has 108.
const MAX_NAME: usize = 256;

/// Which kind of request it is: each has its own names for what a router must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `/generate`
    Generate,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What a router must know of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BodyShape {
    /// The client asked for server-sent events.
    pub(crate) stream: bool,
    /// The client asked for prompt logprobs, which only prefill has.
    pub(crate) merge: Option<Merge>,
    /// The client asked for more than one sample a prompt.
    pub(crate) many_samples: bool,
    /// Where the bootstrap fields go.
    pub(crate) edit: Edit,
}

/// Where a body is cut and where something is added. Offsets count from the body's first byte.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Edit {
    /// What is left out, in order: the client's own `bootstrap_*` fields with one comma each.
    pub(crate) cuts: Vec<Range<usize>>,
    /// The object's closing brace: new fields go in front of it.
    pub(crate) close: usize,
    /// Another field comes before the new ones.
    pub(crate) after_others: bool,
}

/// Why a body was refused. `at` counts bytes from the body's start.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    Empty,
    ByteOrderMark,
    NotUtf8 { at: usize },
    NotAnObject { found: &'static str },
    Syntax { expected: &'static str, at: usize },
    TooDeep { at: usize },
    TooManyCuts,
    Truncated { at: usize },
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the body is empty; a JSON object is expected"),
            Self::ByteOrderMark => {
                f.write_str("the body begins with a byte order mark, which JSON does not allow")
            }
            Self::NotUtf8 { at } => write!(f, "the body is not UTF-8 at byte {at}"),
            Self::NotAnObject { found } => write!(f, "the body must be a JSON object, not {found}"),
            Self::Syntax { expected, at } => {
                write!(f, "the body is not JSON: expected {expected} at byte {at}")
            }
            Self::TooDeep { at } => {
                write!(f, "the body is nested deeper than {MAX_DEPTH} levels at byte {at}")
            }
            Self::TooManyCuts => write!(f, "the body has bootstrap_* fields in over {MAX_CUTS} places"),
            Self::Truncated { at } => {
                write!(f, "the body is not JSON: it ends at byte {at} inside the object")
            }
        }
    }
}

/// Where in the text the inspector stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    NameOrEnd,
    NameStart,
    InName { escaped: bool },
    Colon,
    ValueStart,
    InString { escaped: bool },
    Nested,
    NestedString { escaped: bool },
    Scalar,
    CommaOrEnd,
    End,
}

/// Reads a body in pieces. Feed it every byte in order, then call [`finish`](Self::finish).
#[derive(Debug)]
pub(crate) struct Inspector {
    dialect: Dialect,
    state: State,
    /// Bytes of the pieces before the present one.
    base: usize,
    utf8: Utf8,
    brackets: Brackets,
    /// What earlier pieces had of the name that is being read, without quotes, still escaped.
    name: Vec<u8>,
    current: Name,
    /// Keeps a value's bytes from here on, while it matters.
    kept: Kept,
    cutter: Cutter,
    facts: Facts,
}

impl Inspector {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            state: State::Start,
            base: 0,
            utf8: Utf8::default(),
            brackets: Brackets::default(),
            name: Vec::new(),
            current: Name::Other,
            kept: Kept::default(),
            cutter: Cutter::default(),
            facts: Facts::default(),
        }
    }

    /// Takes the next piece of the body.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Result<(), BodyError> {
        if self.base == 0 && (piece.starts_with(&[0xEF, 0xBB]) || piece == [0xEF]) {
            return Err(BodyError::ByteOrderMark);
        }
        self.utf8.feed(piece, self.base)?;
        let mut at = 0;
        while at < piece.len() {
            at = self.step(piece, at)?;
        }
        self.base += piece.len();
        Ok(())
    }

    /// Says what the body was, once all of it has been fed.
    pub(crate) fn finish(self) -> Result<BodyShape, BodyError> {
        match self.state {
            State::Start => return Err(BodyError::Empty),
            State::End => {}
            _ => return Err(BodyError::Truncated { at: self.base }),
        }
        self.utf8.finish(self.base)?;
        Ok(self.facts.into_shape(self.dialect, self.cutter.edit))
    }

    /// Goes on from `piece[at]`, by as much as one state allows; returns where it stands then.
    fn step(&mut self, piece: &[u8], at: usize) -> Result<usize, BodyError> {
        match self.state {
            State::InName { escaped } => self.in_name(piece, at, escaped),
            State::InString { escaped } => self.in_string(piece, at, escaped),
            State::Nested => self.in_nested(piece, at),
            State::NestedString { escaped } => Ok(self.in_nested_string(piece, at, escaped)),
            State::Scalar => self.in_scalar(piece, at),
            _ if is_whitespace(piece[at]) => Ok(at + 1),
            _ => self.token(piece, at),
        }
    }

    /// A byte that is not white space, between names and values.
    fn token(&mut self, piece: &[u8], at: usize) -> Result<usize, BodyError> {
        let (byte, offset) = (piece[at], self.base + at);
        let expected = |expected| Err(BodyError::Syntax { expected, at: offset });
        self.state = match (self.state, byte) {
            (State::Start, b'{') => State::NameOrEnd,
            (State::Start, _) => return Err(not_an_object(&piece[at..], offset)),
            (State::NameOrEnd | State::NameStart, b'"') => self.name_start(offset),
            (State::NameOrEnd, b'}') => self.close(offset)?,
            (State::NameOrEnd, _) => return expected("a field's name or '}'"),
            (State::NameStart, _) => return expected("a field's name"),
            (State::Colon, b':') => State::ValueStart,
            (State::Colon, _) => return expected("':'"),
            (State::ValueStart, _) => return self.value_start(byte, at),
            (State::CommaOrEnd, b',') => State::NameStart,
            (State::CommaOrEnd, b'}') => self.close(offset)?,
            (State::CommaOrEnd, _) => return expected("',' or '}'"),
            (State::End, _) => return expected("nothing after the object"),
            _ => unreachable!("the other states have their own steps"),
        };
        Ok(at + 1)
    }

    fn close(&mut self, offset: usize) -> Result<State, BodyError> {
        self.cutter.object_closed(offset)?;
        Ok(State::End)
    }

    fn name_start(&mut self, offset: usize) -> State {
        self.name.clear();
        self.cutter.name_at = offset;
        State::InName { escaped: false }
    }

    fn in_name(&mut self, piece: &[u8], at: usize, escaped: bool) -> Result<usize, BodyError> {
        let (end, state) = skip_string(piece, at, escaped);
        if let Some(escaped) = state {
            self.keep_name(&piece[at..end]);
            self.state = State::InName { escaped };
            return Ok(end);
        }
        if self.name.is_empty() {
            self.named(&piece[at..end - 1])?;
        } else {
            self.keep_name(&piece[at..end - 1]);
            let name = std::mem::take(&mut self.name);
            self.named(&name)?;
        }
        // Most often it is the next byte.
        let is_colon = piece.get(end) == Some(&b':');
        self.state = if is_colon { State::ValueStart } else { State::Colon };
        Ok(end + usize::from(is_colon))
    }

    fn keep_name(&mut self, part: &[u8]) {
        self.name.extend_from_slice(&part[..part.len().min(MAX_NAME.saturating_sub(self.name.len()))]);
    }

    /// A whole name has been read.
    fn named(&mut self, name: &[u8]) -> Result<(), BodyError> {
        let is_plain = |byte: &u8| !byte.is_ascii_control() & (*byte != b'\\');
        self.current = if name.len() >= MAX_NAME {
            Name::Other
        } else if name.iter().fold(true, |plain, byte| plain & is_plain(byte)) {
            Name::of(name, self.dialect)
        } else {
            let Some(name) = unescape(name) else {
                return Err(BodyError::Syntax { expected: "a valid string", at: self.cutter.name_at });
            };
            Name::of(name.as_bytes(), self.dialect)
        };
        self.cutter.named(self.current == Name::Bootstrap)
    }

    fn value_start(&mut self, byte: u8, at: usize) -> Result<usize, BodyError> {
        self.kept.begin(self.current != Name::Other || !matches!(byte, b'"' | b'{' | b'['));
        match byte {
            b'"' => {
                self.kept.push(b"\"");
                self.state = State::InString { escaped: false };
                Ok(at + 1)
            }
            b'{' | b'[' => {
                self.brackets.depth = 0;
                self.state = State::Nested;
                Ok(at)
            }
            _ => {
                self.state = State::Scalar;
                Ok(at)
            }
        }
    }

    fn in_string(&mut self, piece: &[u8], at: usize, escaped: bool) -> Result<usize, BodyError> {
        let (end, state) = skip_string(piece, at, escaped);
        self.kept.push(&piece[at..end]);
        match state {
            Some(escaped) => self.state = State::InString { escaped },
            None => return self.value_ended(piece, end),
        }
        Ok(end)
    }

    fn in_nested(&mut self, piece: &[u8], at: usize) -> Result<usize, BodyError> {
        let Some(offset) = find_structural(&piece[at..]) else {
            self.kept.push(&piece[at..]);
            return Ok(piece.len());
        };
        let end = at + offset + 1;
        self.kept.push(&piece[at..end]);
        match piece[end - 1] {
            b'"' => self.state = State::NestedString { escaped: false },
            open @ (b'{' | b'[') => self.brackets.open(open, self.base + end - 1)?,
            close => {
                if self.brackets.close(close, self.base + end - 1)? {
                    return self.value_ended(piece, end);
                }
            }
        }
        Ok(end)
    }

    fn in_nested_string(&mut self, piece: &[u8], at: usize, escaped: bool) -> usize {
        let (end, state) = skip_string(piece, at, escaped);
        self.kept.push(&piece[at..end]);
        self.state = match state {
            Some(escaped) => State::NestedString { escaped },
            None => State::Nested,
        };
        end
    }

    fn in_scalar(&mut self, piece: &[u8], at: usize) -> Result<usize, BodyError> {
        let ends = |byte: &u8| is_whitespace(*byte) || matches!(byte, b',' | b'}');
        let Some(length) = piece[at..].iter().position(ends) else {
            self.kept.push(&piece[at..]);
            return Ok(piece.len());
        };
        let end = at + length;
        let is_whole = self.kept.bytes.is_empty() && !self.kept.too_long;
        if is_whole && self.current == Name::Other && is_json(&piece[at..end]) {
            return self.value_ended(piece, end);
        }
        self.kept.push(&piece[at..end]);
        self.check_kept(end)?;
        self.value_ended(piece, end)
    }

    /// The value of the present field ends before `piece[end]`. Returns where the inspector stands then.
    fn value_ended(&mut self, piece: &[u8], end: usize) -> Result<usize, BodyError> {
        self.cutter.value_ended(self.base + end);
        match self.current {
            Name::Other => {}
            // No server sees what is cut, so none would refuse it.
            Name::Bootstrap => self.check_kept(end)?,
            name => self.facts.note(name, &mut self.kept),
        }
        // Most often a comma and the next name's quote are the next bytes.
        let (state, length) = match piece[end..] {
            [b',', b'"', ..] => (self.name_start(self.base + end + 1), 2),
            [b',', ..] => (State::NameStart, 1),
            _ => (State::CommaOrEnd, 0),
        };
        self.state = state;
        Ok(end + length)
    }

    /// Refuses the value that ends before `piece[end]` if it is no JSON. One too long to keep passes.
    fn check_kept(&self, end: usize) -> Result<(), BodyError> {
        if self.kept.too_long || is_json(&self.kept.bytes) {
            return Ok(());
        }
        let at = self.base + end - self.kept.bytes.len();
        Err(BodyError::Syntax { expected: "a JSON value", at })
    }
}

/// Skips a string's contents from `piece[at]` on. Returns where it stopped and, if the piece ended first, whether
/// its last byte was a backslash that escapes the next.
fn skip_string(piece: &[u8], mut at: usize, escaped: bool) -> (usize, Option<bool>) {
    if escaped {
        at += 1;
    }
    while let Some(offset) = find_string_special(&piece[at..]) {
        at += offset;
        if piece[at] == b'"' {
            return (at + 1, None);
        }
        if at + 1 == piece.len() {
            return (piece.len(), Some(true));
        }
        at += 2;
    }
    (piece.len(), Some(false))
}

/// Names what stands in the place of the object, as far as its first piece shows it.
fn not_an_object(text: &[u8], at: usize) -> BodyError {
    let found = match text {
        [b'[', ..] => "an array",
        [b'"', ..] => "a string",
        [b'0'..=b'9' | b'-', ..] => "a number",
        _ if text.starts_with(b"true") || text.starts_with(b"false") => "true or false",
        _ if text.starts_with(b"null") => "null",
        _ => return BodyError::Syntax { expected: "'{'", at },
    };
    BodyError::NotAnObject { found }
}

#[cfg(test)]
mod tests;

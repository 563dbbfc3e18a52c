//! What keeps the inspector from reading another text than a strict parser:
//! brackets that match, UTF-8, escapes, and values that are JSON.

use serde_json::value::RawValue;
use simd_json::prelude::ValueAsScalar;

use super::BodyError;

/// Deepest nesting. orjson, with which SGLang reads its requests, stops at 1,024 too.
pub(super) const MAX_DEPTH: usize = 1_024;

/// Is all of this JSON? Nothing is built of it, and depth costs no stack.
pub(super) fn is_json(text: &[u8]) -> bool {
    is_usual_scalar(text) || serde_json::from_slice::<&RawValue>(text).is_ok()
}

/// A literal, or a number without an exponent: they need no parser.
fn is_usual_scalar(text: &[u8]) -> bool {
    if matches!(text, b"true" | b"false" | b"null") {
        return true;
    }
    let number = text.strip_prefix(b"-").unwrap_or(text);
    let whole = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (whole, rest) = number.split_at(whole);
    let is_whole = matches!(whole, [b'0'] | [b'1'..=b'9', ..]);
    is_whole
        && match rest {
            [] => true,
            [b'.', fraction @ ..] => !fraction.is_empty() && fraction.iter().all(u8::is_ascii_digit),
            _ => false,
        }
}

/// A name as a strict parser reads it; `None` if an escape is not one.
pub(super) fn unescape(name: &[u8]) -> Option<String> {
    let mut quoted = [b"\"", name, b"\""].concat();
    simd_json::to_borrowed_value(&mut quoted).ok()?.as_str().map(str::to_owned)
}

/// The brackets open inside one value, a bit each: set for `{`.
#[derive(Debug)]
pub(super) struct Brackets {
    pub(super) depth: usize,
    braces: [u64; MAX_DEPTH / 64],
}

impl Default for Brackets {
    fn default() -> Self {
        Self { depth: 0, braces: [0; MAX_DEPTH / 64] }
    }
}

impl Brackets {
    pub(super) fn open(&mut self, byte: u8, at: usize) -> Result<(), BodyError> {
        // The object around the value is a level too.
        if self.depth + 1 >= MAX_DEPTH {
            return Err(BodyError::TooDeep { at });
        }
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        match byte {
            b'{' => self.braces[word] |= bit,
            _ => self.braces[word] &= !bit,
        }
        self.depth += 1;
        Ok(())
    }

    /// Returns whether the outermost bracket was closed.
    pub(super) fn close(&mut self, byte: u8, at: usize) -> Result<bool, BodyError> {
        self.depth -= 1;
        let brace = self.braces[self.depth / 64] & (1 << (self.depth % 64)) != 0;
        match (brace, byte) {
            (true, b'}') | (false, b']') => Ok(self.depth == 0),
            (true, _) => Err(BodyError::Syntax { expected: "'}'", at }),
            (false, _) => Err(BodyError::Syntax { expected: "']'", at }),
        }
    }
}

/// Validates UTF-8 across pieces.
#[derive(Debug, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character that the last piece cut.
    partial: [u8; 4],
    length: usize,
}

impl Utf8 {
    pub(super) fn feed(&mut self, mut piece: &[u8], base: usize) -> Result<(), BodyError> {
        let mut base = base;
        while self.length > 0 && !piece.is_empty() {
            self.partial[self.length] = piece[0];
            self.length += 1;
            (piece, base) = (&piece[1..], base + 1);
            match simdutf8::compat::from_utf8(&self.partial[..self.length]) {
                Ok(_) => self.length = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(BodyError::NotUtf8 { at: base - self.length }),
            }
        }
        let Err(error) = simdutf8::compat::from_utf8(piece) else { return Ok(()) };
        let valid = error.valid_up_to();
        if error.error_len().is_some() {
            return Err(BodyError::NotUtf8 { at: base + valid });
        }
        let rest = &piece[valid..];
        self.partial[..rest.len()].copy_from_slice(rest);
        self.length = rest.len();
        Ok(())
    }

    pub(super) fn finish(&self, end: usize) -> Result<(), BodyError> {
        if self.length > 0 { Err(BodyError::NotUtf8 { at: end - self.length }) } else { Ok(()) }
    }
}

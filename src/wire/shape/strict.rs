//! The checks that keep the inspector from reading another text than a strict parser does: matching brackets,
//! UTF-8, escapes, and scalars that are JSON.

use serde_json::value::RawValue;
use simd_json::prelude::ValueAsScalar;

use super::error::{BodyError, MAX_DEPTH};
use crate::wire::json::MaskScan;

/// Whether all of the text is one JSON value. A `RawValue` builds nothing and does not recurse, so that no
/// depth overflows the stack.
pub(super) fn is_json(text: &[u8]) -> bool {
    is_common_scalar(text) || serde_json::from_slice::<&RawValue>(text).is_ok()
}

/// Whether this is a literal or a number without an exponent: nearly all scalars, checked without a parser.
fn is_common_scalar(text: &[u8]) -> bool {
    if matches!(text, b"true" | b"false" | b"null") {
        return true;
    }
    let number = text.strip_prefix(b"-").unwrap_or(text);
    let length = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (integer, rest) = number.split_at(length);
    // JSON has no leading zeros.
    matches!(integer, [b'0'] | [b'1'..=b'9', ..])
        && match rest {
            [] => true,
            [b'.', fraction @ ..] => !fraction.is_empty() && fraction.iter().all(u8::is_ascii_digit),
            _ => false,
        }
}

/// A name with its escapes resolved by a strict parser; `None` if one is invalid, such as a lone surrogate.
pub(super) fn unescape(name: &[u8]) -> Option<String> {
    let mut quoted = [b"\"", name, b"\""].concat();
    simd_json::to_borrowed_value(&mut quoted).ok()?.as_str().map(str::to_owned)
}

/// The open brackets within one value, one bit each: 1 for `{`, 0 for `[`. At 128 bytes for the deepest body
/// nothing is allocated.
#[derive(Debug)]
pub(super) struct Nesting {
    pub(super) depth: usize,
    braces: [u64; MAX_DEPTH / 64],
}

impl Default for Nesting {
    fn default() -> Self {
        Self { depth: 0, braces: [0; MAX_DEPTH / 64] }
    }
}

impl Nesting {
    pub(super) fn open(&mut self, byte: u8, at: usize) -> Result<(), BodyError> {
        // The object around the value is a level, too.
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

    /// Returns whether this closes the outermost bracket. There must be an open one.
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

/// Validates UTF-8 in chunks.
#[derive(Debug, Default)]
pub(super) struct Utf8Validator {
    /// The start of a character that continues in the next chunk.
    partial: [u8; 4],
    length: usize,
    /// How much of the current chunk was validated.
    checked: usize,
}

/// Fewer bytes of ASCII are not worth being left out of a validation that is faster with longer texts.
const MIN_SKIPPED: usize = 256;

impl Utf8Validator {
    pub(super) fn chunk_started(&mut self) {
        self.checked = 0;
    }

    /// Skips what `scan` has read of a chunk from `start` on, if it is ASCII; validates what is before.
    #[inline]
    pub(super) fn skip_ascii(
        &mut self,
        chunk: &[u8],
        start: usize,
        scan: &mut MaskScan,
        base: usize,
    ) -> Result<(), BodyError> {
        if !std::mem::replace(&mut scan.is_ascii, true) || scan.at - start < MIN_SKIPPED {
            return Ok(());
        }
        if self.checked < start || self.length > 0 {
            // With one byte of the ASCII, before which a character must have ended.
            self.feed(&chunk[self.checked..=start], base + self.checked)?;
        }
        self.checked = scan.at;
        Ok(())
    }

    /// Validates the rest of a chunk.
    pub(super) fn feed_rest(&mut self, chunk: &[u8], base: usize) -> Result<(), BodyError> {
        let from = std::mem::replace(&mut self.checked, chunk.len());
        self.feed(&chunk[from..], base + from)
    }

    pub(super) fn feed(&mut self, mut chunk: &[u8], base: usize) -> Result<(), BodyError> {
        let mut base = base;
        while self.length > 0 && !chunk.is_empty() {
            self.partial[self.length] = chunk[0];
            self.length += 1;
            (chunk, base) = (&chunk[1..], base + 1);
            match simdutf8::compat::from_utf8(&self.partial[..self.length]) {
                Ok(_) => self.length = 0,
                // Still incomplete.
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(BodyError::NotUtf8 { at: base - self.length }),
            }
        }
        let Err(error) = simdutf8::compat::from_utf8(chunk) else { return Ok(()) };
        let valid = error.valid_up_to();
        if error.error_len().is_some() {
            return Err(BodyError::NotUtf8 { at: base + valid });
        }
        // The chunk ends within a character: of at most 3 bytes, as 4 would complete it.
        let rest = &chunk[valid..];
        self.partial[..rest.len()].copy_from_slice(rest);
        self.length = rest.len();
        Ok(())
    }

    pub(super) fn finish(&self, end: usize) -> Result<(), BodyError> {
        if self.length > 0 { Err(BodyError::NotUtf8 { at: end - self.length }) } else { Ok(()) }
    }
}

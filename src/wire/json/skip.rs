//! Finding where a value ends, for text that is in memory as a whole.

use super::MalformedJson;
use super::masks::{BLOCK, MaskScan};
use super::search::{WORD, find_string_special, first_word, is_structural, structural_candidates};

const UNTERMINATED: MalformedJson = MalformedJson::new("a string is not terminated");

/// Bytes of an object or array that are read a word at a time. The end of most is nearer than masks pay.
const NEAR: usize = 64;

/// White space between JSON tokens (RFC 8259, section 2).
#[inline]
pub(crate) fn is_whitespace(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// The offset of the first byte from `at` on that is not white space.
pub(crate) fn skip_whitespace(text: &[u8], at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    rest.iter().position(|&byte| !is_whitespace(byte)).map_or(text.len(), |offset| at + offset)
}

/// `text` without trailing white space.
pub(crate) fn trim_end(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|&byte| !is_whitespace(byte)).map_or(0, |last| last + 1);
    &text[..end]
}

/// The end of the value that starts at `start`.
pub(crate) fn end_of_value(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    match text.get(start) {
        Some(b'"') => end_of_string(text, start),
        Some(b'{' | b'[') => end_of_nested(text, start),
        Some(_) => end_of_scalar(text, start),
        None => Err(MalformedJson::new("a value is missing at the end of the text")),
    }
}

/// The end of the member name whose opening quote is at `start`.
pub(super) fn end_of_name(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    match text.get(start) {
        Some(b'"') => end_of_string(text, start),
        _ => Err(MalformedJson::new("a member has no name")),
    }
}

/// The start of the value whose name ends at `name_end`.
pub(super) fn start_of_member_value(text: &[u8], name_end: usize) -> Result<usize, MalformedJson> {
    let colon = skip_whitespace(text, name_end);
    if text.get(colon) != Some(&b':') {
        return Err(MalformedJson::new("a colon is missing after a member's name"));
    }
    Ok(skip_whitespace(text, colon + 1))
}

/// The end of the string whose opening quote is at `start`.
fn end_of_string(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    let mut at = start + 1;
    loop {
        at += find_string_special(text.get(at..).ok_or(UNTERMINATED)?).ok_or(UNTERMINATED)?;
        if text[at] == b'"' {
            return Ok(at + 1);
        }
        at += 2; // the backslash and the byte that it escapes
    }
}

/// The end of a number, `true`, `false` or `null`: everything up to the next separator.
fn end_of_scalar(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    let is_end = |&byte: &u8| is_whitespace(byte) || is_structural(byte) || matches!(byte, b',' | b':');
    match text[start..].iter().position(is_end) {
        Some(0) => Err(MalformedJson::new("a value is missing")),
        Some(length) => Ok(start + length),
        None => Ok(text.len()),
    }
}

/// The end of the object or array whose bracket is at `start`.
///
/// Counts brackets instead of recursing, so that a million levels cost no stack. It does not distinguish
/// `]` from `}`: the text came from a server, and only has to be cut out, not validated.
fn end_of_nested(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    let mut depth = 0_usize;
    let mut at = start;
    'words: while at < text.len() {
        if at - start >= NEAR && text.len() >= BLOCK {
            return end_of_long_nested(text, at, depth);
        }
        let mut candidates = structural_candidates(first_word(&text[at..]));
        while candidates != 0 {
            let byte = at + candidates.trailing_zeros() as usize / 8;
            match text.get(byte) {
                Some(b'{' | b'[') => depth += 1,
                // Depth is at least 1 from here on: the byte at `start` opens the first level.
                Some(b'}' | b']') if depth == 1 => return Ok(byte + 1),
                Some(b'}' | b']') => depth -= 1,
                Some(b'"') => {
                    at = end_of_string(text, byte)?;
                    continue 'words;
                }
                // A false candidate, or padding behind the text's end.
                _ => {}
            }
            // Clears the lowest candidate.
            candidates &= candidates - 1;
        }
        at += WORD;
    }
    Err(MalformedJson::new("an object or array is not terminated"))
}

/// The same from `at` on, where `depth` brackets are open.
fn end_of_long_nested(text: &[u8], at: usize, depth: usize) -> Result<usize, MalformedJson> {
    let mut scan = MaskScan::new(at, None);
    match scan.end_of_nested(text, depth) {
        Some(last) => Ok(last + 1),
        None if scan.escaped().is_some() => Err(UNTERMINATED),
        None => Err(MalformedJson::new("an object or array is not terminated")),
    }
}

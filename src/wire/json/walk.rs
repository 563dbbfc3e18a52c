//! Walking an object or array in a single pass: the visitor finds the end of each value, so that nested
//! values can be walked in turn without being skipped first.

use super::MalformedJson;
use super::skip::{end_of_name, skip_whitespace, start_of_member_value};

/// A member's name between its quotes, with escapes as they were written.
#[derive(Clone, Copy)]
pub(crate) struct RawName<'a>(&'a [u8]);

impl<'a> RawName<'a> {
    /// Reads the name whose opening quote is at `start`. Returns it and the start of its value.
    pub(super) fn read(text: &'a [u8], start: usize) -> Result<(Self, usize), MalformedJson> {
        let end = end_of_name(text, start)?;
        Ok((Self(&text[start + 1..end - 1]), start_of_member_value(text, end)?))
    }

    /// Whether this is `name` once its escapes are resolved.
    pub(crate) fn is(self, name: &str) -> bool {
        // An escape is never shorter than the character it stands for, so a name with escapes is longer.
        if self.0.len() <= name.len() {
            return self.0 == name.as_bytes() && !self.0.contains(&b'\\');
        }
        self.0.contains(&b'\\') && self.unescaped_is(name)
    }

    /// Slow and rare: SGLang writes no escapes in the names that matter here.
    fn unescaped_is(self, name: &str) -> bool {
        let mut quoted = [b"[\"", self.0, b"\"]"].concat();
        match simd_json::to_tape(&mut quoted) {
            Ok(tape) => tape.0.get(1) == Some(&simd_json::Node::String(name)),
            Err(_) => false,
        }
    }

    #[cfg(test)]
    pub(super) fn raw(self) -> &'a [u8] {
        self.0
    }
}

/// Walks the object that starts at `start`, reading each byte once. `visit` gets each member's name and the
/// start of its value, and returns the value's end. Returns the object's end.
pub(crate) fn walk_members<'a>(
    text: &'a [u8],
    start: usize,
    mut visit: impl FnMut(RawName<'a>, usize) -> Result<usize, MalformedJson>,
) -> Result<usize, MalformedJson> {
    walk(text, start, [b'{', b'}'], |at| {
        let (name, value) = RawName::read(text, at)?;
        visit(name, value)
    })
}

/// The same for an array: `visit` gets the start of each element.
pub(crate) fn walk_elements(
    text: &[u8],
    start: usize,
    visit: impl FnMut(usize) -> Result<usize, MalformedJson>,
) -> Result<usize, MalformedJson> {
    walk(text, start, [b'[', b']'], visit)
}

fn walk(
    text: &[u8],
    start: usize,
    [open, close]: [u8; 2],
    mut visit: impl FnMut(usize) -> Result<usize, MalformedJson>,
) -> Result<usize, MalformedJson> {
    if text.get(start) != Some(&open) {
        return Err(MalformedJson::new("a value has another type than expected"));
    }
    let mut at = skip_whitespace(text, start + 1);
    if text.get(at) == Some(&close) {
        return Ok(at + 1);
    }
    loop {
        at = skip_whitespace(text, visit(at)?);
        match text.get(at) {
            Some(byte) if *byte == close => return Ok(at + 1),
            Some(b',') => at = skip_whitespace(text, at + 1),
            _ => return Err(MalformedJson::new("a comma is missing between two values")),
        }
    }
}

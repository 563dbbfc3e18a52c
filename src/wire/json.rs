//! Finding one's way in JSON text without reading it.
//!
//! The searches here skip what does not matter (string contents, digits, ids)
//! at memory speed. They keep no state and allocate nothing; who calls them
//! remembers whether it stands inside a string and how deep.
//!
//! For a text that is in memory as a whole, [`Value`] walks objects and arrays
//! and tells where their values start and end. Nothing here turns text into
//! numbers, maps or lists, or checks more than the walk needs.

use std::fmt;
use std::ops::Range;

/// How many bytes [`find_structural`] tests at once. The test of a whole block
/// is branch-free, so the compiler turns it into vector compares.
const BLOCK: usize = 32;
/// So far a search looks by itself, a word at a time: names and short strings end before a vector search has begun.
const NEAR: usize = 32;
/// How many bytes are tested at once where few are looked at.
const WORD: usize = size_of::<u64>();
/// 1 in each byte of a word.
const EACH: u64 = u64::from_ne_bytes([1; WORD]);

/// Offset of the first quote or backslash: what a string's contents can end with.
#[inline]
pub(crate) fn find_string_special(bytes: &[u8]) -> Option<usize> {
    let (found, at) = find_near(bytes, |word| equal(word, b'"') | equal(word, b'\\'));
    found.or_else(|| memchr::memchr2(b'"', b'\\', &bytes[at..]).map(|offset| at + offset))
}

/// Offset of the first quote, brace or bracket: what a nested value's shape is made of.
#[inline]
pub(crate) fn find_structural(bytes: &[u8]) -> Option<usize> {
    let (found, mut at) = find_near(bytes, |word| {
        let folded = word | (EACH * 0x20);
        equal(folded, b'{') | equal(folded, b'}') | equal(word, b'"')
    });
    if found.is_some() {
        return found;
    }
    for block in bytes[at..].chunks_exact(BLOCK) {
        if block.iter().fold(false, |hit, &byte| hit | is_structural(byte)) {
            break;
        }
        at += BLOCK;
    }
    bytes[at..].iter().position(|&byte| is_structural(byte)).map(|offset| at + offset)
}

/// Looks at the first words. `marks` sets the highest bit of each byte that is looked for, and may set that of others
/// behind the first. Returns the first of them, or how far there is none.
#[inline]
fn find_near(bytes: &[u8], marks: impl Fn(u64) -> u64) -> (Option<usize>, usize) {
    let mut at = 0;
    while at < NEAR
        && let Some(word) = bytes[at..].first_chunk::<WORD>()
    {
        let marks = marks(u64::from_le_bytes(*word));
        if marks != 0 {
            return (Some(at + marks.trailing_zeros() as usize / 8), at);
        }
        at += WORD;
    }
    (None, at)
}

/// The highest bit of each byte of a word that is this one; see [`zeros`].
#[inline]
fn equal(word: u64, byte: u8) -> u64 {
    zeros(word ^ (EACH * u64::from(byte)))
}

/// The highest bit of each byte that is 0: it borrows from there. Behind the first one, others may lend.
#[inline]
fn zeros(word: u64) -> u64 {
    word.wrapping_sub(EACH) & !word & (EACH * 0x80)
}

/// `{` and `[`, `}` and `]` differ in one bit only.
#[inline]
fn is_structural(byte: u8) -> bool {
    let folded = byte | 0x20;
    (folded == b'{') | (folded == b'}') | (byte == b'"')
}

/// White space between JSON tokens (RFC 8259, section 2).
#[inline]
pub(crate) fn is_whitespace(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// The text is not the JSON it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MalformedJson {
    /// What is wrong, as the rest of a sentence.
    pub(crate) what: &'static str,
}

impl MalformedJson {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what }
    }
}

impl fmt::Display for MalformedJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed: {}", self.what)
    }
}

impl std::error::Error for MalformedJson {}

/// A value within a text that is in memory as a whole.
///
/// It knows where it starts and ends, nothing else. Its inside is checked only as far as someone walks
/// through it: a walk over the members of an object sees that quotes, colons, commas and brackets are where
/// they must be, and that is enough to cut a value out.
#[derive(Clone, Copy)]
pub(crate) struct Value<'a> {
    text: &'a [u8],
    start: usize,
    end: usize,
}

/// A name and its value in an object.
#[derive(Clone, Copy)]
pub(crate) struct Member<'a> {
    /// Between the quotes, escapes as they were written.
    raw_key: &'a [u8],
    pub(crate) value: Value<'a>,
}

/// Walks the object that starts at `start`, and looks at each byte once: `visit` is given a member's name between its
/// quotes and where the value starts, and returns where it ends. Returns where the object ends.
pub(crate) fn walk_members<'a>(
    text: &'a [u8],
    start: usize,
    mut visit: impl FnMut(Key<'a>, usize) -> Result<usize, MalformedJson>,
) -> Result<usize, MalformedJson> {
    walk(text, start, [b'{', b'}'], |at| {
        let key_end = end_of_key(text, at)?;
        let value = start_of_value(text, key_end)?;
        visit(Key(&text[at + 1..key_end - 1]), value)
    })
}

/// The same for an array: `visit` is given where an element starts.
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
        return Err(MalformedJson::new("neither the object nor the array it should be"));
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
            _ => return Err(MalformedJson::new("no comma between two items")),
        }
    }
}

/// A member's name, escapes as they were written.
#[derive(Clone, Copy)]
pub(crate) struct Key<'a>(&'a [u8]);

impl Key<'_> {
    /// Whether this is `name`, however it is written.
    pub(crate) fn is(self, name: &str) -> bool {
        is_named(self.0, name)
    }
}

impl<'a> Value<'a> {
    /// The one value that `text` is, white space around it aside.
    pub(crate) fn root(text: &'a [u8]) -> Result<Self, MalformedJson> {
        let value = Self::at(text, skip_whitespace(text, 0))?;
        if skip_whitespace(text, value.end) == text.len() {
            Ok(value)
        } else {
            Err(MalformedJson::new("more than one value"))
        }
    }

    /// The value that starts at `start`.
    pub(crate) fn at(text: &'a [u8], start: usize) -> Result<Self, MalformedJson> {
        Ok(Self { text, start, end: end_of_value(text, start)? })
    }

    /// Where the value is in its text.
    pub(crate) fn span(self) -> Range<usize> {
        self.start..self.end
    }

    /// The value's own bytes.
    pub(crate) fn raw(self) -> &'a [u8] {
        &self.text[self.start..self.end]
    }

    pub(crate) fn is_object(self) -> bool {
        self.raw().first() == Some(&b'{')
    }

    pub(crate) fn is_array(self) -> bool {
        self.raw().first() == Some(&b'[')
    }

    /// The value as a whole number that is not negative.
    pub(crate) fn as_u64(self) -> Option<u64> {
        std::str::from_utf8(self.raw()).ok()?.parse().ok()
    }

    /// The members of an object, in order; an error when this is none.
    pub(crate) fn members(self) -> Members<'a> {
        Members { items: Items::new(self, b'{', b'}') }
    }

    /// The elements of an array, in order; an error when this is none.
    pub(crate) fn elements(self) -> Elements<'a> {
        Elements { items: Items::new(self, b'[', b']') }
    }

    /// The first member called `name`; none when this is not an object.
    pub(crate) fn member(self, name: &str) -> Result<Option<Value<'a>>, MalformedJson> {
        if !self.is_object() {
            return Ok(None);
        }
        for member in self.members() {
            let member = member?;
            if member.is_named(name) {
                return Ok(Some(member.value));
            }
        }
        Ok(None)
    }
}

impl Member<'_> {
    /// Whether the member's name is `name`, however it is written.
    pub(crate) fn is_named(self, name: &str) -> bool {
        is_named(self.raw_key, name)
    }
}

fn is_named(raw_key: &[u8], name: &str) -> bool {
    // No escape is shorter than what it stands for.
    if raw_key.len() <= name.len() {
        return raw_key == name.as_bytes() && !raw_key.contains(&b'\\');
    }
    raw_key.contains(&b'\\') && unescaped_is(raw_key, name)
}

/// Slow and rare: servers do not write escapes in the names that matter here.
fn unescaped_is(raw_key: &[u8], name: &str) -> bool {
    let mut quoted = [b"[\"", raw_key, b"\"]"].concat();
    match simd_json::to_tape(&mut quoted) {
        Ok(tape) => tape.0.get(1) == Some(&simd_json::Node::String(name)),
        Err(_) => false,
    }
}

/// See [`Value::members`].
pub(crate) struct Members<'a> {
    items: Items<'a>,
}

impl<'a> Iterator for Members<'a> {
    type Item = Result<Member<'a>, MalformedJson>;

    fn next(&mut self) -> Option<Self::Item> {
        self.items.next_with(|text, at| {
            let key_end = end_of_key(text, at)?;
            let value = Value::at(text, start_of_value(text, key_end)?)?;
            Ok((Member { raw_key: &text[at + 1..key_end - 1], value }, value.end))
        })
    }
}

/// See [`Value::elements`].
pub(crate) struct Elements<'a> {
    items: Items<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Value<'a>, MalformedJson>;

    fn next(&mut self) -> Option<Self::Item> {
        self.items.next_with(|text, at| {
            let value = Value::at(text, at)?;
            Ok((value, value.end))
        })
    }
}

/// What objects and arrays have in common: items between two brackets with commas in between.
struct Items<'a> {
    /// Ends with the closing bracket, so that a walk cannot leave the value.
    text: &'a [u8],
    at: usize,
    close: u8,
    state: State,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Broken,
    First,
    Later,
    Done,
}

impl<'a> Items<'a> {
    fn new(value: Value<'a>, open: u8, close: u8) -> Self {
        let state = if value.raw().first() == Some(&open) { State::First } else { State::Broken };
        Self { text: &value.text[..value.end], at: value.start + 1, close, state }
    }

    /// Reads the next item with `read`, which is given the item's start and tells the item's end.
    fn next_with<T>(
        &mut self,
        read: impl FnOnce(&'a [u8], usize) -> Result<(T, usize), MalformedJson>,
    ) -> Option<Result<T, MalformedJson>> {
        let item = self.start_of_next().and_then(|start| start.map(|at| read(self.text, at)).transpose());
        match item {
            Ok(Some((item, end))) => {
                self.at = end;
                self.state = State::Later;
                Some(Ok(item))
            }
            Ok(None) => {
                self.state = State::Done;
                None
            }
            Err(error) => {
                self.state = State::Done;
                Some(Err(error))
            }
        }
    }

    fn start_of_next(&mut self) -> Result<Option<usize>, MalformedJson> {
        let at = skip_whitespace(self.text, self.at);
        let byte = self.text.get(at).copied();
        match self.state {
            State::Done => Ok(None),
            State::Broken => Err(MalformedJson::new("neither the object nor the array it should be")),
            _ if byte == Some(self.close) && at + 1 == self.text.len() => Ok(None),
            State::First => Ok(Some(at)),
            State::Later if byte == Some(b',') => Ok(Some(skip_whitespace(self.text, at + 1))),
            State::Later => Err(MalformedJson::new("no comma between two items")),
        }
    }
}

/// The offset of the first byte from `at` on that is not white space.
pub(crate) fn skip_whitespace(text: &[u8], at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    rest.iter().position(|&byte| !is_whitespace(byte)).map_or(text.len(), |offset| at + offset)
}

/// `text` without the white space at its end.
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
        None => Err(MalformedJson::new("no value at the end of the text")),
    }
}

fn end_of_key(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    match text.get(start) {
        Some(b'"') => end_of_string(text, start),
        _ => Err(MalformedJson::new("a member without a name")),
    }
}

/// The start of the value whose name ends at `key_end`.
fn start_of_value(text: &[u8], key_end: usize) -> Result<usize, MalformedJson> {
    let colon = skip_whitespace(text, key_end);
    if text.get(colon) != Some(&b':') {
        return Err(MalformedJson::new("a member without a colon"));
    }
    Ok(skip_whitespace(text, colon + 1))
}

/// The end of the string whose opening quote is at `start`.
fn end_of_string(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    const ENDLESS: MalformedJson = MalformedJson::new("a string that does not end");
    let mut at = start + 1;
    loop {
        at += find_string_special(text.get(at..).ok_or(ENDLESS)?).ok_or(ENDLESS)?;
        if text[at] == b'"' {
            return Ok(at + 1);
        }
        at += 2; // the backslash and what it escapes
    }
}

/// Numbers, `true`, `false` and `null`: all up to the next separator.
fn end_of_scalar(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    let is_end = |&byte: &u8| is_whitespace(byte) || is_structural(byte) || matches!(byte, b',' | b':');
    match text[start..].iter().position(is_end) {
        Some(0) => Err(MalformedJson::new("no value where one must be")),
        Some(length) => Ok(start + length),
        None => Ok(text.len()),
    }
}

/// The end of the object or array whose bracket is at `start`. Counts brackets instead of recursing, so depth
/// costs nothing; it does not tell `]` from `}`.
fn end_of_nested(text: &[u8], start: usize) -> Result<usize, MalformedJson> {
    let mut depth = 0_usize;
    let mut at = start;
    'words: while at < text.len() {
        let mut marked = marked(word(&text[at..]));
        while marked != 0 {
            let byte = at + marked.trailing_zeros() as usize / 8;
            match text.get(byte) {
                Some(b'{' | b'[') => depth += 1,
                // Not below 0: the byte at `start` opened.
                Some(b'}' | b']') if depth == 1 => return Ok(byte + 1),
                Some(b'}' | b']') => depth -= 1,
                Some(b'"') => {
                    at = end_of_string(text, byte)?;
                    continue 'words;
                }
                _ => {}
            }
            marked &= marked - 1;
        }
        at += WORD;
    }
    Err(MalformedJson::new("an object or array that does not end"))
}

/// A text's first bytes; zeros where it has none.
fn word(text: &[u8]) -> u64 {
    let bytes = text.first_chunk().copied().unwrap_or_else(|| {
        let mut bytes = [0; WORD];
        bytes[..text.len()].copy_from_slice(text);
        bytes
    });
    u64::from_le_bytes(bytes)
}

/// The highest bit of each byte that may be a quote, a brace or a bracket: of all that are, and of few others. A word
/// of eight costs a dozen instructions, and most words of a list of numbers have a bracket at most.
fn marked(word: u64) -> u64 {
    // Braces and brackets differ in these bits only. What else they let pass (`Y`, `_`, `y`, DEL) is looked at in vain.
    let brackets = (word | (EACH * 0x26)) ^ (EACH * 0x7f);
    zeros(brackets) | equal(word, b'"')
}

#[cfg(test)]
mod tests;

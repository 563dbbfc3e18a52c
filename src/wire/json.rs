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

/// Offset of the first quote or backslash: what a string's contents can end with.
#[inline]
pub(crate) fn find_string_special(bytes: &[u8]) -> Option<usize> {
    memchr::memchr2(b'"', b'\\', bytes)
}

/// Offset of the first quote, brace or bracket: what a nested value's shape is made of.
#[inline]
pub(crate) fn find_structural(bytes: &[u8]) -> Option<usize> {
    let mut blocks = bytes.chunks_exact(BLOCK);
    let mut at = 0;
    for block in &mut blocks {
        if block.iter().fold(false, |hit, &byte| hit | is_structural(byte)) {
            break;
        }
        at += BLOCK;
    }
    bytes[at..].iter().position(|&byte| is_structural(byte)).map(|offset| at + offset)
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
pub(crate) struct Malformed {
    /// What is wrong, as the rest of a sentence.
    pub(crate) what: &'static str,
}

impl Malformed {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed: {}", self.what)
    }
}

impl std::error::Error for Malformed {}

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

impl<'a> Value<'a> {
    /// The one value that `text` is, white space around it aside.
    pub(crate) fn root(text: &'a [u8]) -> Result<Self, Malformed> {
        let value = Self::at(text, skip_whitespace(text, 0))?;
        if skip_whitespace(text, value.end) == text.len() {
            Ok(value)
        } else {
            Err(Malformed::new("more than one value"))
        }
    }

    /// The value that starts at `start`.
    pub(crate) fn at(text: &'a [u8], start: usize) -> Result<Self, Malformed> {
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
    pub(crate) fn member(self, name: &str) -> Result<Option<Value<'a>>, Malformed> {
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
        if !self.raw_key.contains(&b'\\') {
            return self.raw_key == name.as_bytes();
        }
        // No escape is shorter than what it stands for.
        self.raw_key.len() > name.len() && unescaped_is(self.raw_key, name)
    }
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
    type Item = Result<Member<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        self.items.next_with(|text, at| {
            let key_end = end_of_key(text, at)?;
            let colon = skip_whitespace(text, key_end);
            if text.get(colon) != Some(&b':') {
                return Err(Malformed::new("a member without a colon"));
            }
            let value = Value::at(text, skip_whitespace(text, colon + 1))?;
            Ok((Member { raw_key: &text[at + 1..key_end - 1], value }, value.end))
        })
    }
}

/// See [`Value::elements`].
pub(crate) struct Elements<'a> {
    items: Items<'a>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Value<'a>, Malformed>;

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
        read: impl FnOnce(&'a [u8], usize) -> Result<(T, usize), Malformed>,
    ) -> Option<Result<T, Malformed>> {
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

    fn start_of_next(&mut self) -> Result<Option<usize>, Malformed> {
        let at = skip_whitespace(self.text, self.at);
        let byte = self.text.get(at).copied();
        match self.state {
            State::Done => Ok(None),
            State::Broken => Err(Malformed::new("neither the object nor the array it should be")),
            _ if byte == Some(self.close) && at + 1 == self.text.len() => Ok(None),
            State::First => Ok(Some(at)),
            State::Later if byte == Some(b',') => Ok(Some(skip_whitespace(self.text, at + 1))),
            State::Later => Err(Malformed::new("no comma between two items")),
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

fn end_of_value(text: &[u8], start: usize) -> Result<usize, Malformed> {
    match text.get(start) {
        Some(b'"') => end_of_string(text, start),
        Some(b'{' | b'[') => end_of_nested(text, start),
        Some(_) => end_of_scalar(text, start),
        None => Err(Malformed::new("no value at the end of the text")),
    }
}

fn end_of_key(text: &[u8], start: usize) -> Result<usize, Malformed> {
    match text.get(start) {
        Some(b'"') => end_of_string(text, start),
        _ => Err(Malformed::new("a member without a name")),
    }
}

/// The end of the string whose opening quote is at `start`.
fn end_of_string(text: &[u8], start: usize) -> Result<usize, Malformed> {
    const ENDLESS: Malformed = Malformed::new("a string that does not end");
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
fn end_of_scalar(text: &[u8], start: usize) -> Result<usize, Malformed> {
    let is_end = |&byte: &u8| is_whitespace(byte) || is_structural(byte) || matches!(byte, b',' | b':');
    match text[start..].iter().position(is_end) {
        Some(0) => Err(Malformed::new("no value where one must be")),
        Some(length) => Ok(start + length),
        None => Ok(text.len()),
    }
}

/// The end of the object or array whose bracket is at `start`. Counts brackets instead of recursing, so depth
/// costs nothing; it does not tell `]` from `}`.
fn end_of_nested(text: &[u8], start: usize) -> Result<usize, Malformed> {
    let mut depth = 0_usize;
    let mut at = start;
    while at < text.len() {
        (at, depth) = skip_plain_blocks(text, at, depth);
        let end = text.len().min(at + BLOCK);
        while at < end {
            match text[at] {
                b'"' => {
                    at = end_of_string(text, at)?;
                    break;
                }
                b'{' | b'[' => depth += 1,
                // Not below 0: the byte at `start` opened.
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            at += 1;
            if depth == 0 {
                return Ok(at);
            }
        }
    }
    Err(Malformed::new("an object or array that does not end"))
}

/// Passes whole blocks without a quote and with too few closing brackets to come to depth 0: in those the
/// order of the brackets does not matter, and counting is branch-free. Lists of numbers (all of a logprob
/// list unless token texts are asked for) are made of such blocks.
fn skip_plain_blocks(text: &[u8], mut at: usize, mut depth: usize) -> (usize, usize) {
    for block in text[at..].chunks_exact(BLOCK) {
        let closing = count(block, |byte| byte | 0x20 == b'}');
        if closing >= depth || count(block, |byte| byte == b'"') > 0 {
            break;
        }
        depth = depth - closing + count(block, |byte| byte | 0x20 == b'{');
        at += BLOCK;
    }
    (at, depth)
}

/// How many bytes of a block pass the test; no more than a `u8` can count.
fn count(block: &[u8], test: impl Fn(u8) -> bool) -> usize {
    block.iter().map(|&byte| u8::from(test(byte))).sum::<u8>().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value as Parsed;

    use super::*;

    /// What is in an object, by walking it.
    fn walk_object(text: &[u8]) -> Result<Vec<[&[u8]; 2]>, Malformed> {
        Value::root(text)?.members().map(|member| member.map(|it| [it.raw_key, it.value.raw()])).collect()
    }

    fn walk_array(text: &[u8]) -> Result<Vec<&[u8]>, Malformed> {
        Value::root(text)?.elements().map(|element| element.map(Value::raw)).collect()
    }

    /// Walks all of it, and panics if a value lies outside of the text.
    fn walk_everything(value: Value<'_>) -> Result<(), Malformed> {
        assert_eq!(value.raw(), &value.text[value.span()]);
        if value.is_object() {
            value.members().try_for_each(|member| walk_everything(member?.value))
        } else if value.is_array() {
            value.elements().try_for_each(|element| walk_everything(element?))
        } else {
            Ok(())
        }
    }

    fn parse(text: &[u8]) -> Parsed {
        serde_json::from_slice(text).unwrap()
    }

    fn any_json() -> impl Strategy<Value = Parsed> {
        let scalar = prop_oneof![
            Just(Parsed::Null),
            any::<bool>().prop_map(Parsed::from),
            any::<i64>().prop_map(Parsed::from),
            // serde_json reads eighths exactly, and not every number.
            any::<i32>().prop_map(|number| Parsed::from(f64::from(number) / 8.0)),
            any::<String>().prop_map(Parsed::from),
            "[\\[\\]{}\"\\\\,:]{0,9}".prop_map(Parsed::from),
        ];
        scalar.prop_recursive(5, 60, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Parsed::from),
                prop::collection::btree_map(any::<String>(), inner, 0..8)
                    .prop_map(|members| Parsed::from(members.into_iter().collect::<serde_json::Map<_, _>>())),
            ]
        })
    }

    #[test]
    fn members_and_elements_come_in_order_and_raw() {
        let text = br#" { "a" : 1.50 , "b":[1, 2 ,{"c":"]"}],"":"\\\"" } "#;
        let members = [[&b"a"[..], b"1.50"], [b"b", br#"[1, 2 ,{"c":"]"}]"#], [b"", br#""\\\"""#]];
        assert_eq!(walk_object(text).unwrap(), members);
        assert_eq!(walk_array(b"[1, 2 ,[3,4],\n]").unwrap_err().what, "no value where one must be");
        assert_eq!(walk_array(b"[1, 2 ,[3,4]\n]").unwrap(), [&b"1"[..], b"2", b"[3,4]"]);
        assert!(walk_object(b"{ }").unwrap().is_empty());
        assert!(walk_array(b"[\n]").unwrap().is_empty());
    }

    #[test]
    fn a_member_is_found_on_its_own_level_only() {
        let text =
            br#"{"my_index":0,"inner":{"index":1},"list":[{"index":2}],"text":"\"index\":3","index":4}"#;
        let root = Value::root(text).unwrap();
        assert_eq!(root.member("index").unwrap().unwrap().as_u64(), Some(4));
        assert!(root.member("other").unwrap().is_none());
        assert!(Value::root(b"[1]").unwrap().member("index").unwrap().is_none());
    }

    #[test]
    fn a_key_with_escapes_is_the_key_it_stands_for() {
        let text = br#"{"ind\u0065x":1,"a\/b":2,"bad\x":3,"\ud800":4}"#;
        let root = Value::root(text).unwrap();
        assert_eq!(root.member("index").unwrap().unwrap().raw(), b"1");
        assert_eq!(root.member("a/b").unwrap().unwrap().raw(), b"2");
        assert!(root.member("bad\\x").unwrap().is_none());
    }

    #[test]
    fn only_whole_numbers_that_are_not_negative_are_read() {
        let number = |text: &str| Value::root(text.as_bytes()).unwrap().as_u64();
        assert_eq!(number("18446744073709551615"), Some(u64::MAX));
        for other in ["18446744073709551616", "-1", "1.0", "1e3", "null", "\"1\"", "[1]"] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_not_json_is_an_error() {
        let objects: [&[u8]; 9] = [
            b"",
            b" ",
            b"{",
            b"{\"a\" 12}",
            b"{\"a\":}",
            b"{\"a\":1,}",
            b"{\"a\":1 \"b\":2}",
            b"{a:1}",
            b"[1]",
        ];
        for text in objects {
            assert!(walk_object(text).is_err(), "{}", text.escape_ascii());
        }
        let arrays: [&[u8]; 9] = [b"[", b"[1", b"[1 2]", b"[,]", b"[1}", b"[\"a]", b"[\"a\\", b"[[1]", b"{}"];
        for text in arrays {
            assert!(walk_array(text).is_err(), "{}", text.escape_ascii());
        }
        assert!(Value::root(b"{} {}").is_err());
    }

    #[test]
    fn depth_costs_no_stack() {
        let deep = ["[".repeat(1_000_000), "]".repeat(1_000_000)].concat();
        assert_eq!(walk_array(deep.as_bytes()).unwrap().len(), 1);
        assert!(Value::root(&deep.as_bytes()[..1_999_999]).is_err());
    }

    proptest! {
        #[test]
        fn a_walk_sees_what_a_parser_sees(value in any_json(), pretty: bool) {
            let write = if pretty { serde_json::to_vec_pretty } else { serde_json::to_vec };
            let text = write(&value).unwrap();
            prop_assert!(walk_everything(Value::root(&text).unwrap()).is_ok());
            match &value {
                Parsed::Array(elements) => {
                    let walked: Vec<_> = walk_array(&text).unwrap().iter().map(|raw| parse(raw)).collect();
                    prop_assert_eq!(&walked, elements);
                }
                Parsed::Object(members) => {
                    for (name, expected) in members {
                        let found = Value::root(&text).unwrap().member(name).unwrap().unwrap();
                        prop_assert_eq!(&parse(found.raw()), expected);
                    }
                    prop_assert_eq!(walk_object(&text).unwrap().len(), members.len());
                }
                scalar => prop_assert_eq!(&parse(&text), scalar),
            }
        }

        #[test]
        fn a_cut_object_or_array_is_an_error(value in any_json(), cut: prop::sample::Index) {
            let text = serde_json::to_vec(&[value]).unwrap();
            prop_assert!(Value::root(&text[..cut.index(text.len())]).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, json in "[\\[\\]{}\"\\\\,:a0 ]{0,40}") {
            for text in [&bytes[..], json.as_bytes()] {
                let _ = Value::root(text).and_then(walk_everything);
                let _ = walk_object(text);
                let _ = walk_array(text);
            }
        }

        #[test]
        fn the_first_structural_byte_is_found(text in "[a\\[\\]{}\"]{0,3}[a-z0-9]{0,80}[\\[\\]{}\"a]{0,3}") {
            let expected = text.find(['[', ']', '{', '}', '"']);
            prop_assert_eq!(find_structural(text.as_bytes()), expected);
        }
    }
}

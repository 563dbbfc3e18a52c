//! Looking values up by name or position, for text that is in memory as a whole.

use std::ops::Range;

use super::MalformedJson;
use super::skip::{end_of_value, skip_whitespace};
use super::walk::RawName;

/// A value within a text: its start and end.
///
/// Its contents are checked only as far as they are iterated: iterating an object's members checks quotes,
/// colons, commas and brackets, which is enough to cut a value out.
#[derive(Clone, Copy)]
pub(crate) struct JsonValue<'a> {
    text: &'a [u8],
    start: usize,
    end: usize,
}

/// A name and its value in an object.
#[derive(Clone, Copy)]
pub(crate) struct ObjectMember<'a> {
    pub(crate) name: RawName<'a>,
    pub(crate) value: JsonValue<'a>,
}

impl<'a> JsonValue<'a> {
    /// The only value in `text`, apart from white space around it.
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

    /// The value's position in its text.
    pub(crate) fn span(self) -> Range<usize> {
        self.start..self.end
    }

    /// The value's bytes, as they were written.
    pub(crate) fn raw(self) -> &'a [u8] {
        &self.text[self.start..self.end]
    }

    pub(crate) fn is_object(self) -> bool {
        self.raw().first() == Some(&b'{')
    }

    pub(crate) fn is_array(self) -> bool {
        self.raw().first() == Some(&b'[')
    }

    /// The value as an unsigned integer, if it is one.
    pub(crate) fn as_u64(self) -> Option<u64> {
        // `parse` accepts a leading `+`, which is not JSON: a server that sends one is understood.
        std::str::from_utf8(self.raw()).ok()?.parse().ok()
    }

    /// The members of an object, in order; a single error if this is no object.
    pub(crate) fn members(self) -> ObjectMembers<'a> {
        ObjectMembers { cursor: Cursor::new(self, b'{', b'}') }
    }

    /// The elements of an array, in order; a single error if this is no array.
    pub(crate) fn elements(self) -> ArrayElements<'a> {
        ArrayElements { cursor: Cursor::new(self, b'[', b']') }
    }

    /// The value of the first member called `name`; `None` if this is no object. Only servers' texts are read
    /// this way, which have no duplicate names.
    pub(crate) fn member(self, name: &str) -> Result<Option<Self>, MalformedJson> {
        if !self.is_object() {
            return Ok(None);
        }
        for member in self.members() {
            let member = member?;
            if member.name.is(name) {
                return Ok(Some(member.value));
            }
        }
        Ok(None)
    }
}

/// See [`JsonValue::members`].
pub(crate) struct ObjectMembers<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Iterator for ObjectMembers<'a> {
    type Item = Result<ObjectMember<'a>, MalformedJson>;

    fn next(&mut self) -> Option<Self::Item> {
        self.cursor.next_with(|text, at| {
            let (name, value) = RawName::read(text, at)?;
            let value = JsonValue::at(text, value)?;
            Ok((ObjectMember { name, value }, value.end))
        })
    }
}

/// See [`JsonValue::elements`].
pub(crate) struct ArrayElements<'a> {
    cursor: Cursor<'a>,
}

impl<'a> Iterator for ArrayElements<'a> {
    type Item = Result<JsonValue<'a>, MalformedJson>;

    fn next(&mut self) -> Option<Self::Item> {
        self.cursor.next_with(|text, at| {
            let value = JsonValue::at(text, at)?;
            Ok((value, value.end))
        })
    }
}

/// The position within an object or array: what iterating the two has in common.
struct Cursor<'a> {
    /// Ends with the closing bracket, so that the iteration cannot leave the value.
    text: &'a [u8],
    at: usize,
    close: u8,
    state: CursorState,
}

#[derive(Clone, Copy, PartialEq)]
enum CursorState {
    /// The value has another type: the next step reports it.
    WrongType,
    BeforeFirst,
    AfterItem,
    Done,
}

impl<'a> Cursor<'a> {
    fn new(value: JsonValue<'a>, open: u8, close: u8) -> Self {
        let is_expected = value.raw().first() == Some(&open);
        let state = if is_expected { CursorState::BeforeFirst } else { CursorState::WrongType };
        Self { text: &value.text[..value.end], at: value.start + 1, close, state }
    }

    /// Reads the next item with `read`, which gets the item's start and returns the item and its end.
    fn next_with<T>(
        &mut self,
        read: impl FnOnce(&'a [u8], usize) -> Result<(T, usize), MalformedJson>,
    ) -> Option<Result<T, MalformedJson>> {
        let item = self.start_of_next().and_then(|start| start.map(|at| read(self.text, at)).transpose());
        match item {
            Ok(Some((item, end))) => {
                self.at = end;
                self.state = CursorState::AfterItem;
                Some(Ok(item))
            }
            Ok(None) => {
                self.state = CursorState::Done;
                None
            }
            // An error is final: without the item's end there is no next one to look for.
            Err(error) => {
                self.state = CursorState::Done;
                Some(Err(error))
            }
        }
    }

    fn start_of_next(&mut self) -> Result<Option<usize>, MalformedJson> {
        let at = skip_whitespace(self.text, self.at);
        let byte = self.text.get(at).copied();
        match self.state {
            CursorState::Done => Ok(None),
            CursorState::WrongType => Err(MalformedJson::new("a value has another type than expected")),
            // The bracket that closes the value is the text's last byte, by construction.
            _ if byte == Some(self.close) && at + 1 == self.text.len() => Ok(None),
            CursorState::BeforeFirst => Ok(Some(at)),
            CursorState::AfterItem if byte == Some(b',') => Ok(Some(skip_whitespace(self.text, at + 1))),
            CursorState::AfterItem => Err(MalformedJson::new("a comma is missing between two values")),
        }
    }
}

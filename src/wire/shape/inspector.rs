//! The scanner: reads a body in chunks, as a state machine over the top level of a JSON object.

use super::edit::FieldFinder;
use super::fields::{RequestedFeatures, TopLevelField, ValueBuffer};
use super::prompt::{HashKey, PromptReader};
use super::strict::{Nesting, Utf8Validator, is_json, unescape};
use super::{BodyError, BodyShape, Dialect, FieldTreatment, InternalFields};
use crate::wire::json::{
    BLOCK, MaskScan, find_near_string_special, find_string_special, find_structural, is_whitespace,
};

/// The most bytes that are kept of a name. None that matters is longer: `bootstrap_pair_key` with all its
/// characters written as `\u` escapes has 108.
pub(super) const MAX_NAME: usize = 256;

/// Bytes that are searched at once in long values.
const SEGMENT: usize = 16 << 10;

/// What the scanner expects next, or is within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScanState {
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

/// Reads a body in chunks. [Feed](Self::feed) it every byte in order, then call [`finish`](Self::finish).
#[derive(Debug)]
pub(crate) struct BodyInspector {
    dialect: Dialect,
    internal: InternalFields,
    state: ScanState,
    /// The body's length before the current chunk.
    base: usize,
    utf8: Utf8Validator,
    nesting: Nesting,
    /// The part of the current name that earlier chunks had, without quotes and still escaped.
    name: Vec<u8>,
    field: TopLevelField,
    /// The current field's value, if it matters.
    value: ValueBuffer,
    fields: FieldFinder,
    features: RequestedFeatures,
    /// `None`: no policy wants to know the prompt.
    prompt: Option<PromptReader>,
    /// Long chunks are read as short ones are.
    #[cfg(any(test, fuzzing))]
    is_reference: bool,
}

impl BodyInspector {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            internal: InternalFields::default(),
            state: ScanState::Start,
            base: 0,
            utf8: Utf8Validator::default(),
            nesting: Nesting::default(),
            name: Vec::new(),
            field: TopLevelField::Other,
            value: ValueBuffer::default(),
            fields: FieldFinder::default(),
            features: RequestedFeatures::default(),
            prompt: None,
            #[cfg(any(test, fuzzing))]
            is_reference: false,
        }
    }

    /// Validates each chunk first, and reads it a word at a time: what reading in blocks must agree with.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn reference(self) -> Self {
        Self { is_reference: true, ..self }
    }

    /// Treats internal fields like this.
    pub(crate) fn with_internal_fields(self, internal: InternalFields) -> Self {
        Self { internal, ..self }
    }

    /// Takes the prompt's fingerprint too, with this key.
    pub(crate) fn with_prompt(mut self, key: HashKey) -> Self {
        self.prompt = Some(PromptReader::new(key));
        self
    }

    /// Takes the fingerprint of the prompt's beginning with the key that is the same in every process, if the
    /// prompt's is taken.
    pub(crate) fn with_stable_prefix(mut self) -> Self {
        self.prompt = self.prompt.map(PromptReader::with_stable_prefix);
        self
    }

    /// Reads the body's next chunk. An error is final.
    pub(crate) fn feed(&mut self, chunk: &[u8]) -> Result<(), BodyError> {
        // Named instead of reported as a syntax error: no editor shows it. One or two bytes of it will do,
        // as nothing else that starts with them is JSON.
        if self.base == 0 && (chunk.starts_with(&[0xEF, 0xBB]) || chunk == [0xEF]) {
            return Err(BodyError::ByteOrderMark);
        }
        self.utf8.chunk_started();
        if !self.reads_blocks(chunk) {
            self.utf8.feed_rest(chunk, self.base)?;
        }
        let mut at = 0;
        while at < chunk.len() {
            at = match self.step(chunk, at) {
                Ok(end) => end,
                Err(error @ BodyError::NotUtf8 { .. }) => return Err(error),
                // Of a chunk that is not UTF-8 that is the error, wherever it is.
                Err(error) => return Err(self.utf8.feed_rest(chunk, self.base).err().unwrap_or(error)),
            };
        }
        self.utf8.feed_rest(chunk, self.base)?;
        if let Some(prompt) = &mut self.prompt {
            prompt.chunk_ended(chunk);
        }
        self.base += chunk.len();
        Ok(())
    }

    /// Whether long values are read in blocks. A block must lie within the chunk.
    fn reads_blocks(&self, chunk: &[u8]) -> bool {
        #[cfg(any(test, fuzzing))]
        if self.is_reference {
            return false;
        }
        chunk.len() >= BLOCK
    }

    /// The body's shape, once all of it was fed.
    pub(crate) fn finish(self) -> Result<BodyShape, BodyError> {
        match self.state {
            ScanState::Start => return Err(BodyError::Empty),
            ScanState::End => {}
            _ => return Err(BodyError::Truncated { at: self.base }),
        }
        self.utf8.finish(self.base)?;
        let shape = self.features.into_shape(self.dialect, self.fields.finish());
        Ok(BodyShape { prompt: self.prompt.map(PromptReader::finish), ..shape })
    }

    /// Advances from `chunk[at]` as far as the current state goes. Returns the new position.
    fn step(&mut self, chunk: &[u8], at: usize) -> Result<usize, BodyError> {
        match self.state {
            ScanState::InName { escaped } => self.in_name(chunk, at, escaped),
            ScanState::InString { escaped } => self.in_string(chunk, at, escaped),
            ScanState::Nested => self.in_nested(chunk, at, None),
            ScanState::NestedString { escaped } => self.in_nested(chunk, at, Some(escaped)),
            ScanState::Scalar => self.in_scalar(chunk, at),
            _ if is_whitespace(chunk[at]) => Ok(at + 1),
            _ => self.token(chunk, at),
        }
    }

    /// A byte between names and values that is not white space.
    fn token(&mut self, chunk: &[u8], at: usize) -> Result<usize, BodyError> {
        let (byte, offset) = (chunk[at], self.base + at);
        let expected = |expected| Err(BodyError::Syntax { expected, at: offset });
        self.state = match (self.state, byte) {
            (ScanState::Start, b'{') => ScanState::NameOrEnd,
            (ScanState::Start, _) => return Err(BodyError::not_an_object(&chunk[at..], offset)),
            (ScanState::NameOrEnd | ScanState::NameStart, b'"') => self.start_name(offset),
            (ScanState::NameOrEnd, b'}') => self.close_object(offset),
            (ScanState::NameOrEnd, _) => return expected("a field's name or '}'"),
            (ScanState::NameStart, _) => return expected("a field's name"),
            (ScanState::Colon, b':') => ScanState::ValueStart,
            (ScanState::Colon, _) => return expected("':'"),
            (ScanState::ValueStart, _) => return self.start_value(chunk, at),
            (ScanState::CommaOrEnd, b',') => ScanState::NameStart,
            (ScanState::CommaOrEnd, b'}') => self.close_object(offset),
            (ScanState::CommaOrEnd, _) => return expected("',' or '}'"),
            (ScanState::End, _) => return expected("nothing after the object"),
            _ => unreachable!("`step` handles the states within a name or value"),
        };
        Ok(at + 1)
    }

    fn close_object(&mut self, offset: usize) -> ScanState {
        self.fields.object_closed(offset);
        ScanState::End
    }

    fn start_name(&mut self, offset: usize) -> ScanState {
        self.name.clear();
        self.fields.name_started(offset);
        ScanState::InName { escaped: false }
    }

    fn in_name(&mut self, chunk: &[u8], at: usize, escaped: bool) -> Result<usize, BodyError> {
        let (end, unfinished) = skip_string(chunk, at, escaped);
        if let Some(escaped) = unfinished {
            self.keep_name(&chunk[at..end]);
            self.state = ScanState::InName { escaped };
            return Ok(end);
        }
        // A name within one chunk, the usual case, is not copied.
        if self.name.is_empty() {
            self.end_name(&chunk[at..end - 1])?;
        } else {
            self.keep_name(&chunk[at..end - 1]);
            let name = std::mem::take(&mut self.name);
            self.end_name(&name)?;
        }
        // The colon is nearly always the next byte: this saves a step.
        let is_colon = chunk.get(end) == Some(&b':');
        self.state = if is_colon { ScanState::ValueStart } else { ScanState::Colon };
        Ok(end + usize::from(is_colon))
    }

    fn keep_name(&mut self, part: &[u8]) {
        self.name.extend_from_slice(&part[..part.len().min(MAX_NAME.saturating_sub(self.name.len()))]);
    }

    /// All of a name was read: between its quotes, still escaped.
    fn end_name(&mut self, name: &[u8]) -> Result<(), BodyError> {
        let is_plain = |byte: &u8| !byte.is_ascii_control() & (*byte != b'\\');
        self.field = if name.len() >= MAX_NAME {
            TopLevelField::Other
        // A fold instead of `all`, which would stop early and so not be vectorised.
        } else if name.iter().fold(true, |plain, byte| plain & is_plain(byte)) {
            self.named(name)?
        } else {
            let Some(name) = unescape(name) else {
                let at = self.fields.name_start();
                return Err(BodyError::Syntax { expected: "a valid string", at });
            };
            self.named(name.as_bytes())?
        };
        self.fields.name_ended(self.field.changed())
    }

    /// The field of this name, without escapes.
    fn named(&mut self, name: &[u8]) -> Result<TopLevelField, BodyError> {
        if let Some(prompt) = &mut self.prompt {
            prompt.field(name, self.dialect);
        }
        let field = TopLevelField::of(name, self.dialect);
        if field != TopLevelField::Other {
            return Ok(field);
        }
        match self.internal.find(name) {
            Some((_, FieldTreatment::Strip)) => Ok(TopLevelField::Stripped),
            Some((name, FieldTreatment::Reject)) => Err(BodyError::InternalField { name }),
            Some((name, FieldTreatment::Pass)) => Ok(TopLevelField::passed(name)),
            None => Ok(TopLevelField::Other),
        }
    }

    fn start_value(&mut self, chunk: &[u8], at: usize) -> Result<usize, BodyError> {
        let byte = chunk[at];
        if let Some(prompt) = &mut self.prompt {
            prompt.value_started(byte, at);
        }
        // Scalars of other fields are kept, too, if they span chunks: they are checked as a whole.
        self.fields.value_started(self.base + at);
        self.value.start(self.field.is_read() || !matches!(byte, b'"' | b'{' | b'['));
        if self.field == TopLevelField::Prompt {
            self.features.set_prompt(&chunk[at..]);
        }
        match byte {
            b'"' => {
                self.value.push(b"\"");
                self.state = ScanState::InString { escaped: false };
                Ok(at + 1)
            }
            b'{' | b'[' => {
                self.nesting.depth = 0;
                self.state = ScanState::Nested;
                Ok(at)
            }
            _ => {
                self.state = ScanState::Scalar;
                Ok(at)
            }
        }
    }

    fn in_string(&mut self, chunk: &[u8], at: usize, escaped: bool) -> Result<usize, BodyError> {
        let (end, unfinished) = match short_string(chunk, at, escaped) {
            Some(end) => (end, None),
            None if self.reads_blocks(chunk) => self.skip_long_string(chunk, at, escaped)?,
            None => skip_string(chunk, at, escaped),
        };
        self.value.push(&chunk[at..end]);
        match unfinished {
            Some(escaped) => self.state = ScanState::InString { escaped },
            None => return self.end_value(chunk, end),
        }
        Ok(end)
    }

    /// [`skip_string`] in blocks. What they say is ASCII is not validated again.
    fn skip_long_string(
        &mut self,
        chunk: &[u8],
        at: usize,
        escaped: bool,
    ) -> Result<(usize, Option<bool>), BodyError> {
        let mut scan = MaskScan::new(at, Some(escaped));
        while scan.at < chunk.len() {
            let start = scan.at;
            let quote = scan.end_of_string(&chunk[..segment_end(chunk, start)]);
            self.utf8.skip_ascii(chunk, start, &mut scan, self.base)?;
            if let Some(quote) = quote {
                return Ok((quote + 1, None));
            }
        }
        Ok((chunk.len(), scan.escaped()))
    }

    /// Within an object or list, in a string of its or not: reads up to its end, or the chunk's.
    fn in_nested(&mut self, chunk: &[u8], at: usize, escaped: Option<bool>) -> Result<usize, BodyError> {
        if !self.reads_blocks(chunk) {
            return match escaped {
                Some(escaped) => Ok(self.in_nested_string(chunk, at, escaped)),
                None => self.in_short_nested(chunk, at),
            };
        }
        let mut scan = MaskScan::new(at, escaped);
        while scan.at < chunk.len() {
            let start = scan.at;
            let found = scan.next_brackets(&chunk[..segment_end(chunk, start)]);
            self.utf8.skip_ascii(chunk, start, &mut scan, self.base)?;
            let Some((block, mut brackets)) = found else { continue };
            while brackets != 0 {
                let bracket = block + brackets.trailing_zeros() as usize;
                if self.bracket(chunk[bracket], self.base + bracket)? {
                    self.value.push(&chunk[at..=bracket]);
                    return self.end_value(chunk, bracket + 1);
                }
                brackets &= brackets - 1;
            }
        }
        self.value.push(&chunk[at..]);
        self.state = match scan.escaped() {
            Some(escaped) => ScanState::NestedString { escaped },
            None => ScanState::Nested,
        };
        Ok(chunk.len())
    }

    /// Returns whether this bracket is the one that closes the outermost.
    fn bracket(&mut self, byte: u8, offset: usize) -> Result<bool, BodyError> {
        match byte {
            b'{' | b'[' => self.nesting.open(byte, offset).map(|()| false),
            _ => self.nesting.close(byte, offset),
        }
    }

    fn in_short_nested(&mut self, chunk: &[u8], at: usize) -> Result<usize, BodyError> {
        let Some(offset) = find_structural(&chunk[at..]) else {
            self.value.push(&chunk[at..]);
            return Ok(chunk.len());
        };
        let end = at + offset + 1;
        self.value.push(&chunk[at..end]);
        match chunk[end - 1] {
            b'"' => self.state = ScanState::NestedString { escaped: false },
            bracket => {
                if self.bracket(bracket, self.base + end - 1)? {
                    return self.end_value(chunk, end);
                }
            }
        }
        Ok(end)
    }

    fn in_nested_string(&mut self, chunk: &[u8], at: usize, escaped: bool) -> usize {
        let (end, unfinished) = skip_string(chunk, at, escaped);
        self.value.push(&chunk[at..end]);
        self.state = match unfinished {
            Some(escaped) => ScanState::NestedString { escaped },
            None => ScanState::Nested,
        };
        end
    }

    fn in_scalar(&mut self, chunk: &[u8], at: usize) -> Result<usize, BodyError> {
        let is_end = |byte: &u8| is_whitespace(*byte) || matches!(byte, b',' | b'}');
        let Some(length) = chunk[at..].iter().position(is_end) else {
            self.value.push(&chunk[at..]);
            return Ok(chunk.len());
        };
        let end = at + length;
        // A scalar within one chunk, the usual case, is checked where it is.
        let is_whole = self.value.bytes.is_empty() && !self.value.is_too_long;
        if is_whole && !self.field.is_read() && is_json(&chunk[at..end]) {
            return self.end_value(chunk, end);
        }
        self.value.push(&chunk[at..end]);
        self.check_value(end)?;
        self.end_value(chunk, end)
    }

    /// The current field's value ends before `chunk[end]`. Returns the new position.
    fn end_value(&mut self, chunk: &[u8], end: usize) -> Result<usize, BodyError> {
        if let Some(prompt) = &mut self.prompt {
            prompt.value_ended(chunk, end);
        }
        match self.field {
            TopLevelField::Prompt | TopLevelField::Other => {}
            field => {
                // No server sees what is removed, so none would reject it.
                if field.changed().is_some() {
                    self.check_value(end)?;
                }
                if let Some(changed) = self.features.set(field, &mut self.value) {
                    let start = self.base + end - self.value.bytes.len();
                    self.fields.value_matters(changed, start)?;
                }
            }
        }
        self.fields.value_ended(self.base + end);
        // A comma and the next name's quote are often the next bytes: this saves two steps.
        let (state, length) = match chunk[end..] {
            [b',', b'"', ..] => (self.start_name(self.base + end + 1), 2),
            [b',', ..] => (ScanState::NameStart, 1),
            _ => (ScanState::CommaOrEnd, 0),
        };
        self.state = state;
        Ok(end + length)
    }

    /// Rejects a value that ends before `chunk[end]` and is not JSON. One too long to keep is not checked.
    fn check_value(&self, end: usize) -> Result<(), BodyError> {
        if self.value.is_too_long || is_json(&self.value.bytes) {
            return Ok(());
        }
        let at = self.base + end - self.value.bytes.len();
        Err(BodyError::Syntax { expected: "a JSON value", at })
    }
}

/// How far a search goes at once, from here on: what of it is ASCII needs no other check.
fn segment_end(chunk: &[u8], at: usize) -> usize {
    chunk.len().min(at + SEGMENT)
}

/// The end of a string whose next special byte is its closing quote, and near.
fn short_string(chunk: &[u8], at: usize, escaped: bool) -> Option<usize> {
    let offset = find_near_string_special(&chunk[at..])?;
    (!escaped && chunk[at + offset] == b'"').then_some(at + offset + 1)
}

/// Skips a string's contents from `chunk[at]` on. Returns where it stopped, and `None` if the string ended;
/// otherwise whether the chunk's last byte is a backslash that escapes the next chunk's first.
pub(super) fn skip_string(chunk: &[u8], mut at: usize, escaped: bool) -> (usize, Option<bool>) {
    if escaped {
        at += 1;
    }
    while let Some(offset) = find_string_special(&chunk[at..]) {
        at += offset;
        if chunk[at] == b'"' {
            return (at + 1, None);
        }
        if at + 1 == chunk.len() {
            return (chunk.len(), Some(true));
        }
        at += 2; // the backslash and the byte that it escapes
    }
    (chunk.len(), Some(false))
}

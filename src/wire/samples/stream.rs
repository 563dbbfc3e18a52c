//! The event streams of all copies as one.

use std::fmt;
use std::mem;
use std::ops::Range;

use bytes::{BufMut, BytesMut};

use super::merged_index;
use super::splice::CopiedText;
use super::usage::UsageTotal;
use crate::wire::json::{
    JsonValue, MalformedJson, end_of_value, skip_whitespace, walk_elements, walk_members,
};
use crate::wire::shape::Dialect;
use crate::wire::sse::{EventEnds, EventTooLarge, data_line_of_type};

const DONE: &[u8] = b"[DONE]";
const DONE_EVENT: &[u8] = b"data: [DONE]\n\n";

/// Merges the event streams of all copies of a request. Each event passes as soon as it is complete, so that
/// the samples come interleaved as a regular server sends them.
pub(crate) struct StreamMerger {
    dialect: Dialect,
    copies: Vec<CopyStream>,
    max_event: usize,
    progress: MergeProgress,
    /// Of chunks of chat and completions.
    response: ResponseMembers,
    usage: UsageTotal,
    /// The first copy's event with its usage, rewritten; the sums are put into it at the end.
    usage_event: Vec<u8>,
    /// An event of the response as a whole has passed (`sglext`).
    has_extension: bool,
}

/// How far a merge has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MergeProgress {
    /// A copy is still expected to send events.
    Open,
    /// All copies are done: the usage and `[DONE]` were appended.
    Complete,
    /// A copy said an error: it and `[DONE]` were appended. The other copies are of no use any more.
    Failed,
}

/// Why streams cannot be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamMergeError {
    EventTooLarge(EventTooLarge),
    Malformed(MalformedJson),
}

impl fmt::Display for StreamMergeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EventTooLarge(error) => error.fmt(f),
            Self::Malformed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for StreamMergeError {}

impl From<MalformedJson> for StreamMergeError {
    fn from(error: MalformedJson) -> Self {
        Self::Malformed(error)
    }
}

/// What is known of a copy's stream.
struct CopyStream {
    ends: EventEnds,
    /// The beginning of an event that is incomplete.
    partial: Vec<u8>,
    /// It has said `[DONE]`.
    is_done: bool,
    has_ended: bool,
}

impl CopyStream {
    fn new() -> Self {
        Self { ends: EventEnds::new(), partial: Vec::new(), is_done: false, has_ended: false }
    }
}

/// What an event is to the client.
enum Meaning {
    /// It passes.
    Part,
    /// It says how many tokens the copy had; where, in the copy's event.
    Usage(Range<usize>),
    /// It extends the response as a whole, which every copy does.
    Extension,
    /// It fails the response.
    Error,
}

impl StreamMerger {
    /// A merger of this many copies' streams, whose events have at most `max_event` bytes each.
    pub(crate) fn new(dialect: Dialect, copies: usize, max_event: usize) -> Self {
        Self {
            dialect,
            copies: (0..copies).map(|_| CopyStream::new()).collect(),
            max_event,
            progress: MergeProgress::Open,
            response: ResponseMembers::default(),
            usage: UsageTotal::default(),
            usage_event: Vec::new(),
            has_extension: false,
        }
    }

    /// Reads the next bytes of a copy's stream, and appends the events that they complete to `out`. An error
    /// is final.
    pub(crate) fn push(
        &mut self,
        copy: usize,
        data: &[u8],
        out: &mut BytesMut,
    ) -> Result<MergeProgress, StreamMergeError> {
        let mut rest = data;
        while self.progress == MergeProgress::Open && !self.copies[copy].has_ended && !rest.is_empty() {
            let stream = &mut self.copies[copy];
            let end = stream.ends.find(rest);
            let (part, others) = rest.split_at(end.unwrap_or(rest.len()));
            if stream.partial.len() + part.len() > self.max_event {
                return Err(StreamMergeError::EventTooLarge(EventTooLarge { limit: self.max_event }));
            }
            rest = others;
            if end.is_some() && stream.partial.is_empty() {
                self.read_event(copy, part, out)?;
                continue;
            }
            stream.partial.extend_from_slice(part);
            if end.is_some() {
                self.read_partial(copy, out)?;
            }
        }
        Ok(self.progress)
    }

    /// A copy's stream has ended.
    pub(crate) fn end(&mut self, copy: usize, out: &mut BytesMut) -> Result<MergeProgress, StreamMergeError> {
        // A server that is stopped may leave out the last blank line. Here other copies' events may follow.
        let partial = &mut self.copies[copy].partial;
        if self.progress == MergeProgress::Open && !partial.is_empty() {
            partial.extend_from_slice(b"\n\n");
            self.read_partial(copy, out)?;
        }
        self.end_copy(copy, out)?;
        Ok(self.progress)
    }

    /// Reads the event that was put together from several pieces.
    fn read_partial(&mut self, copy: usize, out: &mut BytesMut) -> Result<(), StreamMergeError> {
        let mut event = mem::take(&mut self.copies[copy].partial);
        self.read_event(copy, &event, out)?;
        // Its memory is for the next one.
        event.clear();
        self.copies[copy].partial = event;
        Ok(())
    }

    fn read_event(&mut self, copy: usize, event: &[u8], out: &mut BytesMut) -> Result<(), StreamMergeError> {
        let Some(data) = data_line_of_type(event) else {
            if has_data(event) {
                return Err(MalformedJson::new("an event has several lines of data").into());
            }
            // Comments keep a connection alive: those of one copy are enough.
            if self.copies.iter().position(|copy| !copy.has_ended) == Some(copy) {
                out.put_slice(event);
            }
            return Ok(());
        };
        if event[data.clone()].trim_ascii() == DONE {
            self.copies[copy].is_done = true;
            return self.end_copy(copy, out);
        }
        let start = out.len();
        // What was written before an error is no event.
        let rewritten = self.rewrite(copy, event, data, out).inspect_err(|_| out.truncate(start))?;
        match rewritten {
            Meaning::Part => {}
            Meaning::Extension if !mem::replace(&mut self.has_extension, true) => {}
            Meaning::Extension => out.truncate(start),
            Meaning::Usage(usage) => {
                self.usage.add(JsonValue::at(event, usage.start)?)?;
                if copy == 0 {
                    self.usage_event = out[start..].to_vec();
                }
                out.truncate(start);
            }
            Meaning::Error => {
                out.put_slice(DONE_EVENT);
                self.progress = MergeProgress::Failed;
            }
        }
        Ok(())
    }

    /// Appends an event as the merged stream has it, and says what it means.
    fn rewrite(
        &mut self,
        copy: usize,
        event: &[u8],
        data: Range<usize>,
        out: &mut BytesMut,
    ) -> Result<Meaning, StreamMergeError> {
        let place = Place { copy, copies: self.copies.len() };
        let text = &event[..data.end];
        let object = skip_whitespace(text, data.start);
        let mut copied = CopiedText::new(event, out);
        let (meaning, end) = match self.dialect {
            Dialect::Generate => rewrite_answer(text, object, place, &mut copied)?,
            _ => rewrite_chunk(text, object, place, &mut self.response, &mut copied)?,
        };
        if skip_whitespace(text, end) < text.len() {
            return Err(MalformedJson::new("an event has more than one value").into());
        }
        copied.finish();
        Ok(meaning)
    }

    /// Ends the merged stream with the last copy.
    fn end_copy(&mut self, copy: usize, out: &mut BytesMut) -> Result<(), StreamMergeError> {
        self.copies[copy].has_ended = true;
        if self.progress != MergeProgress::Open || self.copies.iter().any(|copy| !copy.has_ended) {
            return Ok(());
        }
        self.progress = MergeProgress::Complete;
        // A sum without one copy's tokens would be none.
        if self.usage.copies == self.copies.len() && !self.usage_event.is_empty() {
            self.write_usage(out)?;
        }
        // A copy that was cut off without one has failed for whoever waits for it.
        if self.copies.iter().all(|copy| copy.is_done) {
            out.put_slice(DONE_EVENT);
        }
        Ok(())
    }

    fn write_usage(&self, out: &mut BytesMut) -> Result<(), MalformedJson> {
        const NO_USAGE: MalformedJson = MalformedJson::new("an event has no usage");
        let event = &self.usage_event[..];
        let data = data_line_of_type(event).ok_or(NO_USAGE)?;
        let root = JsonValue::at(event, skip_whitespace(event, data.start))?;
        let usage = root.member("usage")?.ok_or(NO_USAGE)?;
        let mut text = CopiedText::new(event, out);
        self.usage.write(usage, &mut text)?;
        text.finish();
        Ok(())
    }
}

/// Whether an event is more than comments.
fn has_data(event: &[u8]) -> bool {
    event.split(|byte| matches!(byte, b'\n' | b'\r')).any(|line| line.starts_with(b"data"))
}

/// Which copy an event is of.
#[derive(Clone, Copy)]
struct Place {
    copy: usize,
    copies: usize,
}

impl Place {
    /// Replaces the number of a prompt, at `start`, by that of the sample. Returns the number's end.
    fn replace_index(
        self,
        text: &[u8],
        start: usize,
        copied: &mut CopiedText<'_>,
    ) -> Result<usize, MalformedJson> {
        let prompt = JsonValue::at(text, start)?;
        copied.replace_by_number(prompt.span(), merged_index(prompt, self.copy, self.copies)?);
        Ok(prompt.span().end)
    }
}

/// What all chunks of a response have in common, as the first chunk of any copy had it.
#[derive(Default)]
struct ResponseMembers {
    values: [Option<Box<[u8]>>; Self::NAMES.len()],
}

impl ResponseMembers {
    const NAMES: [&'static str; 3] = ["id", "created", "model"];

    /// Replaces the value of the member at this position in [`NAMES`](Self::NAMES).
    fn replace(&mut self, position: usize, text: &[u8], value: Range<usize>, copied: &mut CopiedText<'_>) {
        let first = &mut self.values[position];
        match first {
            Some(first) => copied.replace(value, first),
            None => *first = Some(text[value].into()),
        }
    }
}

/// `/generate`: the prompt's number of a batch is the last member, which a single prompt has not.
fn rewrite_answer(
    text: &[u8],
    start: usize,
    place: Place,
    copied: &mut CopiedText<'_>,
) -> Result<(Meaning, usize), MalformedJson> {
    let (mut has_index, mut is_error, mut is_abort) = (false, false, false);
    let end = walk_members(text, start, |name, at| {
        if name.is("index") {
            has_index = true;
            return place.replace_index(text, at, copied);
        }
        if name.is("meta_info") && text.get(at) == Some(&b'{') {
            return walk_members(text, at, |name, at| {
                let value = JsonValue::at(text, at)?;
                is_abort |= name.is("finish_reason") && is_abort_reason(value)?;
                Ok(value.span().end)
            });
        }
        let end = end_of_value(text, at)?;
        is_error |= name.is("error") && text[at..end] != *b"null";
        Ok(end)
    })?;
    if is_error {
        return Ok((Meaning::Error, end));
    }
    if !has_index {
        let is_empty = text[start + 1..end - 1].trim_ascii().is_empty();
        copied.replace(end - 1..end - 1, if is_empty { b"\"index\":" } else { b",\"index\":" });
        copied.replace_by_number(end - 1..end - 1, place.copy as u64);
    }
    Ok((if is_abort { Meaning::Error } else { Meaning::Part }, end))
}

/// `{"type":"abort","message":…,"status_code":500}`
fn is_abort_reason(reason: JsonValue<'_>) -> Result<bool, MalformedJson> {
    Ok(reason.member("type")?.is_some_and(|kind| kind.raw() == b"\"abort\""))
}

/// A chunk of chat and completions.
fn rewrite_chunk(
    text: &[u8],
    start: usize,
    place: Place,
    response: &mut ResponseMembers,
    copied: &mut CopiedText<'_>,
) -> Result<(Meaning, usize), MalformedJson> {
    let (mut usage, mut has_choices, mut is_error, mut is_extension) = (None, false, false, false);
    let end = walk_members(text, start, |name, at| {
        if name.is("choices") && text.get(at) == Some(&b'[') {
            return walk_elements(text, at, |at| {
                has_choices = true;
                walk_members(text, at, |name, at| {
                    if name.is("index") {
                        return place.replace_index(text, at, copied);
                    }
                    end_of_value(text, at)
                })
            });
        }
        let end = end_of_value(text, at)?;
        if let Some(position) = ResponseMembers::NAMES.iter().position(|member| name.is(member)) {
            response.replace(position, text, at..end, copied);
        } else if name.is("usage") {
            usage = (text[at] == b'{').then_some(at..end);
        } else if name.is("error") {
            is_error = text[at..end] != *b"null";
        } else if name.is("sglext") {
            is_extension = true;
        }
        Ok(end)
    })?;
    let meaning = match usage {
        _ if is_error => Meaning::Error,
        // With choices it counts those, as `continuous_usage_stats` asks for.
        Some(usage) if !has_choices => Meaning::Usage(usage),
        _ if is_extension && !has_choices => Meaning::Extension,
        _ => Meaning::Part,
    };
    Ok((meaning, end))
}

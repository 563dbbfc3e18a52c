//! The prompt's logprobs: read from prefill's answer, spliced into decode's.
//!
//! Only prefill computes logprobs of the prompt. Decode's answer has the same lists, empty; a client gets
//! what a regular server answers once prefill's lists are put there. They are moved as raw text: every number
//! keeps its digits, and every other byte of decode's answer stays as it came.
//!
//! Whether an answer needs this, and how much of it may be held in memory, is for the caller to know.

mod echo;
mod generate;

use std::ops::Range;

use bytes::Bytes;

use super::json::{MalformedJson, skip_whitespace, trim_end};
use super::segments::{SegmentedBytes, Segments};
use super::sse::{EventTooLarge, Events, only_data};

/// Where the lists are, and how the two servers' lists become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merge {
    /// `/generate`: prefill's `meta_info.input_*` take the place of decode's.
    Generate,
    /// `/v1/completions` with `echo` and `logprobs`: prefill's lists, without the token that it made itself,
    /// come before decode's.
    Echo,
}

/// Prefill's lists, cut out of its answer.
pub(crate) struct PromptLogprobs {
    lists: Lists,
}

enum Lists {
    Generate(generate::Items),
    Echo(echo::Choices),
}

impl PromptLogprobs {
    /// Reads prefill's whole answer: one JSON text, or the events of a stream. The lists stay slices of it.
    pub(crate) fn read(merge: Merge, answer: &Bytes) -> Result<Self, MalformedJson> {
        let mut lists = match merge {
            Merge::Generate => Lists::Generate(generate::Items::default()),
            Merge::Echo => Lists::Echo(echo::Choices::default()),
        };
        match answer.get(skip_whitespace(answer, 0)) {
            Some(b'{' | b'[') => lists.read(answer)?,
            _ => lists.read_events(answer)?,
        }
        Ok(Self { lists })
    }

    /// Whether there is nothing to splice: decode's answer may pass as it is.
    pub(crate) fn is_empty(&self) -> bool {
        match &self.lists {
            Lists::Generate(items) => items.is_empty(),
            Lists::Echo(choices) => choices.is_empty(),
        }
    }

    /// Decode's answer with the lists in place, when it is one JSON text. What cannot be read comes back as
    /// it is.
    pub(crate) fn splice_body(&self, body: &Bytes) -> SegmentedBytes {
        let edits = match &self.lists {
            Lists::Generate(items) => items.edits_of_body(body),
            Lists::Echo(choices) => choices.edits(body).map(|found| found.edits),
        };
        let mut row = Segments::default();
        let mut spliced = Spliced::new(body, &mut row);
        spliced.apply(edits.unwrap_or_default(), 0);
        spliced.end_at(body.len());
        row.into()
    }

    /// A splicer for one stream of decode's, of which no event may be larger than `event_limit`.
    pub(crate) fn into_splicer(self, event_limit: usize) -> StreamSplicer {
        StreamSplicer { events: Events::new(event_limit), lists: self }
    }

    /// Puts the lists into one event of decode's stream, which begins at `start` of what is spliced. What cannot be
    /// read stays as it is.
    fn splice_event(&mut self, event: &[u8], start: usize, into: &mut Spliced<'_>) {
        let Some(data) = object_in(event) else { return };
        let text = &event[data.clone()];
        let edits = match &mut self.lists {
            Lists::Generate(items) => items.edits_of_event(text),
            Lists::Echo(choices) => choices.take_edits(text).unwrap_or_default(),
        };
        into.apply(edits, start + data.start);
    }
}

impl Lists {
    fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        match self {
            Self::Generate(items) => items.read(json),
            Self::Echo(choices) => choices.read(json),
        }
    }

    fn read_events(&mut self, answer: &Bytes) -> Result<(), MalformedJson> {
        let mut events = Events::new(usize::MAX);
        events.push(answer.clone());
        let mut any = false;
        while let Some(Ok(event)) = events.next() {
            any |= self.read_event(&event)?;
        }
        if let Some(unfinished) = events.take_rest() {
            any |= self.read_event(&unfinished)?;
        }
        if any { Ok(()) } else { Err(MalformedJson::new("neither JSON nor events with data")) }
    }

    /// Tells whether the event had data. Comments, which some servers send to keep a connection alive, have
    /// none.
    fn read_event(&mut self, event: &Bytes) -> Result<bool, MalformedJson> {
        let Some(data) = only_data(event) else {
            return Ok(false);
        };
        if event[data.clone()] != *b"[DONE]" {
            self.read(&event.slice(data))?;
        }
        Ok(true)
    }
}

/// Splices event by event, as the frames of decode's stream come in.
pub(crate) struct StreamSplicer {
    events: Events,
    lists: PromptLogprobs,
}

impl StreamSplicer {
    /// Takes the next bytes of decode's stream. [`Self::next`] tells what is complete by that.
    pub(crate) fn push(&mut self, frame: Bytes) {
        self.events.push(frame);
    }

    /// The next bytes for the client: all events that are complete, spliced, or whatever there is once nothing is
    /// left to splice. An error is final.
    pub(crate) fn next(&mut self) -> Option<Result<SegmentedBytes, EventTooLarge>> {
        if self.lists.is_empty() {
            return self.events.take_rest().map(|rest| Ok(rest.into()));
        }
        let mut row = Segments::default();
        if self.events.has_begun() {
            // This one lies in no frame.
            let event = match self.events.next()? {
                Ok(event) => event,
                Err(error) => return Some(Err(error)),
            };
            let mut spliced = Spliced::new(&event, &mut row);
            self.lists.splice_event(&event, 0, &mut spliced);
            spliced.end_at(event.len());
        }
        let frame = self.events.frame().clone();
        let mut spliced = Spliced::new(&frame, &mut row);
        let mut end = 0;
        while !self.lists.is_empty() {
            match self.events.next() {
                Some(Ok(event)) => {
                    self.lists.splice_event(&event, end, &mut spliced);
                    end += event.len();
                }
                // It comes again when it is all that there is.
                Some(Err(_)) if end > 0 || !spliced.row.is_empty() => break,
                Some(Err(error)) => return Some(Err(error)),
                None => break,
            }
        }
        spliced.end_at(end);
        (!row.is_empty()).then(|| Ok(row.into()))
    }

    /// At the end of decode's stream: what is left of an event that was never finished. It passes as it is.
    pub(crate) fn finish(&mut self) -> Option<Bytes> {
        let first = self.events.take_rest()?;
        match self.events.take_rest() {
            Some(second) => Some([&first[..], &second[..]].concat().into()),
            None => Some(first),
        }
    }
}

/// Where in the event a JSON object is that could be spliced. Its ends are enough to look at: a server that
/// sends `{` first and `}` last and no JSON in between gets its bytes relayed either way.
fn object_in(event: &[u8]) -> Option<Range<usize>> {
    let data = only_data(event)?;
    let text = trim_end(&event[data.clone()]);
    let start = skip_whitespace(text, 0);
    (text[start..].starts_with(b"{") && text.ends_with(b"}"))
        .then_some(data.start + start..data.start + text.len())
}

/// These bytes of a text become those.
#[derive(Clone, Debug)]
struct Edit {
    at: Range<usize>,
    with: Bytes,
}

/// A text with edits, as pieces: what is put in is shared, and so is what stays between two edits.
struct Spliced<'a> {
    text: &'a Bytes,
    /// The text up to here is in the row, or replaced.
    done: usize,
    row: &'a mut Segments,
}

impl<'a> Spliced<'a> {
    fn new(text: &'a Bytes, row: &'a mut Segments) -> Self {
        Self { text, done: 0, row }
    }

    /// Makes edits, which are in order, behind all earlier ones, and count from `base`.
    fn apply(&mut self, edits: Vec<Edit>, base: usize) {
        for Edit { at, with } in edits {
            self.row.push(self.text.slice(self.done..base + at.start));
            self.row.push(with);
            self.done = base + at.end;
        }
    }

    /// The text goes no further than this.
    fn end_at(self, end: usize) {
        self.row.push(self.text.slice(self.done..end));
    }
}

#[cfg(test)]
mod tests;

//! Prompt logprobs: read from prefill's response, spliced into decode's.
//!
//! Only prefill computes logprobs of the prompt (`input_*`, or the echoed tokens of a completion). Decode's
//! response has the same lists, empty; with prefill's lists in their place a client gets what a server that
//! is not disaggregated sends. The lists are moved as raw text: every number keeps its digits, and every
//! other byte of decode's response stays as it was.
//!
//! Whether a request needs a merge is decided in `shape`; how much of a response may be held in memory is
//! the caller's limit.

mod echo;
mod generate;
mod splicer;

use std::ops::Range;

use bytes::Bytes;

use self::splicer::SplicedText;
pub(crate) use self::splicer::StreamSplicer;
use super::json::{MalformedJson, skip_whitespace, trim_end};
use super::segments::{SegmentedBytes, Segments};
use super::sse::{EventSplitter, single_data_line};

/// Where the lists are, and how the two servers' lists are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merge {
    /// `/generate`: prefill's `meta_info.input_*` replace decode's.
    Generate,
    /// `/v1/completions` with `echo` and `logprobs`: prefill's lists, without the token that prefill itself
    /// generates, go before decode's.
    Echo,
}

/// Prefill's lists, as slices of its response.
pub(crate) struct PromptLogprobs {
    lists: Lists,
}

enum Lists {
    Generate(generate::ListsByItem),
    Echo(echo::PromptsByChoice),
}

impl PromptLogprobs {
    /// Reads prefill's whole response body: one JSON text, or the events of a stream. Nothing is copied.
    pub(crate) fn read(merge: Merge, body: &Bytes) -> Result<Self, MalformedJson> {
        let mut lists = match merge {
            Merge::Generate => Lists::Generate(generate::ListsByItem::default()),
            Merge::Echo => Lists::Echo(echo::PromptsByChoice::default()),
        };
        // By the first byte, not by the content type: no field name of an event starts with a bracket.
        match body.get(skip_whitespace(body, 0)) {
            Some(b'{' | b'[') => lists.read(body)?,
            _ => lists.read_events(body)?,
        }
        Ok(Self { lists })
    }

    /// Whether there is nothing to splice, so that decode's response can be relayed unread.
    pub(crate) fn is_empty(&self) -> bool {
        match &self.lists {
            Lists::Generate(items) => items.is_empty(),
            Lists::Echo(choices) => choices.is_empty(),
        }
    }

    /// Decode's response body with the lists in place, when it is one JSON text. One that is malformed is
    /// returned unchanged, so that the client sees what the server sent.
    pub(crate) fn splice_body(&self, body: &Bytes) -> SegmentedBytes {
        let insertions = match &self.lists {
            Lists::Generate(items) => items.insertions_in_body(body),
            Lists::Echo(choices) => choices.insertions(body).map(|found| found.insertions),
        };
        let mut segments = Segments::default();
        let mut spliced = SplicedText::new(body, &mut segments);
        spliced.apply(insertions.unwrap_or_default(), 0);
        spliced.finish(body.len());
        segments.into()
    }

    /// A splicer for one stream of decode's. An event larger than `event_limit` bytes is an error.
    pub(crate) fn into_splicer(self, event_limit: usize) -> StreamSplicer {
        StreamSplicer::new(self, event_limit)
    }

    /// Splices the lists into one event of decode's stream, which starts at offset `start` of `spliced`'s
    /// text. An event that is malformed stays as it is.
    fn splice_event(&mut self, event: &[u8], start: usize, spliced: &mut SplicedText<'_>) {
        let Some(object) = object_in_event(event) else { return };
        let text = &event[object.clone()];
        let insertions = match &mut self.lists {
            Lists::Generate(items) => items.insertions_in_event(text),
            Lists::Echo(choices) => choices.take_insertions(text).unwrap_or_default(),
        };
        spliced.apply(insertions, start + object.start);
    }
}

impl Lists {
    fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        match self {
            Self::Generate(items) => items.read(json),
            Self::Echo(choices) => choices.read(json),
        }
    }

    fn read_events(&mut self, stream: &Bytes) -> Result<(), MalformedJson> {
        // The whole stream is in memory already: a limit would save nothing.
        let mut events = EventSplitter::new(usize::MAX);
        events.push(stream.clone());
        let mut has_data = false;
        while let Some(Ok(event)) = events.next() {
            has_data |= self.read_event(&event)?;
        }
        // A server that is stopped may leave out the last blank line.
        if let Some(unfinished) = events.take_remaining() {
            has_data |= self.read_event(&unfinished)?;
        }
        if has_data { Ok(()) } else { Err(MalformedJson::new("neither JSON nor events with data")) }
    }

    /// Returns whether the event has data. Comments, which some servers send to keep a connection alive,
    /// have none.
    fn read_event(&mut self, event: &Bytes) -> Result<bool, MalformedJson> {
        let Some(data) = single_data_line(event) else {
            return Ok(false);
        };
        if event[data.clone()] != *b"[DONE]" {
            self.read(&event.slice(data))?;
        }
        Ok(true)
    }
}

/// The JSON object in an event, if its data is one. Only the object's ends are checked: data with `{` first
/// and `}` last that is malformed in between is relayed unchanged either way.
fn object_in_event(event: &[u8]) -> Option<Range<usize>> {
    let data = single_data_line(event)?;
    let text = trim_end(&event[data.clone()]);
    let start = skip_whitespace(text, 0);
    (text[start..].starts_with(b"{") && text.ends_with(b"}"))
        .then_some(data.start + start..data.start + text.len())
}

#[cfg(test)]
mod tests;

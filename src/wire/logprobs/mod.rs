//! What only prefill knows of a request, such as the prompt's logprobs: read from its response, spliced into
//! decode's.
//!
//! Only prefill computes logprobs of the prompt (`input_*`, or the echoed tokens of a completion) and the
//! experts that its tokens were routed to. Decode's response has them empty, in part, or not at all; with
//! prefill's in their place a client gets what a server that is not disaggregated sends. Values are moved as
//! raw text: every number keeps its digits, and every other byte of decode's response stays as it was.
//!
//! Whether a request needs a merge is decided in `shape`; how much of a response may be held in memory is
//! the caller's limit.

mod echo;
mod experts;
mod generate;
mod sglext;
mod splicer;

use std::ops::Range;

use bytes::Bytes;

pub(crate) use self::splicer::StreamSplicer;
use self::splicer::{Insertion, SplicedText};
use super::json::{MalformedJson, skip_whitespace, trim_end};
use super::segments::{SegmentedBytes, Segments};
use super::sse::{EventSplitter, single_data_line};

/// Where the lists are, and how the two servers' lists are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merge {
    /// `/generate`: prefill's values in `meta_info`.
    Generate,
    /// The same of a request for nothing but `routed_experts`, which a stream has in late events only.
    GenerateExperts,
    /// `/v1/completions` with `echo` and `logprobs`: prefill's lists, without the token that prefill itself
    /// generates, go before decode's. Also its `sglext.routed_experts`.
    Echo,
    /// Chat and completions: nothing but `sglext.routed_experts`, which a stream has in a late event only.
    Experts,
}

impl Merge {
    /// Whether a stream needs prefill's response for late events only.
    pub(crate) fn is_late(self) -> bool {
        matches!(self, Self::GenerateExperts | Self::Experts)
    }
}

/// Prefill's lists, as slices of its response.
pub(crate) struct PromptLogprobs {
    lists: Lists,
}

enum Lists {
    Generate(generate::ListsByItem),
    Echo(echo::PromptsByChoice, sglext::ResponseRows),
    Experts(sglext::ResponseRows),
}

impl PromptLogprobs {
    /// Reads prefill's whole response body: one JSON text, or the events of a stream. Nothing is copied.
    pub(crate) fn read(merge: Merge, body: &Bytes) -> Result<Self, MalformedJson> {
        let mut lists = match merge {
            Merge::Generate | Merge::GenerateExperts => Lists::Generate(generate::ListsByItem::default()),
            Merge::Echo => Lists::Echo(echo::PromptsByChoice::default(), sglext::ResponseRows::default()),
            Merge::Experts => Lists::Experts(sglext::ResponseRows::default()),
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
            Lists::Echo(choices, rows) => choices.is_empty() && rows.is_empty(),
            Lists::Experts(rows) => rows.is_empty(),
        }
    }

    /// Decode's response body with the lists in place, when it is one JSON text. One that is malformed is
    /// returned unchanged, so that the client sees what the server sent.
    pub(crate) fn splice_body(&self, body: &Bytes) -> SegmentedBytes {
        let insertions = match &self.lists {
            Lists::Generate(items) => items.insertions_in_body(body),
            Lists::Echo(choices, rows) => choices
                .insertions(body)
                .and_then(|found| Ok(in_order(found.insertions, rows.insertions(body)?))),
            Lists::Experts(rows) => rows.insertions(body),
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
            Lists::Echo(choices, rows) => in_order(
                choices.take_insertions(text).unwrap_or_default(),
                rows.take_insertions(text).unwrap_or_default(),
            ),
            Lists::Experts(rows) => rows.take_insertions(text).unwrap_or_default(),
        };
        spliced.apply(insertions, start + object.start);
    }
}

impl Lists {
    fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        match self {
            Self::Generate(items) => items.read(json),
            Self::Echo(choices, rows) => {
                choices.read(json)?;
                rows.read(json)
            }
            Self::Experts(rows) => rows.read(json),
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
        if let Self::Echo(_, rows) | Self::Experts(rows) = self {
            rows.end_stream();
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

/// Both insertions in the order of their places, as a text is spliced.
fn in_order(mut insertions: Vec<Insertion>, more: Vec<Insertion>) -> Vec<Insertion> {
    insertions.extend(more);
    // Stable: several at one place stay in their order.
    insertions.sort_by_key(|insertion| insertion.replaced.start);
    insertions
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

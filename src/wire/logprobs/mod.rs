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

use super::json::{Malformed, skip_whitespace, trim_end};
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
    pub(crate) fn read(merge: Merge, answer: &Bytes) -> Result<Self, Malformed> {
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
    pub(crate) fn splice_body(&self, body: &Bytes) -> Bytes {
        let edits = match &self.lists {
            Lists::Generate(items) => items.edits_of_body(body),
            Lists::Echo(choices) => choices.edits(body).map(|found| found.edits),
        };
        apply(edits.unwrap_or_default(), body, 0)
    }

    /// A splicer for one stream of decode's, of which no event may be larger than `event_limit`.
    pub(crate) fn into_splicer(self, event_limit: usize) -> StreamSplicer {
        StreamSplicer { events: Events::new(event_limit), lists: self }
    }

    /// One event of decode's stream with the lists in place. What cannot be read comes back as it is.
    fn splice_event(&mut self, event: &Bytes) -> Bytes {
        let Some(data) = object_in(event) else {
            return event.clone();
        };
        let text = &event[data.clone()];
        let edits = match &mut self.lists {
            Lists::Generate(items) => items.edits_of_event(text),
            Lists::Echo(choices) => choices.take_edits(text).unwrap_or_default(),
        };
        apply(edits, event, data.start)
    }
}

impl Lists {
    fn read(&mut self, json: &Bytes) -> Result<(), Malformed> {
        match self {
            Self::Generate(items) => items.read(json),
            Self::Echo(choices) => choices.read(json),
        }
    }

    fn read_events(&mut self, answer: &Bytes) -> Result<(), Malformed> {
        let mut events = Events::new(usize::MAX);
        events.push(answer.clone());
        let mut any = false;
        while let Some(Ok(event)) = events.next() {
            any |= self.read_event(&event)?;
        }
        if let Some(unfinished) = events.take_rest() {
            any |= self.read_event(&unfinished)?;
        }
        if any { Ok(()) } else { Err(Malformed::new("neither JSON nor events with data")) }
    }

    /// Tells whether the event had data. Comments, which some servers send to keep a connection alive, have
    /// none.
    fn read_event(&mut self, event: &Bytes) -> Result<bool, Malformed> {
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

    /// The next bytes for the client: a complete event, spliced, or whatever there is once nothing is left to
    /// splice. An error is final.
    pub(crate) fn next(&mut self) -> Option<Result<Bytes, EventTooLarge>> {
        if self.lists.is_empty() {
            return self.events.take_rest().map(Ok);
        }
        let event = self.events.next()?;
        Some(event.map(|event| self.lists.splice_event(&event)))
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

/// `text` after all edits, which are in order and count from `base`. Copies only if there are any.
fn apply(edits: Vec<Edit>, text: &Bytes, base: usize) -> Bytes {
    if edits.is_empty() {
        return text.clone();
    }
    let removed: usize = edits.iter().map(|edit| edit.at.len()).sum();
    let added: usize = edits.iter().map(|edit| edit.with.len()).sum();
    let mut edited = Vec::with_capacity(text.len() - removed + added);
    let mut kept = 0;
    for Edit { at, with } in edits {
        edited.extend_from_slice(&text[kept..base + at.start]);
        edited.extend_from_slice(&with);
        kept = base + at.end;
    }
    edited.extend_from_slice(&text[kept..]);
    edited.into()
}

#[cfg(test)]
mod tests;

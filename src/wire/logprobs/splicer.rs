//! Splicing lists into text without copying either.

use std::ops::Range;
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem;

use super::PromptLogprobs;
use crate::wire::segments::{SegmentedBytes, Segments};
use crate::wire::sse::{EventSplitter, EventTooLarge};

/// The name of what late events are held for. Within a string its quotes would have backslashes before them.
const LATE_NAME: &[u8] = b"\"routed_experts\"";
static LATE_NAME_FINDER: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(LATE_NAME));

/// Splices lists into decode's stream, event by event, as its frames arrive.
pub(crate) struct StreamSplicer {
    events: EventSplitter,
    state: State,
}

enum State {
    /// Events pass until there is one that the lists are needed for.
    NotNeeded,
    /// The lists are needed for this event.
    Needed(Bytes),
    Splicing(PromptLogprobs),
}

impl StreamSplicer {
    pub(super) fn new(lists: PromptLogprobs, event_limit: usize) -> Self {
        Self { events: EventSplitter::new(event_limit), state: State::Splicing(lists) }
    }

    /// A splicer for a [late merge](super::Merge::is_late), which gets its lists when they are needed.
    pub(crate) fn late(event_limit: usize) -> Self {
        Self { events: EventSplitter::new(event_limit), state: State::NotNeeded }
    }

    /// Whether the lists are needed now, and nothing can be passed on without them.
    pub(crate) fn needs_lists(&self) -> bool {
        matches!(self.state, State::Needed(_))
    }

    /// Supplies the lists. Returns the event that has waited for them.
    pub(crate) fn supply(&mut self, mut lists: PromptLogprobs) -> SegmentedBytes {
        let mut segments = Segments::default();
        if let State::Needed(event) = &self.state {
            let mut spliced = SplicedText::new(event, &mut segments);
            lists.splice_event(event, 0, &mut spliced);
            spliced.finish(event.len());
        }
        self.state = State::Splicing(lists);
        segments.into()
    }

    /// Appends the next bytes of decode's stream. [`Self::next`] returns the events that they complete.
    pub(crate) fn push(&mut self, frame: Bytes) {
        self.events.push(frame);
    }

    /// The next bytes for the client: all events that are complete, spliced, or everything that has arrived
    /// once there is nothing left to splice. An error is final.
    ///
    /// Events of one frame are returned together, so that they leave in one write.
    pub(crate) fn next(&mut self) -> Option<Result<SegmentedBytes, EventTooLarge>> {
        let lists = match &mut self.state {
            State::Splicing(lists) => lists,
            State::NotNeeded => return self.next_before_late(),
            State::Needed(_) => return None,
        };
        if lists.is_empty() {
            return self.events.take_remaining().map(|rest| Ok(rest.into()));
        }
        let mut segments = Segments::default();
        if self.events.has_partial_event() {
            // Joined from several frames, so this event is no slice of the current one.
            let event = match self.events.next()? {
                Ok(event) => event,
                Err(error) => return Some(Err(error)),
            };
            let mut spliced = SplicedText::new(&event, &mut segments);
            lists.splice_event(&event, 0, &mut spliced);
            spliced.finish(event.len());
        }
        // The frame's other events are spliced as one text: what lies between two lists is one segment,
        // however many events it spans.
        let frame = self.events.unread_frame().clone();
        let mut spliced = SplicedText::new(&frame, &mut segments);
        let mut end = 0;
        while !lists.is_empty() {
            match self.events.next() {
                Some(Ok(event)) => {
                    lists.splice_event(&event, end, &mut spliced);
                    end += event.len();
                }
                // First the complete events; the next call returns the error again.
                Some(Err(_)) if end > 0 || !spliced.segments.is_empty() => break,
                Some(Err(error)) => return Some(Err(error)),
                None => break,
            }
        }
        spliced.finish(end);
        (!segments.is_empty()).then(|| Ok(segments.into()))
    }

    /// The events of a frame up to the first that the lists are needed for.
    fn next_before_late(&mut self) -> Option<Result<SegmentedBytes, EventTooLarge>> {
        let mut segments = Segments::default();
        loop {
            match self.events.next() {
                Some(Ok(event)) if LATE_NAME_FINDER.find(&event).is_some() => {
                    self.state = State::Needed(event);
                    break;
                }
                // The usual frame is one event, which is passed on as it is.
                Some(Ok(event)) if segments.is_empty() && self.events.unread_frame().is_empty() => {
                    return Some(Ok(event.into()));
                }
                Some(Ok(event)) => segments.push(event),
                // First the complete events; the next call returns the error again.
                Some(Err(error)) if segments.is_empty() => return Some(Err(error)),
                Some(Err(_)) | None => break,
            }
        }
        (!segments.is_empty()).then(|| Ok(segments.into()))
    }

    /// At the end of decode's stream: an event that was not completed, unchanged.
    pub(crate) fn finish(&mut self) -> Option<Bytes> {
        let first = self.events.take_remaining()?;
        match self.events.take_remaining() {
            Some(second) => Some([&first[..], &second[..]].concat().into()),
            None => Some(first),
        }
    }
}

/// A list to be inserted into a text, in place of `replaced`, which may be empty.
#[derive(Clone, Debug)]
pub(super) struct Insertion {
    pub(super) replaced: Range<usize>,
    pub(super) list: Bytes,
}

/// A text with insertions, as segments: the lists are shared, and so is the text between two of them.
pub(super) struct SplicedText<'a> {
    text: &'a Bytes,
    /// The text before this offset is in the segments, or replaced.
    done: usize,
    segments: &'a mut Segments,
}

impl<'a> SplicedText<'a> {
    pub(super) fn new(text: &'a Bytes, segments: &'a mut Segments) -> Self {
        Self { text, done: 0, segments }
    }

    /// Applies insertions whose offsets count from `base`. They must be in order and after all earlier ones.
    pub(super) fn apply(&mut self, insertions: Vec<Insertion>, base: usize) {
        for Insertion { replaced, list } in insertions {
            self.segments.push(self.text.slice(self.done..base + replaced.start));
            self.segments.push(list);
            self.done = base + replaced.end;
        }
    }

    /// Appends the rest of the text up to `end`.
    pub(super) fn finish(self, end: usize) {
        self.segments.push(self.text.slice(self.done..end));
    }
}

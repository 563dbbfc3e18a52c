//! Splicing lists into text without copying either.

use std::ops::Range;

use bytes::Bytes;

use super::PromptLogprobs;
use crate::wire::segments::{SegmentedBytes, Segments};
use crate::wire::sse::{EventSplitter, EventTooLarge};

/// Splices lists into decode's stream, event by event, as its frames arrive.
pub(crate) struct StreamSplicer {
    events: EventSplitter,
    lists: PromptLogprobs,
}

impl StreamSplicer {
    pub(super) fn new(lists: PromptLogprobs, event_limit: usize) -> Self {
        Self { events: EventSplitter::new(event_limit), lists }
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
        if self.lists.is_empty() {
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
            self.lists.splice_event(&event, 0, &mut spliced);
            spliced.finish(event.len());
        }
        // The frame's other events are spliced as one text: what lies between two lists is one segment,
        // however many events it spans.
        let frame = self.events.unread_frame().clone();
        let mut spliced = SplicedText::new(&frame, &mut segments);
        let mut end = 0;
        while !self.lists.is_empty() {
            match self.events.next() {
                Some(Ok(event)) => {
                    self.lists.splice_event(&event, end, &mut spliced);
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

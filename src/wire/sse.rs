//! Server-sent events: where one ends and the next starts.
//!
//! Events are returned as they were sent, blank line included. What an event means is not this module's
//! business.

use std::fmt;
use std::mem;
use std::ops::Range;

use bytes::Bytes;

/// Splits a stream into events, wherever its frames begin and end.
///
/// Lines end with LF, CR LF or CR, and a blank line ends an event (WHATWG HTML, section 9.2.5). So an event
/// ends with the first LF LF, LF CR LF or CR CR, and each of these can be spread over several frames.
pub(crate) struct EventSplitter {
    /// The start of an incomplete event, from earlier frames.
    partial: Vec<u8>,
    /// What is unread of the latest frame.
    frame: Bytes,
    /// How much of `frame` was searched. No byte is searched twice, so that an event of many small frames
    /// takes linear time.
    searched: usize,
    ends: EventEnds,
    limit: usize,
}

/// Finds the ends of events in a stream that is searched piece by piece, no byte twice.
#[derive(Debug)]
pub(crate) struct EventEnds {
    line_end: LineEnd,
}

/// The line end that the searched bytes end with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum LineEnd {
    None,
    Lf,
    LfCr,
    Cr,
}

impl EventEnds {
    pub(crate) const fn new() -> Self {
        Self { line_end: LineEnd::None }
    }

    /// How many of the stream's next bytes belong to the current event, if it ends within them.
    pub(crate) fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut searched = 0;
        while searched < bytes.len() {
            // Behind a line end the next byte decides, else only a line end matters.
            if self.line_end == LineEnd::None {
                searched += memchr::memchr2(b'\n', b'\r', &bytes[searched..])?;
            }
            let byte = bytes[searched];
            searched += 1;
            self.line_end = match (self.line_end, byte) {
                (LineEnd::Lf | LineEnd::LfCr, b'\n') | (LineEnd::Cr | LineEnd::LfCr, b'\r') => {
                    self.line_end = LineEnd::None;
                    return Some(searched);
                }
                // Also after CR: CR LF is one line end, not two.
                (_, b'\n') => LineEnd::Lf,
                (LineEnd::Lf, b'\r') => LineEnd::LfCr,
                (_, b'\r') => LineEnd::Cr,
                _ => LineEnd::None,
            };
        }
        None
    }
}

/// An event is larger than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventTooLarge {
    /// The limit in bytes.
    pub(crate) limit: usize,
}

impl fmt::Display for EventTooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a server-sent event is larger than {} bytes", self.limit)
    }
}

impl std::error::Error for EventTooLarge {}

impl EventSplitter {
    /// A splitter for events of at most `limit` bytes each.
    pub(crate) fn new(limit: usize) -> Self {
        Self { partial: Vec::new(), frame: Bytes::new(), searched: 0, ends: EventEnds::new(), limit }
    }

    /// Appends the next bytes of the stream. [`Self::next`] returns the events in them.
    pub(crate) fn push(&mut self, frame: Bytes) {
        if !self.frame.is_empty() {
            // The caller did not read all events of the last frame. The relay always does.
            self.frame = [&self.frame[..], &frame[..]].concat().into();
        } else {
            self.frame = frame;
        }
    }

    /// Whether the next event starts in an earlier frame than it ends in.
    pub(crate) fn has_partial_event(&self) -> bool {
        !self.partial.is_empty()
    }

    /// What is unread of the latest frame. Without a [partial event](Self::has_partial_event), its first
    /// byte is the next event's.
    pub(crate) fn unread_frame(&self) -> &Bytes {
        &self.frame
    }

    /// The next complete event with its blank line: a slice of the frame if it lies within one.
    ///
    /// After an error there are no more events, only the same error again; [`Self::take_remaining`] returns
    /// the bytes.
    pub(crate) fn next(&mut self) -> Option<Result<Bytes, EventTooLarge>> {
        let is_complete = self.find_end();
        // Before anything is taken, so that the next call comes to the same error.
        if self.partial.len() + self.searched > self.limit {
            return Some(Err(EventTooLarge { limit: self.limit }));
        }
        let last_part = self.frame.split_to(mem::take(&mut self.searched));
        if self.partial.is_empty() && is_complete {
            return Some(Ok(last_part));
        }
        self.partial.extend_from_slice(&last_part);
        is_complete.then(|| Ok(mem::take(&mut self.partial).into()))
    }

    /// Takes the bytes that no event was returned of, in at most two calls.
    pub(crate) fn take_remaining(&mut self) -> Option<Bytes> {
        self.searched = 0;
        self.ends = EventEnds::new();
        let partial = Bytes::from(mem::take(&mut self.partial));
        // In two parts instead of a copy of both: a stream with nothing left to splice comes this way.
        let rest = if partial.is_empty() { mem::take(&mut self.frame) } else { partial };
        (!rest.is_empty()).then_some(rest)
    }

    /// Continues the last search, up to the event's end or the frame's. Returns whether the event ends.
    fn find_end(&mut self) -> bool {
        let end = self.ends.find(&self.frame[self.searched..]);
        self.searched = end.map_or(self.frame.len(), |length| self.searched + length);
        end.is_some()
    }
}

/// The data of an event that is a single `data:` line and nothing else: all that SGLang sends on the routes
/// whose events are read here (other fields and comments only occur on `/v1/messages` and `/v1/responses`).
pub(crate) fn single_data_line(event: &[u8]) -> Option<Range<usize>> {
    let is_line_end = |&byte: &u8| matches!(byte, b'\n' | b'\r');
    // An event before that ended with CR CR may have left the LF of a CR LF.
    let line = event.iter().position(|byte| !is_line_end(byte))?;
    let data = line + event[line..].strip_prefix(b"data:").map(|_| b"data:".len())?;
    let end = memchr::memchr2(b'\n', b'\r', &event[data..]).map_or(event.len(), |length| data + length);
    // One space after the colon is not part of the data (WHATWG HTML, section 9.2.6).
    let start = if event[data..end].starts_with(b" ") { data + 1 } else { data };
    event[end..].iter().all(is_line_end).then_some(start..end)
}

/// The same of an event whose type may stand before the data, as on `/v1/messages` and `/v1/responses`.
pub(crate) fn data_line_of_type(event: &[u8]) -> Option<Range<usize>> {
    let line = event.iter().position(|byte| !matches!(byte, b'\n' | b'\r'))?;
    if !event[line..].starts_with(b"event:") {
        return single_data_line(event);
    }
    let data = line + memchr::memchr2(b'\n', b'\r', &event[line..])?;
    single_data_line(&event[data..]).map(|range| data + range.start..data + range.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All events of a stream that arrives in these frames, and the remaining bytes.
    fn split<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Bytes>, Vec<u8>) {
        let mut events = EventSplitter::new(usize::MAX);
        let mut complete = Vec::new();
        for frame in frames {
            events.push(Bytes::copy_from_slice(frame));
            while let Some(event) = events.next() {
                complete.push(event.unwrap());
            }
        }
        let rest = [events.take_remaining(), events.take_remaining()];
        (complete, rest.into_iter().flatten().collect::<Vec<_>>().concat())
    }

    #[test]
    fn a_blank_line_ends_an_event_with_any_kind_of_line_end() {
        for end in ["\n\n", "\r\n\r\n", "\r\r", "\n\r\n", "\r\n\n"] {
            let stream = format!("data: a{end}: comment{end}event: b\ndata: c{end}data: [DO");
            let (events, rest) = split([stream.as_bytes()]);
            let expected = ["data: a", ": comment", "event: b\ndata: c"].map(|event| format!("{event}{end}"));
            assert_eq!(events, expected, "{end:?}");
            assert_eq!(rest, b"data: [DO");
        }
    }

    #[test]
    fn a_single_line_end_does_not_end_an_event() {
        for end in ["\n", "\r\n", "\r"] {
            let stream = format!("event: a{end}data: b{end}");
            assert_eq!(split([stream.as_bytes()]), (vec![], stream.into_bytes()));
        }
    }

    #[test]
    fn an_event_within_one_frame_is_a_slice_of_it() {
        let frame = Bytes::from_static(b"data: a\n\ndata: b\n\ndata: c");
        let mut events = EventSplitter::new(usize::MAX);
        events.push(frame.clone());
        assert_eq!(events.next().unwrap().unwrap().as_ptr(), frame.as_ptr());
        assert_eq!(events.next().unwrap().unwrap().as_ptr(), frame[9..].as_ptr());
        assert!(events.next().is_none());
    }

    #[test]
    fn several_frames_may_be_pushed_before_events_are_read() {
        let mut events = EventSplitter::new(usize::MAX);
        for frame in ["data: a\n\nda", "ta: b\n", "\ndata: c\n\n"] {
            events.push(Bytes::from(frame));
        }
        let all: Vec<_> = std::iter::from_fn(|| events.next()).map(Result::unwrap).collect();
        assert_eq!(all, ["data: a\n\n", "data: b\n\n", "data: c\n\n"]);
    }

    #[test]
    fn an_event_of_many_small_frames_takes_linear_time() {
        // 1 MB in frames of one byte: searching from the start for each frame would compare 500 billion
        // bytes. This takes 0.1 s in a debug build; copying the event for each frame took 50 s.
        let start = std::time::Instant::now();
        let event = ["data: ".as_bytes(), &[b'x'; 1_000_000], b"\n\n"].concat();
        let (events, rest) = split(event.chunks(1));
        assert_eq!(events, [event]);
        assert_eq!(rest, b"");
        assert!(start.elapsed().as_secs() < 10);
    }

    #[test]
    fn an_event_over_the_limit_is_an_error_in_frames_of_any_size() {
        let stream = b"data: ok\n\ndata: larger\n\n";
        for size in 1..=stream.len() {
            let mut events = EventSplitter::new(10);
            let mut all = Vec::new();
            for frame in stream.chunks(size) {
                events.push(Bytes::copy_from_slice(frame));
                while let Some(Ok(event)) = events.next() {
                    all.push(event);
                }
            }
            assert_eq!(all, ["data: ok\n\n"]);
            assert_eq!(events.next(), Some(Err(EventTooLarge { limit: 10 })), "frames of {size}");
            let rest = [events.take_remaining(), events.take_remaining()]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .concat();
            assert_eq!(rest, b"data: larger\n\n");
        }
    }

    #[test]
    fn an_event_of_exactly_the_limit_is_accepted() {
        let mut events = EventSplitter::new(10);
        events.push(Bytes::from_static(b"data: ok\n\n"));
        assert_eq!(events.next(), Some(Ok(Bytes::from_static(b"data: ok\n\n"))));
    }

    #[test]
    fn single_data_line_ignores_events_with_anything_else() {
        let data = |event: &'static str| single_data_line(event.as_bytes()).map(|data| &event[data]);
        assert_eq!(data("data: {}\n\n"), Some("{}"));
        assert_eq!(data("data:{}\r\n\r\n"), Some("{}"));
        assert_eq!(data("\ndata:  {}\r\r"), Some(" {}"));
        assert_eq!(data("data: [DONE]"), Some("[DONE]"));
        assert_eq!(data("data:\n\n"), Some(""));
        let others = [
            "",
            "\n\n",
            ": {}\n\n",
            "data\n\n",
            "data: {\ndata: }\n\n",
            "event: e\ndata: {}\n\n",
            "data: {}\nid: 1\n\n",
        ];
        for other in others {
            assert_eq!(data(other), None, "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn frame_boundaries_do_not_change_the_events(
            stream in "(data|[\n\r]|\r\n|\n\n){0,30}",
            sizes in prop::collection::vec(1_usize..9, 0..40),
        ) {
            let whole = split([stream.as_bytes()]);
            let mut rest = stream.as_bytes();
            let mut frames = Vec::new();
            for size in sizes {
                let (frame, others) = rest.split_at(size.min(rest.len()));
                frames.push(frame);
                rest = others;
            }
            frames.push(rest);
            prop_assert_eq!(&split(frames), &whole);
            prop_assert_eq!(&split(stream.as_bytes().chunks(1)), &whole);
            let (events, rest) = whole;
            prop_assert_eq!([events.concat(), rest].concat(), stream.as_bytes());
            for event in events {
                let text = std::str::from_utf8(&event).unwrap();
                let end = |end: &str| text.find(end).map(|at| at + end.len());
                let ends = ["\n\n", "\n\r\n", "\r\r"].map(end);
                prop_assert_eq!(ends.into_iter().flatten().min(), Some(event.len()));
            }
        }
    }
}

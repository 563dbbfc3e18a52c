//! Server-sent events: where one ends and the next begins.
//!
//! The bytes of an event are handed on as they came, blank line included. What an event means is not known
//! here.

use std::fmt;
use std::mem;
use std::ops::Range;

use bytes::Bytes;

/// Cuts a stream of frames into events, wherever the frames were cut.
///
/// Lines end with LF, CR LF or CR, and a blank line ends an event (WHATWG HTML, section 9.2.5). So an event
/// ends with the first LF LF, LF CR LF or CR CR, and each of these can be spread over frames.
pub(crate) struct Events {
    /// The start of an event whose end is not there yet: what came in earlier frames.
    begun: Vec<u8>,
    /// What is left of the latest frame.
    frame: Bytes,
    /// How much of `frame` was searched. No byte is looked at twice, so small frames do not cost more.
    searched: usize,
    line_end: LineEnd,
    limit: usize,
}

/// The line end that the searched bytes end with.
#[derive(Clone, Copy, PartialEq)]
enum LineEnd {
    None,
    Lf,
    LfCr,
    Cr,
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

impl Events {
    /// Events of at most `limit` bytes each.
    pub(crate) fn new(limit: usize) -> Self {
        Self { begun: Vec::new(), frame: Bytes::new(), searched: 0, line_end: LineEnd::None, limit }
    }

    /// Takes the next bytes of the stream. [`Self::next`] tells the events in them.
    pub(crate) fn push(&mut self, frame: Bytes) {
        if !self.frame.is_empty() {
            // The caller did not ask for all events of the last frame.
            self.frame = [&self.frame[..], &frame[..]].concat().into();
        } else {
            self.frame = frame;
        }
    }

    /// Whether the next event began in an earlier frame than its end will be in.
    pub(crate) fn has_begun(&self) -> bool {
        !self.begun.is_empty()
    }

    /// What is left of the latest frame. If nothing [has begun](Self::has_begun), its events follow one another from
    /// its first byte on.
    pub(crate) fn frame(&self) -> &Bytes {
        &self.frame
    }

    /// The next complete event, its blank line included: a slice of the frame when it lies within one.
    ///
    /// After an error there are no more events, only that error again; [`Self::take_rest`] has the bytes.
    pub(crate) fn next(&mut self) -> Option<Result<Bytes, EventTooLarge>> {
        let end = self.find_end();
        if self.begun.len() + self.searched > self.limit {
            return Some(Err(EventTooLarge { limit: self.limit }));
        }
        let last_part = self.frame.split_to(mem::take(&mut self.searched));
        if self.begun.is_empty() && end {
            return Some(Ok(last_part));
        }
        self.begun.extend_from_slice(&last_part);
        end.then(|| Ok(mem::take(&mut self.begun).into()))
    }

    /// All bytes that no event was made of so far, in at most two parts.
    pub(crate) fn take_rest(&mut self) -> Option<Bytes> {
        self.searched = 0;
        self.line_end = LineEnd::None;
        let begun = Bytes::from(mem::take(&mut self.begun));
        let rest = if begun.is_empty() { mem::take(&mut self.frame) } else { begun };
        (!rest.is_empty()).then_some(rest)
    }

    /// Searches on from where the last search stopped: behind the event's end, or behind the frame.
    fn find_end(&mut self) -> bool {
        while self.searched < self.frame.len() {
            if self.line_end == LineEnd::None {
                let Some(offset) = memchr::memchr2(b'\n', b'\r', &self.frame[self.searched..]) else {
                    self.searched = self.frame.len();
                    return false;
                };
                self.searched += offset;
            }
            let byte = self.frame[self.searched];
            self.searched += 1;
            self.line_end = match (self.line_end, byte) {
                (LineEnd::Lf | LineEnd::LfCr, b'\n') | (LineEnd::Cr | LineEnd::LfCr, b'\r') => {
                    self.line_end = LineEnd::None;
                    return true;
                }
                (_, b'\n') => LineEnd::Lf,
                (LineEnd::Lf, b'\r') => LineEnd::LfCr,
                (_, b'\r') => LineEnd::Cr,
                _ => LineEnd::None,
            };
        }
        false
    }
}

/// Where in the event its data is, if the event is one `data:` line and nothing else.
pub(crate) fn only_data(event: &[u8]) -> Option<Range<usize>> {
    let is_line_end = |&byte: &u8| matches!(byte, b'\n' | b'\r');
    // The LF of a CR LF may be left over from the event before.
    let line = event.iter().position(|byte| !is_line_end(byte))?;
    let data = line + event[line..].strip_prefix(b"data:").map(|_| b"data:".len())?;
    let end = memchr::memchr2(b'\n', b'\r', &event[data..]).map_or(event.len(), |length| data + length);
    let start = if event[data..end].starts_with(b" ") { data + 1 } else { data };
    event[end..].iter().all(is_line_end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All events of a stream that comes in these pieces, and what is left.
    fn split<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Bytes>, Vec<u8>) {
        let mut events = Events::new(usize::MAX);
        let mut complete = Vec::new();
        for piece in pieces {
            events.push(Bytes::copy_from_slice(piece));
            while let Some(event) = events.next() {
                complete.push(event.unwrap());
            }
        }
        let rest = [events.take_rest(), events.take_rest()];
        (complete, rest.into_iter().flatten().collect::<Vec<_>>().concat())
    }

    #[test]
    fn a_blank_line_ends_an_event_whatever_its_line_ends_are() {
        for end in ["\n\n", "\r\n\r\n", "\r\r", "\n\r\n", "\r\n\n"] {
            let stream = format!("data: a{end}: comment{end}event: b\ndata: c{end}data: [DO");
            let (events, rest) = split([stream.as_bytes()]);
            let expected = ["data: a", ": comment", "event: b\ndata: c"].map(|event| format!("{event}{end}"));
            assert_eq!(events, expected, "{end:?}");
            assert_eq!(rest, b"data: [DO");
        }
    }

    #[test]
    fn a_single_line_end_ends_no_event() {
        for end in ["\n", "\r\n", "\r"] {
            let stream = format!("event: a{end}data: b{end}");
            assert_eq!(split([stream.as_bytes()]), (vec![], stream.into_bytes()));
        }
    }

    #[test]
    fn an_event_within_one_frame_is_a_slice_of_it() {
        let frame = Bytes::from_static(b"data: a\n\ndata: b\n\ndata: c");
        let mut events = Events::new(usize::MAX);
        events.push(frame.clone());
        assert_eq!(events.next().unwrap().unwrap().as_ptr(), frame.as_ptr());
        assert_eq!(events.next().unwrap().unwrap().as_ptr(), frame[9..].as_ptr());
        assert!(events.next().is_none());
    }

    #[test]
    fn frames_may_be_given_faster_than_events_are_asked_for() {
        let mut events = Events::new(usize::MAX);
        for frame in ["data: a\n\nda", "ta: b\n", "\ndata: c\n\n"] {
            events.push(Bytes::from(frame));
        }
        let all: Vec<_> = std::iter::from_fn(|| events.next()).map(Result::unwrap).collect();
        assert_eq!(all, ["data: a\n\n", "data: b\n\n", "data: c\n\n"]);
    }

    #[test]
    fn an_event_of_many_small_frames_takes_linear_time() {
        // 1 MB byte by byte: looking at every byte anew for each frame would be 500 billion looks. This takes
        // 0.1 s in a debug build; copying anew for each frame took 50 s.
        let start = std::time::Instant::now();
        let event = ["data: ".as_bytes(), &[b'x'; 1_000_000], b"\n\n"].concat();
        let (events, rest) = split(event.chunks(1));
        assert_eq!(events, [event]);
        assert_eq!(rest, b"");
        assert!(start.elapsed().as_secs() < 10);
    }

    #[test]
    fn an_event_larger_than_the_limit_is_an_error_wherever_it_is_cut() {
        let stream = b"data: ok\n\ndata: larger\n\n";
        for size in 1..=stream.len() {
            let mut events = Events::new(10);
            let mut all = Vec::new();
            for piece in stream.chunks(size) {
                events.push(Bytes::copy_from_slice(piece));
                while let Some(Ok(event)) = events.next() {
                    all.push(event);
                }
            }
            assert_eq!(all, ["data: ok\n\n"]);
            assert_eq!(events.next(), Some(Err(EventTooLarge { limit: 10 })), "pieces of {size}");
            let rest =
                [events.take_rest(), events.take_rest()].into_iter().flatten().collect::<Vec<_>>().concat();
            assert_eq!(rest, b"data: larger\n\n");
        }
    }

    #[test]
    fn an_event_as_large_as_the_limit_passes() {
        let mut events = Events::new(10);
        events.push(Bytes::from_static(b"data: ok\n\n"));
        assert_eq!(events.next(), Some(Ok(Bytes::from_static(b"data: ok\n\n"))));
    }

    #[test]
    fn data_is_told_only_if_it_is_all_there_is() {
        let data = |event: &'static str| only_data(event.as_bytes()).map(|data| &event[data]);
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
        fn cuts_change_nothing(
            stream in "(data|[\n\r]|\r\n|\n\n){0,30}",
            sizes in prop::collection::vec(1_usize..9, 0..40),
        ) {
            let whole = split([stream.as_bytes()]);
            let mut rest = stream.as_bytes();
            let mut pieces = Vec::new();
            for size in sizes {
                let (piece, others) = rest.split_at(size.min(rest.len()));
                pieces.push(piece);
                rest = others;
            }
            pieces.push(rest);
            prop_assert_eq!(&split(pieces), &whole);
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

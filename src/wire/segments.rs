//! Body bytes that are sent together without having been joined.
//!
//! Prefill's lists go into every event of a merged stream. As segments they are shared by all events and
//! never copied. Where the segments come from is decided in `logprobs`.

use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// A part of a response body, in one or more segments.
///
/// As large as [`Bytes`] alone, by boxing the rare case: each frame is moved several times on its way to
/// the client's connection.
#[derive(Debug)]
pub(crate) enum SegmentedBytes {
    One(Bytes),
    Many(Box<Segments>),
}

/// Byte slices in order, none of them empty.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    slices: Vec<Bytes>,
    /// How many of the slices are consumed.
    consumed: usize,
    /// The bytes of the others.
    remaining: usize,
}

impl Segments {
    pub(crate) fn is_empty(&self) -> bool {
        self.remaining == 0
    }

    pub(crate) fn push(&mut self, slice: Bytes) {
        // `Buf::chunk` must not return an empty slice while bytes remain.
        if !slice.is_empty() {
            self.remaining += slice.len();
            self.slices.push(slice);
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.remaining -= count;
        while count > 0 {
            let slice = &mut self.slices[self.consumed];
            if count < slice.len() {
                return slice.advance(count);
            }
            count -= slice.len();
            // Releases the memory of what was sent, even if the rest waits for a slow client.
            *slice = Bytes::new();
            self.consumed += 1;
        }
    }
}

impl SegmentedBytes {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(bytes) => bytes.len(),
            Self::Many(segments) => segments.remaining,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the last segment ends with these bytes. Lists are inserted within an event, so the blank line
    /// that ends the event is never spread over two segments.
    pub(crate) fn ends_with(&self, end: &[u8]) -> bool {
        match self {
            Self::One(bytes) => bytes.ends_with(end),
            Self::Many(segments) => segments.slices.last().is_some_and(|last| last.ends_with(end)),
        }
    }

    /// The segments, in order.
    pub(crate) fn slices(&self) -> &[Bytes] {
        match self {
            Self::One(bytes) => std::slice::from_ref(bytes),
            Self::Many(segments) => &segments.slices[segments.consumed..],
        }
    }

    /// The bytes joined.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn into_bytes(self) -> Bytes {
        match self {
            Self::One(bytes) => bytes,
            Self::Many(_) => self.slices().concat().into(),
        }
    }
}

impl Default for SegmentedBytes {
    fn default() -> Self {
        Self::One(Bytes::new())
    }
}

impl From<Bytes> for SegmentedBytes {
    fn from(bytes: Bytes) -> Self {
        Self::One(bytes)
    }
}

impl From<Segments> for SegmentedBytes {
    fn from(mut segments: Segments) -> Self {
        match segments.slices.len() {
            0 | 1 => Self::One(segments.slices.pop().unwrap_or_default()),
            _ => Self::Many(Box::new(segments)),
        }
    }
}

impl Buf for SegmentedBytes {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::One(bytes) => bytes,
            // Empty only once all slices are consumed.
            Self::Many(segments) => segments.slices.get(segments.consumed).map_or(&[], |slice| slice),
        }
    }

    // The default returns the first slice only, and each further one would be a system call.
    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::One(bytes) => bytes.chunks_vectored(slices),
            Self::Many(segments) => {
                let unsent = &segments.slices[segments.consumed..];
                for (slice, bytes) in slices.iter_mut().zip(unsent) {
                    *slice = IoSlice::new(bytes);
                }
                slices.len().min(unsent.len())
            }
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::One(bytes) => bytes.advance(count),
            Self::Many(segments) => segments.advance(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segmented(slices: &[&'static str]) -> SegmentedBytes {
        let mut segments = Segments::default();
        slices.iter().for_each(|slice| segments.push(Bytes::from_static(slice.as_bytes())));
        segments.into()
    }

    #[test]
    fn segments_read_as_one_buffer_in_steps_of_any_size() {
        for step in 1..=7 {
            let mut bytes = segmented(&["ab", "", "c", "defg"]);
            let mut read = Vec::new();
            while bytes.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 2];
                let count = bytes.chunks_vectored(&mut slices);
                let visible = slices[..count].iter().flat_map(|slice| slice.iter().copied());
                assert_eq!(slices[0][..], *bytes.chunk());
                let read_now: Vec<u8> = visible.take(step).collect();
                read.extend_from_slice(&read_now);
                bytes.advance(read_now.len());
                assert_eq!(read.len() + bytes.remaining(), 7);
            }
            assert_eq!(read, b"abcdefg");
            assert_eq!(bytes.chunk(), b"");
        }
        assert_eq!(segmented(&["ab", "c"]).into_bytes(), "abc");
    }

    #[test]
    fn a_single_segment_is_not_boxed() {
        assert!(matches!(segmented(&["", "a", ""]), SegmentedBytes::One(one) if one == "a"));
        assert!(segmented(&[""]).is_empty());
        assert_eq!(size_of::<SegmentedBytes>(), size_of::<Bytes>());
    }

    #[test]
    fn ends_with_looks_at_the_last_segment() {
        assert!(segmented(&["a", "b\n\n"]).ends_with(b"\n\n"));
        assert!(!segmented(&["a\n\n", "b"]).ends_with(b"\n\n"));
    }
}

//! Bytes that go out together without having been put together.
//!
//! What is put into many answers is shared by all of them: prefill's lists, of which
//! every event of a stream has a copy, are never copied. Where the pieces come from
//! is not known here.

use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// A part of an answer's body. It is as large as [`Bytes`], as hyper moves each several times.
#[derive(Debug)]
pub(crate) enum SegmentedBytes {
    One(Bytes),
    Many(Box<Segments>),
}

/// Pieces in order, none of them empty.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    pieces: Vec<Bytes>,
    /// How many of them are gone.
    gone: usize,
    /// Bytes of the others, all in all.
    left: usize,
}

impl Segments {
    pub(crate) fn is_empty(&self) -> bool {
        self.left == 0
    }

    pub(crate) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.left += piece.len();
            self.pieces.push(piece);
        }
    }
}

impl SegmentedBytes {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(bytes) => bytes.len(),
            Self::Many(row) => row.left,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the last piece ends with these bytes: nobody cuts within them.
    pub(crate) fn ends_with(&self, end: &[u8]) -> bool {
        match self {
            Self::One(bytes) => bytes.ends_with(end),
            Self::Many(row) => row.pieces.last().is_some_and(|last| last.ends_with(end)),
        }
    }

    /// All of it in one piece.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn into_bytes(self) -> Bytes {
        match self {
            Self::One(bytes) => bytes,
            Self::Many(row) => row.pieces[row.gone..].concat().into(),
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
    fn from(mut row: Segments) -> Self {
        match row.pieces.len() {
            0 | 1 => Self::One(row.pieces.pop().unwrap_or_default()),
            _ => Self::Many(Box::new(row)),
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
            Self::Many(row) => row.pieces.get(row.gone).map_or(&[], |piece| piece),
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::One(bytes) => bytes.chunks_vectored(slices),
            Self::Many(row) => {
                let left = &row.pieces[row.gone..];
                for (slice, piece) in slices.iter_mut().zip(left) {
                    *slice = IoSlice::new(piece);
                }
                slices.len().min(left.len())
            }
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::One(bytes) => bytes.advance(count),
            Self::Many(row) => row.advance(count),
        }
    }
}

impl Segments {
    fn advance(&mut self, mut count: usize) {
        self.left -= count;
        while count > 0 {
            let piece = &mut self.pieces[self.gone];
            if count < piece.len() {
                return piece.advance(count);
            }
            count -= piece.len();
            // What is gone is held no longer.
            *piece = Bytes::new();
            self.gone += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pieces: &[&'static str]) -> SegmentedBytes {
        let mut row = Segments::default();
        pieces.iter().for_each(|piece| row.push(Bytes::from_static(piece.as_bytes())));
        row.into()
    }

    #[test]
    fn many_pieces_read_as_one_however_far_each_step_goes() {
        for step in 1..=7 {
            let mut pieces = row(&["ab", "", "c", "defg"]);
            let mut read = Vec::new();
            while pieces.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 2];
                let count = pieces.chunks_vectored(&mut slices);
                let seen = slices[..count].iter().flat_map(|slice| slice.iter().copied());
                assert_eq!(slices[0][..], *pieces.chunk());
                let taken: Vec<u8> = seen.take(step).collect();
                read.extend_from_slice(&taken);
                pieces.advance(taken.len());
                assert_eq!(read.len() + pieces.remaining(), 7);
            }
            assert_eq!(read, b"abcdefg");
            assert_eq!(pieces.chunk(), b"");
        }
        assert_eq!(row(&["ab", "c"]).into_bytes(), "abc");
    }

    #[test]
    fn a_single_piece_is_no_row() {
        assert!(matches!(row(&["", "a", ""]), SegmentedBytes::One(one) if one == "a"));
        assert!(row(&[""]).is_empty());
        assert_eq!(size_of::<SegmentedBytes>(), size_of::<Bytes>());
    }

    #[test]
    fn the_end_is_that_of_the_last_piece() {
        assert!(row(&["a", "b\n\n"]).ends_with(b"\n\n"));
        assert!(!row(&["a\n\n", "b"]).ends_with(b"\n\n"));
    }
}

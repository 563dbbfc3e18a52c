//! A request to a backend, ready to be written: head and body as bytes.

use std::io::IoSlice;
use std::iter;

use bytes::{Buf, Bytes};

/// A request to one backend. As a [`Buf`] it yields what was not written yet.
#[derive(Debug, Default)]
pub(crate) struct OutgoingRequest {
    /// The head, followed by a small body: one `write` costs less than a `writev`.
    head: Bytes,
    /// A body that is too large to be appended to the head.
    body: OutgoingBody,
    /// The piece that is written next: 0 is the head.
    next_piece: usize,
    /// Bytes that are left of the pieces of the body from `next_piece` on.
    body_left: usize,
}

/// A request body in pieces. A clone shares the bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct OutgoingBody {
    pieces: Vec<Bytes>,
    length: usize,
}

impl OutgoingRequest {
    pub(crate) fn new(head: Bytes, body: OutgoingBody) -> Self {
        let body_left = body.len();
        Self { head, body, next_piece: 0, body_left }
    }

    /// The head (with a small body behind it) and the rest of the body, before anything was written.
    pub(crate) fn into_parts(self) -> (Bytes, OutgoingBody) {
        (self.head, self.body)
    }

    fn current(&self) -> &Bytes {
        match self.next_piece.checked_sub(1) {
            None => &self.head,
            Some(piece) => &self.body.pieces[piece],
        }
    }

    /// Steps to the next piece that is not empty.
    fn skip_empty(&mut self) {
        // `Buf` demands it: a chunk is empty only if nothing remains.
        while self.current().is_empty() && self.next_piece < self.body.pieces.len() {
            self.next_piece += 1;
        }
    }
}

impl Buf for OutgoingRequest {
    fn remaining(&self) -> usize {
        self.head.len() + self.body_left
    }

    fn chunk(&self) -> &[u8] {
        self.current()
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = iter::once(&self.head).chain(&self.body.pieces).skip(self.next_piece);
        let mut count = 0;
        // Pieces for which there is no slice are offered again after the next `advance`.
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let piece = match self.next_piece.checked_sub(1) {
                None => &mut self.head,
                Some(piece) => &mut self.body.pieces[piece],
            };
            let taken = count.min(piece.len());
            if taken < piece.len() {
                piece.advance(taken);
            } else {
                // The other leg may be far ahead and the response on its way: memory goes as soon as it can.
                *piece = Bytes::new();
            }
            // The head is not in `body_left`: what remains of it is its own length.
            if self.next_piece > 0 {
                self.body_left -= taken;
            }
            count -= taken;
            self.skip_empty();
        }
    }
}

impl OutgoingBody {
    pub(crate) fn new(pieces: Vec<Bytes>) -> Self {
        let length = pieces.iter().map(Bytes::len).sum();
        Self { pieces, length }
    }

    /// The body's bytes, in order.
    pub(crate) fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(head: &'static str, body: &[&'static str]) -> OutgoingRequest {
        let pieces = body.iter().map(|piece| Bytes::from_static(piece.as_bytes())).collect();
        OutgoingRequest::new(Bytes::from_static(head.as_bytes()), OutgoingBody::new(pieces))
    }

    #[test]
    fn a_request_is_written_whole_however_much_each_write_takes() {
        for step in 1..=9 {
            let mut request = request("head", &["", "ab", "", "cdefg", ""]);
            let mut written = Vec::new();
            while request.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 3];
                let count = request.chunks_vectored(&mut slices);
                assert_eq!(slices[0][..], *request.chunk());
                let offered = slices[..count].iter().flat_map(|slice| slice.iter().copied());
                let taken: Vec<u8> = offered.take(step).collect();
                assert!(!taken.is_empty(), "{step}: {written:?}");
                request.advance(taken.len());
                written.extend(taken);
                assert_eq!(written.len() + request.remaining(), 11);
            }
            assert_eq!(written, b"headabcdefg", "{step}");
        }
    }

    #[test]
    fn a_piece_that_was_written_is_released() {
        let mut request = request("h", &["abc", "d"]);
        request.advance(4);
        assert!(request.body.pieces[0].is_empty());
        assert_eq!(request.chunk(), b"d");
    }
}

//! What a load trace needs of a request beyond its record: its prompt's fingerprint, and the end of its
//! response, where servers say how many tokens they have generated.
//!
//! It is kept only while a load trace is written. What is read from it is for `report`.

use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::Prompt;

/// Bytes of a response's end that are kept. In recorded responses the count of tokens is 60 to 500 bytes
/// before the end, and up to 1,850 if the client wants logprobs.
const TAIL: usize = 2 << 10;

/// A request that will be a line of a trace.
pub(crate) struct TracedRequest {
    pub(crate) prompt: Prompt,
    pub(crate) tail: ResponseTail,
}

impl TracedRequest {
    pub(super) fn new(prompt: Prompt) -> Self {
        Self { prompt, tail: ResponseTail { ring: [0; TAIL], written: 0 } }
    }
}

/// The last bytes of a response's body. They are copied: a reference would keep a whole buffer of the
/// connection's in memory, and make it allocate another one.
pub(crate) struct ResponseTail {
    ring: [u8; TAIL],
    /// All bytes that were ever written to the ring.
    written: usize,
}

impl ResponseTail {
    pub(super) fn push(&mut self, data: &SegmentedBytes) {
        for slice in data.slices() {
            let last = &slice[slice.len().saturating_sub(TAIL)..];
            let at = self.written % TAIL;
            let (to_end, from_start) = last.split_at(last.len().min(TAIL - at));
            self.ring[at..][..to_end.len()].copy_from_slice(to_end);
            self.ring[..from_start.len()].copy_from_slice(from_start);
            self.written += last.len();
        }
    }

    /// The bytes in order.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        if self.written <= TAIL {
            return self.ring[..self.written].to_vec();
        }
        let (newer, older) = self.ring.split_at(self.written % TAIL);
        [older, newer].concat()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn the_tail_is_the_end_of_the_body_however_it_was_cut() {
        let body: Vec<u8> = (0..3 * TAIL + 77).map(|at| (at * at / 7) as u8).collect();
        for size in [1, 7, TAIL - 1, TAIL, TAIL + 1, 2 * TAIL + 5, body.len()] {
            let mut traced = TracedRequest::new(Prompt::default());
            let mut length = 0;
            for piece in body.chunks(size) {
                traced.tail.push(&Bytes::copy_from_slice(piece).into());
                length += piece.len();
                let expected = &body[length.saturating_sub(TAIL)..length];
                assert!(traced.tail.to_vec() == expected, "{length} bytes in pieces of {size}");
            }
        }
    }
}

//! Buffers for large bodies, used again.
//!
//! Bodies come and go as a whole, in many buffers of one size. Given back to the allocator, these stay in its
//! pages for as long as it likes: eight bodies of 8 MiB in flight took up to half as much again. So a thread keeps
//! what it has no use for at the moment, and lets go of what it had no use for between two sweeps.

use std::cell::RefCell;

use bytes::Bytes;

/// How large a buffer is: what is read at a time, if so much is there.
pub(crate) const BODY_BUFFER_SIZE: usize = 128 << 10;

#[derive(Default)]
struct Spare {
    buffers: Vec<Box<[u8]>>,
    /// The fewest that there were since the last sweep.
    fewest: usize,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

/// A buffer that is being filled.
pub(crate) struct BodyBuffer {
    buffer: Buffer,
    filled: usize,
}

/// Goes back to the spare ones when it is dropped.
struct Buffer(Box<[u8]>);

impl BodyBuffer {
    /// An empty one.
    pub(crate) fn take() -> Self {
        let spare = SPARE.with_borrow_mut(|spare| {
            let buffer = spare.buffers.pop();
            spare.fewest = spare.fewest.min(spare.buffers.len());
            buffer
        });
        Self { buffer: Buffer(spare.unwrap_or_else(|| vec![0; BODY_BUFFER_SIZE].into())), filled: 0 }
    }

    /// What is free.
    pub(crate) fn free(&mut self) -> &mut [u8] {
        &mut self.buffer.0[self.filled..]
    }

    /// So much of what was free is filled.
    pub(crate) fn fill(&mut self, count: usize) {
        self.filled += count;
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled == BODY_BUFFER_SIZE
    }

    /// What it was filled with. The buffer is used again when nobody holds any of it.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.buffer).split_to(self.filled)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // At the end of a thread it just goes.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().buffers.push(buffer));
    }
}

/// Lets go of the buffers of this thread that nobody has needed since this was last called.
pub(crate) fn sweep() {
    SPARE.with_borrow_mut(|spare| {
        let kept = spare.buffers.len() - spare.fewest;
        spare.buffers.truncate(kept);
        spare.fewest = kept;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spares() -> usize {
        SPARE.with_borrow(|spare| spare.buffers.len())
    }

    fn filled(with: u8) -> Bytes {
        let mut room = BodyBuffer::take();
        while !room.is_full() {
            room.free()[..BODY_BUFFER_SIZE / 4].fill(with);
            room.fill(BODY_BUFFER_SIZE / 4);
        }
        room.into_bytes()
    }

    #[test]
    fn a_buffer_is_used_again_when_nobody_holds_any_of_it() {
        let first = filled(1);
        let place = first.as_ptr();
        let slice = first.slice(5..6);
        drop(first);
        assert_eq!(spares(), 0);
        assert_eq!(slice, [1][..]);
        drop(slice);
        assert_eq!(spares(), 1);
        let second = filled(2);
        assert_eq!((second.as_ptr(), spares()), (place, 0));
        assert!(second.iter().all(|byte| *byte == 2));
    }

    #[test]
    fn what_is_not_needed_between_two_sweeps_goes() {
        let many: Vec<Bytes> = (0..5).map(filled).collect();
        sweep();
        drop(many);
        sweep();
        assert_eq!(spares(), 5, "they were needed");
        // Two at a time are needed.
        let two = [filled(1), filled(2)];
        drop(two);
        sweep();
        assert_eq!(spares(), 2);
        sweep();
        assert_eq!(spares(), 0);
    }

    #[test]
    fn a_part_is_all_that_was_filled() {
        let mut room = BodyBuffer::take();
        room.free()[..3].copy_from_slice(b"abc");
        room.fill(3);
        assert_eq!(room.into_bytes(), "abc");
    }
}

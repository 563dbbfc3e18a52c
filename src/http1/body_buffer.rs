//! Reused buffers that requests are read into, one pool per thread. Large bodies stay in them.
//!
//! A body is freed as a whole, in many buffers of one size. An allocator keeps such pages for an unknown
//! time: eight bodies of 8 MiB in flight took up to half as much memory again. So each thread keeps its free
//! buffers, and frees those that it has not needed between two [sweeps](sweep).

use std::cell::RefCell;

use bytes::Bytes;

/// Bytes of a buffer, and most bytes of one read.
pub(crate) const BODY_BUFFER_SIZE: usize = 128 << 10;

#[derive(Default)]
struct FreeBuffers {
    buffers: Vec<Box<[u8]>>,
    /// The fewest since the last sweep: so many were not needed.
    fewest: usize,
}

thread_local! {
    static FREE: RefCell<FreeBuffers> = RefCell::default();
}

/// A buffer that is being filled.
pub(crate) struct BodyBuffer {
    buffer: Buffer,
    /// The head before the body's first bytes.
    skipped: usize,
    filled: usize,
}

/// Returns to the free buffers when it is dropped.
struct Buffer(Box<[u8]>);

impl BodyBuffer {
    /// An empty buffer: a free one of this thread, or a new one.
    pub(crate) fn take() -> Self {
        let reused = FREE.with_borrow_mut(|free| {
            // The one that was returned last: its memory is the likeliest to be in the CPU's cache.
            let buffer = free.buffers.pop();
            free.fewest = free.fewest.min(free.buffers.len());
            buffer
        });
        // Zeroed once, when it is new: `unsafe` is forbidden, and a reused one keeps its old bytes behind
        // `filled`.
        let buffer = Buffer(reused.unwrap_or_else(|| vec![0; BODY_BUFFER_SIZE].into()));
        Self { buffer, skipped: 0, filled: 0 }
    }

    /// The part that is not filled.
    pub(crate) fn free(&mut self) -> &mut [u8] {
        &mut self.buffer.0[self.filled..]
    }

    /// Marks the next `count` bytes as filled.
    pub(crate) fn fill(&mut self, count: usize) {
        self.filled += count;
    }

    /// Leaves out all but the last `count` of the filled bytes.
    pub(crate) fn keep_last(&mut self, count: usize) {
        self.skipped = self.filled.saturating_sub(count);
    }

    /// What is filled and not left out.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.buffer.0[self.skipped..self.filled]
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled == BODY_BUFFER_SIZE
    }

    /// The same without a copy. The buffer is free again when the last slice of it is dropped.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.buffer).slice(self.skipped..self.filled)
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
        // Fails while the thread ends and its free buffers are gone: then this one is freed.
        let _ = FREE.try_with(|free| free.borrow_mut().buffers.push(buffer));
    }
}

/// Frees the buffers of this thread that were not needed since the last call. Worker threads call it at a
/// fixed interval.
pub(crate) fn sweep() {
    FREE.with_borrow_mut(|free| {
        // All buffers are alike, so it does not matter which of them are freed.
        let kept = free.buffers.len() - free.fewest;
        free.buffers.truncate(kept);
        free.fewest = kept;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_buffers() -> usize {
        FREE.with_borrow(|free| free.buffers.len())
    }

    fn filled(with: u8) -> Bytes {
        let mut buffer = BodyBuffer::take();
        while !buffer.is_full() {
            buffer.free()[..BODY_BUFFER_SIZE / 4].fill(with);
            buffer.fill(BODY_BUFFER_SIZE / 4);
        }
        buffer.into_bytes()
    }

    #[test]
    fn a_buffer_is_reused_after_its_last_slice_is_dropped() {
        let first = filled(1);
        let address = first.as_ptr();
        let slice = first.slice(5..6);
        drop(first);
        assert_eq!(free_buffers(), 0);
        assert_eq!(slice, [1][..]);
        drop(slice);
        assert_eq!(free_buffers(), 1);
        let second = filled(2);
        assert_eq!((second.as_ptr(), free_buffers()), (address, 0));
        assert!(second.iter().all(|byte| *byte == 2));
    }

    #[test]
    fn buffers_not_needed_between_two_sweeps_are_freed() {
        let many: Vec<Bytes> = (0..5).map(filled).collect();
        sweep();
        drop(many);
        sweep();
        assert_eq!(free_buffers(), 5, "they were needed since the last sweep");
        // Two are needed at once until the next sweep.
        let two = [filled(1), filled(2)];
        drop(two);
        sweep();
        assert_eq!(free_buffers(), 2);
        sweep();
        assert_eq!(free_buffers(), 0);
    }

    #[test]
    fn only_the_filled_part_is_returned() {
        let mut buffer = BodyBuffer::take();
        buffer.free()[..3].copy_from_slice(b"abc");
        buffer.fill(3);
        assert_eq!(buffer.into_bytes(), "abc");
    }

    #[test]
    fn what_is_left_out_is_not_returned() {
        let mut buffer = BodyBuffer::take();
        buffer.free()[..5].copy_from_slice(b"headb");
        buffer.fill(5);
        buffer.keep_last(1);
        buffer.free()[..3].copy_from_slice(b"ody");
        buffer.fill(3);
        assert_eq!(buffer.filled(), b"body");
        assert_eq!(buffer.into_bytes(), "body");
    }
}

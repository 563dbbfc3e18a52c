//! Copying a text while values in it are replaced.

use std::ops::Range;

use bytes::{BufMut, BytesMut};

/// Copies a text, with other values in places. Places must be in order.
pub(super) struct CopiedText<'a> {
    text: &'a [u8],
    /// What is before it is copied, or replaced.
    done: usize,
    out: &'a mut BytesMut,
}

impl<'a> CopiedText<'a> {
    pub(super) fn new(text: &'a [u8], out: &'a mut BytesMut) -> Self {
        Self { text, done: 0, out }
    }

    /// Puts `by` in place of a range, which may be empty.
    pub(super) fn replace(&mut self, range: Range<usize>, by: &[u8]) {
        self.out.put_slice(&self.text[self.done..range.start]);
        self.out.put_slice(by);
        self.done = range.end;
    }

    /// The same with what `write` appends.
    pub(super) fn replace_with(&mut self, range: Range<usize>, write: impl FnOnce(&mut BytesMut)) {
        self.replace(range, b"");
        write(self.out);
    }

    /// The same with a number.
    pub(super) fn replace_by_number(&mut self, range: Range<usize>, number: u64) {
        self.replace(range, itoa::Buffer::new().format(number).as_bytes());
    }

    /// Copies the text up to this place.
    pub(super) fn copy_to(&mut self, end: usize) {
        self.replace(end..end, b"");
    }

    /// Copies the rest.
    pub(super) fn finish(self) {
        self.out.put_slice(&self.text[self.done..]);
    }
}

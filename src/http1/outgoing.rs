//! A request that is ready to be written to a server: head and body as bytes.

use bytes::Bytes;

/// A request to one server.
#[derive(Debug, Default)]
pub(crate) struct OutgoingRequest {
    /// The head, and behind it a small body: one write is cheaper than a vectored one.
    pub(crate) head: Bytes,
    /// A body that is too large to be copied behind the head.
    pub(crate) body: OutgoingBody,
}

/// A request body in pieces. A clone shares the bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct OutgoingBody {
    pieces: Vec<Bytes>,
    length: usize,
}

impl OutgoingBody {
    pub(crate) fn new(pieces: Vec<Bytes>) -> Self {
        let length = pieces.iter().map(Bytes::len).sum();
        Self { pieces, length }
    }

    /// Its bytes, in order.
    pub(crate) fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// Lets go of a piece that has been sent.
    pub(crate) fn release(&mut self, piece: usize) {
        self.pieces[piece] = Bytes::new();
    }

    /// Of all pieces together as they were at first.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }
}

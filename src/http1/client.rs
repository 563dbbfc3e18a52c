//! One HTTP/1.1 connection to a server, read and written from the task that uses it.
//!
//! There is no driver task, no channel and no buffer per connection: the request that holds
//! the connection polls its socket, and only the body's own bytes are kept. The price: nothing
//! polls an idle connection, so [`ClientConnection::is_usable`] must look at it before use.
//! Pooling, retries and time limits are not known here.

use std::mem::offset_of;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;
use std::{fmt, io};

use bytes::Bytes;

use super::io::{MAX_READ, PartialHead, Stream, poll_write_all, with_read_buffer};
use super::{
    BodyDecoder, MalformedMessage, OutgoingRequest, ParsedResponse, ResponseHead, read_response_head,
};

/// A connection to a server: one request at a time. In this order: what the data of a body needs is in two
/// cache lines.
#[repr(C)]
pub(crate) struct ClientConnection {
    stream: Stream,
    body: BodyDecoder,
    /// Body data that was read but not returned yet: it arrived with the head, or was waited for.
    first_data: Option<Bytes>,
    write_progress: WriteProgress,
    /// The connection may be reused after this response.
    keep_alive: bool,
    /// It has carried a request before.
    was_used: bool,
    /// A byte of the response has arrived.
    has_response_started: bool,
    /// Why the rest of the request cannot be written. The response is still read.
    write_error: Option<io::Error>,
    request: OutgoingRequest,
    partial_head: PartialHead,
    timing: WriteTiming,
}

/// The write of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteProgress {
    NotStarted,
    /// The kernel may have taken a part of it.
    Started,
    /// Nothing is left to be written, or it has failed. TLS may still hold the end.
    Done,
}

/// How a request was written.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WriteTiming {
    /// On a connection that had carried another request.
    pub(crate) on_reused: bool,
    /// When its last byte was written. `None`: the response arrived first, or the write was incomplete.
    pub(crate) written_at: Option<Instant>,
}

/// How much of a response's body has arrived. An empty body is complete with its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyProgress {
    None,
    Some,
    All,
}

/// Why a response could not be read, or not to its end.
#[derive(Debug)]
pub(crate) enum ConnError {
    Io(io::Error),
    /// The server closed the connection.
    Closed,
    Malformed(MalformedMessage),
    /// A body that must be held in memory is over the limit.
    TooLarge {
        limit: usize,
    },
}

/// Why a request got no response.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) cause: ConnError,
    /// No byte of a response has arrived.
    pub(crate) unanswered: bool,
}

const _: () = assert!(offset_of!(ClientConnection, request) <= 128, "two cache lines");

impl ClientConnection {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            body: BodyDecoder::ended(),
            first_data: None,
            write_progress: WriteProgress::Done,
            keep_alive: true,
            was_used: false,
            has_response_started: false,
            write_error: None,
            request: OutgoingRequest::default(),
            partial_head: PartialHead::default(),
            timing: WriteTiming::default(),
        }
    }

    /// Whether an idle connection can take a request: the server has neither closed it nor sent anything
    /// since.
    pub(crate) fn is_usable(&mut self) -> bool {
        // No waker is needed: the next poll, with one, is that of the request that follows.
        let mut cx = Context::from_waker(Waker::noop());
        // Ready is the end of the stream, or bytes that belong to no request. Both make it unusable.
        self.poll_read(&mut cx, |_, _| Ok(())).is_pending()
    }

    /// Whether it may carry another request: the last one was written, and its response's body ended cleanly.
    pub(crate) fn is_reusable(&self) -> bool {
        self.keep_alive && self.is_ended() && self.is_written() && self.stream.is_flushed()
    }

    /// Begins a request. [`poll_head`](Self::poll_head) writes it.
    pub(crate) fn begin(&mut self, request: OutgoingRequest) {
        let on_reused = std::mem::replace(&mut self.was_used, true);
        self.timing = WriteTiming { on_reused, written_at: None };
        self.has_response_started = false;
        (self.request, self.write_progress) = (request, WriteProgress::NotStarted);
    }

    /// Writes the request, and waits for the head of its response.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, SendError>> {
        let head = ready!(self.poll_write_and_read_head(cx));
        Poll::Ready(head.map_err(|cause| SendError { cause, unanswered: !self.has_response_started }))
    }

    fn poll_write_and_read_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, ConnError>> {
        // A server that refuses a large body responds and closes, and more of the body would only bring its
        // reset, with which a kernel may discard what was received. The first write needs no look: the
        // request that fits in it has not been read by anyone.
        if self.write_progress == WriteProgress::Started
            && let Poll::Ready(head) = self.poll_read_head(cx)
        {
            return Poll::Ready(head);
        }
        self.poll_write(cx);
        self.poll_read_head(cx)
    }

    /// Reads what has arrived, up to the end of the response's head.
    fn poll_read_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, ConnError>> {
        loop {
            match ready!(self.poll_read(cx, Self::take_head)) {
                Ok(Some(head)) => return Poll::Ready(Ok(head)),
                Ok(None) => {}
                // The connection was lost when the request was written: that says more than its end.
                Err(error @ (ConnError::Closed | ConnError::Io(_))) => {
                    return Poll::Ready(Err(self.write_error.take().map_or(error, ConnError::Io)));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// The next data of the response's body; `None` is its clean end. Trailers are dropped: SGLang sends
    /// none.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        if let Some(first) = self.first_data.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        while !self.body.is_ended() {
            match self.poll_read(cx, Self::take_data) {
                Poll::Ready(read) => {
                    if let Some(data) = read.transpose() {
                        return Poll::Ready(Some(data));
                    }
                }
                Poll::Pending => {
                    // Last, as before the head: a response that is here is worth more than the rest of the
                    // request, and the server may wait for that rest.
                    self.poll_write(cx);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(None)
    }

    /// Waits for some of the body, or for the end of an empty one. [`poll_data`](Self::poll_data) still
    /// returns it.
    pub(crate) fn poll_body_started(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>> {
        if self.first_data.is_none() {
            self.first_data = ready!(self.poll_data(cx)).transpose()?;
        }
        Poll::Ready(Ok(()))
    }

    /// How much of the body has arrived, returned or not.
    pub(crate) fn body_progress(&self) -> BodyProgress {
        match (self.body.is_ended(), &self.first_data) {
            (true, _) => BodyProgress::All,
            (false, Some(_)) => BodyProgress::Some,
            (false, None) => BodyProgress::None,
        }
    }

    /// Whether all of the body was returned. The end of a close-delimited body is known only when the
    /// connection closes.
    pub(crate) fn is_ended(&self) -> bool {
        self.first_data.is_none() && self.body.is_ended()
    }

    pub(crate) fn write_timing(&self) -> WriteTiming {
        self.timing
    }

    /// Bytes of a body with a `Content-Length` that were not returned yet.
    pub(crate) fn remaining(&self) -> Option<u64> {
        let first = self.first_data.as_ref().map_or(0, Bytes::len) as u64;
        self.body.remaining().map(|rest| rest + first)
    }

    /// Writes what can be written. An error ends the request, but not its response: a server may respond and
    /// close before it has read everything, and what it sent is read first (RFC 9112, section 9.5).
    fn poll_write(&mut self, cx: &mut Context<'_>) {
        if let Poll::Ready(Err(error)) = self.poll_write_request(cx) {
            self.end_write();
            (self.write_error, self.keep_alive) = (Some(error), false);
        }
    }

    fn poll_write_request(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.write_error.is_some() {
            return Poll::Pending;
        }
        if !self.is_written() {
            self.write_progress = WriteProgress::Started;
            ready!(poll_write_all(&mut self.stream, cx, &mut self.request))?;
            self.end_write();
            self.timing.written_at = Some(Instant::now());
        }
        self.stream.poll_flushed(cx)
    }

    fn is_written(&self) -> bool {
        self.write_progress == WriteProgress::Done
    }

    /// Drops the request: its list of pieces would be held for as long as the response streams.
    fn end_write(&mut self) {
        (self.request, self.write_progress) = (OutgoingRequest::default(), WriteProgress::Done);
    }

    /// Reads once and passes the bytes to `take`. No bytes: the server has closed the connection.
    fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Self, &[u8]) -> Result<T, ConnError>,
    ) -> Poll<Result<T, ConnError>> {
        with_read_buffer(MAX_READ, |buffer| {
            let received = ready!(self.stream.poll_read_into(cx, buffer))?;
            self.has_response_started |= !received.is_empty();
            Poll::Ready(take(self, received))
        })
    }

    /// Parses the response's head, if it is complete, and keeps the body's bytes that follow it.
    fn take_head(&mut self, received: &[u8]) -> Result<Option<ResponseHead>, ConnError> {
        if received.is_empty() {
            return Err(ConnError::Closed);
        }
        let mut partial = std::mem::take(&mut self.partial_head);
        let head = partial.parse(received, |bytes, searched| self.begin_response(bytes, searched));
        self.partial_head = partial;
        head
    }

    fn begin_response(&mut self, bytes: &[u8], searched: usize) -> Result<Option<ResponseHead>, ConnError> {
        let Some(ParsedResponse { head, decoder, keeps_alive, length }) =
            read_response_head(bytes, searched)?
        else {
            return Ok(None);
        };
        (self.body, self.keep_alive) = (decoder, keeps_alive && self.write_error.is_none());
        self.first_data = self.decode(&bytes[length..])?;
        Ok(Some(head))
    }

    fn take_data(&mut self, received: &[u8]) -> Result<Option<Bytes>, ConnError> {
        if received.is_empty() {
            // Only a close-delimited body ends here.
            return if self.body.close() { Ok(None) } else { Err(ConnError::Closed) };
        }
        self.decode(received)
    }

    /// Decodes the body's bytes.
    fn decode(&mut self, received: &[u8]) -> Result<Option<Bytes>, ConnError> {
        let first = self.body.next(received)?;
        let mut used = first.end;
        let second = self.body.next(&received[used..])?;
        let body = if second.is_empty() {
            // One range, as in most reads: an allocation of the right size is cheaper than a shared buffer.
            used += second.end;
            Bytes::copy_from_slice(&received[first])
        } else {
            let mut body = Vec::with_capacity(received.len() - first.start);
            body.extend_from_slice(&received[first]);
            body.extend_from_slice(&received[used..][second.clone()]);
            used += second.end;
            used += self.body.decode(&received[used..], &mut body)?;
            body.into()
        };
        // Bytes after the response belong to no request: the connection cannot be reused.
        self.keep_alive &= used == received.len();
        Ok((!body.is_empty()).then_some(body))
    }
}

impl From<MalformedMessage> for ConnError {
    fn from(malformed: MalformedMessage) -> Self {
        Self::Malformed(malformed)
    }
}

impl From<io::Error> for ConnError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for ConnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Closed => f.write_str("the connection was closed"),
            Self::Malformed(MalformedMessage(what)) => f.write_str(what),
            Self::TooLarge { limit } => write!(f, "its body is over {limit} bytes"),
        }
    }
}

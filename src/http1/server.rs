//! One HTTP/1.1 connection of a client: reads the heads and bodies of its requests, one after the other.
//! [`response_writer`](super::response_writer) writes the responses.
//!
//! There is no driver task and no buffer per connection: the task that serves it reads and writes itself.
//! What a request asks for, and what the response is, is not known here.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, Interest};
use tokio::time::Instant;

use super::io::{PartialHead, Stream, poll_write_all, with_read_buffer};
use super::{
    BODY_BUFFER_SIZE, BodyBuffer, BodyDecoder, CloseWatch, HeadError, MalformedMessage, RequestFraming,
    RequestHead, read_request_head,
};
use crate::timer::Timer;

/// Largest first read of a request. Nearly all requests arrive with one read and are copied out of its
/// buffer. It also bounds what is read of a pipelined request.
const FIRST_READ: usize = 16 << 10;
/// A body of this size stays in the buffer of the first read, and the rest of it is read behind. Smaller ones
/// would hold more than twice the memory that is reserved for them.
const MIN_KEPT_BODY: usize = BODY_BUFFER_SIZE / 2;
/// If no more of it came with its head, it is copied: its client may be slow to send the rest.
const MIN_KEPT_START: usize = 4 << 10;
/// With less free capacity than this, a new buffer is allocated for the rest of a body.
const MIN_READ: usize = 4 << 10;

/// How long a client's connection may wait.
#[derive(Clone, Copy)]
pub(crate) struct ClientTimeouts {
    /// From the first byte of a head to its last.
    pub(crate) head: Duration,
    /// From a response's last byte to the next head's first, and for a client that reads none of its
    /// response.
    pub(crate) idle: Duration,
    /// For a body that is discarded after the response.
    pub(crate) body: BodyTimeouts,
}

/// How long a client may take to send a request's body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyTimeouts {
    /// Longest pause.
    pub(crate) idle: Duration,
    /// From the first wait for a part of it to its end.
    pub(crate) whole: Duration,
}

/// A client's connection. In this order: what a token that is written needs is side by side.
#[repr(C)]
pub(crate) struct ServerConnection {
    pub(super) stream: Stream,
    /// What the kernel has not accepted yet.
    pub(super) pending_write: Option<Box<dyn Buf + Send + Sync>>,
    /// Bytes that were read after a head and not used yet: of its body, or of the next head.
    buffered: Bytes,
    /// The buffer that a large body is read into.
    body_buffer: Option<BodyBuffer>,
    /// Decodes the rest of the body of the current request.
    body: BodyDecoder,
    /// For a client that has sent more than is read ahead.
    close_watch: CloseWatch,
    /// The client for whom a load balancer has connected. Boxed, because few connections have one.
    proxied_for: Option<Box<SocketAddr>>,
    partial_head: PartialHead,
    /// The buffer for its end, and for a body of unknown length.
    body_tail: BytesMut,
    /// Bytes of the body that were read after the head's.
    body_bytes_read: u64,
    /// The client waits for `100 Continue` before it sends the body.
    expects_continue: bool,
}

/// The next request of a connection, or why there is none.
pub(crate) enum NextRequest {
    Request(RequestHead, RequestFraming),
    /// The connection ends with an error response.
    Rejected(HeadRejection),
    /// No request arrived within the idle timeout.
    Idle,
    /// The client closed the connection.
    Closed,
    /// The connection was idle when the server began to shut down.
    ShuttingDown,
}

/// Why what a client sent is not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadRejection {
    Malformed(&'static str),
    TooLarge,
    /// Its end did not arrive in time.
    Timeout(Duration),
}

/// Why the rest of a request's body could not be read.
#[derive(Debug)]
pub(crate) enum BodyReadError {
    Io(io::Error),
    /// The client closed the connection in the middle of it.
    Closed,
    Malformed(MalformedMessage),
}

impl ServerConnection {
    pub(crate) fn new(stream: Stream, proxied_for: Option<SocketAddr>) -> Self {
        Self {
            stream,
            proxied_for: proxied_for.map(Box::new),
            partial_head: PartialHead::default(),
            buffered: Bytes::new(),
            close_watch: CloseWatch::default(),
            body: BodyDecoder::ended(),
            body_buffer: None,
            body_tail: BytesMut::new(),
            body_bytes_read: 0,
            expects_continue: false,
            pending_write: None,
        }
    }

    pub(crate) fn proxied_for(&self) -> Option<SocketAddr> {
        self.proxied_for.as_deref().copied()
    }

    pub(crate) fn into_stream(self) -> Stream {
        self.stream
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    pub(crate) fn stream_mut(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Waits for the next request. `shutdown` ends an idle connection; a head that has begun is waited for.
    /// `timer` serves all waits of the connection.
    pub(crate) async fn next(
        &mut self,
        timer: &mut Timer,
        timeouts: ClientTimeouts,
        shutdown: impl Future<Output = ()>,
    ) -> NextRequest {
        let mut shutdown = pin!(shutdown);
        // When the current wait began: the clock is read only if there is a wait.
        let mut since = None;
        let buffered = std::mem::take(&mut self.buffered);
        self.close_watch.stop();
        if let Some((next, behind)) = self.take_head(&buffered) {
            self.buffered = buffered.slice(buffered.len() - behind..);
            return next;
        }
        std::future::poll_fn(|cx| {
            loop {
                let had_begun = !self.partial_head.is_empty();
                if !had_begun && shutdown.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(NextRequest::ShuttingDown);
                }
                match self.poll_head(cx) {
                    Poll::Ready(Some(next)) => return Poll::Ready(next),
                    Poll::Ready(None) => {
                        // The idle timeout ends, and the head's timeout starts.
                        if !had_begun && !self.partial_head.is_empty() {
                            since = None;
                        }
                    }
                    Poll::Pending => break,
                }
            }
            // A head that does not end has its own limit: it may be an attack with slow heads (slowloris).
            let is_idle = self.partial_head.is_empty();
            let since = *since.get_or_insert_with(Instant::now);
            let limit = if is_idle { timeouts.idle } else { timeouts.head };
            ready!(timer.poll_until(since + limit, cx));
            Poll::Ready(if is_idle {
                NextRequest::Idle
            } else {
                NextRequest::Rejected(HeadRejection::Timeout(limit))
            })
        })
        .await
    }

    /// Reads once. `None`: the head is incomplete.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<NextRequest>> {
        let mut buffer = BodyBuffer::take();
        match ready!(self.stream.poll_read_into(cx, &mut buffer.free()[..FIRST_READ])) {
            Ok(received) if !received.is_empty() => {
                let count = received.len();
                buffer.fill(count);
            }
            // Also in the middle of a head: no one is left to read an error.
            _ => return Poll::Ready(Some(NextRequest::Closed)),
        }
        let next = self.take_head(buffer.filled());
        Poll::Ready(next.map(|(next, behind)| {
            self.keep_behind_head(buffer, behind);
            next
        }))
    }

    /// Keeps what was read behind a head, at the end of `buffer`.
    fn keep_behind_head(&mut self, mut buffer: BodyBuffer, count: usize) {
        buffer.keep_last(count);
        let is_large = self.body.remaining().is_some_and(|length| length >= MIN_KEPT_BODY as u64);
        if is_large && count >= MIN_KEPT_START {
            // The client did not wait for `100 Continue`.
            self.expects_continue = false;
            self.body_buffer = Some(buffer);
        } else {
            self.buffered = Bytes::copy_from_slice(buffer.filled());
        }
    }

    /// Parses a head from what was received, if it is complete. Also returns how much follows it.
    fn take_head(&mut self, received: &[u8]) -> Option<(NextRequest, usize)> {
        // Empty lines between requests do not begin a head, and so do not start the head's timeout.
        let received = if self.partial_head.is_empty() { skip_empty_lines(received) } else { received };
        if received.is_empty() {
            return None;
        }
        let parsed = self.partial_head.parse(received, |bytes, searched| {
            let skipped = bytes.len() - skip_empty_lines(bytes).len();
            let text = &bytes[skipped..];
            let parsed = read_request_head(text, searched.saturating_sub(skipped))?;
            Ok(parsed.map(|(head, framing, length)| (head, framing, text.len() - length)))
        });
        let rejected = |why| Some((NextRequest::Rejected(why), 0));
        match parsed {
            Ok(Some((head, framing, behind))) => {
                self.body = framing.body.clone();
                self.expects_continue = framing.expects_continue;
                self.body_bytes_read = 0;
                Some((NextRequest::Request(head, framing), behind))
            }
            Ok(None) => None,
            Err(HeadError::Malformed(what)) => rejected(HeadRejection::Malformed(what)),
            Err(HeadError::TooLarge) => rejected(HeadRejection::TooLarge),
        }
    }

    /// Ready when the client has closed the connection during the response. Pipelined requests that arrive
    /// meanwhile are kept, up to [`FIRST_READ`] bytes of them; more stays in the socket.
    pub(crate) fn poll_disconnect(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.release_body_buffer();
        loop {
            // Careless clients send an empty line behind a body (RFC 9112, section 2.2).
            if !self.buffered.is_empty() && self.body.is_ended() {
                let skipped = self.buffered.len() - skip_empty_lines(&self.buffered).len();
                self.buffered.advance(skipped);
            }
            // A close is behind the bytes that were not read yet, and to read them all would need an
            // unbounded buffer.
            if self.buffered.len() >= FIRST_READ || self.body_buffer.is_some() {
                return self.close_watch.poll(&self.stream, cx);
            }
            if ready!(self.poll_read_ahead(cx)) == 0 {
                return Poll::Ready(());
            }
        }
    }

    /// A body that waits, for its share of the memory or for an early response to end, holds no more than
    /// what was read with its head: of ten thousand that wait, 160 MiB and not 1.3 GiB.
    fn release_body_buffer(&mut self) {
        if self.body_buffer.as_ref().is_some_and(|buffer| buffer.filled().len() <= FIRST_READ)
            && let Some(buffer) = self.body_buffer.take()
        {
            self.buffered = Bytes::copy_from_slice(buffer.filled());
        }
    }

    /// Reads once and keeps what was read. Returns its length; 0 also for an error.
    fn poll_read_ahead(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        with_read_buffer(FIRST_READ - self.buffered.len(), |buffer| {
            let Ok(received) = ready!(self.stream.poll_read_into(cx, buffer)) else { return Poll::Ready(0) };
            self.buffered = match self.buffered.is_empty() {
                true => Bytes::copy_from_slice(received),
                false => [&self.buffered, received].concat().into(),
            };
            Poll::Ready(received.len())
        })
    }

    /// Waits until the client has closed the connection, without reading.
    pub(crate) async fn disconnected(&self) {
        match self.stream.socket() {
            // Not `READABLE`, which is also set by unread bytes; what is left is the peer's close.
            Some(socket) if socket.ready(Interest::PRIORITY).await.is_ok() => {}
            _ => std::future::pending().await,
        }
    }

    /// The next chunk of the body, which is not empty. `None` is its end.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyReadError>> {
        loop {
            if !self.buffered.is_empty() {
                // The client did not wait for `100 Continue`.
                self.expects_continue = false;
                if let Some(chunk) = self.take_chunk()? {
                    return Poll::Ready(Ok(Some(chunk)));
                }
            }
            if self.body.is_ended() {
                // A stream may run for minutes after this: it must not hold the buffer.
                self.body_tail = BytesMut::new();
                return Poll::Ready(Ok(None));
            }
            ready!(self.poll_continue(cx)).map_err(BodyReadError::Io)?;
            ready!(self.poll_read_body(cx))?;
        }
    }

    /// A lower bound of the body's unread bytes.
    pub(crate) fn content_length_hint(&self) -> u64 {
        self.body.remaining().unwrap_or(0)
    }

    /// Whether all of the body was read.
    pub(crate) fn is_body_ended(&self) -> bool {
        self.body.is_ended()
    }

    /// Whether the client sends its body only after `100 Continue`, which it has not got.
    pub(crate) fn is_body_withheld(&self) -> bool {
        self.expects_continue && self.buffered.is_empty()
    }

    /// What has arrived of the next chunk. Such a body has a length, so these are bytes of it, without
    /// framing.
    pub(crate) fn unreturned(&self) -> &[u8] {
        self.body_buffer.as_ref().map_or(&[], BodyBuffer::filled)
    }

    /// Bytes of the body that were read since the head's, returned or not.
    pub(crate) fn body_bytes_read(&self) -> u64 {
        self.body_bytes_read
    }

    /// Sends `100 Continue` to a client that waits for it (RFC 9110, section 10.1.1).
    fn poll_continue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.expects_continue) {
            self.pending_write = Some(Box::new(&b"HTTP/1.1 100 Continue\r\n\r\n"[..]));
        }
        self.poll_flush(cx)
    }

    /// Writes what the kernel has not accepted yet.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pending) = &mut self.pending_write {
            ready!(poll_write_all(&mut self.stream, cx, &mut **pending))?;
            self.pending_write = None;
        }
        self.stream.poll_flushed(cx)
    }

    /// Reads more of a body. A large one is read into full buffers, which both legs share; its end, and a
    /// body of unknown length, in chunks of the size that arrives.
    fn poll_read_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyReadError>> {
        let is_large = self.body.remaining().is_some_and(|left| left >= BODY_BUFFER_SIZE as u64);
        if self.body_buffer.is_none() && is_large {
            self.body_buffer = Some(BodyBuffer::take());
        }
        let Some(buffer) = &mut self.body_buffer else { return self.poll_read_tail(cx) };
        while !buffer.is_full() {
            let left = self.body.remaining().unwrap_or(u64::MAX).saturating_sub(buffer.filled().len() as u64);
            if left == 0 {
                break;
            }
            // One byte more than the body: see `poll_read_tail`.
            let wanted = usize::try_from(left).map_or(BODY_BUFFER_SIZE, |left| left.saturating_add(1));
            let free = buffer.free();
            let most = wanted.min(free.len());
            let read =
                ready!(self.stream.poll_read_into(cx, &mut free[..most])).map_err(BodyReadError::Io)?;
            let count = read.len();
            if count == 0 {
                return Poll::Ready(Err(BodyReadError::Closed));
            }
            buffer.fill(count);
            self.body_bytes_read += count as u64;
        }
        self.buffered = self.body_buffer.take().map(BodyBuffer::into_bytes).unwrap_or_default();
        Poll::Ready(Ok(()))
    }

    /// Reads once. The buffer has one byte more than a body of known length needs: after a read that fills
    /// its buffer tokio tries again, which would cost a syscall that finds nothing.
    fn poll_read_tail(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyReadError>> {
        let left = self.body.remaining().and_then(|left| usize::try_from(left).ok());
        let wanted = left.map_or(BODY_BUFFER_SIZE, |left| left + 1);
        // A new buffer only when the old one is full: chunks that were split off share its memory.
        if self.body_tail.capacity() < wanted.min(MIN_READ) {
            self.body_tail = BytesMut::with_capacity(wanted);
        }
        let Self { stream, body_tail, .. } = self;
        let read = pin!(stream.read_buf(body_tail));
        match ready!(read.poll(cx)).map_err(BodyReadError::Io)? {
            0 => Poll::Ready(Err(BodyReadError::Closed)),
            count => {
                self.body_bytes_read += count as u64;
                self.buffered = self.body_tail.split().freeze();
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Takes the next chunk of the body from the buffered bytes.
    fn take_chunk(&mut self) -> Result<Option<Bytes>, BodyReadError> {
        let data = self.body.next(&self.buffered).map_err(BodyReadError::Malformed)?;
        // Nearly always it is all that was buffered, and then needs no second reference count.
        let mut chunk = if data.end == self.buffered.len() {
            std::mem::take(&mut self.buffered)
        } else {
            self.buffered.split_to(data.end)
        };
        chunk.advance(data.start);
        Ok((!chunk.is_empty()).then_some(chunk))
    }
}

/// Memory that a body of this length takes: one that stays in the buffer of its head has all of that.
pub(crate) fn memory_of_body(length: usize) -> usize {
    if (MIN_KEPT_BODY..BODY_BUFFER_SIZE).contains(&length) { BODY_BUFFER_SIZE } else { length }
}

/// Skips empty lines before a request line (RFC 9112, section 2.2).
fn skip_empty_lines(mut text: &[u8]) -> &[u8] {
    while let Some(rest) = text.strip_prefix(b"\r\n").or_else(|| text.strip_prefix(b"\n")) {
        text = rest;
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream};

    use super::*;

    const TIME: Duration = Duration::from_secs(60);
    const TIMEOUTS: ClientTimeouts =
        ClientTimeouts { head: TIME, idle: TIME, body: BodyTimeouts { idle: TIME, whole: TIME } };

    fn body(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at % 251) as u8).collect()
    }

    /// A connection, and a request with a body of this length that its client may send, with another request
    /// behind it.
    fn connection(length: usize) -> (DuplexStream, ServerConnection, Vec<u8>) {
        let (client, server) = tokio::io::duplex(1 << 20);
        let head = format!("POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
        let sent = [head.as_bytes(), &body(length), b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n"].concat();
        (client, ServerConnection::new(Stream::Memory(server), None), sent)
    }

    async fn next(connection: &mut ServerConnection) -> RequestHead {
        let mut timer = Timer::default();
        match connection.next(&mut timer, TIMEOUTS, std::future::pending()).await {
            NextRequest::Request(head, _) => head,
            _ => panic!("no request"),
        }
    }

    async fn body_of(connection: &mut ServerConnection) -> Vec<Bytes> {
        let mut chunks = Vec::new();
        while let Some(chunk) = std::future::poll_fn(|cx| connection.poll_chunk(cx)).await.unwrap() {
            chunks.push(chunk);
        }
        chunks
    }

    /// The chunks of a request's body, of which `first` bytes arrive before the rest.
    async fn chunks(length: usize, first: usize) -> Vec<Bytes> {
        let (mut client, mut connection, sent) = connection(length);
        let (first, rest) = sent.split_at(first.min(sent.len()));
        client.write_all(first).await.unwrap();
        assert_eq!(next(&mut connection).await.path(), "/a");
        client.write_all(rest).await.unwrap();
        let chunks = body_of(&mut connection).await;
        assert!(chunks.concat() == body(length), "{length} {}", first.len());
        assert_eq!(next(&mut connection).await.path(), "/next");
        chunks
    }

    #[tokio::test]
    async fn bodies_of_all_sizes_arrive_whole_however_they_are_cut() {
        let kept = MIN_KEPT_BODY;
        for length in [1, FIRST_READ, kept - 1, kept, kept + 1, BODY_BUFFER_SIZE, 3 * BODY_BUFFER_SIZE + 7] {
            for first in
                [60, 61, MIN_KEPT_START, MIN_KEPT_START + 100, FIRST_READ, 2 * FIRST_READ, usize::MAX]
            {
                chunks(length, first).await;
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_waits_holds_no_buffer_and_arrives_whole() {
        let (mut client, mut connection, sent) = connection(3 * BODY_BUFFER_SIZE);
        let (first, rest) = sent.split_at(FIRST_READ);
        client.write_all(first).await.unwrap();
        next(&mut connection).await;
        assert!(connection.body_buffer.is_some());
        let waiting = std::future::poll_fn(|cx| Poll::Ready(connection.poll_disconnect(cx))).await;
        assert!(waiting.is_pending() && connection.body_buffer.is_none());
        client.write_all(rest).await.unwrap();
        assert!(body_of(&mut connection).await.concat() == body(3 * BODY_BUFFER_SIZE));
    }

    #[tokio::test]
    async fn a_body_of_64_kib_stays_in_the_buffer_of_its_head() {
        let chunks = chunks(64 << 10, usize::MAX).await;
        assert_eq!(chunks.len(), 1, "none was copied to another buffer");
    }
}

//! HTTP/1.1 towards a client, on a connection that has one request at a time.
//!
//! There is no task and no buffer of its own behind a connection: whoever serves it
//! reads heads and bodies ([`Http1`]) and writes answers ([`send`]) from its own task. What is
//! read first lands in a buffer that all connections of a thread share, so an idle connection and
//! a stream that waits for its next token hold nothing. What a request asks for is not known here.

mod write;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, Interest, ReadBuf};
use tokio::time::Instant;

use super::service::ClientTransport;
use super::stream::ClientStream;
use crate::error::{BodyReadError, Error};
use crate::http1::{
    BODY_BUFFER_SIZE, BodyBuffer, BodyDecoder, HeadError, RequestFraming, RequestHead, read_request_head,
};
use crate::proxy::RequestBody;
use crate::timer::Timer;
use crate::wire::segments::SegmentedBytes;
use write::PendingWrite;

pub(crate) use write::{WriteOptions, WriteOutcome};

/// What is read at a time of a head, and of what comes with it. Nearly all requests come at once, and are copied out of
/// the shared buffer.
const FIRST_READ: usize = 16 << 10;

/// Less room than this is not worth a read, if more is to come.
const LEAST_READ: usize = 4 << 10;

thread_local! {
    /// What was read last, by any connection of this thread; nobody keeps it across an await.
    static INPUT: RefCell<Vec<u8>> = RefCell::new(vec![0; FIRST_READ]);
}

/// How long a connection may wait.
#[derive(Clone, Copy)]
pub(crate) struct ClientTimeouts {
    /// From the first byte of a head to its last.
    pub(crate) head: Duration,
    /// From an answer's last byte to the next head's first, and for the client to take any of an answer.
    pub(crate) idle: Duration,
}

/// A client's connection.
pub(crate) struct Http1 {
    stream: ClientStream,
    /// The beginning of a head, of which the end has not come, and how much of it has been searched for its end.
    begun: Vec<u8>,
    searched: usize,
    /// What has come behind a head and was not taken: of its body, or of the next head.
    come: Bytes,
    /// The rest of the body of the request under way.
    body: BodyDecoder,
    /// Where more of it is read to, if it is large.
    room: Option<BodyBuffer>,
    /// And where the rest.
    rest: BytesMut,
    /// Bytes of it that were read since its head was.
    more: u64,
    /// The client is to be told that its body is wanted.
    waits: bool,
    /// Of an answer.
    unsent: PendingWrite,
}

/// What comes next on a connection.
pub(crate) enum NextRequest {
    Request(RequestHead, RequestFraming),
    /// A head that is not answered as a request is.
    Refused(Error),
    /// There was nothing for too long.
    Idle,
    /// The client has left.
    Closed,
    /// There was nothing, and nothing more is wanted.
    Ended,
}

impl Http1 {
    pub(crate) fn new(stream: ClientStream) -> Self {
        Self {
            stream,
            begun: Vec::new(),
            searched: 0,
            come: Bytes::new(),
            body: BodyDecoder::ended(),
            room: None,
            rest: BytesMut::new(),
            more: 0,
            waits: false,
            unsent: write::unsent(Bytes::new(), SegmentedBytes::default(), b""),
        }
    }

    pub(crate) fn into_stream(self) -> ClientStream {
        self.stream
    }

    /// Waits for the next request. `end` makes an idle connection end; a head that has begun is waited for. `timer` is
    /// one for all waits.
    pub(crate) async fn next(
        &mut self,
        timer: &mut Timer,
        patience: ClientTimeouts,
        end: impl Future<Output = ()>,
    ) -> NextRequest {
        let mut end = pin!(end);
        // What the wait counts from, when the clock was first needed.
        let mut since = None;
        self.begun = Vec::from(std::mem::take(&mut self.come));
        self.searched = 0;
        let parsed = self.take_head();
        if let Some(next) = parsed {
            return next;
        }
        std::future::poll_fn(|cx| {
            loop {
                let had_begun = !self.begun.is_empty();
                if !had_begun && end.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(NextRequest::Ended);
                }
                match self.poll_head(cx) {
                    Poll::Ready(Some(next)) => return Poll::Ready(next),
                    Poll::Ready(None) => {
                        if !had_begun && !self.begun.is_empty() {
                            since = None;
                        }
                    }
                    Poll::Pending => break,
                }
            }
            let is_idle = self.begun.is_empty();
            let since = *since.get_or_insert_with(Instant::now);
            let limit = if is_idle { patience.idle } else { patience.head };
            ready!(timer.poll_until(since + limit, cx));
            Poll::Ready(if is_idle {
                NextRequest::Idle
            } else {
                NextRequest::Refused(Error::RequestTimeout {
                    what: "the rest of the request's head",
                    after: limit,
                })
            })
        })
        .await
    }

    /// Reads once. `None`: more is wanted.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<NextRequest>> {
        INPUT.with_borrow_mut(|input| {
            let come = match ready!(poll_read(&mut self.stream, cx, input)) {
                Ok(come) if !come.is_empty() => come,
                // Whoever is in the middle of a head is gone as well.
                _ => return Poll::Ready(Some(NextRequest::Closed)),
            };
            if !self.begun.is_empty() {
                self.begun.extend_from_slice(come);
                return Poll::Ready(self.take_head());
            }
            let come = skip_empty_lines(come);
            match read_request_head(come, 0) {
                Ok(Some((head, manner, length))) => {
                    self.come = Bytes::copy_from_slice(&come[length..]);
                    Poll::Ready(Some(self.begin(head, manner)))
                }
                Ok(None) => {
                    self.begun = come.to_vec();
                    Poll::Ready(None)
                }
                Err(bad) => Poll::Ready(Some(refused(bad))),
            }
        })
    }

    /// Takes a head out of what has come, if all of it has.
    fn take_head(&mut self) -> Option<NextRequest> {
        if self.searched == 0 {
            let skipped = self.begun.len() - skip_empty_lines(&self.begun).len();
            self.begun.drain(..skipped);
        }
        if self.begun.is_empty() {
            return None;
        }
        match read_request_head(&self.begun, self.searched) {
            Ok(Some((head, manner, length))) => {
                self.come = Bytes::from(std::mem::take(&mut self.begun)).split_off(length);
                Some(self.begin(head, manner))
            }
            Ok(None) => {
                // The end may have come in part.
                self.searched = self.begun.len().saturating_sub(3);
                None
            }
            Err(bad) => Some(refused(bad)),
        }
    }

    fn begin(&mut self, head: RequestHead, manner: RequestFraming) -> NextRequest {
        self.body = manner.body.clone();
        self.waits = manner.waits;
        self.more = 0;
        NextRequest::Request(head, manner)
    }

    /// Whether the client has left while it is answered. It may send its next request meanwhile, which is kept.
    fn poll_disconnect(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.come.is_empty() {
            // Only the end is waited for, and it is behind what is not read now.
            return Poll::Pending;
        }
        INPUT.with_borrow_mut(|input| match ready!(poll_read(&mut self.stream, cx, input)) {
            Ok(come) if !come.is_empty() => {
                self.come = Bytes::copy_from_slice(come);
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
    }

    /// Tells the client that its body is wanted, if it waits for that.
    fn poll_say_continue(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.waits) {
            let word = Bytes::from_static(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.unsent = write::unsent(word, SegmentedBytes::default(), b"");
        }
        self.poll_flush(cx)
    }

    /// Reads more of a body: a large one into buffers that both legs share, each of them full, and the rest, or one of
    /// unknown length, as it comes.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyReadError>> {
        if self.room.is_none() && self.body.remaining().is_some_and(|left| left >= BODY_BUFFER_SIZE as u64) {
            self.room = Some(BodyBuffer::take());
        }
        let Some(room) = &mut self.room else { return self.poll_rest(cx) };
        while !room.is_full() {
            let read = ready!(poll_read(&mut self.stream, cx, room.free())).map_err(BodyReadError::Io)?;
            let count = read.len();
            if count == 0 {
                return Poll::Ready(Err(BodyReadError::Closed));
            }
            room.fill(count);
            self.more += count as u64;
        }
        self.come = self.room.take().map(BodyBuffer::into_bytes).unwrap_or_default();
        Poll::Ready(Ok(()))
    }

    /// Reads once: of a body of known length a byte more than there is to come, as a read that fills its buffer would be
    /// followed by another one, which finds nothing.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyReadError>> {
        let left = self.body.remaining().and_then(|left| usize::try_from(left).ok());
        let wanted = left.map_or(BODY_BUFFER_SIZE, |left| left + 1);
        if self.rest.capacity() < wanted.min(LEAST_READ) {
            self.rest = BytesMut::with_capacity(wanted);
        }
        let Self { stream, rest, .. } = self;
        let read = pin!(stream.read_buf(rest));
        match ready!(read.poll(cx)).map_err(BodyReadError::Io)? {
            0 => Poll::Ready(Err(BodyReadError::Closed)),
            count => {
                self.more += count as u64;
                self.come = self.rest.split().freeze();
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Takes some of the body out of what has come.
    fn take_chunk(&mut self) -> Result<Option<Bytes>, BodyReadError> {
        let data = self.body.next(&self.come).map_err(BodyReadError::Malformed)?;
        // Nearly always it is all that has come, and goes as it is.
        let mut piece = if data.end == self.come.len() {
            std::mem::take(&mut self.come)
        } else {
            self.come.split_to(data.end)
        };
        piece.advance(data.start);
        Ok((!piece.is_empty()).then_some(piece))
    }
}

impl RequestBody for Http1 {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyReadError>> {
        loop {
            if !self.come.is_empty() {
                self.waits = false;
                if let Some(piece) = self.take_chunk()? {
                    return Poll::Ready(Ok(Some(piece)));
                }
            }
            if self.body.is_ended() {
                self.rest = BytesMut::new();
                return Poll::Ready(Ok(None));
            }
            ready!(self.poll_say_continue(cx)).map_err(BodyReadError::Io)?;
            ready!(self.poll_more(cx))?;
        }
    }

    fn content_length_hint(&self) -> u64 {
        self.body.remaining().unwrap_or(0)
    }

    fn is_ended(&self) -> bool {
        self.body.is_ended()
    }

    fn bytes_read(&self) -> u64 {
        self.more
    }

    async fn disconnected(&self) {
        match self.stream.socket() {
            // Not `READABLE`, which unread bytes are as well; all there is without them is the end.
            Some(socket) if socket.ready(Interest::PRIORITY).await.is_ok() => {}
            _ => std::future::pending().await,
        }
    }
}

impl ClientTransport for Http1 {
    fn peer(&self) -> Option<SocketAddr> {
        self.stream.socket()?.peer_addr().ok()
    }

    async fn cancel_on_disconnect<T: Send>(&mut self, answer: impl Future<Output = T> + Send) -> Option<T> {
        let mut answer = pin!(answer);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(Some(answer));
            }
            self.poll_disconnect(cx).map(|()| None)
        })
        .await
    }
}

fn refused(bad: HeadError) -> NextRequest {
    NextRequest::Refused(match bad {
        HeadError::Malformed(what) => Error::BadRequest(what),
        HeadError::TooLarge => Error::HeadTooLarge,
    })
}

/// What is behind empty lines, which may be in front of a request (RFC 9112, section 2.2).
fn skip_empty_lines(mut text: &[u8]) -> &[u8] {
    while let Some(rest) = text.strip_prefix(b"\r\n").or_else(|| text.strip_prefix(b"\n")) {
        text = rest;
    }
    text
}

/// Reads once into the shared buffer.
fn poll_read<'a>(
    stream: &mut ClientStream,
    cx: &mut Context<'_>,
    input: &'a mut [u8],
) -> Poll<io::Result<&'a [u8]>> {
    let mut read = ReadBuf::new(input);
    ready!(Pin::new(stream).poll_read(cx, &mut read))?;
    let length = read.filled().len();
    Poll::Ready(Ok(&input[..length]))
}

//! One HTTP/1.1 connection to a server, read and written by whoever uses it.
//!
//! There is no task, no channel and no buffer of its own behind a connection: the
//! request that holds it writes and reads the socket itself. What is read lands in
//! a buffer that all connections of a thread share, and only the body's own bytes are
//! kept, so that a stream that waits for its next token holds nothing. The price: a
//! connection that nobody holds is polled by nobody, so [`Http1Client::is_usable`] looks at
//! it before use. The bytes' meaning is in `wire::request` and `wire::message`.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;
use std::{fmt, iter};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::http1::OutgoingRequest;
use crate::http1::{BodyDecoder, MalformedMessage, ParsedResponse, ResponseHead, read_response_head};
use crate::tls::TlsConnection;

/// What is read at a time. A stream's tokens that are there already come, and go, as one.
const READ_SIZE: usize = 64 << 10;
/// Pieces of a request that are written at a time.
const MAX_SLICES: usize = 64;

thread_local! {
    /// What was read last, by any connection of this thread; nobody keeps it across an await.
    static INPUT: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_SIZE]);
}

/// What carries the bytes.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsConnection>),
    #[cfg(any(test, fuzzing))]
    Memory(tokio::io::DuplexStream),
}

/// The same call on whatever carries the bytes.
macro_rules! on_stream {
    ($conn:expr, $stream:ident => $call:expr) => {
        match &mut $conn.stream {
            Stream::Tcp($stream) => $call,
            Stream::Tls($stream) => $call,
            #[cfg(any(test, fuzzing))]
            Stream::Memory($stream) => $call,
        }
    };
}

pub(crate) struct Http1Client {
    stream: Stream,
    output: PendingRequest,
    /// A head of which the end has not come.
    input: Vec<u8>,
    /// Data of the body that nobody has asked for yet: it came with the head, or was waited for.
    first: Option<Bytes>,
    decoder: BodyDecoder,
    /// Nothing speaks against another request when this answer's body has ended.
    keeps_alive: bool,
    /// It has carried a request before.
    used: bool,
    sent: WriteTiming,
    /// Something has come since the request.
    heard: bool,
}

/// How a request was sent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WriteTiming {
    /// On a connection that had carried others.
    pub(crate) on_kept: bool,
    /// When its last byte was written. `None`: it was answered before, or not at all.
    pub(crate) written_at: Option<Instant>,
}

/// How much of a body has come. An empty one has come with its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyProgress {
    None,
    Some,
    All,
}

/// Why an answer has no end, or no beginning.
#[derive(Debug)]
pub(crate) enum ConnError {
    Io(io::Error),
    /// The server has closed the connection.
    Closed,
    Bad(MalformedMessage),
    /// A body that must be held in memory is over the limit.
    TooLarge {
        limit: usize,
    },
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) cause: ConnError,
    /// The connection had been idle, and it died without a byte: the server had closed it before the request
    /// came, as servers do that bound their keep-alive.
    pub(crate) unseen: bool,
}

impl Http1Client {
    /// Boxed, once a connection: leases are moved from hand to hand several times a request.
    pub(crate) fn new(stream: Stream) -> Box<Self> {
        Box::new(Self {
            stream,
            output: PendingRequest::default(),
            input: Vec::new(),
            first: None,
            decoder: BodyDecoder::ended(),
            keeps_alive: true,
            used: false,
            sent: WriteTiming::default(),
            heard: false,
        })
    }

    /// Whether an idle connection can take a request: the server has neither closed it nor sent anything since.
    pub(crate) fn is_usable(&mut self) -> bool {
        // No waker is needed: the next poll, with one, is that of the request that follows.
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_read(&mut cx, |_, _| Ok(())).is_pending()
    }

    /// Whether it may carry another request: the last one has been written, and its answer's body has ended cleanly.
    pub(crate) fn is_reusable(&self) -> bool {
        let all_sent = match &self.stream {
            Stream::Tls(stream) => stream.is_flushed(),
            _ => true,
        };
        self.keeps_alive && self.is_ended() && self.output.is_done() && all_sent
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(&mut self, request: OutgoingRequest) -> Result<ResponseHead, SendError> {
        let reused = std::mem::replace(&mut self.used, true);
        (self.heard, self.sent) = (false, WriteTiming { on_kept: reused, written_at: None });
        self.output = PendingRequest::new(request);
        let head = std::future::poll_fn(|cx| self.poll_head(cx)).await;
        head.map_err(|cause| SendError { cause, unseen: reused && !self.heard })
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, ConnError>> {
        let written = self.poll_write(cx);
        // A server may answer before it has got everything, and then take no more.
        while let Poll::Ready(head) = self.poll_read(cx, Self::take_head)? {
            if let Some(head) = head {
                return Poll::Ready(Ok(head));
            }
        }
        match written {
            Poll::Ready(Err(error)) => Poll::Ready(Err(ConnError::Io(error))),
            _ => Poll::Pending,
        }
    }

    /// The next data of the answer's body; `None` is its clean end.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if let Poll::Ready(Err(_)) = self.poll_write(cx) {
            // What it answers is worth having all the same.
            self.output = PendingRequest::default();
            self.keeps_alive = false;
        }
        while !self.decoder.is_ended() {
            if let Some(data) = ready!(self.poll_read(cx, Self::take_data)).transpose() {
                return Poll::Ready(Some(data));
            }
        }
        Poll::Ready(None)
    }

    /// Waits for some of the body, or for the end of an empty one. It is still to be had afterwards.
    pub(crate) fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>> {
        if self.first.is_none() {
            self.first = ready!(self.poll_data(cx)).transpose()?;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether some of the body is there to be handed out, or there is none left.
    pub(crate) fn has_begun(&self) -> bool {
        self.first.is_some() || self.decoder.is_ended()
    }

    /// How much of the body has come, handed out or not.
    pub(crate) fn come(&self) -> BodyProgress {
        match (self.decoder.is_ended(), &self.first) {
            (true, _) => BodyProgress::All,
            (false, Some(_)) => BodyProgress::Some,
            (false, None) => BodyProgress::None,
        }
    }

    /// Whether all of the body has been handed out. Of one that ends with the connection this is not known before.
    pub(crate) fn is_ended(&self) -> bool {
        self.first.is_none() && self.decoder.is_ended()
    }

    /// How the last request was sent.
    pub(crate) fn sent(&self) -> WriteTiming {
        self.sent
    }

    /// What is to be handed out of a body of announced length.
    pub(crate) fn remaining(&self) -> Option<u64> {
        let first = self.first.as_ref().map_or(0, Bytes::len) as u64;
        self.decoder.remaining().map(|rest| rest + first)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_done() {
            let write = if let Some(only) = self.output.only() {
                on_stream!(self, stream => Pin::new(stream).poll_write(cx, only))
            } else {
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                let count = self.output.slices(&mut slices);
                let slices = &slices[..count];
                on_stream!(self, stream => Pin::new(stream).poll_write_vectored(cx, slices))
            };
            match ready!(write)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.output.advance(written),
            }
            if self.output.is_done() {
                self.sent.written_at = Some(Instant::now());
            }
        }
        match &mut self.stream {
            Stream::Tls(stream) => stream.poll_flushed(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Reads once, and gives what has come to `take`; nothing is the connection's end.
    fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Self, &[u8]) -> Result<T, ConnError>,
    ) -> Poll<Result<T, ConnError>> {
        INPUT.with_borrow_mut(|input| {
            let mut read = ReadBuf::new(input);
            ready!(on_stream!(self, stream => Pin::new(stream).poll_read(cx, &mut read)))?;
            self.heard |= !read.filled().is_empty();
            Poll::Ready(take(self, read.filled()))
        })
    }

    fn take_head(&mut self, come: &[u8]) -> Result<Option<ResponseHead>, ConnError> {
        if come.is_empty() {
            return Err(ConnError::Closed);
        }
        if self.input.is_empty() {
            let head = self.begin(come, true)?;
            if head.is_none() {
                self.input = come.to_vec();
            }
            return Ok(head);
        }
        let mut held = std::mem::take(&mut self.input);
        held.extend_from_slice(come);
        let head = self.begin(&held, false)?;
        if head.is_none() {
            self.input = held;
        }
        Ok(head)
    }

    /// Begins with an answer if all of its head has come, and with the body behind it.
    fn begin(&mut self, come: &[u8], first: bool) -> Result<Option<ResponseHead>, ConnError> {
        let Some(ParsedResponse { head, decoder, keeps_alive, length }) = read_response_head(come, first)?
        else {
            return Ok(None);
        };
        (self.decoder, self.keeps_alive) = (decoder, keeps_alive);
        self.first = self.take_body(&come[length..])?;
        Ok(Some(head))
    }

    fn take_data(&mut self, come: &[u8]) -> Result<Option<Bytes>, ConnError> {
        if come.is_empty() {
            return if self.decoder.close() { Ok(None) } else { Err(ConnError::Closed) };
        }
        self.take_body(come)
    }

    fn take_body(&mut self, come: &[u8]) -> Result<Option<Bytes>, ConnError> {
        let first = self.decoder.next(come)?;
        let mut used = first.end;
        let second = self.decoder.next(&come[used..])?;
        let body = if second.is_empty() {
            // In one part, as most of what is read: memory that fits needs no other to be shared.
            used += second.end;
            Bytes::copy_from_slice(&come[first])
        } else {
            let mut body = Vec::with_capacity(come.len() - first.start);
            body.extend_from_slice(&come[first]);
            body.extend_from_slice(&come[used..][second.clone()]);
            used += second.end;
            used += self.decoder.decode(&come[used..], &mut body)?;
            body.into()
        };
        // Otherwise there is something that nobody has asked for.
        self.keeps_alive &= used == come.len();
        Ok((!body.is_empty()).then_some(body))
    }
}

/// What of a request has not been written.
#[derive(Default)]
struct PendingRequest {
    request: OutgoingRequest,
    /// Which piece is next, the head being the first, and how much of it is written.
    piece: usize,
    offset: usize,
}

impl PendingRequest {
    fn new(request: OutgoingRequest) -> Self {
        Self { request, piece: 0, offset: 0 }
    }

    fn is_done(&self) -> bool {
        self.request.head.is_empty()
    }

    /// What is left, if it is a part of the head: there is no body apart from it.
    fn only(&self) -> Option<&[u8]> {
        self.request.body.is_empty().then(|| &self.request.head[self.offset..])
    }

    /// What is left of the pieces, the first one in part.
    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = iter::once(&self.request.head).chain(self.request.body.pieces()).skip(self.piece);
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(&piece[if count == 0 { self.offset } else { 0 }..]);
            count += 1;
        }
        count
    }

    /// Of the piece that is next.
    fn length(&self) -> Option<usize> {
        match self.piece.checked_sub(1) {
            None => Some(self.request.head.len()),
            Some(piece) => self.request.body.pieces().get(piece).map(Bytes::len),
        }
    }

    fn advance(&mut self, written: usize) {
        self.offset += written;
        while let Some(length) = self.length() {
            if self.offset < length {
                return;
            }
            self.offset -= length;
            // The other leg may be far ahead, and the answer on its way: each piece goes as soon as it can.
            if let Some(sent) = self.piece.checked_sub(1) {
                self.request.body.release(sent);
            }
            self.piece += 1;
        }
        *self = Self::default();
    }
}

impl From<MalformedMessage> for ConnError {
    fn from(bad: MalformedMessage) -> Self {
        Self::Bad(bad)
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
            Self::Bad(MalformedMessage(what)) => f.write_str(what),
            Self::TooLarge { limit } => write!(f, "its body is over {limit} bytes"),
        }
    }
}

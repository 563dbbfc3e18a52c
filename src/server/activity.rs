//! What a client connection is doing, as its socket and its requests see it.
//!
//! hyper does not say whether a connection is idle or in the middle of a head.
//! [`Watched`] and [`Busy`] note it in flags; the clock is read elsewhere, and not
//! more than once a request.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::stream::ClientStream;
use crate::error::Error;
use crate::gate::Place;
use crate::metrics::WorkerMetrics;
use crate::proxy::Relay;
use crate::record::Record;
use crate::wire::pieces::Pieces;

/// One connection's flags. All of them are set and read by its own task; they are atomic only because tasks must
/// be `Send`.
pub(super) struct Activity {
    /// Who is at the other end.
    peer: Option<SocketAddr>,
    /// A request is under way, from the end of its head to the end of its answer.
    busy: AtomicBool,
    /// Bytes have come that belong to a head whose end has not.
    in_head: AtomicBool,
    /// Something happened that the wait for a head is counted from.
    touched: AtomicBool,
    /// The client has not taken all that was written.
    blocked: AtomicBool,
    /// An answer was given before its request was read to the end.
    cut_short: AtomicBool,
    /// When decode's first byte came that is about to be written: nanoseconds after `begun`. 0: none is.
    first_byte: AtomicU64,
    begun: Instant,
    metrics: Arc<WorkerMetrics>,
    /// The request waits for its turn, and its body is unread.
    queued: AtomicBool,
}

/// What a connection without a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    ForHead,
    ForRestOfHead,
}

impl Activity {
    pub(super) fn new(peer: Option<SocketAddr>, metrics: Arc<WorkerMetrics>) -> Self {
        Self {
            peer,
            busy: AtomicBool::new(false),
            in_head: AtomicBool::new(false),
            touched: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            cut_short: AtomicBool::new(false),
            first_byte: AtomicU64::new(0),
            begun: Instant::now(),
            metrics,
            queued: AtomicBool::new(false),
        }
    }

    /// What came first of decode is the next to be written.
    fn gives_first(&self, came: Instant) {
        let nanos = came.saturating_duration_since(self.begun).as_nanos();
        self.first_byte.store(u64::try_from(nanos).unwrap_or(u64::MAX), Relaxed);
    }

    /// Something was written, or could not be.
    fn relayed(&self) {
        let came = self.first_byte.swap(0, Relaxed);
        self.metrics.relayed(self.begun.elapsed().saturating_sub(Duration::from_nanos(came)));
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// `None` while a request is under way.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        if self.busy.load(Relaxed) {
            return None;
        }
        Some(if self.in_head.load(Relaxed) { Waiting::ForRestOfHead } else { Waiting::ForHead })
    }

    /// Whether the wait has begun anew since this was last asked.
    pub(super) fn take_touched(&self) -> bool {
        let touched = self.touched.load(Relaxed);
        self.touched.store(false, Relaxed);
        touched
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.load(Relaxed)
    }

    pub(super) fn cut_short(&self) {
        self.cut_short.store(true, Relaxed);
    }

    /// While a request waits in the queue, nobody reads its body, so that hyper would not see its client leave.
    pub(super) fn set_queued(&self, queued: bool) {
        self.queued.store(queued, Relaxed);
    }

    pub(super) fn is_cut_short(&self) -> bool {
        self.cut_short.load(Relaxed)
    }

    /// While a request is under way, hyper reads on after the request's end unless it still has bytes; so whether
    /// the last read brought any says whether a part of the next head is there.
    fn read(&self, bytes: &[u8]) {
        if self.busy.load(Relaxed) {
            self.in_head.store(!bytes.is_empty(), Relaxed);
        } else if !self.in_head.load(Relaxed) && bytes.iter().any(|byte| !b"\r\n".contains(byte)) {
            self.in_head.store(true, Relaxed);
            self.touched.store(true, Relaxed);
        }
    }

    fn wrote(&self, blocked: bool) {
        if self.first_byte.load(Relaxed) != 0 && !blocked {
            self.relayed();
        }
        self.blocked.store(blocked, Relaxed);
        // Every answer's end is written after the request's beginning was seen, and mostly after its body is dropped.
        self.touched.store(true, Relaxed);
    }
}

/// A request under way, until this is dropped.
pub(super) struct Busy(Arc<Activity>);

impl Busy {
    pub(super) fn begin(activity: &Arc<Activity>) -> Self {
        activity.busy.store(true, Relaxed);
        Self(Arc::clone(activity))
    }

    pub(super) fn activity(&self) -> &Activity {
        &self.0
    }
}

/// What says that a request is under way, for as long as it lives.
pub(super) trait UnderWay: Unpin {
    /// What came first of decode, at this time, is the next to be written.
    fn gives_first(&self, came: Instant);
}

impl UnderWay for Busy {
    fn gives_first(&self, came: Instant) {
        self.0.gives_first(came);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.store(false, Relaxed);
    }
}

/// The body of an answer: relayed from a server, or the router's own. The request is under way until it is dropped.
pub(super) struct AnswerBody<B> {
    body: Either<Relay, Full<Pieces>>,
    under_way: B,
    /// The request's place among those that may be under way.
    _place: Option<Place>,
    /// After the body: finished when the legs have ended.
    record: Record,
}

impl<B> AnswerBody<B> {
    pub(super) fn new(
        body: Either<Relay, Full<Pieces>>,
        under_way: B,
        place: Option<Place>,
        record: Record,
    ) -> Self {
        Self { body, under_way, _place: place, record }
    }
}

impl<B: UnderWay> Body for AnswerBody<B> {
    type Data = Pieces;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Pieces>, Error>>> {
        let frame = match &mut self.body {
            Either::Left(relay) => Pin::new(relay).poll_frame(cx),
            Either::Right(own) => Pin::new(own).poll_frame(cx).map_err(|never| match never {}),
        };
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(came) = self.record.gives(frame.data_ref().map_or(0, Pieces::len)) {
                    self.under_way.gives_first(came);
                }
            }
            Poll::Ready(Some(Err(error))) => self.record.failed(error),
            Poll::Ready(None) | Poll::Pending => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// hyper does not ask for the end of a body that has said that it is there.
impl<B> Drop for AnswerBody<B> {
    fn drop(&mut self) {
        if matches!(self.body, Either::Right(_)) || self.body.is_end_stream() {
            self.record.completed();
        } else if let Either::Left(relay) = &self.body
            && let Some(error) = relay.failure()
        {
            // The client left before it could be told.
            self.record.failed(error);
        }
    }
}

/// A client's stream that notes what goes through it.
pub(super) struct Watched {
    stream: ClientStream,
    activity: Arc<Activity>,
    /// Ends when the client leaves; only while its request is queued.
    leaving: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Watched {
    pub(super) fn new(stream: ClientStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity, leaving: None }
    }

    /// Whether the client has left although it has not been read to its end.
    fn poll_leaving(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.activity.queued.load(Relaxed) {
            self.leaving = None;
            return Poll::Pending;
        }
        if self.leaving.is_none() {
            self.leaving = leaving(self.stream.socket()).ok();
        }
        self.leaving.as_mut().map_or(Poll::Pending, |leaving| leaving.as_mut().poll(cx))
    }

    pub(super) fn into_stream(self) -> ClientStream {
        self.stream
    }
}

/// Ends when the peer has closed or reset the connection. On a descriptor of its own, because it outlives any borrow.
fn leaving(socket: &TcpStream) -> io::Result<Pin<Box<dyn Future<Output = ()> + Send>>> {
    let socket = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned()?);
    let socket = TcpStream::from_std(socket)?;
    Ok(Box::pin(async move {
        // Not `READABLE`, which unread bytes are as well; all there is without them is the end.
        let _ = socket.ready(Interest::PRIORITY).await;
    }))
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.activity.read(&buffer.filled()[before..]);
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.activity.wrote(polled.is_pending());
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.activity.wrote(polled.is_pending());
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper comes here whenever it is polled.
        if self.poll_leaving(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Nothing: how a connection is closed is decided when hyper is done with it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

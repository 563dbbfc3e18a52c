//! What hyper does not report of a client's connection: how many requests are open, since when there is none,
//! and whether the client reads its response.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::RequestBody;
use super::request_body::discard;
use crate::http1::{BodyTimeouts, ClientTimeouts, CloseWatch, Stream};
use crate::timer::Timer;

/// The requests of one connection.
pub(super) struct OpenRequests {
    requests: Mutex<Requests>,
    body_timeouts: BodyTimeouts,
}

struct Requests {
    open: usize,
    /// When the last one ended, or the first byte of the next one's head arrived.
    since: Instant,
    /// A part of the next head has arrived, and no request is open.
    head_begun: bool,
    /// Since when the kernel has accepted nothing of what is to be written.
    write_blocked: Option<Instant>,
    /// The connection takes no more requests.
    is_ending: bool,
    /// The last response was sent before all of its request's body was read.
    is_cut_short: bool,
    /// The last request was HTTP/1.0.
    is_http_10: bool,
    /// Discards the rest of a request's body, which counts as an open request. It returns whether it reached
    /// the end.
    discarding: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
}

impl OpenRequests {
    pub(super) fn new(body_timeouts: BodyTimeouts) -> Self {
        let requests = Mutex::new(Requests {
            open: 0,
            since: Instant::now(),
            head_begun: false,
            write_blocked: None,
            is_ending: false,
            is_cut_short: false,
            is_http_10: false,
            discarding: None,
        });
        Self { requests, body_timeouts }
    }

    /// Only the worker's thread takes this lock, a few times a request.
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self) {
        self.lock().is_ending = true;
    }

    pub(super) fn is_ending(&self) -> bool {
        self.lock().is_ending
    }

    fn is_any_open(&self) -> bool {
        self.lock().open > 0
    }

    pub(super) fn is_cut_short(&self) -> bool {
        self.lock().is_cut_short
    }

    pub(super) fn is_http_10(&self) -> bool {
        self.lock().is_http_10
    }

    /// Discards what has arrived of a request's body after its response. Ready when that has ended; a
    /// connection that closes does not wait for it.
    pub(super) fn poll_discarded(&self, is_closing: bool, cx: &mut Context<'_>) -> Poll<()> {
        // Without the lock: hyper may wake this connection.
        let Some(mut rest) = self.lock().discarding.take() else { return Poll::Pending };
        let is_whole = match rest.as_mut().poll(cx) {
            Poll::Ready(is_whole) => is_whole,
            Poll::Pending if is_closing => false,
            Poll::Pending => {
                self.lock().discarding = Some(rest);
                return Poll::Pending;
            }
        };
        // hyper stops reading, if this was not the end.
        drop(rest);
        let mut now = self.lock();
        now.is_cut_short |= !is_whole;
        (now.open, now.since) = (now.open - 1, Instant::now());
        Poll::Ready(())
    }

    /// The first bytes after a request start the next one's head. Empty lines do not (RFC 9112, section 2.2).
    fn record_read(&self, bytes: &[u8]) {
        let mut now = self.lock();
        let begins = bytes.iter().any(|byte| !b"\r\n".contains(byte));
        if begins && now.open == 0 && !now.head_begun {
            (now.head_begun, now.since) = (true, Instant::now());
        }
    }

    fn record_write(&self, is_blocked: bool) {
        let mut now = self.lock();
        now.write_blocked = is_blocked.then(|| now.write_blocked.unwrap_or_else(Instant::now));
    }
}

/// A request that is open until this is dropped.
pub(super) struct OpenRequest {
    requests: Arc<OpenRequests>,
}

impl OpenRequest {
    pub(super) fn begin(requests: &Arc<OpenRequests>) -> Self {
        let mut now = requests.lock();
        (now.open, now.head_begun) = (now.open + 1, false);
        Self { requests: Arc::clone(requests) }
    }

    pub(super) fn set_http_10(&self, is_http_10: bool) {
        self.requests.lock().is_http_10 = is_http_10;
    }

    /// Lets the connection take no more requests.
    pub(super) fn end_connection(&self) {
        self.requests.end();
    }

    /// Discards what is left of the request's body after the response, if the connection does not close.
    pub(super) fn discard(&self, mut rest: impl RequestBody + Send + 'static, closes: bool) {
        let mut now = self.requests.lock();
        if closes {
            now.is_cut_short = true;
        } else if !rest.is_ended() {
            let timeouts = self.requests.body_timeouts;
            now.open += 1;
            now.discarding = Some(Box::pin(async move {
                matches!(discard(&mut rest, timeouts, &mut Timer::default()).await, Ok(true))
            }));
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut now = self.requests.lock();
        now.open -= 1;
        now.since = Instant::now();
    }
}

/// The idle, head and write timeouts of a connection.
pub(super) struct IdleWait<'a> {
    requests: &'a OpenRequests,
    timeouts: ClientTimeouts,
    since: Instant,
    timer: Timer,
}

/// Which timeout has passed.
pub(super) enum IdleEnd {
    NoRequest,
    /// The rest of a head.
    NoHead(Duration),
    /// The client does not read its response.
    NotRead,
}

impl<'a> IdleWait<'a> {
    pub(super) fn new(requests: &'a OpenRequests, timeouts: ClientTimeouts) -> Self {
        Self { requests, timeouts, since: Instant::now(), timer: Timer::default() }
    }

    pub(super) fn restart(&mut self, limit: Duration) {
        (self.since, self.timeouts.idle) = (Instant::now(), limit);
    }

    /// The end of a request wakes no task, so the timer runs while requests are open, too.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<IdleEnd> {
        let (since, limit, end) = {
            let now = self.requests.lock();
            let idle = self.timeouts.idle;
            match now.write_blocked {
                Some(since) => (since, idle, IdleEnd::NotRead),
                None if now.open > 0 => (Instant::now(), idle, IdleEnd::NoRequest),
                None if now.head_begun => {
                    (now.since, self.timeouts.head, IdleEnd::NoHead(self.timeouts.head))
                }
                None => (now.since.max(self.since), idle, IdleEnd::NoRequest),
            }
        };
        ready!(self.timer.poll_until(since + limit, cx));
        Poll::Ready(end)
    }
}

/// A client's stream whose reads and writes are observed.
///
/// hyper reads nothing while it has bytes that are not used yet, of a body that no one reads or of a next
/// request, and then does not see that the client closes the connection. The stream sees it, and fails.
pub(super) struct ObservedStream {
    stream: Stream,
    requests: Arc<OpenRequests>,
    /// hyper waits for bytes, so it will see the end.
    is_read: bool,
    close_watch: CloseWatch,
}

impl ObservedStream {
    pub(super) fn new(stream: Stream, requests: Arc<OpenRequests>) -> Self {
        Self { stream, requests, is_read: false, close_watch: CloseWatch::default() }
    }

    pub(super) fn into_stream(self) -> Stream {
        self.stream
    }

    fn observe_write(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.requests.record_write(written.is_pending());
        written
    }
}

impl AsyncRead for ObservedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.is_read = read.is_pending();
        ready!(read)?;
        self.requests.record_read(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ObservedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.observe_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.observe_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes each time it is polled, after it has read and written what it can.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        let Self { stream, requests, is_read, close_watch } = &mut *self;
        if *is_read || !requests.is_any_open() {
            close_watch.stop();
        } else if close_watch.poll(stream, cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

//! What hyper does not report of a connection to a backend: whether a byte was received, when the request was
//! written, and why it could not be.
//!
//! The counterpart for clients' connections is [`open_requests`](super::open_requests).

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http1::Stream;

/// What passed over the socket since the request began. Retries and records need it.
#[derive(Default)]
pub(super) struct Traffic {
    received: AtomicBool,
    /// hyper has taken the last of the request's body.
    body_taken: AtomicBool,
    /// The last write after that.
    written_at: Mutex<Option<Instant>>,
    /// Why the rest of the request could not be written. It ends the connection, so no request resets it.
    write_error: Mutex<Option<io::Error>>,
    /// There was such an error.
    is_unwritable: AtomicBool,
}

impl Traffic {
    /// Starts anew for the next request.
    pub(super) fn begin(&self) {
        self.received.store(false, Relaxed);
        self.body_taken.store(false, Relaxed);
        *self.written_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn has_received(&self) -> bool {
        self.received.load(Relaxed)
    }

    pub(super) fn is_writable(&self) -> bool {
        !self.is_unwritable.load(Relaxed)
    }

    pub(super) fn written_at(&self) -> Option<Instant> {
        *self.written_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_write_error(&self) -> Option<io::Error> {
        self.write_error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn set_body_taken(&self, is_taken: bool) {
        self.body_taken.store(is_taken, Relaxed);
    }

    fn record_read(&self, count: usize) {
        self.received.fetch_or(count > 0, Relaxed);
    }

    fn record_write(&self) {
        if self.body_taken.load(Relaxed) {
            *self.written_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    fn record_write_error(&self, error: io::Error) {
        self.is_unwritable.store(true, Relaxed);
        *self.write_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// A stream to a backend whose reads and writes are recorded.
///
/// hyper gives up at a write error, and would lose the response of a server that has responded and closed
/// before it read everything. So hyper does not hear of the error: the rest of the request is discarded, and
/// hyper reads the response, or the end of the connection.
pub(super) struct ObservedBackend {
    stream: Stream,
    traffic: Arc<Traffic>,
}

impl ObservedBackend {
    pub(super) fn new(stream: Stream, traffic: Arc<Traffic>) -> Self {
        Self { stream, traffic }
    }

    /// The outcome of writing `length` bytes as hyper sees it.
    fn written(&self, length: usize, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(match ready!(written) {
            Ok(count) => {
                self.traffic.record_write();
                count
            }
            Err(error) => {
                self.traffic.record_write_error(error);
                length
            }
        }))
    }
}

impl AsyncRead for ObservedBackend {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.traffic.record_read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ObservedBackend {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !self.traffic.is_writable() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(bytes.len(), written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        if !self.traffic.is_writable() {
            return Poll::Ready(Ok(length));
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.written(length, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.traffic.is_writable()
            && let Err(error) = ready!(Pin::new(&mut self.stream).poll_flush(cx))
        {
            self.traffic.record_write_error(error);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

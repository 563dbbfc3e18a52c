//! What connections to clients and to backends share: the byte stream, the read buffer, an incomplete head,
//! and vectored writes.
//!
//! It does not know which side the peer is, nor what the bytes mean.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::tls::TlsConnection;

/// Largest single read through the shared buffer. Tokens of a stream that are already in the socket are read
/// and relayed together.
pub(crate) const MAX_READ: usize = 64 << 10;
/// Buffers handed to one `writev`. Linux takes 1,024; more than 64 gained nothing.
const MAX_SLICES: usize = 64;

thread_local! {
    /// Shared by all connections of the thread. Its bytes are consumed before the poll returns, so neither an
    /// idle connection nor a stream that waits for its next token holds a buffer.
    static READ_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_READ]);
}

/// The byte stream below a connection, to a client or to a backend.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsConnection>),
    Prefixed(Box<Prefixed>),
    #[cfg(any(test, fuzzing))]
    Memory(tokio::io::DuplexStream),
}

/// A socket whose first bytes were read already, to detect the protocol.
pub(crate) struct Prefixed {
    prefix: Bytes,
    socket: TcpStream,
}

impl Stream {
    /// A stream that returns `prefix`, which was read from `socket`, before the rest.
    pub(crate) fn prefixed(prefix: Bytes, socket: TcpStream) -> Self {
        Self::Prefixed(Box::new(Prefixed { prefix, socket }))
    }

    /// `None` for an in-memory stream, which only tests use.
    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(socket) => Some(socket),
            Self::Tls(stream) => Some(stream.socket()),
            Self::Prefixed(prefixed) => Some(&prefixed.socket),
            #[cfg(any(test, fuzzing))]
            Self::Memory(_) => None,
        }
    }

    /// Flushes TLS. Other streams buffer nothing: what is written is in the kernel.
    pub(crate) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tls(stream) => stream.poll_flushed(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Whether TLS holds no unsent bytes.
    pub(crate) fn is_flushed(&self) -> bool {
        match self {
            Self::Tls(stream) => stream.is_flushed(),
            _ => true,
        }
    }

    /// Writes the last bytes of a connection. A plain socket has nothing queued and takes them at once; if it
    /// does not, the peer is not reading.
    pub(crate) async fn write_last(&mut self, bytes: &[u8]) {
        match self {
            Self::Tls(stream) => {
                let _ = stream.write_all(bytes).await;
                let _ = stream.flush().await;
            }
            plain => {
                let _ = plain.socket().map(|socket| socket.try_write(bytes));
            }
        }
    }

    /// Sends `close_notify` on a TLS connection.
    pub(crate) async fn close_notify(&mut self) {
        if let Self::Tls(stream) = self {
            let _ = stream.shutdown().await;
        }
    }

    /// Reads once into `buffer` and returns what was read. Empty: the end of the stream.
    pub(crate) fn poll_read_into<'a>(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &'a mut [u8],
    ) -> Poll<io::Result<&'a [u8]>> {
        let mut read = ReadBuf::new(buffer);
        ready!(Pin::new(self).poll_read(cx, &mut read))?;
        let count = read.filled().len();
        Poll::Ready(Ok(&buffer[..count]))
    }
}

/// Lends the thread's read buffer, up to `limit` bytes of it. `read` must not wait while it holds it.
pub(crate) fn with_read_buffer<T>(limit: usize, read: impl FnOnce(&mut [u8]) -> T) -> T {
    READ_BUFFER.with_borrow_mut(|buffer| read(&mut buffer[..limit.min(MAX_READ)]))
}

/// Writes all of `data`, or as much as the kernel takes. Contiguous data goes out with `write`, which costs
/// less than a `writev` of one slice.
pub(crate) fn poll_write_all(
    stream: &mut Stream,
    cx: &mut Context<'_>,
    data: &mut (impl Buf + ?Sized),
) -> Poll<io::Result<()>> {
    while data.has_remaining() {
        let stream = Pin::new(&mut *stream);
        let written = if data.chunk().len() == data.remaining() {
            ready!(stream.poll_write(cx, data.chunk()))?
        } else {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = data.chunks_vectored(&mut slices);
            ready!(stream.poll_write_vectored(cx, &slices[..count]))?
        };
        // The kernel takes nothing and gives no error: without this the loop would not end.
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        data.advance(written);
    }
    Poll::Ready(Ok(()))
}

/// The first part of a head that is incomplete.
#[derive(Default)]
pub(crate) struct PartialHead {
    bytes: Vec<u8>,
    /// Bytes that were searched for the head's end before, so that a head that arrives byte by byte is not
    /// searched from the start each time.
    searched: usize,
}

impl PartialHead {
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Parses what has arrived so far: `parse` gets all bytes, and how many of them were searched before.
    /// Nearly every head arrives with one read and is parsed in the read buffer, without a copy.
    pub(crate) fn parse<T, E>(
        &mut self,
        received: &[u8],
        parse: impl FnOnce(&[u8], usize) -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        if self.bytes.is_empty() {
            let parsed = parse(received, 0)?;
            if parsed.is_none() {
                self.keep(received.to_vec());
            }
            return Ok(parsed);
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.extend_from_slice(received);
        let parsed = parse(&bytes, self.searched)?;
        self.searched = 0;
        if parsed.is_none() {
            self.keep(bytes);
        }
        Ok(parsed)
    }

    fn keep(&mut self, bytes: Vec<u8>) {
        // The end is at most 4 bytes long (CR LF CR LF), and up to 3 of them may be here.
        self.searched = bytes.len().saturating_sub(3);
        self.bytes = bytes;
    }
}

/// Forwards a call to the stream's variant.
macro_rules! on_stream {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => $call,
            Stream::Tls($stream) => $call,
            Stream::Prefixed(prefixed) => {
                let $stream = &mut prefixed.socket;
                $call
            }
            #[cfg(any(test, fuzzing))]
            Stream::Memory($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Self::Prefixed(prefixed) = &mut *self
            && !prefixed.prefix.is_empty()
        {
            let count = prefixed.prefix.len().min(buffer.remaining());
            buffer.put_slice(&prefixed.prefix[..count]);
            prefixed.prefix.advance(count);
            return Poll::Ready(Ok(()));
        }
        on_stream!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        on_stream!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_stream!(self, stream => Pin::new(stream).poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        // All variants are.
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

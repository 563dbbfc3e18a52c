//! What both sides of a connection share: the byte stream, the read buffer, the beginning
//! of a head that has not come as a whole, and writing several buffers with one call.
//!
//! Nothing here knows who is at the other end, or what the bytes mean.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::tls::TlsConnection;

/// Largest single read through the shared buffer. A stream's tokens that are already in the socket are read,
/// and passed on, together.
pub(crate) const MAX_READ: usize = 64 << 10;
/// Buffers handed to one `writev`. Linux takes 1,024; more than 64 gained nothing.
const MAX_SLICES: usize = 64;

thread_local! {
    /// The bytes read last, by any connection of this thread. They are used up before the poll returns, so an
    /// idle connection and a stream that waits for its next token hold no buffer.
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

/// A socket whose first bytes were read already, to see which protocol they belong to.
pub(crate) struct Prefixed {
    prefix: Bytes,
    socket: TcpStream,
}

impl Stream {
    /// Puts bytes that were read from `socket` in front of what it will bring.
    pub(crate) fn prefixed(prefix: Bytes, socket: TcpStream) -> Self {
        Self::Prefixed(Box::new(Prefixed { prefix, socket }))
    }

    /// `None` for a stream within the process, which only tests have.
    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(socket) => Some(socket),
            Self::Tls(stream) => Some(stream.socket()),
            Self::Prefixed(prefixed) => Some(&prefixed.socket),
            #[cfg(any(test, fuzzing))]
            Self::Memory(_) => None,
        }
    }

    /// Hands on what TLS still holds. Other streams keep nothing back: what is written is with the kernel.
    pub(crate) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tls(stream) => stream.poll_flushed(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Whether nothing that was written waits in TLS.
    pub(crate) fn is_flushed(&self) -> bool {
        match self {
            Self::Tls(stream) => stream.is_flushed(),
            _ => true,
        }
    }

    /// Writes the last bytes of a connection. A plain socket takes them at once, as nothing is queued; if it
    /// does not, the peer is not reading and would not see them anyway.
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

    /// Sends TLS's `close_notify`, where there is TLS.
    pub(crate) async fn close_notify(&mut self) {
        if let Self::Tls(stream) = self {
            let _ = stream.shutdown().await;
        }
    }

    /// Reads once into `buffer` and returns what was read: nothing is the stream's end.
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

/// Writes all of `data`, or as much as the kernel takes: with `write` if it is in one piece, which costs less
/// than a `writev` of one.
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

/// The beginning of a head whose end has not come.
#[derive(Default)]
pub(crate) struct PartialHead {
    bytes: Vec<u8>,
    /// Bytes known not to hold the head's end, so that a head which comes byte by byte is not searched each
    /// time.
    searched: usize,
}

impl PartialHead {
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Parses what has come so far: `parse` gets all bytes, and how many of them were searched before. Nearly
    /// every head comes with one read, and is parsed where it lies, without a copy.
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

/// The same call on whatever carries the bytes.
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
        // So is each of the streams.
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

//! A client's connection as bytes: plain, encrypted, or with some of it read already.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// What carries a client's bytes.
pub(crate) enum ClientStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Prefixed(Box<Prefixed>),
    #[cfg(any(test, fuzzing))]
    Memory(tokio::io::DuplexStream),
}

/// A socket of which the first bytes have been read, to see what they are.
pub(crate) struct Prefixed {
    read: Bytes,
    socket: TcpStream,
}

impl ClientStream {
    pub(crate) fn begun(read: Bytes, socket: TcpStream) -> Self {
        Self::Prefixed(Box::new(Prefixed { read, socket }))
    }

    /// `None`: it is within the process, in tests.
    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Tls(stream) => Some(stream.get_ref().0),
            Self::Prefixed(begun) => Some(&begun.socket),
            #[cfg(any(test, fuzzing))]
            Self::Memory(_) => None,
        }
    }

    /// Whether what is written is with the kernel.
    pub(crate) fn is_plain(&self) -> bool {
        !matches!(self, Self::Tls(_))
    }

    /// Writes a last word, which the kernel takes at once: nothing is queued. If not, the client does not read.
    pub(crate) async fn say(&mut self, word: &[u8]) {
        match self {
            Self::Tls(stream) => {
                let _ = stream.write_all(word).await;
                let _ = stream.flush().await;
            }
            plain => {
                let _ = plain.socket().map(|socket| socket.try_write(word));
            }
        }
    }

    /// Tells the client, where TLS has a word for it, that nothing more will come.
    pub(crate) async fn say_end(&mut self) {
        if let Self::Tls(stream) = self {
            let _ = stream.shutdown().await;
        }
    }
}

/// The same call on whatever carries the bytes.
macro_rules! on_stream {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            ClientStream::Plain($stream) => $call,
            ClientStream::Tls($stream) => $call,
            ClientStream::Prefixed(begun) => {
                let $stream = &mut begun.socket;
                $call
            }
            #[cfg(any(test, fuzzing))]
            ClientStream::Memory($stream) => $call,
        }
    };
}

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
            #[cfg(any(test, fuzzing))]
            Self::Memory(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Prefixed(begun) if begun.read.is_empty() => {
                Pin::new(&mut begun.socket).poll_read(cx, buffer)
            }
            Self::Prefixed(begun) => {
                let count = begun.read.len().min(buffer.remaining());
                buffer.put_slice(&begun.read[..count]);
                begun.read.advance(count);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for ClientStream {
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

    /// So do all of them.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

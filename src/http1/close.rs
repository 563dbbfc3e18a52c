//! How a client's connection is closed so that the client gets the whole of its last response.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::io::Stream;

/// How long the rest of what a client sends is read and discarded. Closing a socket with unread bytes resets
/// the connection (RFC 9112, section 9.6), and the client may lose the response.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are discarded at a time.
const DISCARD_READ: usize = 4 << 10;

/// Writes the last response of a connection, and closes it.
pub(crate) async fn reject(mut stream: Stream, response: &[u8]) {
    let _ = tokio::time::timeout(LINGER, stream.write_last(response)).await;
    linger(stream).await;
}

/// Resets a connection, because an orderly end would make its last response look complete: without a length
/// and without chunks, the end of the connection is the end of the body (RFC 9112, section 6.3).
pub(crate) fn reset(stream: &Stream) {
    // With TLS the missing `close_notify` says the same.
    let Some(socket) = stream.socket() else { return };
    // A socket that lingers for no time is reset when it is closed.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

/// Closes a connection whose client has been told that it ends.
pub(crate) async fn close(mut stream: Stream) {
    close_notify(&mut stream).await;
}

/// Closes the sending side: the client sees the end of the last response, and may still send.
pub(crate) async fn half_close(stream: &mut Stream) -> io::Result<()> {
    close_notify(stream).await;
    stream.socket().map_or(Ok(()), |socket| SockRef::from(socket).shutdown(Shutdown::Write))
}

/// Closes the sending side, and reads until the client has seen it.
pub(crate) async fn linger(mut stream: Stream) {
    if half_close(&mut stream).await.is_err() {
        return;
    }
    let Some(socket) = stream.socket() else { return };
    let drained = async { while socket.readable().await.is_ok() && discard(socket) {} };
    let _ = tokio::time::timeout(LINGER, drained).await;
}

async fn close_notify(stream: &mut Stream) {
    let _ = tokio::time::timeout(LINGER, stream.close_notify()).await;
}

/// Discards what has arrived. Returns whether more may follow.
fn discard(socket: &TcpStream) -> bool {
    match socket.try_read(&mut [0; DISCARD_READ]) {
        Ok(count) => count > 0,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

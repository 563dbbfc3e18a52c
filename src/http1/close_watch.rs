//! Notices that a client has closed its connection although nothing is read from it.
//!
//! The end of a connection comes behind its last byte: who does not read does not see it. The kernel tells it
//! all the same (EPOLLRDHUP), but a task that waits for a socket to become readable is woken at once as long
//! as bytes are unread. A second registration of the socket has a readiness of its own, which can be cleared
//! without a read.

use std::io;
use std::net;
use std::os::fd::AsFd;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::io::Stream;

/// Watches one connection, from the first poll on. It costs a file descriptor, so it is for connections with
/// unread bytes only.
#[derive(Default)]
pub(crate) struct CloseWatch(Option<Box<Registration>>);

enum Registration {
    Made(TcpStream),
    /// There is no file descriptor left. The close is noticed when the bytes before it are read.
    Failed,
}

impl CloseWatch {
    /// Ready when the client has closed its sending side, or the connection is broken.
    pub(crate) fn poll(&mut self, stream: &Stream, cx: &mut Context<'_>) -> Poll<()> {
        // In-memory streams, which only tests use, are not watched.
        let Some(socket) = stream.socket() else { return Poll::Pending };
        let registration = self.0.get_or_insert_with(|| Box::new(Registration::of(socket)));
        let Registration::Made(watched) = &**registration else { return Poll::Pending };
        loop {
            if ready!(watched.poll_read_ready(cx)).is_err() || is_read_closed(watched, cx) {
                return Poll::Ready(());
            }
            // Bytes: the next event is more of them, or the end. Nothing is read.
            let _ = watched.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
    }

    pub(crate) fn stop(&mut self) {
        self.0 = None;
    }
}

fn is_read_closed(socket: &TcpStream, cx: &mut Context<'_>) -> bool {
    match pin!(socket.ready(Interest::READABLE)).poll(cx) {
        Poll::Ready(state) => state.map_or(true, |state| state.is_read_closed()),
        Poll::Pending => false,
    }
}

impl Registration {
    fn of(socket: &TcpStream) -> Self {
        let copy = socket.as_fd().try_clone_to_owned().map(net::TcpStream::from);
        // Of tokio's own, as the first one is: the copy does not block either.
        copy.and_then(TcpStream::from_std).map_or(Self::Failed, Self::Made)
    }
}

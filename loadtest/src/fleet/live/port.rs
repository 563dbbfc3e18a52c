//! A server's port: its listener and its connections, which stop at one moment, and start again with the same
//! address.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::servers::{Shared, serve, stop_stream};
use crate::sim::Role;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1_024;

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// As by a process that closes its sockets.
    Close,
    /// As by a machine that has forgotten them.
    Reset,
}

/// What a connection had not answered when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Had {
    /// This request of the trace.
    Request(usize),
    /// One of which not all has been read. A router cannot know how much of it was.
    Unread,
}

/// A port. Dropping it stops its server.
pub(super) struct Port {
    pub(super) address: SocketAddr,
    role: Role,
    index: usize,
    state: State,
}

enum State {
    Open {
        stop: watch::Sender<Option<Stop>>,
        accepting: JoinHandle<Vec<Had>>,
    },
    /// Bound, so that nobody else takes the port, but not listening: connections are refused.
    Closed(TcpSocket),
    Failed,
}

impl Port {
    /// Listens on a free port of loopback.
    pub(super) fn open(shared: Arc<Shared>, role: Role, index: usize) -> io::Result<Self> {
        let socket = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = socket.local_addr()?;
        let mut port = Self { address, role, index, state: State::Closed(socket) };
        port.open_again(shared)?;
        Ok(port)
    }

    /// Listens again.
    pub(super) fn open_again(&mut self, shared: Arc<Shared>) -> io::Result<()> {
        let State::Closed(socket) = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(io::Error::other("a port that is not closed"));
        };
        let listener = socket.listen(BACKLOG)?;
        let (stop, stopped) = watch::channel(None);
        let accepting = tokio::spawn(accept(listener, shared, self.role, self.index, stopped));
        self.state = State::Open { stop, accepting };
        Ok(())
    }

    /// Closes the listener, ends all connections, and returns what they had not answered.
    pub(super) async fn close(&mut self, how: Stop) -> io::Result<Vec<Had>> {
        let State::Open { stop, accepting } = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(io::Error::other("a port that is not open"));
        };
        let _ = stop.send(Some(how));
        let had = accepting.await.map_err(io::Error::other)?;
        self.state = State::Closed(bound(self.address)?);
        Ok(had)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let State::Open { accepting, .. } = &self.state {
            accepting.abort();
        }
    }
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Waits for the end. An owner that is gone is one, too.
pub(super) async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let how = stop.wait_for(Option::is_some).await;
    how.ok().and_then(|how| *how).unwrap_or(Stop::Close)
}

async fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    role: Role,
    index: usize,
    mut stop: watch::Receiver<Option<Stop>>,
) -> Vec<Had> {
    let mut connections = JoinSet::new();
    // Of the connections: they end when the listener is closed, or a router would connect at once again.
    let (end, ended) = watch::channel(None);
    let how = loop {
        tokio::select! {
            biased;
            how = stopped(&mut stop) => break how,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, shared.clone(), role, index, ended.clone()))),
                // Out of descriptors: connections that close free some.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
        }
        while connections.try_join_next().is_some() {}
    };
    let mut had = Vec::new();
    if let Ok(listener) = listener.into_std() {
        // What the kernel has accepted, a router may have written to.
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            had.extend(stop_stream(&stream, how));
        }
    }
    let _ = end.send(Some(how));
    while let Some(connection) = connections.join_next().await {
        had.extend(connection.ok().flatten());
    }
    had
}

//! Backends for load tests: SGLang's response bytes, composed beforehand.
//!
//! The path and `"stream":true` select the response. Its length, pace and delay are set for the whole server
//! with [`Canned::plan`] or `PUT /canned?tokens=64&interval_us=20000`. Bodies above 4 KiB are discarded
//! unread, but for the room at their end with [`Plan::paired`]: then decode responds only when prefill has
//! read that room's body. Nothing else is checked and no KV transfer is simulated; [`crate::sim`] does that.

mod admin;
mod connection;
mod responses;
mod rooms;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, time::Duration};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

pub use crate::sim::Role;
pub(crate) use connection::unix_nanos;
use responses::Responses;
pub use responses::{PROMPT_LOGPROB_MARKER, TIMESTAMP_FIELD};
use rooms::Rooms;

/// How a server responds until its plan is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of a response.
    pub tokens: u32,
    /// Time between two tokens of a stream.
    pub interval: Duration,
    /// A whole stream is one write; otherwise each event is one, as with SGLang.
    pub single_write: bool,
    /// Time until prefill responds.
    pub prefill_delay: Duration,
    /// Entries in prefill's list of prompt logprobs.
    pub prompt_tokens: u32,
    /// In a [`Canned::pair`], decode responds to a body above 4 KiB with a room at its end only when prefill
    /// has read that room's body, or after 30 seconds. Real decode servers cannot respond earlier either.
    pub paired: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let (interval, prefill_delay) = (Duration::ZERO, Duration::ZERO);
        Self { tokens: 64, interval, single_write: false, prefill_delay, prompt_tokens: 512, paired: false }
    }
}

/// Counters since the plan was set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// Connections that carried at least one generation request.
    pub connections: u64,
    /// Generation requests, read to their end.
    pub requests: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

#[derive(Default)]
struct Counters {
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

struct Shared {
    role: Role,
    responses: Mutex<Arc<Responses>>,
    counters: Counters,
    /// Shared with the other server of a pair.
    rooms: Option<Arc<Rooms>>,
}

impl Shared {
    fn new(role: Role, plan: Plan, rooms: Option<Arc<Rooms>>) -> Self {
        let responses = Mutex::new(Arc::new(Responses::new(role, plan)));
        Self { role, responses, counters: Counters::default(), rooms }
    }

    fn responses(&self) -> Arc<Responses> {
        self.responses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, plan: Plan) {
        *self.responses.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Responses::new(self.role, plan));
        for counter in [&self.counters.connections, &self.counters.requests, &self.counters.bytes] {
            counter.store(0, Relaxed);
        }
    }

    fn counts(&self) -> RequestCounts {
        let [connections, requests, bytes] =
            [&self.counters.connections, &self.counters.requests, &self.counters.bytes]
                .map(|counter| counter.load(Relaxed));
        RequestCounts { connections, requests, bytes }
    }
}

/// A running server. Dropping it stops it.
pub struct Canned {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Canned {
    /// Listens on `addr` (port 0 picks a free port) and serves on the current runtime.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn start(role: Role, addr: SocketAddr, plan: Plan) -> io::Result<Self> {
        Self::serve(role, addr, plan, None)
    }

    /// A prefill and a decode server that share which rooms prefill has read.
    ///
    /// # Errors
    /// If an address cannot be bound.
    pub fn pair(prefill: SocketAddr, decode: SocketAddr, plan: Plan) -> io::Result<[Self; 2]> {
        let rooms = Some(Arc::new(Rooms::default()));
        Ok([
            Self::serve(Role::Prefill, prefill, plan, rooms.clone())?,
            Self::serve(Role::Decode, decode, plan, rooms)?,
        ])
    }

    fn serve(role: Role, addr: SocketAddr, plan: Plan, rooms: Option<Arc<Rooms>>) -> io::Result<Self> {
        let listener = listen(addr)?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared::new(role, plan, rooms));
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Ok(Self { addr, shared, accepting })
    }

    /// The address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Responds according to `plan` from the next request on, and resets the counters.
    pub fn plan(&self, plan: Plan) {
        self.shared.set(plan);
    }

    /// The counters since the plan was set.
    pub fn counts(&self) -> RequestCounts {
        self.shared.counts()
    }
}

impl Drop for Canned {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Listens with a long backlog: a thousand streams connect at once, and the usual backlog of 128 would make
/// some of them retry their SYN after a second.
fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(4096)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            // An error of a connection shows at the router; here the connection only ends.
            Ok((stream, _)) => drop(connections.spawn(connection::serve(stream, shared.clone()))),
            // Out of descriptors: connections that close free some.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

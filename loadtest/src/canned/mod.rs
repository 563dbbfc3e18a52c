//! Servers for load: the answers of SGLang, byte shapes and all, written beforehand.
//!
//! What is answered follows from the path and from `"stream":true`; how (tokens, pace, delay) is set for the whole
//! server with [`Canned::plan`] or `PUT /canned?tokens=64&interval_us=20000`. Bodies above 4 KiB are thrown away unread,
//! but for the room at their end if the plan is [`Plan::paired`]: then decode answers no room that prefill has not read.
//! Nothing else is checked, and no room is met: that is [`crate::sim`]'s business.

mod answers;
mod connection;
mod control;
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
use answers::Answers;
pub use answers::{MARK, STAMP};
pub(crate) use connection::unix_nanos;
use rooms::Rooms;

/// How a server answers until it is told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of an answer.
    pub tokens: u32,
    /// Time between two tokens of a stream.
    pub interval: Duration,
    /// A whole stream is one write; otherwise each event is one, as with SGLang.
    pub in_one_write: bool,
    /// Time until prefill answers.
    pub prefill_delay: Duration,
    /// Entries in prefill's list of prompt logprobs.
    pub prompt_tokens: u32,
    /// Decode of a [`Canned::pair`] answers a body above 4 KiB with a room at its end only when prefill has read that
    /// room's body whole, or after 30 seconds.
    pub paired: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let (interval, prefill_delay) = (Duration::ZERO, Duration::ZERO);
        Self { tokens: 64, interval, in_one_write: false, prefill_delay, prompt_tokens: 512, paired: false }
    }
}

/// What a server has seen since its plan was set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
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
    answers: Mutex<Arc<Answers>>,
    seen: Counters,
    /// With the other server of a pair.
    rooms: Option<Arc<Rooms>>,
}

impl Shared {
    fn new(role: Role, plan: Plan, rooms: Option<Arc<Rooms>>) -> Self {
        let answers = Mutex::new(Arc::new(Answers::new(role, plan)));
        Self { role, answers, seen: Counters::default(), rooms }
    }

    fn answers(&self) -> Arc<Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, plan: Plan) {
        *self.answers.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Answers::new(self.role, plan));
        for counter in [&self.seen.connections, &self.seen.requests, &self.seen.bytes] {
            counter.store(0, Relaxed);
        }
    }

    fn seen(&self) -> Seen {
        let [connections, requests, bytes] = [&self.seen.connections, &self.seen.requests, &self.seen.bytes]
            .map(|counter| counter.load(Relaxed));
        Seen { connections, requests, bytes }
    }
}

/// A running server; dropping it ends it.
pub struct Canned {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Canned {
    /// Listens on `addr` (port 0 takes a free one) and serves on the current runtime.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub fn start(role: Role, addr: SocketAddr, plan: Plan) -> io::Result<Self> {
        Self::serve(role, addr, plan, None)
    }

    /// A prefill and a decode server that know of each other's rooms.
    ///
    /// # Errors
    /// If an address cannot be listened on.
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

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Answers according to `plan` from the next request on, and counts from zero.
    pub fn plan(&self, plan: Plan) {
        self.shared.set(plan);
    }

    /// What it has seen since the plan was set.
    pub fn seen(&self) -> Seen {
        self.shared.seen()
    }
}

impl Drop for Canned {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A thousand streams open their connections at once: the usual backlog of 128 would make some wait a second.
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
            // A connection's failure is the router's to report; here it only ends.
            Ok((stream, _)) => drop(connections.spawn(connection::serve(stream, shared.clone()))),
            // Out of descriptors: some may be given back soon.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

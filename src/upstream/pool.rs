//! Keep-alive connections, kept between requests.
//!
//! Each worker has its own [`Pools`], one per server, so that a connection stays
//! on the runtime that opened it. A pool is made when a server is first asked, and
//! is gone when nothing is left in it. A connection comes back only through
//! [`Lease::park`]; a lease that is merely dropped closes its socket, which is
//! also how a request is cancelled at the server. The pool never retries, never
//! picks a server, and never looks into a body.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::connection_counts::{ConnectionCounts, Shard};
use super::dial::DialError;
use super::id_map::IdMap;
use super::{Backend, Dialer, SocketOptions};
use crate::http1::OutgoingRequest;
use crate::http1::ResponseHead;
use crate::http1::{BodyProgress, ConnError, Http1Client, SendError, Stream, WriteTiming};

/// How often idle connections are looked through, as a part of the idle timeout. Their age is counted in sweeps, not by
/// the clock, which would be read four times a request. They live at most an eighth too long: 4.5 s by default, still
/// within SGLang's 5 s.
const SWEEPS_PER_TIMEOUT: u32 = 8;

/// A shorter idle timeout than eight of these is kept less exactly.
const SHORTEST_SWEEP: Duration = Duration::from_millis(1);

/// The connections of one worker.
pub(crate) struct Pools {
    /// By [`Backend::id`]. Only its worker's thread takes this lock, as that of a [`Pool`].
    pools: Mutex<IdMap<u64, Arc<Pool>>>,
    max_idle: usize,
    /// Where this worker counts connections.
    shard: Shard,
    dialer: Dialer,
    idle_timeout: Duration,
    /// Takes the dialer's place.
    #[cfg(any(test, fuzzing))]
    memory: Option<Connector>,
}

/// Opens a connection within the process.
#[cfg(any(test, fuzzing))]
type Connector = Box<dyn Fn(&Backend) -> std::io::Result<tokio::io::DuplexStream> + Send + Sync>;

impl Pools {
    pub(crate) fn new(options: &SocketOptions) -> Self {
        Self {
            pools: Mutex::default(),
            max_idle: options.max_idle,
            shard: Shard::next(),
            dialer: Dialer::new(options),
            idle_timeout: options.idle_timeout,
            #[cfg(any(test, fuzzing))]
            memory: None,
        }
    }

    /// Pools whose connections `connector` opens.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn in_memory(options: &SocketOptions, connector: Connector) -> Self {
        Self { memory: Some(connector), ..Self::new(options) }
    }

    fn lock(&self) -> MutexGuard<'_, IdMap<u64, Arc<Pool>>> {
        // Nothing under the lock leaves the map half changed.
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, backend: &Backend) -> Arc<Pool> {
        let pool = || {
            let counts = Arc::clone(backend.connection_counts());
            Arc::new(Pool { idle: Mutex::default(), max_idle: self.max_idle, counts, shard: self.shard })
        };
        Arc::clone(self.lock().entry(backend.id()).or_insert_with(pool))
    }

    /// A connection to `backend`: a kept one if there is any, otherwise a new one.
    pub(crate) async fn lease(&self, backend: &Backend) -> Result<Lease, DialError> {
        let pool = self.of(backend);
        while let Some(idle) = pool.pop() {
            let mut conn = idle.conn;
            if conn.is_usable() {
                pool.counts.reused(self.shard);
                return Ok(Lease { conn, pool });
            }
        }
        // Boxed: most requests have no use for the room that it takes.
        Box::pin(self.open_into(pool, backend)).await
    }

    /// A new connection to `backend`, for a request that a kept one has failed already.
    pub(crate) async fn lease_new(&self, backend: &Backend) -> Result<Lease, DialError> {
        self.open_into(self.of(backend), backend).await
    }

    async fn open_into(&self, pool: Arc<Pool>, backend: &Backend) -> Result<Lease, DialError> {
        let stream = self.open(backend).await?;
        pool.counts.opened(self.shard);
        Ok(Lease { conn: Http1Client::new(stream), pool })
    }

    async fn open(&self, backend: &Backend) -> Result<Stream, DialError> {
        #[cfg(any(test, fuzzing))]
        if let Some(connect) = &self.memory {
            return connect(backend).map(Stream::Memory).map_err(DialError::Io);
        }
        self.dialer.dial(backend.address()).await
    }

    /// Closes connections as they outlive the idle timeout. Runs as long as the worker does.
    pub(crate) async fn sweep(&self) {
        let period = (self.idle_timeout / SWEEPS_PER_TIMEOUT).max(SHORTEST_SWEEP);
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            self.lock().retain(|_, pool| {
                pool.retain(|idle| {
                    idle.sweeps += 1;
                    idle.sweeps <= SWEEPS_PER_TIMEOUT
                });
                // A server may be gone for good, and one that is asked again gets a pool again.
                Arc::strong_count(pool) > 1 || !pool.lock().is_empty()
            });
        }
    }
}

/// The idle connections to one server, the last used one last.
struct Pool {
    /// Only its worker's thread takes this lock, so it is never waited for; it is what lets the worker's futures
    /// run on any runtime.
    idle: Mutex<Vec<Idle>>,
    max_idle: usize,
    counts: Arc<ConnectionCounts>,
    shard: Shard,
}

struct Idle {
    conn: Box<Http1Client>,
    /// Since it is idle.
    sweeps: u32,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        // Nothing under the lock leaves the list half changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection used last has the longest time left.
    fn pop(&self) -> Option<Idle> {
        let idle = self.lock().pop()?;
        self.counts.unparked(self.shard, 1);
        Some(idle)
    }

    fn push(&self, conn: Box<Http1Client>) {
        let mut idle = self.lock();
        if idle.len() < self.max_idle {
            idle.push(Idle { conn, sweeps: 0 });
            self.counts.parked(self.shard);
        }
    }

    fn retain(&self, stays: impl FnMut(&mut Idle) -> bool) {
        let mut idle = self.lock();
        let before = idle.len();
        idle.retain_mut(stays);
        self.counts.unparked(self.shard, before - idle.len());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.retain(|_| false);
    }
}

/// A connection that one request holds.
pub(crate) struct Lease {
    conn: Box<Http1Client>,
    pool: Arc<Pool>,
}

impl Lease {
    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(&mut self, request: OutgoingRequest) -> Result<ResponseHead, SendError> {
        self.conn.send(request).await
    }

    /// How the request was sent.
    pub(crate) fn sent(&self) -> WriteTiming {
        self.conn.sent()
    }

    /// The next data of the answer's body. Trailers are not passed on: SGLang sends none.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        self.conn.poll_data(cx)
    }

    /// Waits for some of the body, or for the end of an empty one. It is still to be had afterwards.
    pub(crate) async fn begun(&mut self) -> Result<(), ConnError> {
        poll_fn(|cx| self.conn.poll_begun(cx)).await
    }

    /// Whether some of the body is there to be handed out, or there is none left.
    pub(crate) fn has_begun(&self) -> bool {
        self.conn.has_begun()
    }

    /// How much of the body has come, handed out or not.
    pub(crate) fn come(&self) -> BodyProgress {
        self.conn.come()
    }

    /// The whole body, which may have `limit` bytes.
    pub(crate) async fn read(&mut self, limit: usize) -> Result<Bytes, ConnError> {
        // Most come at once, and are not copied.
        let (mut only, mut whole) = (Bytes::new(), BytesMut::new());
        while let Some(data) = poll_fn(|cx| self.poll_data(cx)).await.transpose()? {
            if only.len() + whole.len() + data.len() > limit {
                return Err(ConnError::TooLarge { limit });
            }
            if only.is_empty() && whole.is_empty() {
                only = data;
                continue;
            }
            whole.extend_from_slice(&std::mem::take(&mut only));
            whole.extend_from_slice(&data);
        }
        Ok(if whole.is_empty() { only } else { whole.freeze() })
    }

    /// Whether all of the body has been handed out, or there is none.
    pub(crate) fn is_ended(&self) -> bool {
        self.conn.is_ended()
    }

    /// What is to be handed out of a body of announced length.
    pub(crate) fn remaining(&self) -> Option<u64> {
        self.conn.remaining()
    }

    /// Gives the connection back, if the answer's body has ended cleanly and the server means to keep it.
    pub(crate) fn park(self) {
        if self.conn.is_reusable() {
            self.pool.push(self.conn);
        }
    }
}

//! Keep-alive connections to backends, kept between requests.
//!
//! Each worker has [`Pools`] of its own, one pool per backend, so that a connection stays on the
//! runtime that opened it. A pool is made for a backend's first request and removed when it is
//! empty. A connection comes back only through [`Lease::park`]; a lease that is merely dropped
//! closes its socket, which is also how a request is cancelled at the server. The pool never
//! retries, never picks a backend, and never looks into a body.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::connection_counts::{ConnectionCounts, Shard};
use super::dial::{DialError, Dialed};
use super::id_map::IdMap;
use super::{Address, Backend, Dialer, SocketOptions};
#[cfg(any(test, fuzzing))]
use crate::http1::Stream;
use crate::http1::{BodyProgress, ConnError, OutgoingRequest, ResponseHead, SendError, WriteTiming};
use crate::transport::{BackendConnection, Http1Engine};

/// Sweeps for idle connections per idle timeout. Their age is counted in sweeps, not by the clock, which
/// would be read four times a request. A connection lives at most an eighth too long: 4.5 s by default,
/// within SGLang's 5 s.
const SWEEPS_PER_TIMEOUT: u32 = 8;

/// Shortest time between two sweeps: idle timeouts under 8 ms are kept less exactly.
const MIN_SWEEP_PERIOD: Duration = Duration::from_millis(1);

/// The connections of one worker.
pub(crate) struct Pools {
    /// By [`Backend::id`]. Only its worker's thread takes this lock, as that of a [`Pool`].
    pools: Mutex<IdMap<u64, Arc<Pool>>>,
    max_idle: usize,
    /// Where this worker counts connections.
    shard: Shard,
    dialer: Dialer,
    engine: Http1Engine,
    idle_timeout: Duration,
    /// Opens connections instead of the dialer.
    #[cfg(any(test, fuzzing))]
    memory: Option<Connector>,
}

/// Opens an in-memory connection.
#[cfg(any(test, fuzzing))]
type Connector = Box<dyn Fn(&Backend) -> std::io::Result<tokio::io::DuplexStream> + Send + Sync>;

impl Pools {
    pub(crate) fn new(options: &SocketOptions) -> Self {
        Self {
            pools: Mutex::default(),
            max_idle: options.max_idle,
            shard: Shard::next(),
            dialer: Dialer::new(options),
            engine: options.engine,
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
            let (idle, shard) = (Mutex::default(), self.shard);
            Arc::new(Pool { idle, max_idle: self.max_idle, counts, shard, connect_micros: AtomicU32::new(0) })
        };
        Arc::clone(self.lock().entry(backend.id()).or_insert_with(pool))
    }

    /// A connection to `backend`: an idle one if there is any, otherwise a new one.
    pub(crate) async fn lease(&self, backend: &Backend) -> Result<Lease, DialError> {
        match self.take_idle(backend) {
            Some(lease) => Ok(lease),
            None => self.open(backend).await,
        }
    }

    /// An idle connection to `backend`, if there is any.
    pub(crate) fn take_idle(&self, backend: &Backend) -> Option<Lease> {
        let pool = self.of(backend);
        while let Some(idle) = pool.pop() {
            let mut conn = idle.conn;
            // Nothing polls an idle connection, so a close by the backend shows only here.
            if conn.is_usable() {
                pool.counts.reused(self.shard);
                return Some(Lease { conn, pool, is_reused: true });
            }
        }
        None
    }

    /// A new connection to `backend`.
    pub(crate) async fn open(&self, backend: &Backend) -> Result<Lease, DialError> {
        let pool = self.of(backend);
        let Dialed { stream, connect_time } = self.connect(backend).await?;
        pool.connect_micros.store(u32::try_from(connect_time.as_micros()).unwrap_or(u32::MAX), Relaxed);
        pool.counts.opened(self.shard);
        Ok(Lease { conn: self.engine.connect(stream), pool, is_reused: false })
    }

    /// A new connection to a server that is no backend. It is closed after its one request.
    pub(crate) async fn open_to(&self, address: &Address) -> Result<Lease, DialError> {
        let Dialed { stream, .. } = self.dialer.dial(address).await?;
        // A pool that keeps nothing and is counted nowhere.
        let pool = Arc::new(Pool {
            idle: Mutex::default(),
            max_idle: 0,
            counts: Arc::default(),
            shard: self.shard,
            connect_micros: AtomicU32::new(0),
        });
        Ok(Lease { conn: self.engine.connect(stream), pool, is_reused: false })
    }

    async fn connect(&self, backend: &Backend) -> Result<Dialed, DialError> {
        #[cfg(any(test, fuzzing))]
        if let Some(connect) = &self.memory {
            let stream = connect(backend).map(Stream::Memory).map_err(DialError::Io)?;
            return Ok(Dialed { stream, connect_time: Duration::ZERO });
        }
        self.dialer.dial(backend.address()).await
    }

    /// Closes connections that have been idle for the idle timeout. Runs for as long as the worker.
    pub(crate) async fn sweep(&self) {
        let period = (self.idle_timeout / SWEEPS_PER_TIMEOUT).max(MIN_SWEEP_PERIOD);
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            self.lock().retain(|_, pool| {
                pool.retain(|idle| {
                    idle.sweeps += 1;
                    idle.sweeps <= SWEEPS_PER_TIMEOUT
                });
                // The backend may be gone. If it is used again, it gets a new pool.
                Arc::strong_count(pool) > 1 || !pool.lock().is_empty()
            });
        }
    }
}

/// The idle connections to one backend, the most recently used one last.
struct Pool {
    /// Only its worker's thread takes this lock, so it is never waited for; it is what lets the worker's
    /// futures run on any runtime.
    idle: Mutex<Vec<Idle>>,
    max_idle: usize,
    counts: Arc<ConnectionCounts>,
    shard: Shard,
    /// Of the last connection that was opened. Relaxed: one thread writes and reads.
    connect_micros: AtomicU32,
}

struct Idle {
    conn: Box<dyn BackendConnection>,
    /// Sweeps since it became idle.
    sweeps: u32,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        // Nothing under the lock leaves the list half changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most recently used connection has the longest time left before the backend closes it.
    fn pop(&self) -> Option<Idle> {
        let idle = self.lock().pop()?;
        self.counts.unparked(self.shard, 1);
        Some(idle)
    }

    fn push(&self, conn: Box<dyn BackendConnection>) {
        let mut idle = self.lock();
        // Over the limit it is closed: file descriptors are limited per process.
        if idle.len() < self.max_idle {
            idle.push(Idle { conn, sweeps: 0 });
            self.counts.parked(self.shard);
        }
    }

    fn retain(&self, keep: impl FnMut(&mut Idle) -> bool) {
        let mut idle = self.lock();
        let before = idle.len();
        idle.retain_mut(keep);
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
    conn: Box<dyn BackendConnection>,
    pool: Arc<Pool>,
    is_reused: bool,
}

impl Lease {
    /// Whether the connection was idle before, so that the backend may have closed it meanwhile.
    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }

    /// The round trip to the backend: how long the worker's last connect took.
    pub(crate) fn round_trip(&self) -> Duration {
        Duration::from_micros(self.pool.connect_micros.load(Relaxed).into())
    }

    /// Whether it can take a request: the backend has not closed it.
    pub(crate) fn is_usable(&mut self) -> bool {
        self.conn.is_usable()
    }

    /// Begins a request. [`poll_head`](Self::poll_head) writes it.
    pub(crate) fn begin(&mut self, request: OutgoingRequest) {
        self.conn.begin(request);
    }

    /// Writes the request, and waits for the head of its response.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, SendError>> {
        self.conn.poll_head(cx)
    }

    /// Sends a request and waits for the head of its response.
    pub(crate) async fn send(&mut self, request: OutgoingRequest) -> Result<ResponseHead, SendError> {
        self.begin(request);
        poll_fn(|cx| self.poll_head(cx)).await
    }

    /// How the request was written.
    pub(crate) fn write_timing(&self) -> WriteTiming {
        self.conn.write_timing()
    }

    /// The next data of the response's body; `None` is its clean end.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        self.conn.poll_data(cx)
    }

    /// Waits for some of the body, or for the end of an empty one. [`poll_data`](Self::poll_data) still
    /// returns it.
    pub(crate) fn poll_body_started(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>> {
        self.conn.poll_body_started(cx)
    }

    /// How much of the body has arrived, returned or not.
    pub(crate) fn body_progress(&self) -> BodyProgress {
        self.conn.body_progress()
    }

    /// Reads the whole body, of at most `limit` bytes.
    pub(crate) async fn collect(&mut self, limit: usize) -> Result<Bytes, ConnError> {
        // Most bodies arrive with one read and are not copied.
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

    /// Whether all of the body was returned, or there is none.
    pub(crate) fn is_ended(&self) -> bool {
        self.conn.is_ended()
    }

    /// Bytes of a body with a `Content-Length` that were not returned yet.
    pub(crate) fn remaining(&self) -> Option<u64> {
        self.conn.remaining()
    }

    /// Returns the connection to the pool, if the response's body ended cleanly and the backend keeps the
    /// connection alive.
    pub(crate) fn park(mut self) {
        if self.conn.is_reusable() {
            self.pool.push(self.conn);
        }
    }
}

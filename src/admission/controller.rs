//! Who may begin, and who waits: how many generation requests are under way at a
//! time, how many begin in a second, and the queue of those that come too early.
//!
//! One [`AdmissionController`] for all workers, so that a limit is one limit and the queue is one
//! queue. Nothing here knows HTTP or servers: whether a server has room is asked
//! of whoever enters ([`AdmissionController::enter`]), and whoever frees room says so ([`WakeOnDrop`]).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::rate_limit::RateLimiter;
use super::wait_queue::{Permit, WaitQueue, Waiter};

/// What is limited. The default limits nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct AdmissionOptions {
    /// Generation requests under way at a time.
    pub(crate) max_concurrent: Option<u32>,
    /// Requests that wait.
    pub(crate) queue_size: usize,
    pub(crate) queue_timeout: Duration,
    /// Generation requests that may begin in a second.
    pub(crate) rate: Option<u32>,
    pub(crate) caps: BackendCaps,
}

/// Requests that one server has at a time, by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackendCaps {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
}

impl Default for BackendCaps {
    fn default() -> Self {
        Self::NONE
    }
}

impl BackendCaps {
    pub(crate) const NONE: Self = Self { prefill: usize::MAX, decode: usize::MAX };
}

/// Why a request may not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// So many wait already, or nobody may.
    QueueFull { waiting: usize },
    /// It has waited for so long.
    QueueTimeout(Duration),
    /// So many may begin in a second, and the next one after this time.
    RateLimited { rate: u32, after: Duration },
}

impl Rejection {
    /// When it is worth another try, in whole seconds. When a place will be free nobody knows, so that is one.
    pub(crate) fn retry_after(&self) -> u64 {
        match self {
            Self::QueueFull { .. } | Self::QueueTimeout(_) => 1,
            Self::RateLimited { after, .. } => after.as_secs() + u64::from(after.subsec_nanos() > 0),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { waiting: 0 } => {
                f.write_str("as many requests as may be are under way, and none may wait")
            }
            Self::QueueFull { waiting } => {
                write!(f, "as many requests as may be are under way, and {waiting} wait already")
            }
            Self::QueueTimeout(after) => write!(f, "the request's turn did not come within {after:?}"),
            Self::RateLimited { rate, .. } => write!(f, "over the limit of {rate} requests a second"),
        }
    }
}

/// The limits, the queue and its numbers.
pub(crate) struct AdmissionController {
    /// Read by every request, and written by a reload only.
    is_on: AtomicBool,
    /// [`u32::MAX`] is none.
    max_concurrent: AtomicU32,
    pub(super) queue_size: AtomicUsize,
    pub(super) queue_timeout_ms: AtomicU64,
    prefill_cap: AtomicUsize,
    decode_cap: AtomicUsize,
    rate: RateLimiter,
    pub(super) line: WaitQueue,
}

impl AdmissionController {
    pub(crate) fn new(options: &AdmissionOptions) -> Self {
        let gate = Self {
            is_on: AtomicBool::new(false),
            max_concurrent: AtomicU32::new(u32::MAX),
            queue_size: AtomicUsize::new(0),
            queue_timeout_ms: AtomicU64::new(0),
            prefill_cap: AtomicUsize::new(usize::MAX),
            decode_cap: AtomicUsize::new(usize::MAX),
            rate: RateLimiter::new(),
            line: WaitQueue::default(),
        };
        gate.reload(options);
        gate
    }

    /// Takes other limits over. Requests under way go on, also above a lower limit; those that wait stay in order.
    pub(crate) fn reload(&self, options: &AdmissionOptions) {
        self.max_concurrent.store(options.max_concurrent.unwrap_or(u32::MAX), Relaxed);
        self.queue_size.store(options.queue_size, Relaxed);
        let timeout = u64::try_from(options.queue_timeout.as_millis()).unwrap_or(u64::MAX);
        self.queue_timeout_ms.store(timeout, Relaxed);
        self.prefill_cap.store(options.caps.prefill, Relaxed);
        self.decode_cap.store(options.caps.decode, Relaxed);
        self.rate.set(options.rate);
        let limits =
            options.max_concurrent.is_some() || options.caps != BackendCaps::NONE || options.rate.is_some();
        self.is_on.store(limits, Relaxed);
        // There may be room for it now.
        self.line.wake_first();
    }

    /// Whether anything is limited. If not, nobody need enter.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Relaxed)
    }

    pub(crate) fn caps(&self) -> BackendCaps {
        BackendCaps { prefill: self.prefill_cap.load(Relaxed), decode: self.decode_cap.load(Relaxed) }
    }

    /// How many may wait; none if nothing is limited.
    pub(crate) fn queue_size(&self) -> usize {
        if self.is_on() { self.queue_size.load(Relaxed) } else { 0 }
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.line.waiting()
    }

    pub(super) fn max_concurrent(&self) -> u32 {
        self.max_concurrent.load(Relaxed)
    }
}

/// A worker's own handle on the gate. What a request holds counts this one's users, which no other worker writes to.
pub(crate) struct AdmissionHandle(Arc<AdmissionController>);

impl AdmissionHandle {
    pub(crate) fn new(gate: Arc<AdmissionController>) -> Arc<Self> {
        Arc::new(Self(gate))
    }

    pub(crate) fn gate(&self) -> &AdmissionController {
        &self.0
    }

    /// Enters, at once or when it is this request's turn: the first who came is the first who enters.
    ///
    /// `take` takes what else the request needs; `None` says that it cannot be had now. It is asked when it is this
    /// request's turn, and again each time something is free. `waits` is told when the wait begins.
    ///
    /// `now` is when it came. Dropping the future gives the place in the queue up.
    pub(crate) async fn enter<T, E: From<Rejection>>(
        self: &Arc<Self>,
        now: Instant,
        mut take: impl FnMut() -> Result<Option<T>, E>,
        waits: impl FnOnce(),
    ) -> Result<(Permit, T), E> {
        self.0.rate.admit(now)?;
        if let Some(place) = Permit::if_free(self)
            && let Some(taken) = take()?
        {
            return Ok((place, taken));
        }
        let wait = Waiter::begin(self, take)?;
        waits();
        // On the heap: hardly any request waits, and all of them would keep room for it.
        Box::pin(wait).await
    }
}

/// Tells the gate, when it is dropped, that something is free which its first one in the queue may wait for.
pub(crate) struct WakeOnDrop(Arc<AdmissionHandle>);

impl WakeOnDrop {
    pub(crate) fn by(entrance: &Arc<AdmissionHandle>) -> Self {
        Self(Arc::clone(entrance))
    }
}

impl fmt::Debug for WakeOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Freed")
    }
}

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.0.line.freed();
    }
}

#[cfg(test)]
mod tests;

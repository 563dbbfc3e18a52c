//! Admission control for generation requests: how many run at a time, how many start
//! per second, and the queue of those that exceed the limits.
//!
//! One [`AdmissionController`] is shared by all workers, so that a limit holds for the
//! whole process and the queue is first in, first out across workers. Nothing here knows
//! HTTP or backends: the caller of [`AdmissionHandle::admit`] says how to acquire backend
//! capacity, and the holder that releases capacity wakes the queue with [`WakeOnDrop`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::memory_budget::MemoryBudget;
use super::rate_limit::RateLimiter;
use super::wait_queue::{Permit, WaitQueue, Waiter};

/// The limits. The default limits nothing.
#[derive(Debug, Clone)]
pub(crate) struct AdmissionOptions {
    /// Generation requests in flight at a time.
    pub(crate) max_concurrent: Option<u32>,
    /// Longest queue, in requests.
    pub(crate) queue_size: usize,
    /// Longest wait in the queue.
    pub(crate) queue_timeout: Duration,
    /// Generation requests that may start per second.
    pub(crate) rate: Option<u32>,
    pub(crate) caps: BackendCaps,
    /// Bytes of request bodies and merges that are held at a time.
    pub(crate) max_buffered: usize,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self {
            max_concurrent: None,
            queue_size: 0,
            queue_timeout: Duration::ZERO,
            rate: None,
            caps: BackendCaps::NONE,
            max_buffered: usize::MAX,
        }
    }
}

/// Most requests in flight on one backend, by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackendCaps {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
    pub(crate) regular: usize,
}

impl Default for BackendCaps {
    fn default() -> Self {
        Self::NONE
    }
}

impl BackendCaps {
    /// No cap on any role.
    pub(crate) const NONE: Self = Self { prefill: usize::MAX, decode: usize::MAX, regular: usize::MAX };
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// The limit is reached and the queue is full. `waiting` is its length: 0 if queueing is disabled.
    QueueFull { waiting: usize },
    /// The request was queued for this long without being admitted.
    QueueTimeout(Duration),
    /// The rate limit is reached; the next request is admitted after this time.
    RateLimited { rate: u32, after: Duration },
}

impl Rejection {
    /// The `Retry-After` header, in whole seconds. When capacity frees up cannot be predicted, so a full
    /// queue answers with the shortest value that is not 0.
    pub(crate) fn retry_after(&self) -> u64 {
        match self {
            Self::QueueFull { .. } | Self::QueueTimeout(_) => 1,
            // Rounded up: a client that comes back earlier is rejected again.
            Self::RateLimited { after, .. } => after.as_secs() + u64::from(after.subsec_nanos() > 0),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { waiting: 0 } => {
                f.write_str("concurrency limit reached and queueing is disabled")
            }
            Self::QueueFull { waiting } => {
                write!(f, "concurrency limit reached and the queue is full ({waiting} requests waiting)")
            }
            Self::QueueTimeout(after) => write!(f, "timed out after {after:?} in the queue"),
            Self::RateLimited { rate, .. } => write!(f, "rate limit of {rate} requests per second exceeded"),
        }
    }
}

/// The limits in force, the queue, and the counts that both are checked against.
pub(crate) struct AdmissionController {
    /// Whether any limit is set: read by every request, written on reload only.
    is_enabled: AtomicBool,
    /// [`u32::MAX`] means no limit.
    max_concurrent: AtomicU32,
    pub(super) queue_size: AtomicUsize,
    pub(super) queue_timeout_ms: AtomicU64,
    prefill_cap: AtomicUsize,
    decode_cap: AtomicUsize,
    regular_cap: AtomicUsize,
    rate: RateLimiter,
    pub(super) wait_queue: WaitQueue,
    memory: MemoryBudget,
}

impl AdmissionController {
    pub(crate) fn new(options: &AdmissionOptions) -> Self {
        let controller = Self {
            is_enabled: AtomicBool::new(false),
            max_concurrent: AtomicU32::new(u32::MAX),
            queue_size: AtomicUsize::new(0),
            queue_timeout_ms: AtomicU64::new(0),
            prefill_cap: AtomicUsize::new(usize::MAX),
            decode_cap: AtomicUsize::new(usize::MAX),
            regular_cap: AtomicUsize::new(usize::MAX),
            rate: RateLimiter::new(),
            wait_queue: WaitQueue::default(),
            memory: MemoryBudget::new(),
        };
        controller.reload(options);
        controller
    }

    /// Replaces the limits. Requests in flight continue even above a lowered limit; queued requests keep
    /// their order.
    pub(crate) fn reload(&self, options: &AdmissionOptions) {
        self.max_concurrent.store(options.max_concurrent.unwrap_or(u32::MAX), Relaxed);
        self.queue_size.store(options.queue_size, Relaxed);
        let timeout = u64::try_from(options.queue_timeout.as_millis()).unwrap_or(u64::MAX);
        self.queue_timeout_ms.store(timeout, Relaxed);
        self.prefill_cap.store(options.caps.prefill, Relaxed);
        self.decode_cap.store(options.caps.decode, Relaxed);
        self.regular_cap.store(options.caps.regular, Relaxed);
        // The rate limiter keeps its bucket, so that a reload does not grant a second burst.
        self.rate.set(options.rate);
        let has_limit =
            options.max_concurrent.is_some() || options.caps != BackendCaps::NONE || options.rate.is_some();
        self.is_enabled.store(has_limit, Relaxed);
        self.memory.reload(options);
        // A raised limit may admit the head of the queue now.
        self.wait_queue.wake_head();
    }

    /// Whether any limit is set. If not, callers skip [`AdmissionHandle::admit`]: it costs shared atomics.
    pub(crate) fn is_enabled(&self) -> bool {
        self.is_enabled.load(Relaxed)
    }

    pub(crate) fn caps(&self) -> BackendCaps {
        BackendCaps {
            prefill: self.prefill_cap.load(Relaxed),
            decode: self.decode_cap.load(Relaxed),
            regular: self.regular_cap.load(Relaxed),
        }
    }

    /// Longest queue, in requests; 0 if no limit is set, as nothing is queued then.
    pub(crate) fn queue_size(&self) -> usize {
        if self.is_enabled() { self.queue_size.load(Relaxed) } else { 0 }
    }

    /// Bytes that requests hold, and their bound. It applies also if no limit of requests is set.
    pub(crate) fn memory(&self) -> &MemoryBudget {
        &self.memory
    }

    /// Queued requests.
    pub(crate) fn waiting(&self) -> usize {
        self.wait_queue.waiting()
    }

    pub(super) fn max_concurrent(&self) -> u32 {
        self.max_concurrent.load(Relaxed)
    }
}

/// One worker's handle on the controller.
///
/// Permits hold a clone of the worker's own handle, so that no reference count is written by two workers:
/// that cache line would otherwise move between cores twice per request.
pub(crate) struct AdmissionHandle(Arc<AdmissionController>);

impl AdmissionHandle {
    pub(crate) fn new(controller: Arc<AdmissionController>) -> Arc<Self> {
        Arc::new(Self(controller))
    }

    pub(crate) fn controller(&self) -> &AdmissionController {
        &self.0
    }

    /// Admits a request, at once or in its turn: first in, first out.
    ///
    /// `acquire` acquires what else the request needs, such as backend permits; `Ok(None)` means that it is
    /// not available now. It is called when the request is at the head of the queue, and again whenever
    /// capacity is released. `on_wait` is called once if the request is queued.
    ///
    /// `now` is when the request arrived, for the rate limit. Dropping the future leaves the queue.
    pub(crate) async fn admit<T, E: From<Rejection>>(
        self: &Arc<Self>,
        now: Instant,
        mut acquire: impl FnMut() -> Result<Option<T>, E>,
        on_wait: impl FnOnce(),
    ) -> Result<(Permit, T), E> {
        self.0.rate.acquire(now)?;
        // The fast path: one atomic update and a reference count, no lock.
        if let Some(permit) = Permit::try_acquire(self)
            && let Some(acquired) = acquire()?
        {
            return Ok((permit, acquired));
        }
        // A permit that was acquired without backend capacity has been released again: a waiter holds
        // nothing.
        let waiter = Waiter::enqueue(self, acquire)?;
        on_wait();
        // Boxed: few requests wait, and inline the waiter would enlarge every request's future.
        Box::pin(waiter).await
    }
}

/// Drop guard: wakes the head of the queue when capacity is released.
pub(crate) struct WakeOnDrop(Arc<AdmissionHandle>);

impl WakeOnDrop {
    pub(crate) fn new(handle: &Arc<AdmissionHandle>) -> Self {
        Self(Arc::clone(handle))
    }
}

impl fmt::Debug for WakeOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WakeOnDrop")
    }
}

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.0.wait_queue.wake_on_release();
    }
}

#[cfg(test)]
mod tests;

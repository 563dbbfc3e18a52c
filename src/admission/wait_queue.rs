//! Places and the queue for them, for all threads together.
//!
//! How many places are taken and how many requests wait is one atomic number, so that a
//! request that finds a place, and one that leaves while nobody waits, need nothing
//! else. The queue is behind a lock. Only its first one may enter: it is woken when
//! something is free, and wakes the next when it has entered.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};
use std::sync::atomic::{AtomicU64, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::{AdmissionHandle, Rejection};

/// One who waits, in the upper half of [`WaitQueue::count`]; places are in the lower half.
const WAITING: u64 = 1 << 32;
/// How often the first one in the queue looks whether a server has room for reasons that nobody tells: it is healthy
/// again, or new.
const HEAD_RECHECK_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Default)]
pub(super) struct WaitQueue {
    pub(super) count: AtomicU64,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// By the order in which they came.
    waiting: BTreeMap<u64, Waker>,
}

fn taken(count: u64) -> u64 {
    count % WAITING
}

impl WaitQueue {
    pub(super) fn waiting(&self) -> usize {
        (self.count.load(Acquire) / WAITING) as usize
    }

    /// Takes a place if one is free; without being the first, only if nobody waits.
    fn take(&self, limit: u32, is_first: bool) -> bool {
        let taken = self.count.fetch_update(AcqRel, Acquire, |count| {
            let may = (is_first || count < WAITING) && taken(count) < u64::from(limit);
            may.then_some(count + 1)
        });
        taken.is_ok()
    }

    fn give_back(&self, is_quiet: bool) {
        if self.count.fetch_sub(1, AcqRel) >= WAITING && !is_quiet {
            self.wake_first();
        }
    }

    /// Something else than a place is free.
    pub(super) fn freed(&self) {
        // Either this sees who waits, or the one who waits sees what is free.
        fence(SeqCst);
        if self.waiting() > 0 {
            self.wake_first();
        }
    }

    pub(super) fn wake_first(&self) {
        let first = self.queue().waiting.first_key_value().map(|(_, waker)| waker.clone());
        // The lock is free again: a waker may run anything.
        if let Some(waker) = first {
            waker.wake();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it is held.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, size: usize) -> Result<u64, Rejection> {
        let mut queue = self.queue();
        let waiting = queue.waiting.len();
        if waiting >= size {
            return Err(Rejection::QueueFull { waiting });
        }
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, Waker::noop().clone());
        self.count.fetch_add(WAITING, AcqRel);
        Ok(number)
    }

    /// Says how to wake the one with this number. Returns whether it is the first.
    fn wait(&self, number: u64, waker: &Waker) -> bool {
        let mut queue = self.queue();
        if let Some(known) = queue.waiting.get_mut(&number) {
            known.clone_from(waker);
        }
        queue.waiting.first_key_value().is_some_and(|(first, _)| *first == number)
    }

    /// Leaves the queue, entered or not.
    fn leave(&self, number: u64) {
        let mut queue = self.queue();
        queue.waiting.remove(&number);
        self.count.fetch_sub(WAITING, AcqRel);
        let is_empty = queue.waiting.is_empty();
        drop(queue);
        if !is_empty {
            self.wake_first();
        }
    }
}

/// A place, taken until it is dropped.
pub(crate) struct Permit {
    entrance: Arc<AdmissionHandle>,
    /// Whoever waits need not be told when it is free.
    is_quiet: bool,
}

impl Permit {
    /// Takes one if that keeps nobody waiting who came before.
    pub(super) fn if_free(entrance: &Arc<AdmissionHandle>) -> Option<Self> {
        Self::take(entrance, false)
    }

    fn take(entrance: &Arc<AdmissionHandle>, is_first: bool) -> Option<Self> {
        let gate = entrance.gate();
        let taken = gate.line.take(gate.max_concurrent(), is_first);
        taken.then(|| Self { entrance: Arc::clone(entrance), is_quiet: false })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.entrance.gate().line.give_back(self.is_quiet);
    }
}

/// A wait in the queue.
pub(super) struct Waiter<F> {
    entrance: Arc<AdmissionHandle>,
    take: F,
    number: u64,
    timeout: Duration,
    end: Instant,
    timer: Pin<Box<Sleep>>,
}

impl<F> Waiter<F> {
    pub(super) fn begin(entrance: &Arc<AdmissionHandle>, take: F) -> Result<Self, Rejection> {
        let gate = entrance.gate();
        let number = gate.line.join(gate.queue_size.load(Acquire))?;
        let timeout = Duration::from_millis(gate.queue_timeout_ms.load(Acquire));
        let end = Instant::now() + timeout;
        let timer = Box::pin(sleep_until(end));
        Ok(Self { entrance: Arc::clone(entrance), take, number, timeout, end, timer })
    }
}

/// `take` is called, and never pinned.
impl<F> Unpin for Waiter<F> {}

impl<T, E: From<Rejection>, F: FnMut() -> Result<Option<T>, E>> Future for Waiter<F> {
    type Output = Result<(Permit, T), E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let wait = self.get_mut();
        let line = &wait.entrance.gate().line;
        loop {
            if line.wait(wait.number, cx.waker())
                && let Some(mut place) = Permit::take(&wait.entrance, true)
            {
                fence(SeqCst);
                match (wait.take)() {
                    Ok(Some(taken)) => return Poll::Ready(Ok((place, taken))),
                    Err(error) => return Poll::Ready(Err(error)),
                    Ok(None) => {
                        // Nobody else may have it: the one who would be woken is this one.
                        place.is_quiet = true;
                        wait.timer.as_mut().reset(wait.end.min(Instant::now() + HEAD_RECHECK_INTERVAL));
                    }
                }
            }
            if wait.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= wait.end {
                return Poll::Ready(Err(Rejection::QueueTimeout(wait.timeout).into()));
            }
            wait.timer.as_mut().reset(wait.end);
        }
    }
}

impl<F> Drop for Waiter<F> {
    fn drop(&mut self) {
        self.entrance.gate().line.leave(self.number);
    }
}

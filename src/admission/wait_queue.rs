//! Concurrency permits and the first-in, first-out queue for them, shared by all workers.
//!
//! Permits and waiters are counted in one atomic word, so that a request that gets a
//! permit, and one that ends while no other waits, touch nothing else. The queue itself is
//! behind a lock. Only its head may be admitted: it is woken when capacity is released, and
//! wakes the next waiter when it leaves.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};
use std::sync::atomic::{AtomicU64, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::{AdmissionHandle, Rejection};

/// One waiter in [`WaitQueue::count`], whose upper 32 bits count waiters and whose lower 32 bits count
/// permits.
const WAITER: u64 = 1 << 32;
/// How often the head of the queue re-checks capacity that frees without a wake-up: a backend recovered or
/// was added.
const HEAD_RECHECK_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Default)]
pub(super) struct WaitQueue {
    pub(super) count: AtomicU64,
    waiters: Mutex<Waiters>,
}

#[derive(Default)]
struct Waiters {
    next_ticket: u64,
    /// By ticket, so in order of arrival.
    by_ticket: BTreeMap<u64, Waker>,
}

/// The permits held, of a [`WaitQueue::count`].
fn permits(count: u64) -> u64 {
    count % WAITER
}

impl WaitQueue {
    /// Queued requests.
    pub(super) fn waiting(&self) -> usize {
        (self.count.load(Acquire) / WAITER) as usize
    }

    /// Takes a permit if one is free. Only the head of the queue may do so while others wait, or newcomers
    /// would overtake.
    fn try_acquire(&self, limit: u32, is_head: bool) -> bool {
        let acquired = self.count.fetch_update(AcqRel, Acquire, |count| {
            let is_allowed = (is_head || count < WAITER) && permits(count) < u64::from(limit);
            is_allowed.then_some(count + 1)
        });
        acquired.is_ok()
    }

    fn release(&self, wakes_head: bool) {
        if self.count.fetch_sub(1, AcqRel) >= WAITER && wakes_head {
            self.wake_head();
        }
    }

    /// Wakes the head of the queue after something other than a permit was released, such as capacity of a
    /// backend.
    pub(super) fn wake_on_release(&self) {
        // Pairs with the fence in `Waiter::poll`: either this thread sees the waiter, or the waiter sees the
        // capacity.
        fence(SeqCst);
        if self.waiting() > 0 {
            self.wake_head();
        }
    }

    pub(super) fn wake_head(&self) {
        let head = self.lock().by_ticket.first_key_value().map(|(_, waker)| waker.clone());
        // Outside the lock: a waker may run arbitrary code, also code that takes this lock.
        if let Some(waker) = head {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiters> {
        // Poisoning is ignored: no code panics while it holds the lock.
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a waiter and returns its ticket.
    fn join(&self, queue_size: usize) -> Result<u64, Rejection> {
        let mut waiters = self.lock();
        let waiting = waiters.by_ticket.len();
        if waiting >= queue_size {
            return Err(Rejection::QueueFull { waiting });
        }
        let ticket = waiters.next_ticket;
        waiters.next_ticket += 1;
        // The first poll registers the real waker, right after this.
        waiters.by_ticket.insert(ticket, Waker::noop().clone());
        // Under the lock, so that the count never disagrees with the map for another thread that holds it.
        self.count.fetch_add(WAITER, AcqRel);
        Ok(ticket)
    }

    /// Registers the waker of a waiter. Returns whether it is the head of the queue.
    fn register(&self, ticket: u64, waker: &Waker) -> bool {
        let mut waiters = self.lock();
        if let Some(registered) = waiters.by_ticket.get_mut(&ticket) {
            registered.clone_from(waker);
        }
        waiters.by_ticket.first_key_value().is_some_and(|(head, _)| *head == ticket)
    }

    /// Removes a waiter, admitted or not, and wakes the next one: it may be the head now.
    fn leave(&self, ticket: u64) {
        let mut waiters = self.lock();
        waiters.by_ticket.remove(&ticket);
        self.count.fetch_sub(WAITER, AcqRel);
        let is_empty = waiters.by_ticket.is_empty();
        drop(waiters);
        if !is_empty {
            self.wake_head();
        }
    }
}

/// One admitted request; released on drop.
pub(crate) struct Permit {
    handle: Arc<AdmissionHandle>,
    wakes_head: bool,
}

impl Permit {
    /// Takes a permit if one is free and no request waits.
    pub(super) fn try_acquire(handle: &Arc<AdmissionHandle>) -> Option<Self> {
        Self::acquire(handle, false)
    }

    fn acquire(handle: &Arc<AdmissionHandle>, is_head: bool) -> Option<Self> {
        let controller = handle.controller();
        let acquired = controller.wait_queue.try_acquire(controller.max_concurrent(), is_head);
        acquired.then(|| Self { handle: Arc::clone(handle), wakes_head: true })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.handle.controller().wait_queue.release(self.wakes_head);
    }
}

/// A queued request: resolves when it is admitted, or when its time in the queue is over.
pub(super) struct Waiter<F> {
    handle: Arc<AdmissionHandle>,
    acquire: F,
    ticket: u64,
    timeout: Duration,
    deadline: Instant,
    timer: Pin<Box<Sleep>>,
}

impl<F> Waiter<F> {
    pub(super) fn enqueue(handle: &Arc<AdmissionHandle>, acquire: F) -> Result<Self, Rejection> {
        let controller = handle.controller();
        let ticket = controller.wait_queue.join(controller.queue_size.load(Acquire))?;
        let timeout = Duration::from_millis(controller.queue_timeout_ms.load(Acquire));
        let deadline = Instant::now() + timeout;
        let timer = Box::pin(sleep_until(deadline));
        Ok(Self { handle: Arc::clone(handle), acquire, ticket, timeout, deadline, timer })
    }
}

/// `acquire` is called, never pinned.
impl<F> Unpin for Waiter<F> {}

impl<T, E: From<Rejection>, F: FnMut() -> Result<Option<T>, E>> Future for Waiter<F> {
    type Output = Result<(Permit, T), E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let waiter = self.get_mut();
        let queue = &waiter.handle.controller().wait_queue;
        loop {
            if queue.register(waiter.ticket, cx.waker())
                && let Some(mut permit) = Permit::acquire(&waiter.handle, true)
            {
                // Pairs with the fence in `wake_on_release`.
                fence(SeqCst);
                match (waiter.acquire)() {
                    Ok(Some(acquired)) => return Poll::Ready(Ok((permit, acquired))),
                    Err(error) => return Poll::Ready(Err(error)),
                    Ok(None) => {
                        // The permit goes back without a wake-up: it would wake this waiter, which would
                        // spin.
                        permit.wakes_head = false;
                        let recheck = Instant::now() + HEAD_RECHECK_INTERVAL;
                        waiter.timer.as_mut().reset(waiter.deadline.min(recheck));
                    }
                }
            }
            if waiter.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= waiter.deadline {
                return Poll::Ready(Err(Rejection::QueueTimeout(waiter.timeout).into()));
            }
            // A re-check was due; the next turn of the loop sets another one if it is needed.
            waiter.timer.as_mut().reset(waiter.deadline);
        }
    }
}

impl<F> Drop for Waiter<F> {
    fn drop(&mut self) {
        self.handle.controller().wait_queue.leave(self.ticket);
    }
}

//! How many bytes of request bodies, and of responses that are merged, all workers hold together.
//!
//! Bytes are reserved before they are held, and returned when the [`Reservation`] is dropped. Nothing here
//! holds or reads them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;

use super::{AdmissionHandle, AdmissionOptions};

/// The bytes that are reserved, and the bound.
///
/// In a fast path it costs an addition and a subtraction. Those who wait stand in line in their own futures:
/// the line has no list of its own that could grow.
pub(crate) struct MemoryBudget {
    reserved: AtomicUsize,
    limit: AtomicUsize,
    /// Longest wait.
    timeout_ms: AtomicU64,
    waiting: AtomicUsize,
    /// Held by the head of the line. Tokio's mutex is first in, first out.
    head: Mutex<()>,
    /// Wakes the head.
    returned: Notify,
}

/// No memory is free. The bytes were waited for, if that could not last forever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryFull {
    pub(crate) limit: usize,
}

impl fmt::Display for MemoryFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the router holds as much of other requests as it may: {} bytes (--max-buffered-bytes)",
            self.limit
        )
    }
}

impl MemoryBudget {
    pub(super) fn new() -> Self {
        Self {
            reserved: AtomicUsize::new(0),
            limit: AtomicUsize::new(usize::MAX),
            timeout_ms: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            head: Mutex::const_new(()),
            returned: Notify::const_new(),
        }
    }

    /// Replaces the bound. What is reserved stays, even above a lowered one.
    pub(super) fn reload(&self, options: &AdmissionOptions) {
        self.limit.store(options.max_buffered, SeqCst);
        let timeout = u64::try_from(options.queue_timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms.store(timeout, Relaxed);
        self.wake_head();
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit.load(Relaxed)
    }

    /// The bytes that are reserved.
    pub(crate) fn reserved(&self) -> usize {
        self.reserved.load(Relaxed)
    }

    fn try_add(&self, bytes: usize) -> bool {
        let limit = self.limit();
        let added = self.reserved.fetch_update(SeqCst, SeqCst, |reserved| {
            reserved.checked_add(bytes).filter(|reserved| *reserved <= limit)
        });
        added.is_ok()
    }

    fn release(&self, bytes: usize) {
        self.reserved.fetch_sub(bytes, SeqCst);
        self.wake_head();
    }

    fn wake_head(&self) {
        // Sequentially consistent, as are the counts: either this thread sees the one that waits, or that one
        // sees the bytes.
        if self.waiting.load(SeqCst) > 0 {
            self.returned.notify_one();
        }
    }

    /// Adds bytes when it is their turn: first in, first out.
    async fn add_in_turn(&self, bytes: usize) -> Result<(), MemoryFull> {
        let _counted = Waiting::begin(self);
        let turn = async {
            let _head = self.head.lock().await;
            while !self.try_add(bytes) {
                // A notification that came before this line is not lost: it is stored.
                self.returned.notified().await;
            }
        };
        let limit = Duration::from_millis(self.timeout_ms.load(Relaxed));
        timeout(limit, turn).await.map_err(|_| MemoryFull { limit: self.limit() })
    }
}

/// Counts one that waits, until it is dropped.
struct Waiting<'a>(&'a MemoryBudget);

impl<'a> Waiting<'a> {
    fn begin(budget: &'a MemoryBudget) -> Self {
        budget.waiting.fetch_add(1, SeqCst);
        Self(budget)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

/// Bytes of the budget, returned on drop.
pub(crate) struct Reservation {
    /// The worker's own: no reference count is written by two workers.
    handle: Arc<AdmissionHandle>,
    bytes: usize,
}

impl Reservation {
    /// Of no bytes yet.
    pub(crate) fn empty(handle: &Arc<AdmissionHandle>) -> Self {
        Self { handle: Arc::clone(handle), bytes: 0 }
    }

    /// The budget's bound.
    pub(crate) fn limit(&self) -> usize {
        self.budget().limit()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn budget(&self) -> &MemoryBudget {
        self.handle.controller().memory()
    }

    /// Adds a few bytes, also above the bound. For what costs less than to wait.
    pub(crate) fn charge(&mut self, bytes: usize) {
        self.budget().reserved.fetch_add(bytes, SeqCst);
        self.bytes += bytes;
    }

    /// Adds bytes, or fails at the bound. For the holder of bytes: if all of them waited for more, no one
    /// would return any. It goes before those who hold nothing and wait.
    pub(crate) fn try_grow(&mut self, bytes: usize) -> Result<(), MemoryFull> {
        if !self.budget().try_add(bytes) {
            return Err(MemoryFull { limit: self.budget().limit() });
        }
        self.bytes += bytes;
        Ok(())
    }

    /// Adds bytes, at once or in their turn, at most all that there are. The holder should have none yet.
    pub(crate) async fn grow(&mut self, bytes: usize) -> Result<(), MemoryFull> {
        let budget = self.budget();
        let bytes = bytes.min(budget.limit());
        let is_free = budget.waiting.load(SeqCst) == 0 && budget.try_add(bytes);
        if !is_free {
            // Boxed: few requests wait.
            Box::pin(budget.add_in_turn(bytes)).await?;
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget().release(self.bytes);
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reservation").field(&self.bytes).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;
    use crate::admission::AdmissionController;

    fn handle(max_buffered: usize) -> Arc<AdmissionHandle> {
        let queue_timeout = Duration::from_secs(60);
        let options = AdmissionOptions { max_buffered, queue_timeout, ..AdmissionOptions::default() };
        AdmissionHandle::new(Arc::new(AdmissionController::new(&options)))
    }

    fn held(handle: &Arc<AdmissionHandle>, bytes: usize) -> Reservation {
        let mut reservation = Reservation::empty(handle);
        reservation.try_grow(bytes).unwrap();
        reservation
    }

    async fn grown(handle: &Arc<AdmissionHandle>, bytes: usize) -> Result<Reservation, MemoryFull> {
        let mut reservation = Reservation::empty(handle);
        reservation.grow(bytes).await?;
        Ok(reservation)
    }

    fn is_pending<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_are_given_in_turn_when_some_are_returned() {
        let handle = handle(100);
        let budget = handle.controller().memory();
        let first = held(&handle, 60);
        let (mut large, mut small) = (pin!(grown(&handle, 90)), pin!(grown(&handle, 10)));
        assert!(is_pending(large.as_mut()));
        assert!(is_pending(small.as_mut()), "40 are free, but it is not its turn");
        drop(first);
        assert!(is_pending(small.as_mut()));
        let large = large.await.unwrap();
        let small = small.await.unwrap();
        assert_eq!(budget.reserved(), 100);
        drop((large, small));
        assert_eq!((budget.reserved(), budget.waiting.load(SeqCst)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_grows_before_those_who_wait_and_never_waits() {
        let handle = handle(100);
        let mut first = held(&handle, 60);
        let mut waiting = pin!(grown(&handle, 90));
        assert!(is_pending(waiting.as_mut()));
        assert_eq!(first.try_grow(40), Ok(()));
        assert_eq!(first.try_grow(1), Err(MemoryFull { limit: 100 }));
        first.charge(1);
        assert_eq!((first.bytes(), handle.controller().memory().reserved()), (101, 101));
        let begun = tokio::time::Instant::now();
        assert_eq!(waiting.await.unwrap_err(), MemoryFull { limit: 100 });
        assert_eq!(begun.elapsed().as_secs(), 60);
        drop(first);
        assert_eq!(grown(&handle, 100).await.unwrap().bytes(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_leaves_the_line_makes_room_for_the_next() {
        let handle = handle(100);
        let first = held(&handle, 60);
        let mut next = pin!(grown(&handle, 30));
        {
            let mut large = pin!(grown(&handle, 90));
            assert!(is_pending(large.as_mut()));
            assert!(is_pending(next.as_mut()));
        }
        next.await.unwrap();
        drop(first);
        assert_eq!(handle.controller().memory().reserved(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_raised_bound_lets_the_head_in() {
        let handle = handle(100);
        let _first = held(&handle, 60);
        let mut waiting = pin!(grown(&handle, 90));
        assert!(is_pending(waiting.as_mut()));
        handle.controller().reload(&AdmissionOptions { max_buffered: 150, ..AdmissionOptions::default() });
        waiting.await.unwrap();
        // One that is larger than all there is gets all there is.
        drop(_first);
        assert_eq!(grown(&handle, 1_000).await.unwrap().bytes(), 150);
    }
}

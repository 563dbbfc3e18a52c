//! Requests that wait for their turn, as those who make them wait tell of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::counts::TIMES;
use super::histogram::Histogram;

/// Why a request was not let wait, or did not get its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many wait as may.
    Full,
    /// Its turn did not come in time.
    Timeout,
    /// Its turn would have come, but there are too many in a second.
    Rate,
}

impl Refusal {
    pub(super) const ALL: [Self; 3] = [Self::Full, Self::Timeout, Self::Rate];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Timeout => "timeout",
            Self::Rate => "rate",
        }
    }
}

/// The queue of a router. Shared by all workers: a request that waits has time.
#[derive(Default)]
pub(crate) struct Queue {
    length: AtomicUsize,
    limit: AtomicUsize,
    refused: [AtomicU64; Refusal::ALL.len()],
    waits: Mutex<Histogram<19>>,
}

impl Queue {
    /// Says how many may wait; 0 is none.
    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    /// A request waits from now on, until what is returned is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Waiting {
        self.length.fetch_add(1, Relaxed);
        Waiting { queue: Arc::clone(self), since: Instant::now() }
    }

    /// A request was refused instead of being served.
    pub(crate) fn refuse(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn length(&self) -> usize {
        self.length.load(Relaxed)
    }

    pub(super) fn limit(&self) -> usize {
        self.limit.load(Relaxed)
    }

    pub(super) fn refused(&self, why: Refusal) -> u64 {
        self.refused[why as usize].load(Relaxed)
    }

    pub(super) fn waits(&self) -> Histogram<19> {
        // Plain numbers: whole whatever happens under the lock.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A request in the queue.
pub(crate) struct Waiting {
    queue: Arc<Queue>,
    since: Instant,
}

/// Its turn has come, or it waits no longer: both are a wait.
impl Drop for Waiting {
    fn drop(&mut self) {
        self.queue.length.fetch_sub(1, Relaxed);
        let waited = self.since.elapsed();
        self.queue.waits.lock().unwrap_or_else(PoisonError::into_inner).observe(&TIMES, waited);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_counts_until_the_wait_is_over() {
        let queue = Arc::new(Queue::default());
        queue.set_limit(2);
        let (first, second) = (queue.enter(), queue.enter());
        assert_eq!((queue.length(), queue.limit()), (2, 2));
        queue.refuse(Refusal::Full);
        drop(first);
        assert_eq!(queue.length(), 1);
        drop(second);
        let waits = queue.waits();
        assert_eq!(waits.within.iter().sum::<u64>() + waits.beyond, 2);
        assert_eq!(Refusal::ALL.map(|why| queue.refused(why)), [1, 0, 0]);
    }
}

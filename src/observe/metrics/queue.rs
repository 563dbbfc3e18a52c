//! Requests that wait for their turn, as those who make them wait tell of it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::counts::TIMES;
use super::histogram::Histogram;
use crate::admission::Rejection;

/// Why requests are refused, as it is shown.
const REASONS: [&str; 3] = ["full", "timeout", "rate"];

/// What came of waiting. Shared by all workers: a request that waits has time. How many wait is for the gate to know.
#[derive(Default)]
pub(crate) struct QueueMetrics {
    /// By [`REASONS`].
    refused: [AtomicU64; REASONS.len()],
    waits: Mutex<Histogram<19>>,
}

impl QueueMetrics {
    /// A request waits from now on, until what is returned is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Waiting {
        Waiting { queue: Arc::clone(self), since: Instant::now() }
    }

    /// A request was refused instead of being served.
    pub(crate) fn refuse(&self, why: &Rejection) {
        let reason = match why {
            Rejection::QueueFull { .. } => 0,
            Rejection::QueueTimeout(_) => 1,
            Rejection::RateLimited { .. } => 2,
        };
        self.refused[reason].fetch_add(1, Relaxed);
    }

    /// How many were refused for each reason.
    pub(super) fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.refused.iter().map(|count| count.load(Relaxed)))
    }

    pub(super) fn waits(&self) -> Histogram<19> {
        // Plain numbers: whole whatever happens under the lock.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A request in the queue.
pub(crate) struct Waiting {
    queue: Arc<QueueMetrics>,
    since: Instant,
}

/// Its turn has come, or it waits no longer: both are a wait.
impl Drop for Waiting {
    fn drop(&mut self) {
        let waited = self.since.elapsed();
        self.queue.waits.lock().unwrap_or_else(PoisonError::into_inner).observe(&TIMES, waited);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wait_and_a_refusal_count_once() {
        let queue = Arc::new(QueueMetrics::default());
        let waiting = queue.enter();
        queue.refuse(&Rejection::QueueTimeout(Duration::from_secs(1)));
        let count = || queue.waits().within.iter().sum::<u64>() + queue.waits().beyond;
        assert_eq!(count(), 0);
        drop(waiting);
        assert_eq!(count(), 1);
        assert!(queue.refused().eq([("full", 0), ("timeout", 1), ("rate", 0)]));
    }
}

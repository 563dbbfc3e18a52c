//! Metrics of requests that wait in the admission queue, or are rejected there.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::counts::REQUEST_BOUNDS;
use super::histogram::Histogram;
use crate::admission::Rejection;

/// The values of the label `reason`.
const REASONS: [&str; 3] = ["full", "timeout", "rate"];

/// Counts of waits and rejections. Shared by all workers, unlike other metrics: a request that waits, or is
/// rejected, does not mind a shared cache line. The length of the queue is known to the admission controller.
#[derive(Default)]
pub(crate) struct QueueMetrics {
    /// By [`REASONS`].
    rejected: [AtomicU64; REASONS.len()],
    waits: Mutex<Histogram<19>>,
}

impl QueueMetrics {
    /// A request waits from now on, until the returned guard is dropped.
    pub(crate) fn start_wait(self: &Arc<Self>) -> QueueWait {
        QueueWait { queue: Arc::clone(self), since: Instant::now() }
    }

    /// A request was rejected instead of being admitted.
    pub(crate) fn count_rejection(&self, rejection: &Rejection) {
        let reason = match rejection {
            Rejection::QueueFull { .. } => 0,
            Rejection::QueueTimeout(_) => 1,
            Rejection::RateLimited { .. } => 2,
        };
        self.rejected[reason].fetch_add(1, Relaxed);
    }

    /// The count of rejected requests by reason.
    pub(super) fn rejected(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(self.rejected.iter().map(|count| count.load(Relaxed)))
    }

    pub(super) fn waits(&self) -> Histogram<19> {
        // A poisoned lock does no harm: the numbers under it are valid at any time.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A request in the queue. Dropped when it leaves it.
pub(crate) struct QueueWait {
    queue: Arc<QueueMetrics>,
    since: Instant,
}

// Admitted, rejected or given up by its client: each is a wait.
impl Drop for QueueWait {
    fn drop(&mut self) {
        let waited = self.since.elapsed();
        self.queue.waits.lock().unwrap_or_else(PoisonError::into_inner).observe(&REQUEST_BOUNDS, waited);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wait_and_a_rejection_count_once() {
        let queue = Arc::new(QueueMetrics::default());
        let waiting = queue.start_wait();
        queue.count_rejection(&Rejection::QueueTimeout(Duration::from_secs(1)));
        let count = || queue.waits().buckets.iter().sum::<u64>() + queue.waits().overflow;
        assert_eq!(count(), 0);
        drop(waiting);
        assert_eq!(count(), 1);
        assert!(queue.rejected().eq([("full", 0), ("timeout", 1), ("rate", 0)]));
    }
}

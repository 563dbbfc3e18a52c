//! Metrics of the watch of Kubernetes' pods. All stay unused without the feature `kubernetes`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// The values of the label `reason`: why pods could not be listed or watched.
pub(crate) const POD_WATCH_FAILURES: [&str; 8] =
    ["configuration", "unauthorized", "forbidden", "gone", "status", "unreachable", "timeout", "malformed"];

/// What the task that follows pods counts, and what it knows.
#[derive(Default)]
pub(crate) struct PodMetrics {
    /// Whether pods are followed at all; otherwise there are no samples.
    pub(crate) is_on: AtomicBool,
    /// Whether the API server sends events now.
    pub(crate) is_watching: AtomicBool,
    /// Pods that are servers.
    pub(crate) servers: AtomicU64,
    /// Pods that would be servers but for an error in them.
    pub(crate) refused: AtomicU64,
    /// Complete lists.
    pub(crate) lists: AtomicU64,
    /// Events of pods.
    pub(crate) events: AtomicU64,
    /// By [`POD_WATCH_FAILURES`].
    pub(crate) failures: [AtomicU64; POD_WATCH_FAILURES.len()],
}

impl PodMetrics {
    /// The pods by their state.
    pub(super) fn pods(&self) -> [(&'static str, u64); 2] {
        [("server", self.servers.load(Relaxed)), ("refused", self.refused.load(Relaxed))]
    }

    pub(super) fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        POD_WATCH_FAILURES.into_iter().zip(self.failures.iter().map(|count| count.load(Relaxed)))
    }
}

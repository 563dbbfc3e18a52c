//! Counters and histograms, and their text for Prometheus, which is made for each scrape.
//!
//! Each worker counts in plain numbers of its own, once per request, under a lock that only a
//! scrape contends for; that costs less than one shared atomic per counter. Health, outcomes
//! and connections are counted by the backends themselves (`upstream`), and only read here.
//! There is no crate for it: the text is simple, and none counts in plain numbers per worker.

mod counts;
mod exposition;
mod histogram;
mod pairs;
mod pods;
mod process;
mod queue;
mod render;
mod selections;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use counts::Counts;
use pairs::TrackedPairs;
#[cfg(feature = "kubernetes")]
pub(crate) use pods::POD_WATCH_FAILURES;
pub(crate) use pods::PodMetrics;
pub(crate) use queue::QueueMetrics;

use crate::admission::AdmissionController;
use crate::observe::record::{CompletedRequest, Observer};
use crate::upstream::{Fleet, ServerPair};

/// The metrics of a router.
#[derive(Default)]
pub(crate) struct Metrics {
    workers: Mutex<Vec<Arc<WorkerMetrics>>>,
    pairs: Arc<TrackedPairs>,
    queue: Arc<QueueMetrics>,
    pods: Arc<PodMetrics>,
}

impl Metrics {
    /// Adds the metrics of one more worker.
    pub(crate) fn worker(&self) -> Arc<WorkerMetrics> {
        let worker = Arc::new(WorkerMetrics { counts: Mutex::default(), pairs: Arc::clone(&self.pairs) });
        self.lock().push(Arc::clone(&worker));
        worker
    }

    /// The metrics of the admission queue.
    pub(crate) fn queue(&self) -> &Arc<QueueMetrics> {
        &self.queue
    }

    /// The metrics of the watch of pods.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn pods(&self) -> &Arc<PodMetrics> {
        &self.pods
    }

    /// All metrics as text. Those of backends and pairs are of the backends in `fleet`.
    pub(crate) fn to_text(&self, fleet: &Fleet, admission: &AdmissionController) -> String {
        let is_present = |id| fleet.known_servers().any(|backend| backend.id() == id);
        let tracked = self.pairs.retain(is_present);
        let mut total = Counts::default();
        for worker in self.lock().iter() {
            let mut counts = worker.lock();
            // Here, because a worker does not learn that a backend is gone.
            counts.pairs.retain(|pair, _| pair.is_none_or(|pair| tracked.contains_key(&pair)));
            counts.selections.retain(is_present);
            total.add(&counts);
        }
        render::render(&total, &tracked, (&self.queue, admission), fleet, &self.pods)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<WorkerMetrics>>> {
        // A poisoned lock does no harm: workers are only ever added.
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metrics of one worker. Aligned, so that no two workers write to one cache line, or to a pair of
/// 64-byte lines that the prefetcher of x86-64 loads together.
#[repr(align(128))]
pub(crate) struct WorkerMetrics {
    counts: Mutex<Counts>,
    pairs: Arc<TrackedPairs>,
}

impl WorkerMetrics {
    /// The first byte of decode's response was written to the client, this long after it arrived.
    pub(crate) fn observe_relay(&self, duration: Duration) {
        self.lock().observe_relay(duration);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        // A poisoned lock does no harm: the numbers under it are valid at any time.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for WorkerMetrics {
    fn pair_selected(&self, pair: &ServerPair) {
        self.lock().selections.count(pair);
    }

    fn request_completed(&self, request: &CompletedRequest<'_>) {
        let pair = request.pair().and_then(|pair| self.pairs.key(pair));
        self.lock().count_request(request, pair);
    }
}

#[cfg(test)]
mod tests;

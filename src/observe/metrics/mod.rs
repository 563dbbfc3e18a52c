//! What is counted, and how it is shown: Prometheus' text, made when it is asked for.
//!
//! Each worker counts in numbers of its own, once a request, under a lock that nobody
//! else wants but a scrape; that costs less than a shared atomic number for each thing
//! that is counted. Health, outcomes and connections are counted by the servers themselves
//! (`upstream`) and only read here. The text is simple enough that a crate for it would
//! bring more code than it saves, and none of them counts in plain numbers a worker.

mod counts;
mod histogram;
mod pairs;
mod process;
mod queue;
mod render;
mod text;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use counts::Counts;
use pairs::Pairs;
pub(crate) use queue::QueueMetrics;

use crate::admission::AdmissionController;
use crate::observe::record::{CompletedRequest, Observer};
use crate::upstream::Fleet;

/// The numbers of a router.
#[derive(Default)]
pub(crate) struct Metrics {
    workers: Mutex<Vec<Arc<WorkerMetrics>>>,
    pairs: Arc<Pairs>,
    queue: Arc<QueueMetrics>,
}

impl Metrics {
    /// Numbers for one more worker.
    pub(crate) fn worker(&self) -> Arc<WorkerMetrics> {
        let worker = Arc::new(WorkerMetrics { counts: Mutex::default(), pairs: Arc::clone(&self.pairs) });
        self.lock().push(Arc::clone(&worker));
        worker
    }

    /// What those who make requests wait tell of it.
    pub(crate) fn queue(&self) -> &Arc<QueueMetrics> {
        &self.queue
    }

    /// All numbers as text. Those of servers, and of pairs, are of the servers in `fleet`.
    pub(crate) fn to_text(&self, fleet: &Fleet, gate: &AdmissionController) -> String {
        let is_there = |id| fleet.known_servers().any(|server| server.id() == id);
        let named = self.pairs.retain(is_there);
        let mut total = Counts::default();
        for worker in self.lock().iter() {
            let mut counts = worker.lock();
            counts.pairs.retain(|pair, _| pair.is_none_or(|pair| named.contains_key(&pair)));
            total.add(&counts);
        }
        render::render(&total, &named, (&self.queue, gate), fleet)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<WorkerMetrics>>> {
        // Workers are only ever added.
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker's numbers. Aligned, so that no two workers write to one cache line (or to a pair of lines that are
/// fetched together).
#[repr(align(128))]
pub(crate) struct WorkerMetrics {
    counts: Mutex<Counts>,
    pairs: Arc<Pairs>,
}

impl WorkerMetrics {
    /// The first byte of decode's has been written to the client, so long after it came.
    pub(crate) fn relayed(&self, time: Duration) {
        self.lock().relayed(time);
    }

    /// A request of which not even the head came was refused, with this status and an error of this code.
    pub(crate) fn log_rejected_before_parse(&self, status: u16, code: &'static str) {
        self.lock().log_rejected_before_parse(status, code);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        // Numbers to be added to: whole whatever happens under the lock.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for WorkerMetrics {
    fn finished(&self, request: &CompletedRequest<'_>) {
        let pair = request.pair().and_then(|pair| self.pairs.key(pair));
        self.lock().request(request, pair);
    }
}

#[cfg(test)]
mod tests;

//! Requests in flight on a backend: counted while they run, with their work, and limited where a cap is set.

use std::sync::Arc;
use std::time::Duration;

use super::completed_prefill::Expectation;
use super::ranks::RankSlot;
use super::{Backend, Outcome};
use crate::admission::{AdmissionHandle, WakeOnDrop};
use crate::wire::usage::Usage;

/// One leg of a request: counted on its backend until it is dropped, and its outcome recorded then.
#[derive(Debug)]
pub(crate) struct InFlight {
    permit: BackendPermit,
    outcome: Outcome,
}

impl InFlight {
    /// Starts a leg, whatever the number in flight, on a rank of the backend if it has several.
    pub(crate) fn enter(backend: Arc<Backend>, rank: Option<Arc<RankSlot>>) -> Self {
        let mut permit = BackendPermit::acquire(backend);
        permit.set_rank(rank);
        Self::with_permit(permit)
    }

    /// Starts a leg with a permit that was acquired before.
    pub(crate) fn with_permit(permit: BackendPermit) -> Self {
        // Until another outcome is set: a leg that is dropped before its end was cancelled.
        Self { permit, outcome: Outcome::Cancelled }
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.permit.backend
    }

    /// Counts a kept-alive connection that its server had closed. The leg goes on.
    pub(crate) fn connection_was_stale(&self) {
        self.permit.backend.record_outcome(Outcome::Stale);
    }

    /// Counts this many bytes as the backend's work until the leg ends.
    pub(super) fn add_work(&mut self, bytes: u64) {
        self.permit.add_work(bytes);
    }

    pub(super) fn set_expectation(&mut self, expected: Expectation) {
        self.permit.expected = expected;
    }

    /// The whole response of a prefill server has arrived, this long after the request was written.
    pub(crate) fn prefill_completed(&self, usage: Option<Usage>, time: Option<Duration>) {
        let BackendPermit { backend, rank, expected, .. } = &self.permit;
        backend.prefill_completed(rank.as_deref(), *expected, usage, time);
    }

    /// Sets the leg's outcome, which is recorded when this is dropped.
    pub(crate) fn set_outcome(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Before the permit is released: an observer that sees nothing in flight must see the outcome too.
        self.permit.backend.record_outcome(self.outcome);
    }
}

/// One request in flight on a backend, and its work there; both released on drop.
#[derive(Debug)]
pub(crate) struct BackendPermit {
    backend: Arc<Backend>,
    /// Where it is counted, too.
    rank: Option<Arc<RankSlot>>,
    work: u64,
    pub(super) expected: Expectation,
    /// Wakes the admission queue, if requests in flight are capped. Fields are dropped after `Drop::drop`, so
    /// the slot is released by then.
    _wake: Option<WakeOnDrop>,
}

impl BackendPermit {
    /// Acquires a slot, above any cap.
    pub(super) fn acquire(backend: Arc<Backend>) -> Self {
        backend.load_slot().enter();
        Self { backend, rank: None, work: 0, expected: Expectation::default(), _wake: None }
    }

    /// Acquires a slot if fewer than `cap` requests are in flight.
    pub(super) fn try_acquire(backend: &Arc<Backend>, cap: usize) -> Option<Self> {
        let is_acquired = backend.load_slot().try_enter(cap);
        let new = || Self {
            backend: Arc::clone(backend),
            rank: None,
            work: 0,
            expected: Expectation::default(),
            _wake: None,
        };
        is_acquired.then(new)
    }

    pub(super) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// Counts the request on a rank of the backend, too, before it has any work.
    pub(super) fn set_rank(&mut self, rank: Option<Arc<RankSlot>>) {
        debug_assert!(self.rank.is_none() && self.work == 0, "a request is on one rank");
        if let Some(rank) = &rank {
            rank.slot().enter();
        }
        self.rank = rank;
    }

    /// Counts this many bytes as the backend's work until the permit is released.
    pub(super) fn add_work(&mut self, bytes: u64) {
        self.work += self.backend.load_slot().add_work(bytes);
        if let Some(rank) = &self.rank {
            rank.slot().add_work(bytes);
        }
    }

    /// Makes the release of this permit wake the head of the admission queue.
    pub(super) fn waking(mut self, handle: &Arc<AdmissionHandle>) -> Self {
        self._wake = Some(WakeOnDrop::new(handle));
        self
    }
}

impl Drop for BackendPermit {
    fn drop(&mut self) {
        self.backend.load_slot().leave(self.work);
        if let Some(rank) = &self.rank {
            rank.slot().leave(self.work);
        }
    }
}

//! Selection of a pair where the requests in flight on each server are capped.
//!
//! Selection and permit are one step: a request that waits for capacity holds no permit, and one that was
//! admitted has its permits already. It is admitted before its body is read, so that a queue costs little
//! memory. A policy that wants to know the request selects afterwards, in [`settle`](Fleet::settle): until
//! then the permits are on the servers with the fewest requests, and only keep the capacity.

use std::sync::Arc;

use super::{Fleet, Picked, Rank, RoleGroup, ServerPair, rank};
use crate::admission::{AdmissionHandle, BackendCaps};
use crate::upstream::completed_prefill::Expectation;
use crate::upstream::in_flight::BackendPermit;
use crate::upstream::{Backend, Demand, InFlight, Needs, Role};

/// A pair, and a permit for one request on each of its servers.
pub(crate) struct PairPermits {
    prefill: BackendPermit,
    decode: BackendPermit,
}

impl PairPermits {
    /// The pair, and one request in flight on each of its servers.
    pub(crate) fn into_legs(self) -> (ServerPair, InFlight, InFlight) {
        let server = |permit: &BackendPermit| Arc::clone(permit.backend());
        let pair = ServerPair { prefill: server(&self.prefill), decode: server(&self.decode) };
        (pair, InFlight::with_permit(self.prefill), InFlight::with_permit(self.decode))
    }
}

impl Fleet {
    /// Selects a pair with capacity and acquires its permits; `None` if there is no capacity now. The error
    /// is a role that has no server.
    pub(crate) fn acquire_pair(
        &self,
        caps: BackendCaps,
        handle: &Arc<AdmissionHandle>,
    ) -> Result<Option<PairPermits>, Role> {
        // Waiting would not help: an error now is better than a timeout in the queue.
        for group in [&self.prefill, &self.decode] {
            if group.servers().is_empty() {
                return Err(group.role);
            }
        }
        // Checked for both roles first: a policy's turn on one role would be lost if the other has no
        // capacity.
        if !self.prefill.has_capacity(caps.prefill) || !self.decode.has_capacity(caps.decode) {
            return Ok(None);
        }
        let permits = self.prefill.try_acquire(caps.prefill).zip(self.decode.try_acquire(caps.decode));
        Ok(permits.map(|(prefill, decode)| PairPermits {
            prefill: prefill.waking(handle),
            decode: decode.waking(handle),
        }))
    }

    /// Completes the selection of a request that has been read: the policies that want to know it select now,
    /// and its work is counted. A server that was only reserved is given up for the selected one.
    pub(crate) fn settle(
        &self,
        permits: PairPermits,
        demand: Demand<'_>,
        caps: BackendCaps,
        handle: &Arc<AdmissionHandle>,
    ) -> PairPermits {
        let PairPermits { prefill, decode } = permits;
        PairPermits {
            prefill: self.prefill.settle(prefill, demand, caps.prefill, handle),
            decode: self.decode.settle(decode, demand, caps.decode, handle),
        }
    }

    /// Like [`acquire_pair`](Self::acquire_pair), for the retry of a request that was admitted before:
    /// without the server that has just failed if there is another one, and above the cap rather than not at
    /// all.
    pub(crate) fn acquire_other_pair(
        &self,
        failed: &Arc<Backend>,
        demand: Demand<'_>,
        caps: BackendCaps,
        handle: &Arc<AdmissionHandle>,
    ) -> Result<PairPermits, Role> {
        let acquire = |group: &RoleGroup, cap| {
            let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed) && server.is_healthy();
            let below_cap = group.pick_where(|server| is_other(server) && server.in_flight() < cap, demand);
            let picked = below_cap.or_else(|| group.pick_other(failed, demand)).ok_or(group.role)?;
            let mut permit = BackendPermit::acquire(picked.server).waking(handle);
            permit.add_work(picked.work);
            permit.expected = picked.expected;
            Ok(permit)
        };
        // Both permits are new: the failed attempt has released its own.
        let prefill = acquire(&self.prefill, caps.prefill)?;
        Ok(PairPermits { prefill, decode: acquire(&self.decode, caps.decode)? })
    }
}

impl RoleGroup {
    fn has_capacity(&self, cap: usize) -> bool {
        let best = self.best_rank();
        self.servers().iter().any(|server| is_eligible(server, best, cap))
    }

    /// Whether the policy selects only when the request has been read.
    fn selects_late(&self) -> bool {
        self.needs != Needs::default()
    }

    /// Selects a server with capacity and acquires a permit on it.
    fn try_acquire(&self, cap: usize) -> Option<BackendPermit> {
        let best = self.best_rank();
        loop {
            let server = if self.selects_late() {
                // Not by the policy, whose selection counts.
                let eligible = self.servers().iter().filter(|server| is_eligible(server, best, cap));
                Arc::clone(eligible.min_by_key(|server| server.in_flight())?)
            } else {
                self.pick_where(|server| is_eligible(server, best, cap), Demand::default())?.server
            };
            // Another worker may have taken the last permit since; another server may still have one.
            if let Some(permit) = BackendPermit::try_acquire(&server, cap) {
                return Some(permit);
            }
        }
    }

    /// Selects late if the policy does, among the servers that have capacity and the one that was reserved.
    fn settle(
        &self,
        mut reserved: BackendPermit,
        demand: Demand<'_>,
        cap: usize,
        handle: &Arc<AdmissionHandle>,
    ) -> BackendPermit {
        let picked = if self.selects_late() {
            let best = self.best_rank();
            let is_reserved = |server: &Arc<Backend>| Arc::ptr_eq(server, reserved.backend());
            // `None` if a reload has removed all servers since.
            self.pick_where(|server| is_reserved(server) || is_eligible(server, best, cap), demand)
        } else {
            None
        };
        reserved.expected = Expectation::of_bytes(demand.prompt_bytes());
        let Some(Picked { server, work, expected }) = picked else {
            reserved.add_work(demand.prompt_bytes());
            return reserved;
        };
        if !Arc::ptr_eq(&server, reserved.backend()) {
            // If another worker was faster, the reserved server will do.
            if let Some(permit) = BackendPermit::try_acquire(&server, cap) {
                reserved = permit.waking(handle);
            }
        }
        if Arc::ptr_eq(&server, reserved.backend()) {
            reserved.expected = expected;
        }
        reserved.add_work(work);
        reserved
    }
}

/// Whether a server may get one more request. Those that are out of rotation may only while the role has none
/// that is in it: one that may be down is better than none.
fn is_eligible(server: &Backend, best: Rank, cap: usize) -> bool {
    server.in_flight() < cap && rank(server) <= best
}

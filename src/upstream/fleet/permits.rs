//! Selection of servers where the requests in flight on each are capped.
//!
//! Selection and permit are one step: a request that waits for capacity holds no permit, and one that was
//! admitted has its permits already. It is admitted before its body is read, so that a queue costs little
//! memory. A policy that wants to know the request selects afterwards, in [`settle`](Fleet::settle): until
//! then the permits are on the servers with the fewest requests, and only keep the capacity.

use std::sync::Arc;

use super::{Entered, Fleet, Picked, Priority, RoleGroup, ServerPair, Stopwatch, priority};
use crate::admission::{AdmissionHandle, BackendCaps};
use crate::upstream::completed_prefill::Expectation;
use crate::upstream::in_flight::BackendPermit;
use crate::upstream::{Backend, Demand, InFlight, Needs, Role, SelectedBy, SelectionReason};

/// A pair, and a permit for one request on each of its servers. A plain server is in decode's place.
pub(crate) struct PairPermits {
    prefill: Option<Reserved>,
    decode: Reserved,
    /// Of the selection, if it was measured.
    nanos: Option<u32>,
}

/// A permit, and how its server was selected.
struct Reserved {
    permit: BackendPermit,
    by: SelectedBy,
}

impl Reserved {
    fn waking(self, handle: &Arc<AdmissionHandle>) -> Self {
        Self { permit: self.permit.waking(handle), by: self.by }
    }

    /// Counts the request's work.
    fn with_work(mut self) -> Self {
        self.permit.add_work(self.by.work());
        self
    }
}

impl PairPermits {
    /// The pair, and one request in flight on each of its servers.
    pub(crate) fn into_legs(self) -> Entered {
        let server = |reserved: &Reserved| (Arc::clone(reserved.permit.backend()), reserved.by);
        let (decode, by) = server(&self.decode);
        let mut pair = match &self.prefill {
            Some(prefill) => ServerPair::new(server(prefill), (decode, by)),
            None => ServerPair::single(decode, by),
        };
        pair.selection_nanos = self.nanos;
        let on_prefill = self.prefill.map(|prefill| InFlight::with_permit(prefill.permit));
        (pair, on_prefill, InFlight::with_permit(self.decode.permit))
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
        for role in self.roles() {
            if self.servers(*role).is_empty() {
                return Err(*role);
            }
        }
        if self.is_regular {
            let permit = self.regular.try_acquire(caps.regular);
            let waking =
                |permit: Reserved| PairPermits { prefill: None, decode: permit.waking(handle), nanos: None };
            return Ok(permit.map(waking));
        }
        // Checked for both roles first: a policy's turn on one role would be lost if the other has no
        // capacity.
        if !self.prefill.has_capacity(caps.prefill) || !self.decode.has_capacity(caps.decode) {
            return Ok(None);
        }
        let permits = self.prefill.try_acquire(caps.prefill).zip(self.decode.try_acquire(caps.decode));
        Ok(permits.map(|(prefill, decode)| PairPermits {
            prefill: Some(prefill.waking(handle)),
            decode: decode.waking(handle),
            nanos: None,
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
        let PairPermits { prefill, decode, .. } = permits;
        let stopwatch = Stopwatch::start();
        let prefill = prefill.map(|prefill| self.prefill.settle(prefill, demand, caps.prefill, handle));
        let decode = match self.is_regular {
            true => self.regular.settle(decode, demand, caps.regular, handle),
            false => self.decode.settle(decode, demand, caps.decode, handle),
        };
        PairPermits { prefill, decode, nanos: stopwatch.nanos() }
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
            permit.set_rank(picked.rank);
            permit.expected = picked.expected;
            Ok(Reserved { permit, by: picked.by }.with_work())
        };
        // Both permits are new: the failed attempt has released its own.
        if self.is_regular {
            let decode = acquire(&self.regular, caps.regular)?;
            return Ok(PairPermits { prefill: None, decode, nanos: None });
        }
        let prefill = Some(acquire(&self.prefill, caps.prefill)?);
        Ok(PairPermits { prefill, decode: acquire(&self.decode, caps.decode)?, nanos: None })
    }
}

impl RoleGroup {
    fn has_capacity(&self, cap: usize) -> bool {
        let best = self.best_priority();
        self.servers().iter().any(|server| is_eligible(server, best, cap))
    }

    /// Whether the policy selects only when the request has been read.
    fn selects_late(&self) -> bool {
        self.needs != Needs::default()
    }

    /// Selects a server with capacity and acquires a permit on it.
    fn try_acquire(&self, cap: usize) -> Option<Reserved> {
        let best = self.best_priority();
        loop {
            let (server, rank, by) = if self.selects_late() {
                // Not by the policy, whose selection counts.
                let eligible = self.servers().iter().filter(|server| is_eligible(server, best, cap));
                let server = Arc::clone(eligible.min_by_key(|server| server.in_flight())?);
                (server, None, self.by_load(Demand::default()))
            } else {
                let picked = self.pick_where(|server| is_eligible(server, best, cap), Demand::default())?;
                (picked.server, picked.rank, picked.by)
            };
            // Another worker may have taken the last permit since; another server may still have one.
            if let Some(mut permit) = BackendPermit::try_acquire(&server, cap) {
                permit.set_rank(rank);
                return Some(Reserved { permit, by });
            }
        }
    }

    /// What is said of a server that was selected for its capacity, and not by the policy.
    fn by_load(&self, demand: Demand<'_>) -> SelectedBy {
        self.selected_by(demand, 0, SelectionReason::Load, self.servers().len())
    }

    /// A server that was reserved takes the request, on whichever rank has the least load.
    fn on_any_rank(&self, mut permit: BackendPermit, demand: Demand<'_>) -> Reserved {
        let rank = self.rank_of(permit.backend());
        let by = SelectedBy { rank: rank.as_ref().map(|rank| rank.rank()), ..self.by_load(demand) };
        permit.set_rank(rank);
        Reserved { permit, by }
    }

    /// Selects late if the policy does, among the servers that have capacity and the one that was reserved.
    fn settle(
        &self,
        reserved: Reserved,
        demand: Demand<'_>,
        cap: usize,
        handle: &Arc<AdmissionHandle>,
    ) -> Reserved {
        let Reserved { mut permit, by } = reserved;
        permit.expected = Expectation::of_bytes(demand.prompt_bytes());
        if !self.selects_late() {
            // Selected before the request was read.
            let by = SelectedBy { prompt_bytes: demand.prompt_bytes(), ..by };
            return Reserved { permit, by }.with_work();
        }
        let best = self.best_priority();
        let is_reserved = |server: &Arc<Backend>| Arc::ptr_eq(server, permit.backend());
        let picked = self.pick_where(|server| is_reserved(server) || is_eligible(server, best, cap), demand);
        let other = match picked {
            Some(Picked { server, rank, by, expected }) if is_reserved(&server) => {
                permit.set_rank(rank);
                permit.expected = expected;
                return Reserved { permit, by }.with_work();
            }
            Some(Picked { server, rank, by, expected }) => {
                BackendPermit::try_acquire(&server, cap).map(|mut permit| {
                    permit.set_rank(rank);
                    permit.expected = expected;
                    Reserved { permit, by }.waking(handle)
                })
            }
            // A reload has removed all servers since.
            None => None,
        };
        // If another worker was faster, the reserved server will do.
        other.unwrap_or_else(|| self.on_any_rank(permit, demand)).with_work()
    }
}

/// Whether a server may get one more request. Those that are out of rotation may only while the role has none
/// that is in it: one that may be down is better than none.
fn is_eligible(server: &Backend, best: Priority, cap: usize) -> bool {
    server.in_flight() < cap && priority(server) <= best
}

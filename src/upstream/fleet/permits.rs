//! Selection of a pair where the requests in flight on each server are capped.
//!
//! Selection and permit are one step: a request that waits for capacity holds no permit,
//! and one that was admitted has its permits already.

use std::sync::Arc;

use super::{Fleet, Rank, RoleGroup, ServerPair, rank};
use crate::admission::{AdmissionHandle, BackendCaps};
use crate::upstream::in_flight::BackendPermit;
use crate::upstream::{Backend, InFlight, Role};

/// A pair, and a permit for one request on each of its servers.
pub(crate) struct PairPermits {
    pair: ServerPair,
    prefill: BackendPermit,
    decode: BackendPermit,
}

impl PairPermits {
    /// The pair, and one request in flight on each of its servers.
    pub(crate) fn into_legs(self) -> (ServerPair, InFlight, InFlight) {
        (self.pair, InFlight::with_permit(self.prefill), InFlight::with_permit(self.decode))
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
        for (group, role) in [(&self.prefill, Role::Prefill), (&self.decode, Role::Decode)] {
            if group.servers.is_empty() {
                return Err(role);
            }
        }
        // Checked for both roles first: a policy's turn on one role would be lost if the other has no
        // capacity.
        if !self.prefill.has_capacity(caps.prefill) || !self.decode.has_capacity(caps.decode) {
            return Ok(None);
        }
        let permits = self.prefill.try_acquire(caps.prefill).zip(self.decode.try_acquire(caps.decode));
        Ok(permits.map(|((prefill, on_prefill), (decode, on_decode))| PairPermits {
            pair: ServerPair { prefill, decode },
            prefill: on_prefill.waking(handle),
            decode: on_decode.waking(handle),
        }))
    }

    /// Like [`acquire_pair`](Self::acquire_pair), for the retry of a request that was admitted before:
    /// without the server that has just failed if there is another one, and above the cap rather than not at
    /// all.
    pub(crate) fn acquire_other_pair(
        &self,
        failed: &Arc<Backend>,
        caps: BackendCaps,
        handle: &Arc<AdmissionHandle>,
    ) -> Result<PairPermits, Role> {
        let pick = |group: &RoleGroup, cap, role| {
            let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed) && server.is_healthy();
            let below_cap = group.pick_where(|server| is_other(server) && server.in_flight() < cap);
            below_cap.or_else(|| group.pick_other(failed)).ok_or(role)
        };
        // Both permits are new: the failed attempt has released its own.
        let prefill = pick(&self.prefill, caps.prefill, Role::Prefill)?;
        let decode = pick(&self.decode, caps.decode, Role::Decode)?;
        let acquire = |server: &Arc<Backend>| BackendPermit::acquire(Arc::clone(server)).waking(handle);
        let (on_prefill, on_decode) = (acquire(&prefill), acquire(&decode));
        Ok(PairPermits { pair: ServerPair { prefill, decode }, prefill: on_prefill, decode: on_decode })
    }
}

impl RoleGroup {
    fn has_capacity(&self, cap: usize) -> bool {
        let best = self.best_rank();
        self.servers.iter().any(|server| is_eligible(server, best, cap))
    }

    /// Selects a server with capacity and acquires a permit on it.
    fn try_acquire(&self, cap: usize) -> Option<(Arc<Backend>, BackendPermit)> {
        let best = self.best_rank();
        loop {
            let server = self.pick_where(|server| is_eligible(server, best, cap))?;
            // Another worker may have taken the last permit since; another server may still have one.
            if let Some(permit) = BackendPermit::try_acquire(&server, cap) {
                return Some((server, permit));
            }
        }
    }
}

/// Whether a server may get one more request. Those that are out of rotation may only while the role has none
/// that is in it: one that may be down is better than none.
fn is_eligible(server: &Backend, best: Rank, cap: usize) -> bool {
    server.in_flight() < cap && rank(server) <= best
}

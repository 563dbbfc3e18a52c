//! The choice of two servers where each has so many requests at a time and no more.
//!
//! What is chosen is taken at once: a request that waits for room holds none, and one
//! that has been let in finds it.

use std::sync::Arc;

use super::{Fleet, Group, ServerPair};
use crate::admission::{AdmissionHandle, BackendCaps};
use crate::upstream::backend::BackendPermit;
use crate::upstream::{Backend, InFlight, Role};

/// A pair of servers, and a place on each.
pub(crate) struct PairPermits {
    pair: ServerPair,
    prefill: BackendPermit,
    decode: BackendPermit,
}

impl PairPermits {
    /// The pair, and one request under way on each.
    pub(crate) fn into_legs(self) -> (ServerPair, InFlight, InFlight) {
        (self.pair, InFlight::on(self.prefill), InFlight::on(self.decode))
    }
}

impl Fleet {
    /// Takes a place on two servers that have room. `None`: there is none now. The error is a role that has no server.
    pub(crate) fn seats(
        &self,
        caps: BackendCaps,
        entrance: &Arc<AdmissionHandle>,
    ) -> Result<Option<PairPermits>, Role> {
        for (group, role) in [(&self.prefill, Role::Prefill), (&self.decode, Role::Decode)] {
            if group.servers.is_empty() {
                return Err(role);
            }
        }
        // Before anything is taken or a policy is asked, as one without the other is of no use.
        if !self.prefill.has_room(caps.prefill) || !self.decode.has_room(caps.decode) {
            return Ok(None);
        }
        let seats = self.prefill.seat(caps.prefill).zip(self.decode.seat(caps.decode));
        Ok(seats.map(|((prefill, on_prefill), (decode, on_decode))| PairPermits {
            pair: ServerPair { prefill, decode },
            prefill: on_prefill.told_of(entrance),
            decode: on_decode.told_of(entrance),
        }))
    }

    /// As [`seats`](Self::seats), for a request that was let in already and is sent again: without the server that has
    /// just failed where there is another, and over the cap rather than not at all.
    pub(crate) fn other_seats(
        &self,
        failed: &Arc<Backend>,
        caps: BackendCaps,
        entrance: &Arc<AdmissionHandle>,
    ) -> Result<PairPermits, Role> {
        let pick = |group: &Group, cap, role| {
            let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed) && server.is_healthy();
            let roomy = group.pick_where(|server| is_other(server) && server.in_flight() < cap);
            roomy.or_else(|| group.pick_other(failed)).ok_or(role)
        };
        let prefill = pick(&self.prefill, caps.prefill, Role::Prefill)?;
        let decode = pick(&self.decode, caps.decode, Role::Decode)?;
        let seat = |server: &Arc<Backend>| BackendPermit::take(Arc::clone(server)).told_of(entrance);
        let (on_prefill, on_decode) = (seat(&prefill), seat(&decode));
        Ok(PairPermits { pair: ServerPair { prefill, decode }, prefill: on_prefill, decode: on_decode })
    }
}

impl Group {
    fn has_room(&self, cap: usize) -> bool {
        let healthy_only = self.has_healthy();
        self.servers.iter().any(|server| is_open(server, healthy_only, cap))
    }

    fn has_healthy(&self) -> bool {
        self.servers.iter().any(|server| server.is_healthy())
    }

    /// A server that has room, and the place on it.
    fn seat(&self, cap: usize) -> Option<(Arc<Backend>, BackendPermit)> {
        let healthy_only = self.has_healthy();
        loop {
            let server = self.pick_where(|server| is_open(server, healthy_only, cap))?;
            // If another worker was quicker, there may be a place elsewhere.
            if let Some(seat) = BackendPermit::take_of(&server, cap) {
                return Some((server, seat));
            }
        }
    }
}

/// Whether a server may have one more. One that may be down is better than none, so health counts only if one is healthy.
fn is_open(server: &Backend, healthy_only: bool, cap: usize) -> bool {
    server.in_flight() < cap && (server.is_healthy() || !healthy_only)
}

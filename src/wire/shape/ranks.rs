//! Data-parallel ranks that a client has chosen in its request (`--dp-rank-fields pass`).

/// The ranks that a client has chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ClientRanks {
    /// It has set one of the fields, to whatever value.
    pub(crate) is_set: bool,
    /// Of both servers: `routed_dp_rank`, or `data_parallel_rank` of older versions.
    pub(super) routed: Option<u16>,
    /// The one that decode expects prefill to have used: `disagg_prefill_dp_rank`.
    pub(super) prefill: Option<u16>,
}

impl ClientRanks {
    /// The rank of the prefill server that it has chosen, or of the decode server.
    pub(crate) fn of(self, is_prefill: bool) -> Option<u16> {
        // Without the first, the room leads prefill to its rank, which must be the one that decode expects.
        self.routed.or(self.prefill.filter(|_| is_prefill))
    }
}

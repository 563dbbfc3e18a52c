//! Fields that SGLang has for its own use and accepts from anyone: what becomes of those that a client sends.
//!
//! `bootstrap_*` fields are none of them: the router sets them itself, so a client's are always removed.

/// What is done with a client's field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum FieldTreatment {
    /// Servers do not get it.
    #[default]
    Strip,
    /// The request is refused.
    Reject,
    /// Servers get it.
    Pass,
}

/// What is done with internal fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InternalFields {
    /// Those that make a server connect elsewhere, wait for somebody, or believe false times.
    pub(crate) orchestration: FieldTreatment,
    /// Those that choose a data-parallel rank, which some clients do knowingly.
    pub(crate) dp_rank: FieldTreatment,
}

impl Default for InternalFields {
    fn default() -> Self {
        Self { orchestration: FieldTreatment::Strip, dp_rank: FieldTreatment::Pass }
    }
}

/// From SGLang 0.5.23, `managers/io_struct.py`: where outputs go inside the server, URLs of encoders that the
/// scheduler connects to, and what else it takes from an orchestrator that it trusts.
const ORCHESTRATION: [&str; 8] = [
    "http_worker_ipc",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "encoder_urls",
    "kv_hints",
    "external_trace_header",
    "received_time",
    "decode_tp_size",
];
const DP_RANK: [&str; 3] = ["routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"];

impl InternalFields {
    /// What is done with the field of this name, if it is an internal one.
    pub(super) fn find(self, name: &[u8]) -> Option<(&'static str, FieldTreatment)> {
        // Nearly all names of clients are shorter than 8 bytes or found by the match before.
        let among =
            |names: &'static [&'static str]| names.iter().copied().find(|known| known.as_bytes() == name);
        let orchestration = || Some((among(&ORCHESTRATION)?, self.orchestration));
        orchestration().or_else(|| Some((among(&DP_RANK)?, self.dp_rank)))
    }
}

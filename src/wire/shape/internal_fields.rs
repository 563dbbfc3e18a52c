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

/// Which of the two kinds a field is.
#[derive(Clone, Copy)]
enum Kind {
    Orchestration,
    DpRank,
}

/// From SGLang 0.5.23, `managers/io_struct.py`: where outputs go inside the server, URLs of encoders that the
/// scheduler connects to, and what else it takes from an orchestrator that it trusts.
fn kind(name: &[u8]) -> Option<(&'static str, Kind)> {
    use Kind::{DpRank, Orchestration};
    // By length first: the names of most fields have another one, and are compared with nothing.
    let candidates: &[(&str, Kind)] = match name.len() {
        8 => &[("kv_hints", Orchestration)],
        12 => &[("encoder_urls", Orchestration)],
        13 => &[("received_time", Orchestration)],
        14 => &[("decode_tp_size", Orchestration), ("routed_dp_rank", DpRank)],
        15 => &[("http_worker_ipc", Orchestration)],
        18 => &[("num_items_assigned", Orchestration), ("data_parallel_rank", DpRank)],
        21 => &[("external_trace_header", Orchestration)],
        22 => &[("disagg_prefill_dp_rank", DpRank)],
        23 => &[("need_wait_for_mm_inputs", Orchestration)],
        _ => return None,
    };
    candidates.iter().copied().find(|(known, _)| known.as_bytes() == name)
}

impl InternalFields {
    /// Whether servers get whatever a client sends.
    pub(crate) fn passes_all(self) -> bool {
        self.orchestration == FieldTreatment::Pass && self.dp_rank == FieldTreatment::Pass
    }

    /// What is done with the field of this name, if it is an internal one.
    pub(super) fn find(self, name: &[u8]) -> Option<(&'static str, FieldTreatment)> {
        let (known, kind) = kind(name)?;
        let treatment = match kind {
            Kind::Orchestration => self.orchestration,
            Kind::DpRank => self.dp_rank,
        };
        Some((known, treatment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_internal_field_is_found_and_nothing_like_it() {
        let fields = InternalFields { orchestration: FieldTreatment::Reject, dp_rank: FieldTreatment::Strip };
        for (names, treatment) in [
            (
                &[
                    "http_worker_ipc",
                    "need_wait_for_mm_inputs",
                    "num_items_assigned",
                    "encoder_urls",
                    "kv_hints",
                    "external_trace_header",
                    "received_time",
                    "decode_tp_size",
                ][..],
                FieldTreatment::Reject,
            ),
            (&["routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"][..], FieldTreatment::Strip),
        ] {
            for name in names {
                assert_eq!(fields.find(name.as_bytes()), Some((*name, treatment)));
                assert_eq!(fields.find(format!("{name}s").as_bytes()), None);
                assert_eq!(fields.find(name.to_uppercase().as_bytes()), None);
            }
        }
    }
}

//! Counts of one worker: which servers policies have selected, why, and how much of the prompts they are
//! believed to have in their caches.

use super::histogram::{BucketBounds, Histogram};
use crate::upstream::{IdMap, Role, SelectedBy, SelectionReason, ServerPair};

/// Bounds for the time that a selection takes: 0.1 µs to 1 ms.
pub(super) static SELECTION_BOUNDS: BucketBounds<13> = BucketBounds::nanos([
    100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
]);

/// What the series of one reason have in common.
pub(super) type SelectionKey = (Role, &'static str, SelectionReason);

/// The prompts that a prefill server was given.
#[derive(Default, Clone, Copy)]
pub(super) struct PromptBytes {
    pub(super) total: u64,
    /// Believed to be in the server's cache.
    pub(super) matched: u64,
}

#[derive(Default, Clone)]
pub(super) struct Selections {
    /// A list, because a router has one policy for each role, and a policy few reasons.
    pub(super) reasons: Vec<(SelectionKey, u64)>,
    /// By the id of the prefill backend, or of the plain one.
    pub(super) prompts: IdMap<u64, PromptBytes>,
    pub(super) times: Histogram<13>,
}

impl Selections {
    pub(super) fn count(&mut self, pair: &ServerPair) {
        for role in pair.servers().map(|server| server.role()) {
            let SelectedBy { policy, reason, .. } = *pair.selected_by(role);
            self.count_reasons((role, policy, reason), 1);
        }
        let SelectedBy { prompt_bytes, cached, .. } = *pair.selected_by(Role::Prefill);
        let prompts = self.prompts.entry(pair.prefill().id()).or_default();
        prompts.total += prompt_bytes;
        prompts.matched += cached;
        if let Some(nanos) = pair.selection_nanos() {
            self.times.observe_nanos(&SELECTION_BOUNDS, nanos);
        }
    }

    fn count_reasons(&mut self, key: SelectionKey, count: u64) {
        match self.reasons.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => *known += count,
            None => self.reasons.push((key, count)),
        }
    }

    /// Forgets backends that are gone.
    pub(super) fn retain(&mut self, is_present: impl Fn(u64) -> bool) {
        self.prompts.retain(|id, _| is_present(*id));
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (key, count) in &other.reasons {
            self.count_reasons(*key, *count);
        }
        for (id, PromptBytes { total, matched }) in &other.prompts {
            let prompts = self.prompts.entry(*id).or_default();
            prompts.total += total;
            prompts.matched += matched;
        }
        self.times.add(&other.times);
    }
}

//! Which pairs have metrics of their own.
//!
//! A thousand prefill and a thousand decode backends are a million pairs, more series than
//! any monitoring takes. The first [`MAX_PAIRS`] pairs that get a request have series of
//! their own, the others share one. A pair's series is free again when one of its backends is gone.

use std::sync::{Mutex, PoisonError};

use arc_swap::ArcSwap;

use super::counts::PairKey;
use crate::upstream::{IdMap, ServerPair};

/// Pairs that have series of their own. Each has 42, so that all of them have 5,376.
pub(super) const MAX_PAIRS: usize = 128;

/// The URLs of a pair, which are its labels.
#[derive(Debug, Clone)]
pub(super) struct PairUrls {
    pub(super) prefill: String,
    pub(super) decode: String,
}

/// The pairs that have series of their own, by the ids of their backends.
#[derive(Default)]
pub(super) struct TrackedPairs {
    /// Read by every request, and so without a lock; replaced for a new pair.
    tracked: ArcSwap<IdMap<(u64, u64), PairUrls>>,
    /// Held while it is replaced: two workers may see a new pair at the same time.
    replacing: Mutex<()>,
}

impl TrackedPairs {
    /// Whose series a pair's requests are counted in. Starts series for a new pair if there may be more.
    pub(super) fn key(&self, pair: &ServerPair) -> PairKey {
        let key = (pair.prefill().id(), pair.decode().id());
        let is_tracked = {
            let tracked = self.tracked.load();
            tracked.contains_key(&key) || (tracked.len() < MAX_PAIRS).then(|| self.track(key, pair))?
        };
        is_tracked.then_some(key)
    }

    /// Starts a pair's series. Whether it has series of its own now.
    fn track(&self, key: (u64, u64), pair: &ServerPair) -> bool {
        // A poisoned lock does no harm: the map is replaced as a whole or not at all.
        let _guard = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tracked = IdMap::clone(&self.tracked.load());
        // Another worker may have tracked this pair, or the last one, since it was looked up.
        if tracked.len() >= MAX_PAIRS {
            return tracked.contains_key(&key);
        }
        let urls =
            || PairUrls { prefill: pair.prefill().url().to_owned(), decode: pair.decode().url().to_owned() };
        tracked.entry(key).or_insert_with(urls);
        self.tracked.store(tracked.into());
        true
    }

    /// Ends the series of pairs of which a backend is gone, and returns the others.
    pub(super) fn retain(&self, is_present: impl Fn(u64) -> bool) -> IdMap<(u64, u64), PairUrls> {
        let _guard = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.tracked.load_full();
        let mut tracked = IdMap::clone(&before);
        tracked.retain(|(prefill, decode), _| is_present(*prefill) && is_present(*decode));
        // Unchanged at most scrapes: workers keep the map that is in their caches.
        if tracked.len() < before.len() {
            self.tracked.store(tracked.clone().into());
        }
        tracked
    }
}

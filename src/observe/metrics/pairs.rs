//! Which pairs are counted by themselves.
//!
//! A thousand prefill and a thousand decode servers are a million pairs, more than
//! any monitoring takes. The first [`MAX_PAIRS`] that are seen have series of their
//! own; the rest share one. A pair's place is free again when one of its servers is gone.

use std::sync::{Mutex, PoisonError};

use arc_swap::ArcSwap;

use super::counts::PairKey;
use crate::upstream::{IdMap, ServerPair};

/// Pairs that have series of their own: 42 each.
pub(super) const MAX_PAIRS: usize = 128;

/// The URLs of a prefill and a decode server.
#[derive(Debug, Clone)]
pub(super) struct Urls {
    pub(super) prefill: String,
    pub(super) decode: String,
}

/// The pairs that are counted by themselves.
#[derive(Default)]
pub(super) struct Pairs {
    /// Read by every request, changed for a new pair.
    named: ArcSwap<IdMap<(u64, u64), Urls>>,
    changing: Mutex<()>,
}

impl Pairs {
    /// What a pair is counted as.
    pub(super) fn key(&self, pair: &ServerPair) -> PairKey {
        let key = (pair.prefill().id(), pair.decode().id());
        let known = {
            let named = self.named.load();
            named.contains_key(&key) || (named.len() < MAX_PAIRS).then(|| self.name(key, pair))?
        };
        known.then_some(key)
    }

    /// Whether there was a place for it.
    fn name(&self, key: (u64, u64), pair: &ServerPair) -> bool {
        // The map is replaced as a whole, whatever happens under the lock.
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut named = IdMap::clone(&self.named.load());
        if named.len() >= MAX_PAIRS {
            return named.contains_key(&key);
        }
        let urls =
            || Urls { prefill: pair.prefill().url().to_owned(), decode: pair.decode().url().to_owned() };
        named.entry(key).or_insert_with(urls);
        self.named.store(named.into());
        true
    }

    /// Forgets the pairs of which a server is gone, and returns those that stay.
    pub(super) fn retain(&self, is_there: impl Fn(u64) -> bool) -> IdMap<(u64, u64), Urls> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.named.load_full();
        let mut named = IdMap::clone(&before);
        named.retain(|(prefill, decode), _| is_there(*prefill) && is_there(*decode));
        if named.len() < before.len() {
            self.named.store(named.clone().into());
        }
        named
    }
}

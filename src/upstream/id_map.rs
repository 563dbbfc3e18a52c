//! Maps keyed by backend ids.
//!
//! Ids are counted up by the router and never come from clients, so no one can choose
//! them to collide: a fast hash with a fixed seed is enough.

use std::collections::HashMap;

use foldhash::fast::FixedState;

/// A map keyed by [`Backend::id`](super::Backend::id), or by several ids.
pub(crate) type IdMap<K, V> = HashMap<K, V, FixedState>;

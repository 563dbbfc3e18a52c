//! The data-parallel ranks of a server: each has a queue and a KV cache of its own, and is chosen by itself.
//!
//! A server's ranks are known once it has told how many it has, and may be others after a restart. Which rank
//! a request goes to is for a [`Policy`](super::Policy), and how a server is made to use it for `wire`.

use std::num::NonZeroU16;
use std::sync::Arc;

use super::Role;
use super::load_table::{Load, LoadTable, Slot};
use crate::wire::bootstrap;
use crate::wire::shape::key_hash;

/// Most ranks of one server. One with more counts as one, as it has for its own load balancer.
pub(crate) const MAX_RANKS: u64 = 512;

/// How many ranks a server has, and how it learns which one a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RankLayout {
    size: NonZeroU16,
    /// By fields of the request. Otherwise it follows the room: SGLang's default of prefill servers.
    is_told: bool,
}

impl RankLayout {
    /// The layout of a server that has told `dp_size`, and whether it follows the room. `None` if it has one
    /// rank, or if its own load balancer is to choose.
    pub(super) fn of(
        role: Role,
        dp_size: Option<u64>,
        follows_bootstrap_room: Option<bool>,
        is_dp_aware: bool,
    ) -> Option<Self> {
        let size = dp_size.filter(|size| (2..=MAX_RANKS).contains(size))?;
        let is_told = match role {
            Role::Prefill if follows_bootstrap_room != Some(false) => false,
            Role::Prefill | Role::Decode if is_dp_aware => true,
            _ => return None,
        };
        Some(Self { size: NonZeroU16::new(size as u16)?, is_told })
    }
}

/// One rank of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DpRank {
    number: u16,
    layout: RankLayout,
}

impl DpRank {
    pub(crate) fn number(self) -> u16 {
        self.number
    }

    /// Its number, if the server is to be told.
    pub(super) fn told(self) -> Option<u16> {
        self.layout.is_told.then_some(self.number)
    }

    /// A bootstrap room of this rank, near a random one.
    pub(super) fn bootstrap_room(self, random: u64) -> u64 {
        bootstrap::room_of_rank(random, self.number, self.layout.size)
    }
}

/// A rank's place in the load table of its role.
#[derive(Debug)]
pub(crate) struct RankSlot {
    rank: DpRank,
    slot: Slot,
    /// Of the server's URL and the rank.
    url_hash: u64,
}

impl RankSlot {
    pub(crate) fn rank(&self) -> DpRank {
        self.rank
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(super) fn url_hash(&self) -> u64 {
        self.url_hash
    }

    pub(super) fn load(&self) -> Load {
        self.slot.load()
    }
}

/// The ranks of one server, by number.
#[derive(Debug)]
pub(super) struct Ranks {
    layout: RankLayout,
    all: Vec<Arc<RankSlot>>,
}

impl Ranks {
    /// Gives each rank its place; there are none if there is no place for all of them.
    pub(super) fn new(layout: RankLayout, url: &str, loads: &Arc<LoadTable>) -> Self {
        let slots = loads.take_slots(usize::from(layout.size.get())).unwrap_or_default();
        let ranked = |(number, slot): (usize, Slot)| {
            // As sglang_router names a rank.
            let url_hash = key_hash(format!("{url}@{number}").as_bytes());
            Arc::new(RankSlot { rank: DpRank { number: number as u16, layout }, slot, url_hash })
        };
        Self { layout, all: slots.into_iter().enumerate().map(ranked).collect() }
    }

    pub(super) fn layout(&self) -> RankLayout {
        self.layout
    }

    pub(super) fn all(&self) -> &[Arc<RankSlot>] {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: u64) -> RankLayout {
        RankLayout::of(Role::Prefill, Some(size), None, false).unwrap()
    }

    #[test]
    fn a_server_has_ranks_only_if_the_router_can_choose_them() {
        let of = |role, size, follows, is_dp_aware| {
            RankLayout::of(role, size, follows, is_dp_aware).map(|layout| (layout.size.get(), layout.is_told))
        };
        for size in [None, Some(0), Some(1), Some(MAX_RANKS + 1), Some(u64::MAX)] {
            assert_eq!(of(Role::Prefill, size, Some(true), true), None, "{size:?}");
        }
        for follows in [None, Some(true)] {
            assert_eq!(of(Role::Prefill, Some(8), follows, false), Some((8, false)));
            assert_eq!(of(Role::Prefill, Some(8), follows, true), Some((8, false)));
        }
        assert_eq!(of(Role::Prefill, Some(8), Some(false), false), None);
        assert_eq!(of(Role::Prefill, Some(8), Some(false), true), Some((8, true)));
        assert_eq!(of(Role::Decode, Some(8), Some(true), false), None);
        assert_eq!(of(Role::Decode, Some(MAX_RANKS), None, true), Some((512, true)));
    }

    #[test]
    fn ranks_take_no_places_that_servers_may_need() {
        let table = Arc::new(LoadTable::default());
        let mut taken = Vec::new();
        let ranks = || Ranks::new(layout(512), "http://p", &table);
        for _ in 0..5 {
            taken.push(ranks());
            assert_eq!(taken.last().unwrap().all().len(), 512);
        }
        assert!(ranks().all().is_empty());
        let servers: Vec<_> = (0..1_024).map(|_| table.take_slot()).collect();
        assert!(servers.iter().all(|slot| !slot.is_shared()));
        drop((taken.pop(), servers));
        assert!(!ranks().all().is_empty());
    }
}

//! Data-parallel ranks of a server: which one a request goes to, and the prefix cache of each. How the two
//! legs of a request find each other is in `transfer`.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::Value;

use super::{
    bootstrap_fields::BootstrapTarget,
    config::{LoadBalance, SimConfig},
    request::{Endpoint, Fields, Item, Reject},
};

/// Bound on the prompts that one rank has in its cache.
const MAX_CACHED_PROMPTS: usize = 4_096;

/// What a rank was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankStats {
    /// Prompts, of batches each.
    pub requests: u64,
    /// Those of them that it had computed before.
    pub cached_prompts: u64,
}

/// The ranks that a request names.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NamedRanks {
    /// The one that gets the request.
    routed: Option<u64>,
    /// The one that prefill has used.
    prefill: Option<u64>,
}

impl NamedRanks {
    pub(crate) fn of(fields: &Fields, header: Option<&str>, endpoint: Endpoint) -> Self {
        let number = |name| fields.get(name).and_then(Value::as_u64);
        let by_header = header
            .filter(|_| matches!(endpoint, Endpoint::Chat | Endpoint::Completions))
            .and_then(|header| header.trim().parse().ok());
        Self {
            routed: by_header.or(number("routed_dp_rank")).or(number("data_parallel_rank")),
            prefill: number("disagg_prefill_dp_rank"),
        }
    }
}

/// Where an item runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dispatch {
    /// `None` if the server has one rank.
    pub rank: Option<u64>,
    /// The rank that prefill has used, as the request says.
    pub prefill: Option<u64>,
    /// Tokens of the prompt that the rank had in its cache.
    pub cached: usize,
}

impl Dispatch {
    pub(crate) fn number(self) -> u64 {
        self.rank.unwrap_or(0)
    }
}

#[derive(Debug, Default)]
struct Rank {
    stats: RankStats,
    cached: HashSet<u64>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Rank {
    /// Computes a prompt. Returns whether it had done so before.
    fn compute(&mut self, hash: u64) -> bool {
        if !self.cached.insert(hash) {
            self.stats.cached_prompts += 1;
            return true;
        }
        self.order.push_back(hash);
        if self.order.len() > MAX_CACHED_PROMPTS {
            let oldest = self.order.pop_front();
            oldest.map(|oldest| self.cached.remove(&oldest));
        }
        false
    }
}

/// The ranks of one server.
#[derive(Debug)]
pub(crate) struct Ranks {
    all: Vec<Mutex<Rank>>,
    turn: AtomicUsize,
}

fn lock(rank: &Mutex<Rank>) -> MutexGuard<'_, Rank> {
    rank.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ranks {
    pub(crate) fn new(config: &SimConfig) -> Self {
        let count = config.dp_size.max(1);
        Self { all: (0..count).map(|_| Mutex::default()).collect(), turn: AtomicUsize::new(0) }
    }

    /// Sends an item to a rank, as SGLang's controller of data parallelism does.
    pub(crate) fn dispatch(
        &self,
        config: &SimConfig,
        item: &Item,
        named: NamedRanks,
    ) -> Result<Dispatch, Reject> {
        let count = self.all.len() as u64;
        let number = match named.routed {
            Some(routed) if routed >= count => {
                return Err(Reject::Value(format!("routed_dp_rank={routed} out of range [0, {count})")));
            }
            Some(routed) => routed,
            None if count == 1 => 0,
            None => match (config.balance(), &item.bootstrap) {
                (LoadBalance::FollowBootstrapRoom, BootstrapTarget::At { room, .. }) => *room as u64 % count,
                // The controller asserts that there is one.
                (LoadBalance::FollowBootstrapRoom, BootstrapTarget::Missing) => return Err(Reject::Crash),
                (LoadBalance::RoundRobin, _) => self.turn.fetch_add(1, Ordering::Relaxed) as u64 % count,
            },
        };
        let mut rank = lock(&self.all[number as usize]);
        rank.stats.requests += 1;
        let is_cached = config.has_prefix_cache() && rank.compute(item.prompt.hash);
        Ok(Dispatch {
            rank: (count > 1).then_some(number),
            prefill: named.prefill,
            // The last token is always computed.
            cached: if is_cached { item.prompt.tokens.saturating_sub(1) } else { 0 },
        })
    }

    pub(crate) fn stats(&self) -> Vec<RankStats> {
        self.all.iter().map(|rank| lock(rank).stats).collect()
    }

    /// The rank that follows from a room.
    pub(crate) fn of_room(&self, room: i64) -> u64 {
        room as u64 % self.all.len() as u64
    }
}

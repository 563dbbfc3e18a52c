//! Load-balancing policies: which server of a role gets a request.
//!
//! A policy sees the eligible servers of one role, their load, and what is known of the request's prompt, and
//! it is told what prefill servers say of it afterwards. It opens no connection and tracks no health. The
//! policies here use nothing that one of a library's user cannot use.

mod cache_aware;
mod cache_clock;
mod consistent_hash;
mod homes;
mod least_load;
mod prefix_index;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::load_table::{Load, LoadTable};
use super::ranks::RankSlot;
use super::selection::ANY_RANK;
use super::{Backend, CompletedPrefill, Role, Selection, SelectionReason};
use crate::wire::shape::{ClientRanks, Prompt};

pub use cache_aware::CacheAware;
pub(crate) use cache_aware::DEFAULT_INDEX_BYTES;
pub use consistent_hash::ConsistentHash;
pub use least_load::{LeastLoad, PowerOfTwo};
pub(crate) use prefix_index::IndexUsage;

/// A load-balancing policy: selects one of several servers.
///
/// [`choose`](Self::choose), and through it [`pick`](Self::pick), is called once per role and attempt, by all
/// worker threads concurrently, so it must not block and keeps its state in atomics.
///
/// ```
/// use std::sync::Arc;
///
/// use mini_lb::{Backend, Choice, Policy};
///
/// /// The server with the fewest requests in flight.
/// struct LeastBusy;
///
/// impl Policy for LeastBusy {
///     fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
///         let servers = choice.servers().iter();
///         servers.min_by_key(|server| server.in_flight()).unwrap_or(&choice.servers()[0])
///     }
/// }
/// ```
pub trait Policy: Any + Send + Sync {
    /// Picks one of [`Choice::servers`], which is never empty.
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend>;

    /// The policy in metrics. At most one policy of a name should be in use: their selections are counted
    /// together.
    fn name(&self) -> &'static str {
        "custom"
    }

    /// Picks a server, and tells why, and how much of the prompt it is believed to have in its cache already.
    /// That much is not counted as [work](Choice::work) of the server. By default nothing is believed cached.
    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        Selection::new(self.pick(choice))
    }

    /// What the router must find out about requests for this policy. By default nothing: bodies are then
    /// scanned no more than they have to be.
    fn needs(&self, role: Role) -> Needs {
        let _ = role;
        Needs::default()
    }

    /// The servers of the role are others now, or one of them has told its ranks or the capacity of its
    /// cache. As in [`Choice::servers`], one with several ranks is there once for each. Called outside of
    /// requests, so that memory can be allocated here.
    fn servers_changed(&self, servers: &[Arc<Backend>]) {
        let _ = servers;
    }

    /// A prefill leg of the role has ended well, and its server may have said how much of the prompt it had
    /// in its cache. Called between two requests of others, so it must be quick. By default nothing is
    /// learned.
    fn prefill_completed(&self, completed: &CompletedPrefill<'_>) {
        let _ = completed;
    }

    /// Whether a reload that brings the policy `next` keeps this one, with its state, instead. By default it
    /// does not.
    fn continues_as(&self, next: &dyn Policy) -> bool {
        let _ = next;
        false
    }
}

/// What a policy wants to know of requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`Choice::prompt`]: the hashes of its blocks are keyed at random.
    pub prompt: bool,
    /// [`Choice::key`], and the prompt as well, with a [`Prompt::prefix`] that is the same in every process.
    pub key: bool,
}

impl Needs {
    /// What at least one of two policies needs.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { prompt: self.prompt || other.prompt, key: self.key || other.key }
    }
}

/// What is known of a request when its servers are chosen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Demand<'a> {
    pub(crate) prompt: Option<&'a Prompt>,
    /// The size of the body.
    pub(crate) body: u64,
    /// From a header.
    pub(crate) key: Option<u64>,
    /// That the client has chosen.
    pub(crate) ranks: ClientRanks,
}

impl Demand<'_> {
    pub(super) fn prompt_bytes(&self) -> u64 {
        self.prompt.map_or(self.body, Prompt::bytes)
    }
}

/// The servers of a role, or those of them that a policy may choose from: one with several ranks is there
/// once for each.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) servers: Vec<Arc<Backend>>,
    /// The rank of each; empty if no server has several.
    ranks: Vec<Option<Arc<RankSlot>>>,
    /// The slot of each, and a hash of its URL: copied here, so that no other memory is read for servers that
    /// are not chosen.
    slots: Vec<u16>,
    url_hashes: Vec<u64>,
    /// The position of each server by its slot, if there are enough to make a search slow.
    positions: Vec<u16>,
}

/// Up to as many servers are searched one by one.
const MAX_SEARCHED: usize = 16;
/// No server has this slot.
const NOWHERE: u16 = u16::MAX;

impl Candidates {
    pub(super) fn new(servers: &[Arc<Backend>]) -> Self {
        let with_ranks = |server: &Arc<Backend>| {
            let ranks = server.ranks();
            let alone = ranks.is_empty().then_some(None);
            let server = Arc::clone(server);
            ranks.into_iter().map(Some).chain(alone).map(move |rank| (Arc::clone(&server), rank))
        };
        Self::of(servers.iter().flat_map(with_ranks))
    }

    /// Those of them that match.
    pub(super) fn filtered(&self, matches: impl Fn(&Arc<Backend>, Option<&Arc<RankSlot>>) -> bool) -> Self {
        let all = (0..self.servers.len()).map(|index| (&self.servers[index], self.rank(index)));
        let matching = all.filter(|(server, rank)| matches(server, *rank));
        Self::of(matching.map(|(server, rank)| (Arc::clone(server), rank.cloned())))
    }

    fn of(candidates: impl Iterator<Item = (Arc<Backend>, Option<Arc<RankSlot>>)>) -> Self {
        let (servers, mut ranks): (Vec<_>, Vec<_>) = candidates.unzip();
        if ranks.iter().all(Option::is_none) {
            ranks = Vec::new();
        }
        let rank = |index: usize| ranks.get(index).and_then(Option::as_ref);
        let slot = |(index, server): (usize, &Arc<Backend>)| {
            rank(index).map_or(server.slot(), |rank| rank.slot().index())
        };
        let url_hash = |(index, server): (usize, &Arc<Backend>)| {
            rank(index).map_or(server.url_hash(), |rank| rank.url_hash())
        };
        let slots: Vec<_> = servers.iter().enumerate().map(slot).collect();
        let url_hashes = servers.iter().enumerate().map(url_hash).collect();
        let mut positions = Vec::new();
        if servers.len() > MAX_SEARCHED {
            positions.resize(usize::from(slots.iter().copied().max().unwrap_or(0)) + 1, NOWHERE);
            for (position, slot) in slots.iter().enumerate() {
                positions[usize::from(*slot)] = position as u16;
            }
        }
        Self { servers, ranks, slots, url_hashes, positions }
    }

    pub(super) fn has_ranks(&self) -> bool {
        !self.ranks.is_empty()
    }

    pub(super) fn rank(&self, index: usize) -> Option<&Arc<RankSlot>> {
        self.ranks.get(index)?.as_ref()
    }
}

/// The candidates that a [`Policy`] selects from, and the request that one is selected for.
#[derive(Debug)]
pub struct Choice<'a> {
    role: Role,
    candidates: &'a Candidates,
    loads: &'a LoadTable,
    demand: Demand<'a>,
}

impl<'a> Choice<'a> {
    pub(super) fn new(
        role: Role,
        candidates: &'a Candidates,
        loads: &'a LoadTable,
        demand: Demand<'a>,
    ) -> Self {
        Self { role, candidates, loads, demand }
    }

    /// The eligible servers of one role, in the order of the configuration. Never empty. One with several
    /// [ranks](Self::rank) that the router chooses among is there once for each, one after the other.
    pub fn servers(&self) -> &'a [Arc<Backend>] {
        &self.candidates.servers
    }

    /// Which data-parallel rank of the server this candidate is: each has a queue and a cache of its own, and
    /// its own [work](Self::work), [requests](Self::requests) and [slot](Self::slot) here. `None` if the
    /// server has one, or if its own load balancer chooses.
    pub fn rank(&self, index: usize) -> Option<usize> {
        self.candidates.rank(index).map(|rank| rank.rank().number().into())
    }

    /// Selects the candidate with this index: the server and, if it has several, this rank of it.
    pub fn select(&self, index: usize) -> Selection<'a> {
        Selection { index: index as u32, ..Selection::new(&self.candidates.servers[index]) }
    }

    /// The rank that was selected, or the best one if any of the server will do.
    pub(super) fn rank_of(&self, selection: &Selection<'_>) -> Option<&'a Arc<RankSlot>> {
        let Candidates { servers, slots, .. } = self.candidates;
        if selection.index != ANY_RANK {
            return self.candidates.rank(selection.index as usize);
        }
        let of_server = |index: &usize| Arc::ptr_eq(&servers[*index], selection.server);
        let load = |index: &usize| match self.role {
            Role::Prefill => self.weighted_work(*index, 0),
            _ => self.loads.get(slots[*index]).by_requests(),
        };
        let start = self.loads.next_turn() % servers.len();
        let best = (start..servers.len()).chain(0..start).filter(of_server).min_by_key(load)?;
        self.candidates.rank(best)
    }

    /// The role of the servers.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The request's prompt. `None` if no policy in use [needs](Policy::needs) it and no
    /// [trace](crate::MiniLbConfig::trace_log) is written, if the request was not read yet (as in
    /// [`select_pair`](crate::MiniLoadBalancer::select_pair)), and just after a reload.
    pub fn prompt(&self) -> Option<&'a Prompt> {
        self.demand.prompt
    }

    /// The size of the prompt in bytes, or that of the whole body if nobody needs more.
    pub fn prompt_bytes(&self) -> u64 {
        self.demand.prompt_bytes()
    }

    /// A hash of the name of the request's conversation: of a header (`--hash-key-headers`), or of
    /// `prompt_cache_key` or `session_id` in the body. It is the same in every process.
    pub fn key(&self) -> Option<u64> {
        self.demand.key.or_else(|| self.demand.prompt?.key())
    }

    /// The bytes of prompt that a prefill server has been given and has not computed yet, without those that
    /// it was believed to have cached; of a decode server, the prompts of its requests; of a plain server,
    /// those without what it was believed to have cached. What a prefill server has told of others' work
    /// (`--load-poll-secs`) is in it. `index` is that of the server in [`servers`](Self::servers), here and
    /// below.
    pub fn work(&self, index: usize) -> u64 {
        self.load(index).work() + self.loads.foreign_work(self.candidates.slots[index])
    }

    /// The [work](Self::work) of a server and these bytes, as many more as the server is slower than the mean
    /// of its role: what waiting for it costs. Servers that are about as fast as the mean, and decode
    /// servers, count as equal.
    pub fn weighted_work(&self, index: usize, more: u64) -> u64 {
        self.loads.weighted(self.candidates.slots[index], self.work(index).saturating_add(more))
    }

    /// The requests in flight on a server, as [`Backend::in_flight`] without reading the backend's memory.
    pub fn requests(&self, index: usize) -> usize {
        self.load(index).requests()
    }

    fn load(&self, index: usize) -> Load {
        self.loads.get(self.candidates.slots[index])
    }

    /// A small number of the server, less than [`MAX_SLOTS`](Self::MAX_SLOTS): that of no other server of its
    /// role until this one is removed.
    pub fn slot(&self, index: usize) -> usize {
        usize::from(self.candidates.slots[index])
    }

    /// More than the largest [slot](Self::slot).
    pub const MAX_SLOTS: usize = super::load_table::MAX_SLOTS;

    /// The index of the server with this slot, if it is among the candidates.
    pub fn index_of_slot(&self, slot: usize) -> Option<usize> {
        let Candidates { slots, positions, .. } = self.candidates;
        if slots.len() <= MAX_SEARCHED {
            return slots.iter().position(|other| usize::from(*other) == slot);
        }
        positions.get(slot).filter(|position| **position != NOWHERE).map(|position| usize::from(*position))
    }

    /// A hash of the server's URL, and of the rank if it has several. It is the same in every process.
    pub fn url_hash(&self, index: usize) -> u64 {
        self.candidates.url_hashes[index]
    }

    /// The index of the prefill server that would be through with these bytes first.
    fn first_through(&self, bytes: u64) -> usize {
        // Apart, so that a fleet of equal servers reads their loads only.
        if self.loads.is_uneven() || self.loads.has_foreign_work() {
            let work = |slot, load: Load| load.work() + self.loads.foreign_work(slot);
            self.least_by(|slot, load| self.loads.weighted(slot, work(slot, load).saturating_add(bytes)))
        } else {
            self.least_by(|_, load| load.work())
        }
    }

    /// The index of the server with the smallest value of its slot and load. Among equals it is the first
    /// from a random one on.
    fn least_by(&self, value: impl Fn(u16, Load) -> u64) -> usize {
        let slots = &self.candidates.slots[..];
        // Otherwise the first of several idle servers would receive all requests. Ranks of a server compute
        // in step, each batch as slow as the slowest, so they take turns: chance would make them differ.
        let start = if self.candidates.ranks.is_empty() {
            fastrand::usize(..slots.len())
        } else {
            self.loads.next_turn() % slots.len()
        };
        let (before, from_start) = slots.split_at(start);
        let mut best = (u64::MAX, start);
        for (first, slots) in [(start, from_start), (0, before)] {
            for (place, slot) in slots.iter().enumerate() {
                let value = value(*slot, self.loads.get(*slot));
                // Chosen without a branch, which could not be predicted.
                let is_less = value < best.0;
                best = (if is_less { value } else { best.0 }, if is_less { first + place } else { best.1 });
            }
        }
        best.1
    }
}

/// Selects each server with the same probability.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random;

impl Policy for Random {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        choice.select(fastrand::usize(..choice.servers().len())).because(SelectionReason::Random)
    }

    fn name(&self) -> &'static str {
        "random"
    }
}

/// Selects one server after the other, in the order of the configuration.
#[derive(Debug, Default)]
pub struct RoundRobin {
    next: AtomicUsize,
}

impl Policy for RoundRobin {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        // Relaxed: the counter orders nothing but itself. It wraps after 2^64 requests, where at most one
        // round is uneven.
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        choice.select(turn % choice.servers().len()).because(SelectionReason::Turn)
    }

    fn name(&self) -> &'static str {
        "round_robin"
    }
}

impl fmt::Debug for dyn Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Policy")
    }
}

#[cfg(test)]
mod tests;

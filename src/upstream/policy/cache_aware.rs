//! The policy that knows what servers have in their caches: the fewest bytes to wait for.
//!
//! A request goes where the bytes before it and its own, without those that the server is believed to have
//! cached, are fewest. Computing again what one conversation alone has is counted four times, because
//! everybody queues behind that waste; computing again what many prompts begin with is an investment, and
//! counted once. There is no threshold between "cache" and "load", and no model of time. Where this comes
//! from, and what was measured, is in `docs/ROUTING.md`.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use arc_swap::ArcSwapOption;

use super::cache_clock::{Ages, BytesPerToken, CacheClock};
use super::homes::{HOMES, homes_of};
use super::least_load::least_loaded;
use super::prefix_index::{HOLDERS, IndexUsage, Note, PrefixIndex};
use super::{Choice, Needs, Policy, Selection, SelectionReason};
use crate::upstream::{Backend, CompletedPrefill, Role};
use crate::wire::shape::Prompt;

/// How many times a private byte that is computed again counts. Between 3 and 6 the results are alike.
const PRIVATE_COST: u64 = 4;
/// A block from whose end this many prompts have continued is a beginning that many share. Between 8 and 64
/// the results are alike.
const HOT_FAN_OUT: u8 = 16;

/// The most memory of the index unless it is set: enough for 1,000 servers with 800,000 tokens each.
pub(crate) const DEFAULT_INDEX_BYTES: usize = 64 << 20;

/// Selects the prefill server with the fewest bytes to wait for: those of the requests before, and those of
/// the request's own prompt that the server is not believed to have in its prefix cache. Of decode servers it
/// selects as [`LeastLoad`](super::LeastLoad): decode gets the whole KV cache from prefill in any case. Plain
/// servers have a prefix cache and all the load: of them it selects as of prefill servers, where the bytes of
/// a request count until its response has ended.
///
/// Which server has what is remembered by hashes of the prompts that were sent to it, in a table of fixed
/// size. A note is forgotten when the server has computed more since then than its cache can hold
/// (`max_total_num_tokens` of its `/server_info`, corrected by the `cached_tokens` of its responses), or when
/// it restarts or is flushed.
///
/// With [polls](crate::MiniLbConfig::load_poll_interval) of servers' loads, which are for several routers, it
/// selects one of the servers that have at least half of the prompt, or one of two that every router finds by
/// the hash of the prompt's beginning. What many prompts begin with may go anywhere, as without.
pub struct CacheAware {
    index: ArcSwapOption<PrefixIndex>,
    max_index_bytes: AtomicUsize,
    /// Other routers choose among the same servers.
    has_peers: AtomicBool,
    /// By slot.
    clocks: Box<[CacheClock]>,
    bytes_per_token: BytesPerToken,
}

/// A server that is believed to have the beginning of a prompt.
#[derive(Debug, Clone, Copy, Default)]
struct Holder {
    index: usize,
    /// How many blocks it has.
    blocks: usize,
}

/// What the index says of a prompt.
#[derive(Debug, Default)]
struct Match {
    holders: [Holder; HOLDERS],
    count: usize,
    /// How many blocks anyone has.
    deepest: usize,
    /// How many blocks of the prompt many prompts begin with.
    hot: usize,
}

impl Match {
    fn holders(&self) -> &[Holder] {
        &self.holders[..self.count]
    }

    /// Whether the whole beginning by which homes are found is one of many prompts, or there is none to be
    /// cached. Two servers could not take the load of all of them.
    fn is_head_hot(&self, prompt: &Prompt) -> bool {
        self.hot >= prompt.prefix_blocks()
    }
}

impl CacheAware {
    /// With an index of up to 64 MiB.
    pub fn new() -> Self {
        Self {
            index: ArcSwapOption::empty(),
            max_index_bytes: AtomicUsize::new(DEFAULT_INDEX_BYTES),
            has_peers: AtomicBool::new(false),
            clocks: (0..Choice::MAX_SLOTS).map(|_| CacheClock::default()).collect(),
            bytes_per_token: BytesPerToken::default(),
        }
    }

    /// With an index of up to this many bytes, and at least 64 KiB.
    #[must_use]
    pub fn with_index_bytes(self, bytes: usize) -> Self {
        self.set_index_bytes(bytes);
        self
    }

    pub(crate) fn set_index_bytes(&self, bytes: usize) {
        self.max_index_bytes.store(bytes, Relaxed);
    }

    /// Whether other routers choose among the same servers.
    pub(crate) fn set_peers(&self, has_peers: bool) {
        self.has_peers.store(has_peers, Relaxed);
    }

    fn age(&self, note: Note) -> u32 {
        self.clocks[usize::from(note.slot)].age(note.stamp)
    }

    /// How full the index is. `None` before the first server.
    pub(crate) fn index_usage(&self) -> Option<IndexUsage> {
        let index = self.index.load();
        Some(index.as_deref()?.usage(|note| f64::from(self.age(note)) / 256.0))
    }

    /// Looks a prompt up, from its end: where a server has a block, it has all before it.
    fn look_up(&self, index: &PrefixIndex, choice: &Choice<'_>, prompt: &Prompt) -> Match {
        let mut found = Match::default();
        for number in (0..prompt.blocks()).rev() {
            let Some(entry) = index.find(prompt.block(number)) else { continue };
            if found.hot == 0 && entry.fan_out() >= HOT_FAN_OUT {
                found.hot = number + 1;
            }
            for note in entry.notes() {
                let clock = &self.clocks[usize::from(note.slot)];
                if !clock.is_live(note.stamp) {
                    continue;
                }
                found.deepest = found.deepest.max(number + 1);
                self.add_holder(&mut found, choice, note, number + 1);
            }
            if found.count == HOLDERS && found.hot > 0 {
                break;
            }
        }
        found
    }

    fn add_holder(&self, found: &mut Match, choice: &Choice<'_>, note: Note, blocks: usize) {
        // A server that was removed, or may not be chosen now.
        let Some(index) = choice.index_of_slot(usize::from(note.slot)) else { return };
        let is_known = found.holders().iter().any(|holder| holder.index == index);
        if is_known || found.count == HOLDERS {
            return;
        }
        if self.clocks[usize::from(note.slot)].is_current(&choice.servers()[index], &self.bytes_per_token) {
            found.holders[found.count] = Holder { index, blocks };
            found.count += 1;
        }
    }

    /// The servers to choose from besides those that were found.
    fn others(
        &self,
        index: &PrefixIndex,
        choice: &Choice<'_>,
        prompt: &Prompt,
        found: &mut Match,
    ) -> [Holder; HOMES] {
        if !self.has_peers.load(Relaxed) || found.is_head_hot(prompt) {
            // Of the servers that are not among the holders the one with the least work is the cheapest.
            let least = choice.first_through(choice.prompt_bytes());
            return [self.unlisted(index, choice, prompt, found, least); HOMES];
        }
        let homes = homes_of(choice, prompt.prefix()).map(|server| {
            let listed = found.holders().iter().find(|holder| holder.index == server).copied();
            listed.unwrap_or_else(|| self.unlisted(index, choice, prompt, found, server))
        });
        // A prompt that goes on from less is computed at its home, where the other routers look for it.
        let has_half = |holder: &&Holder| 2 * holder.blocks >= prompt.blocks();
        // Those with more blocks come first.
        found.count = found.holders().iter().take_while(has_half).count();
        homes
    }

    /// What a server has that is not among the holders. What many prompts begin with, more servers have than
    /// an entry notes: each of them has a note of its own.
    fn unlisted(
        &self,
        index: &PrefixIndex,
        choice: &Choice<'_>,
        prompt: &Prompt,
        found: &Match,
        server: usize,
    ) -> Holder {
        let slot = choice.slot(server);
        let has_hot = || {
            let entry = index.find(hash_of_server(prompt.block(found.hot - 1), slot));
            entry.is_some_and(|entry| {
                entry
                    .notes()
                    .any(|note| usize::from(note.slot) == slot && self.clocks[slot].is_live(note.stamp))
            }) && self.clocks[slot].is_current(&choice.servers()[server], &self.bytes_per_token)
        };
        Holder { index: server, blocks: if found.hot > 0 && has_hot() { found.hot } else { 0 } }
    }

    /// Notes that a server will have a prompt in its cache, of which many prompts begin with `hot` blocks.
    /// Returns how old its notes were before.
    fn note(&self, index: &PrefixIndex, slot: usize, prompt: &Prompt, computed: u64, hot: usize) -> Ages {
        let clock = &self.clocks[slot];
        let before = clock.now();
        clock.fill(computed);
        let note = Note { slot: slot as u16, stamp: clock.now() };
        let mut ages = Ages::default();
        for number in 0..prompt.blocks() {
            if let Some(stamp) = index.note(prompt.block(number), note, |note| self.age(note)) {
                ages.add(number, before.wrapping_sub(stamp));
            }
        }
        if hot > 0 {
            let of_server = hash_of_server(prompt.block(hot - 1), slot);
            let stamp = index.note(of_server, note, |note| self.age(note));
            if let Some(stamp) = stamp.filter(|_| ages.is_empty()) {
                ages.add(hot - 1, before.wrapping_sub(stamp));
            }
        }
        ages
    }
}

/// The hash under which one server is noted for a block that many have.
fn hash_of_server(block: u64, slot: usize) -> u64 {
    // The golden ratio spreads neighbouring slots over the table (Knuth, TAOCP 3, section 6.4).
    (block ^ (slot as u64 + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The server with the fewest bytes to wait for, and how many blocks it has.
fn cheapest(choice: &Choice<'_>, prompt: &Prompt, found: &Match, others: [Holder; HOMES]) -> Holder {
    let cost = |holder: Holder| {
        let missing = |blocks: usize| prompt.bytes().saturating_sub((blocks * Prompt::BLOCK_BYTES) as u64);
        let private = missing(holder.blocks.max(found.hot));
        choice.weighted_work(holder.index, missing(holder.blocks) + (PRIVATE_COST - 1) * private)
    };
    // Among equals the first: a holder, with more blocks first.
    let all = found.holders().iter().copied().chain(others);
    all.min_by_key(|holder| cost(*holder)).unwrap_or(others[0])
}

impl Policy for CacheAware {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        let index = self.index.load();
        let (Role::Prefill | Role::Regular, Some(index), Some(prompt)) =
            (choice.role(), index.as_deref(), choice.prompt())
        else {
            return choice.select(least_loaded(choice)).because(SelectionReason::Load);
        };
        let mut found = self.look_up(index, choice, prompt);
        let others = self.others(index, choice, prompt, &mut found);
        let Holder { index: chosen, blocks } = cheapest(choice, prompt, &found, others);
        let selection = choice.select(chosen);
        let slot = choice.slot(chosen);
        self.clocks[slot].is_current(selection.server(), &self.bytes_per_token);
        let cached = (blocks * Prompt::BLOCK_BYTES) as u64;
        let ages = self.note(index, slot, prompt, prompt.bytes().saturating_sub(cached), found.hot);
        if let Some(entry) = found.deepest.checked_sub(1).and_then(|last| index.find(prompt.block(last))) {
            entry.continued();
        }
        let reason = if blocks > 0 { SelectionReason::Prefix } else { SelectionReason::Load };
        selection.with_cached(cached).because(reason).with_memo(ages.to_memo())
    }

    fn name(&self) -> &'static str {
        "cache_aware"
    }

    fn needs(&self, role: Role) -> Needs {
        let has_cache = role != Role::Decode;
        Needs { prompt: has_cache, key: has_cache && self.has_peers.load(Relaxed) }
    }

    fn servers_changed(&self, servers: &[Arc<Backend>]) {
        // It is told of the servers of one role; of decode servers nothing is noted.
        if servers.first().is_none_or(|server| server.role() == Role::Decode) {
            return;
        }
        let capacity = |server: &Arc<Backend>| self.bytes_per_token.capacity_of_table(server);
        let blocks = servers.iter().map(capacity).sum::<u64>() / Prompt::BLOCK_BYTES as u64;
        let max_bytes = self.max_index_bytes.load(Relaxed);
        let wanted = PrefixIndex::bits_for(blocks, max_bytes);
        let new = match self.index.load().as_deref() {
            None => PrefixIndex::new(wanted),
            // It shrinks only where it must: servers that went may come back.
            Some(index)
                if index.bits() < wanted || index.bits() > PrefixIndex::bits_for(u64::MAX / 2, max_bytes) =>
            {
                // Notes of the requests that are chosen for in between are lost.
                index.resized(wanted, |note| self.age(note))
            }
            Some(_) => return,
        };
        self.index.store(Some(Arc::new(new)));
    }

    fn prefill_completed(&self, completed: &CompletedPrefill<'_>) {
        let Some(tokens) = completed.prompt_tokens().filter(|tokens| *tokens > 0) else { return };
        let bytes = completed.prompt_bytes();
        self.bytes_per_token.learn(bytes, tokens);
        if let Some(cached) = completed.cached_tokens() {
            // Its own mean: the prompts of one fleet may be of several scripts.
            let cached = bytes.saturating_mul(cached) / tokens;
            self.clocks[completed.slot()].correct(completed, cached, Ages::from_memo(completed.memo()));
        }
    }

    fn continues_as(&self, next: &dyn Policy) -> bool {
        let Some(next) = (next as &dyn Any).downcast_ref::<Self>() else { return false };
        self.set_index_bytes(next.max_index_bytes.load(Relaxed));
        self.set_peers(next.has_peers.load(Relaxed));
        true
    }
}

impl Default for CacheAware {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for CacheAware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.index.load().as_deref().map(PrefixIndex::bits);
        f.debug_struct("CacheAware").field("index_bits", &bits).finish_non_exhaustive()
    }
}

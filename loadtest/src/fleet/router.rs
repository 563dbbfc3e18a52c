//! What the simulation asks of a router, and the policies that it is compared with.
//!
//! The policies here are the yardstick: written for clarity, without the bounds and the atomics that a
//! router's own need. A router's own policies implement [`Router`] outside of this crate.

use std::collections::HashMap;

use fastrand::Rng;

use super::cache::PrefixCache;
use super::model::{Model, PrefillServer};
use super::trace::{BLOCK_TOKENS, Request, prompt_bytes};

/// A request as it arrives at the router.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// Its number, from 0.
    pub index: usize,
    /// Seconds since the start.
    pub now: f64,
    /// What it asks for. A router without a tokenizer does not know the numbers of tokens.
    pub request: &'a Request,
    /// Bytes of its prompt: about four a token.
    pub bytes: u64,
}

/// The servers as they are.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The prefill servers that may be chosen, in ascending order; never empty.
    pub up: &'a [usize],
    /// The number of decode servers.
    pub decode: usize,
    /// The truth about all prefill servers, for an oracle only.
    pub prefill: &'a [PrefillServer],
    /// The model that they run by, for an oracle only.
    pub model: &'a Model,
}

/// The servers of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// One of [`View::up`].
    pub prefill: usize,
    /// Less than [`View::decode`].
    pub decode: usize,
}

/// How a prefill leg ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PrefillEnd {
    /// It answered, and said how many tokens were cached.
    Answered {
        /// Tokens of the prompt that were in the cache.
        cached: u64,
        /// Seconds since the request was sent.
        time: f64,
    },
    /// The server stopped.
    Failed,
}

/// Chooses servers and is told what becomes of requests.
pub trait Router {
    /// Chooses the servers of a request.
    fn choose(&mut self, arrival: &Arrival<'_>, fleet: &View<'_>) -> Pair;

    /// The prefill leg of request `index` has ended.
    fn prefill_done(&mut self, index: usize, pair: Pair, end: PrefillEnd);

    /// Request `index` has ended.
    fn done(&mut self, index: usize, pair: Pair);

    /// A prefill server is up with an empty cache.
    fn prefill_started(&mut self, server: usize) {
        let _ = server;
    }
}

/// A policy of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Reference {
    /// Each server with the same probability.
    Random,
    /// One after the other.
    RoundRobin,
    /// Of two prefill servers the one with fewer bytes to compute, of two decode servers the one with fewer
    /// requests.
    PowerOfTwo,
    /// The prefill server with the fewest bytes to compute, the decode server with the fewest requests.
    LeastLoad,
    /// The cost of `cache_aware` with a perfect memory of what was sent where, in bytes.
    IdealCacheAware,
    /// The same cost in seconds, with the true queues, the true caches and the true time of each prompt.
    Oracle,
}

impl Reference {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Random,
        Self::RoundRobin,
        Self::PowerOfTwo,
        Self::LeastLoad,
        Self::IdealCacheAware,
        Self::Oracle,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round_robin",
            Self::PowerOfTwo => "power_of_two",
            Self::LeastLoad => "least_load",
            Self::IdealCacheAware => "ideal_cache_aware",
            Self::Oracle => "oracle",
        }
    }

    /// A router with this policy for a fleet of `prefill` and `decode` servers.
    pub fn router(self, prefill: usize, decode: usize, model: &Model, seed: u64) -> Box<dyn Router> {
        let ledger = Ledger::new(prefill, decode, seed);
        let blocks = usize::try_from(model.cache_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX);
        let believed = (0..prefill).map(|_| PrefixCache::new(blocks)).collect();
        Box::new(ReferenceRouter { policy: self, ledger, turn: 0, believed, fan_out: FanOut::default() })
    }
}

/// Bytes that a request counts for besides its own: a prompt that is cached as a whole takes time, too, about
/// that of 267 tokens, and would not be counted at all.
const REQUEST_BYTES: u64 = 1 << 10;
/// How many times a private byte that is computed again counts.
const PRIVATE_COST: f64 = 4.0;
/// A block that so many prompts have continued is the end of a shared beginning.
const HOT_FAN_OUT: u32 = 16;

/// Requests and bytes under way.
struct Ledger {
    rng: Rng,
    prefill_bytes: Vec<u64>,
    decode: Vec<(u64, u64)>,
    /// By request: what it added to its prefill server, and to its decode server.
    taken: HashMap<usize, (u64, u64)>,
}

impl Ledger {
    fn new(prefill: usize, decode: usize, seed: u64) -> Self {
        let (prefill_bytes, decode) = (vec![0; prefill], vec![(0, 0); decode]);
        Self { rng: Rng::with_seed(seed ^ 0x5eed), prefill_bytes, decode, taken: HashMap::new() }
    }

    fn take(&mut self, arrival: &Arrival<'_>, pair: Pair, new_bytes: u64) {
        self.prefill_bytes[pair.prefill] += new_bytes;
        let decode = &mut self.decode[pair.decode];
        *decode = (decode.0 + 1, decode.1 + arrival.bytes);
        self.taken.insert(arrival.index, (new_bytes, arrival.bytes));
    }

    /// The first minimum from a random server on: otherwise the first of several idle ones gets all.
    fn least<K: PartialOrd>(&mut self, servers: usize, key: impl Fn(&Self, usize) -> K) -> usize {
        let start = self.rng.usize(..servers);
        let mut best = start;
        for step in 1..servers {
            let server = (start + step) % servers;
            if key(self, server) < key(self, best) {
                best = server;
            }
        }
        best
    }

    fn two(&mut self, servers: usize) -> (usize, usize) {
        let first = self.rng.usize(..servers);
        if servers == 1 {
            return (first, first);
        }
        (first, (first + self.rng.usize(1..servers)) % servers)
    }
}

/// How many prompts have gone on from a block that was known.
#[derive(Default)]
struct FanOut(HashMap<u64, u32>);

impl FanOut {
    /// Blocks at the start of the chain that many prompts begin with.
    fn hot_blocks(&self, chain: &[u64]) -> usize {
        let is_hot = |block: &u64| self.0.get(block).is_some_and(|count| *count >= HOT_FAN_OUT);
        chain.iter().rposition(is_hot).map_or(0, |at| at + 1)
    }

    /// Counts a prompt of which someone has `known` blocks.
    fn count(&mut self, chain: &[u64], known: usize) {
        if let Some(last) = known.checked_sub(1) {
            *self.0.entry(chain[last]).or_default() += 1;
        }
    }
}

struct ReferenceRouter {
    policy: Reference,
    ledger: Ledger,
    turn: usize,
    /// What each prefill server was sent.
    believed: Vec<PrefixCache>,
    fan_out: FanOut,
}

impl ReferenceRouter {
    /// The server with the fewest bytes to wait for, and those of this prompt that it has to compute.
    fn cheapest_in_bytes(&mut self, arrival: &Arrival<'_>, up: &[usize]) -> (usize, u64) {
        let chain = &arrival.request.blocks;
        let request = arrival.request;
        let cached = |blocks: usize| prompt_bytes(request, request.input.min(blocks as u64 * BLOCK_TOKENS));
        let missing = |blocks: usize| arrival.bytes.saturating_sub(cached(blocks));
        let matched: Vec<_> = up.iter().map(|server| self.believed[*server].matched(chain)).collect();
        let hot = self.fan_out.hot_blocks(chain);
        let at = self.ledger.least(up.len(), |ledger, at| {
            let private = missing(matched[at].max(hot)) as f64;
            (ledger.prefill_bytes[up[at]] + missing(matched[at])) as f64 + (PRIVATE_COST - 1.0) * private
        });
        self.fan_out.count(chain, matched.iter().copied().max().unwrap_or(0));
        self.believed[up[at]].insert(chain);
        (up[at], missing(matched[at]) + REQUEST_BYTES)
    }

    /// The same in seconds, of what is so rather than what is believed.
    fn cheapest_in_truth(&mut self, arrival: &Arrival<'_>, fleet: &View<'_>) -> usize {
        let (request, up) = (arrival.request, fleet.up);
        let hot = self.fan_out.hot_blocks(&request.blocks) as u64 * BLOCK_TOKENS;
        let cached: Vec<_> = up.iter().map(|server| fleet.prefill[*server].cached_tokens(request)).collect();
        let at = self.ledger.least(up.len(), |_, at| {
            let server = &fleet.prefill[up[at]];
            let seconds = |cached: u64| fleet.model.prefill_seconds(cached, request.input - cached);
            let private = seconds(cached[at].max(hot).min(request.input)) - fleet.model.prefill_base;
            server.wait(arrival.now) + (seconds(cached[at]) + (PRIVATE_COST - 1.0) * private) / server.speed()
        });
        let known = cached.iter().max().unwrap_or(&0).div_ceil(BLOCK_TOKENS) as usize;
        self.fan_out.count(&request.blocks, known);
        up[at]
    }
}

impl Router for ReferenceRouter {
    fn choose(&mut self, arrival: &Arrival<'_>, fleet: &View<'_>) -> Pair {
        let (up, decode) = (fleet.up, fleet.decode);
        let mut new_bytes = arrival.bytes;
        self.turn += 1;
        let prefill = match self.policy {
            Reference::Random => up[self.ledger.rng.usize(..up.len())],
            Reference::RoundRobin => up[self.turn % up.len()],
            Reference::PowerOfTwo => {
                let (one, two) = self.ledger.two(up.len());
                let bytes = |at: usize| self.ledger.prefill_bytes[up[at]];
                up[if bytes(two) < bytes(one) { two } else { one }]
            }
            Reference::LeastLoad => {
                up[self.ledger.least(up.len(), |ledger, at| ledger.prefill_bytes[up[at]])]
            }
            Reference::IdealCacheAware => {
                let (server, new) = self.cheapest_in_bytes(arrival, up);
                new_bytes = new;
                server
            }
            Reference::Oracle => self.cheapest_in_truth(arrival, fleet),
        };
        let decode = match self.policy {
            Reference::Random => self.ledger.rng.usize(..decode),
            Reference::RoundRobin => self.turn % decode,
            Reference::PowerOfTwo => {
                let (one, two) = self.ledger.two(decode);
                let load = &self.ledger.decode;
                if load[two] < load[one] { two } else { one }
            }
            _ => self.ledger.least(decode, |ledger, server| ledger.decode[server]),
        };
        let pair = Pair { prefill, decode };
        self.ledger.take(arrival, pair, new_bytes);
        pair
    }

    fn prefill_done(&mut self, index: usize, pair: Pair, _: PrefillEnd) {
        if let Some((bytes, _)) = self.ledger.taken.get_mut(&index) {
            self.ledger.prefill_bytes[pair.prefill] -= std::mem::take(bytes);
        }
    }

    fn done(&mut self, index: usize, pair: Pair) {
        if let Some((_, bytes)) = self.ledger.taken.remove(&index) {
            let decode = &mut self.ledger.decode[pair.decode];
            *decode = (decode.0 - 1, decode.1 - bytes);
        }
    }

    fn prefill_started(&mut self, server: usize) {
        self.believed[server].clear();
    }
}

//! The router's own policies in the lab's simulation: their code, the prompt's fingerprint and the counts of
//! servers, without sockets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use loadtest::fleet::trace::{BLOCK_TOKENS, Request, prompt_bytes};
use loadtest::fleet::{Arrival, Candidate, Fleet, Pair, PrefillEnd, Router, View};
use mini_lb::internals::{Legs, ToldPrefill, enter_pair, inspect, set_cache_tokens, tell_waiting_tokens};
use mini_lb::{
    Backend, CacheAware, ConsistentHash, LeastLoad, MiniLbConfig, MiniLoadBalancer, PowerOfTwo, Prompt,
    Random, RoundRobin,
};

/// The fingerprints of prompts, by their blocks and their length.
type Prompts = Rc<RefCell<HashMap<(Vec<u64>, u64), Rc<Prompt>>>>;

/// Puts a policy of its own for each role into a configuration.
type WithPolicy = fn(MiniLbConfig) -> MiniLbConfig;

/// What servers tell the router.
#[derive(Clone, Copy)]
struct Telling {
    /// The size of their caches, by this factor too large. `None`: nothing.
    capacity: Option<f64>,
    /// How much of each prompt was cached.
    cached: bool,
}

const TRUTH: Telling = Telling { capacity: Some(1.0), cached: true };
const NO_RANKS: Ranks = Ranks { of_server: 1, are_known: false };

/// Several of the lab's prefill servers are one server to the router, of which each is a data-parallel rank.
#[derive(Clone, Copy)]
struct Ranks {
    of_server: usize,
    /// The router knows of them. Otherwise its rooms are random.
    are_known: bool,
}

/// A router without sockets.
struct OwnRouter {
    router: MiniLoadBalancer,
    with_policy: WithPolicy,
    telling: Telling,
    ranks: Ranks,
    fleet: Fleet,
    /// The prefill servers that it knows.
    up: Vec<usize>,
    /// And how many tokens the prompt has.
    legs: HashMap<usize, (Legs, u64)>,
    prompts: Prompts,
}

/// All policies of the router, with `mini-lb:` before their names.
pub(crate) fn candidates() -> Vec<Candidate> {
    let prompts = Prompts::default();
    let policies: [(&str, WithPolicy); 6] = [
        ("random", |config| config.policy(|| Random)),
        ("round_robin", |config| config.policy(RoundRobin::default)),
        ("power_of_two", |config| config.policy(|| PowerOfTwo)),
        ("least_load", |config| config.policy(|| LeastLoad)),
        ("consistent_hash", |config| config.policy(|| ConsistentHash)),
        ("cache_aware", |config| config.policy(CacheAware::new)),
    ];
    let candidate = |(name, with_policy)| candidate(name, with_policy, TRUTH, &prompts);
    policies.into_iter().map(candidate).collect()
}

/// `cache_aware` with servers that tell less, or what is not so.
#[allow(dead_code, reason = "for the bench alone")]
pub(crate) fn misinformed() -> Vec<Candidate> {
    let prompts = Prompts::default();
    let mut candidates = Vec::new();
    let capacities = [("", Some(1.0)), (":unknown", None), (":half", Some(0.5)), (":double", Some(2.0))];
    for (name, capacity) in capacities {
        for (silent, cached) in [("", true), (":silent", false)] {
            let name = format!("cache_aware{name}{silent}");
            let with_policy: WithPolicy = |config| config.policy(CacheAware::new);
            candidates.push(candidate(&name, with_policy, Telling { capacity, cached }, &prompts));
        }
    }
    candidates.split_off(1)
}

/// Four prefill servers of the lab are the ranks of one, which the router knows or not.
pub(crate) fn with_ranks() -> Vec<Candidate> {
    let prompts = Prompts::default();
    let policies: [(&str, WithPolicy); 3] = [
        ("cache_aware", |config| config.policy(CacheAware::new)),
        ("least_load", |config| config.policy(|| LeastLoad)),
        ("consistent_hash", |config| config.policy(|| ConsistentHash)),
    ];
    let mut candidates = Vec::new();
    for (policy, with_policy) in policies {
        for (name, are_known) in [("ranks", true), ("ranks-ignored", false)] {
            let (ranks, prompts) = (Ranks { of_server: 4, are_known }, prompts.clone());
            candidates.push(Candidate::new(&format!("mini-lb:{policy}:{name}"), move |fleet| {
                Box::new(OwnRouter::new(fleet, with_policy, TRUTH, ranks, prompts.clone()))
            }));
        }
    }
    candidates
}

/// `cache_aware` in several routers that share nothing and take turns, and with `:polls` behind it those that
/// ask servers for their load.
#[allow(dead_code, reason = "for the bench alone")]
pub(crate) fn several() -> Vec<Candidate> {
    let prompts = Prompts::default();
    let mut candidates = Vec::new();
    for count in [1, 2, 4, 8] {
        for (polls, has_polls) in [("", false), (":polls", true)] {
            let prompts = prompts.clone();
            candidates.push(Candidate::new(&format!("mini-lb:cache_aware:{count}{polls}"), move |fleet| {
                let with_policy: WithPolicy = match has_polls {
                    true => |config| config.policy(CacheAware::new).load_poll_interval(POLL_INTERVAL),
                    false => |config| config.policy(CacheAware::new),
                };
                let router = || OwnRouter::new(fleet, with_policy, TRUTH, NO_RANKS, prompts.clone());
                let routers = (0..count).map(|_| router()).collect();
                Box::new(Routers { routers, next_poll: has_polls.then_some(0.0) })
            }));
        }
    }
    candidates
}

const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Routers that take turns.
struct Routers {
    routers: Vec<OwnRouter>,
    /// In seconds since the start. `None`: servers are not asked.
    next_poll: Option<f64>,
}

impl Routers {
    fn of(&mut self, index: usize) -> &mut OwnRouter {
        let count = self.routers.len();
        &mut self.routers[index % count]
    }

    /// What waits on a server is what all routers have given to it, with four bytes a token.
    fn poll(&self) {
        let mut waiting: HashMap<String, u64> = HashMap::new();
        for server in self.routers.iter().flat_map(|own| own.router.servers()) {
            *waiting.entry(server.url().to_owned()).or_default() += server.work() / 4;
        }
        for own in &self.routers {
            tell_waiting_tokens(&own.router, |server| waiting[server.url()]);
        }
    }
}

impl Router for Routers {
    fn choose(&mut self, arrival: &Arrival<'_>, fleet: &View<'_>) -> Pair {
        if self.next_poll.is_some_and(|next| next <= arrival.now) {
            self.poll();
            self.next_poll = Some(arrival.now + POLL_INTERVAL.as_secs_f64());
        }
        self.of(arrival.index).choose(arrival, fleet)
    }

    fn prefill_done(&mut self, index: usize, pair: Pair, end: PrefillEnd) {
        self.of(index).prefill_done(index, pair, end);
    }

    fn done(&mut self, index: usize, pair: Pair) {
        self.of(index).done(index, pair);
    }
}

fn candidate(name: &str, with_policy: WithPolicy, telling: Telling, prompts: &Prompts) -> Candidate {
    let prompts = prompts.clone();
    Candidate::new(&format!("mini-lb:{name}"), move |fleet| {
        Box::new(OwnRouter::new(fleet, with_policy, telling, NO_RANKS, prompts.clone()))
    })
}

impl OwnRouter {
    fn new(fleet: &Fleet, with_policy: WithPolicy, telling: Telling, ranks: Ranks, prompts: Prompts) -> Self {
        // The policies draw from the thread's generator.
        fastrand::seed(fleet.seed);
        let up: Vec<_> = (0..fleet.prefill).collect();
        let servers = &up[..fleet.prefill / ranks.of_server];
        let router =
            MiniLoadBalancer::new(config(fleet, servers, with_policy)).expect("a valid configuration");
        let legs = HashMap::new();
        let own = Self { router, with_policy, telling, ranks, fleet: *fleet, up, legs, prompts };
        own.tell_capacity();
        own
    }

    fn tell_capacity(&self) {
        if let Some(factor) = self.telling.capacity {
            let tokens = self.fleet.model.cache_tokens as f64 * factor;
            let dp_size = if self.ranks.are_known { self.ranks.of_server } else { 1 };
            set_cache_tokens(&self.router, tokens as u64, dp_size as u64);
        }
    }
}

/// Names without a meaning: nothing is connected to.
fn config(fleet: &Fleet, up: &[usize], with_policy: WithPolicy) -> MiniLbConfig {
    let prefill = up.iter().map(|index| (format!("http://prefill-{index}:30000"), None)).collect();
    let decode = (0..fleet.decode).map(|index| format!("http://decode-{index}:30000")).collect();
    // Nobody is there to be probed, and a server that joins would wait for its first probe.
    with_policy(MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 600).health_checks(false))
}

fn index(server: &Backend) -> usize {
    let digits = server.url().trim_end_matches(":30000").rsplit('-').next();
    digits.and_then(|digits| digits.parse().ok()).expect("a name with a number")
}

/// The prompt's text, of which each block is a function of its number alone.
fn body(request: &Request) -> String {
    let mut text = String::with_capacity(prompt_bytes(request, request.input) as usize + 20);
    text += r#"{"text":""#;
    let mut length = 0;
    for (number, block) in (1..).zip(&request.blocks) {
        let end = prompt_bytes(request, request.input.min(number * BLOCK_TOKENS)) as usize;
        let word = format!("{block:015x} ");
        text.extend(word.chars().cycle().take(end - length));
        length = end;
    }
    text + r#""}"#
}

impl Router for OwnRouter {
    fn choose(&mut self, arrival: &Arrival<'_>, fleet: &View<'_>) -> Pair {
        if self.up != fleet.up {
            assert_eq!(self.ranks.of_server, 1, "a rank does not stop alone");
            self.up = fleet.up.to_vec();
            let config = config(&self.fleet, &self.up, self.with_policy);
            self.router.reload(config).expect("a valid configuration");
            self.tell_capacity();
        }
        let request = arrival.request;
        let key = (request.blocks.clone(), request.input);
        let prompt = self.prompts.borrow_mut().entry(key).or_insert_with(|| fingerprint(request)).clone();
        let legs = enter_pair(&self.router, &prompt);
        let of_server = self.ranks.of_server;
        let rank = legs.pair.prefill_rank().unwrap_or_else(|| fastrand::usize(..of_server));
        let prefill = index(legs.pair.prefill()) * of_server + rank;
        let pair = Pair { prefill, decode: index(legs.pair.decode()) };
        self.legs.insert(arrival.index, (legs, request.input));
        pair
    }

    fn prefill_done(&mut self, index: usize, _: Pair, end: PrefillEnd) {
        let Some((legs, prompt_tokens)) = self.legs.get_mut(&index) else { return };
        legs.end_prefill(match end {
            PrefillEnd::Answered { cached, time } => Some(ToldPrefill {
                prompt_tokens: *prompt_tokens,
                cached_tokens: self.telling.cached.then_some(cached),
                time: Duration::from_secs_f64(time),
            }),
            PrefillEnd::Failed => None,
        });
    }

    fn done(&mut self, index: usize, _: Pair) {
        self.legs.remove(&index);
    }
}

fn fingerprint(request: &Request) -> Rc<Prompt> {
    Rc::new(inspect(&[Bytes::from(body(request))], false, true).expect("a prompt"))
}

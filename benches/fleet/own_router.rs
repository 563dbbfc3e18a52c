//! The router's own policies in the lab's simulation: their code, the prompt's fingerprint and the counts of
//! servers, without sockets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use bytes::Bytes;
use loadtest::fleet::trace::{BLOCK_TOKENS, Request, prompt_bytes};
use loadtest::fleet::{Arrival, Candidate, Fleet, Pair, PrefillEnd, Router, View};
use mini_lb::internals::{Legs, enter_pair, inspect, set_cache_tokens};
use mini_lb::{
    Backend, CacheAware, ConsistentHash, LeastLoad, MiniLbConfig, MiniLoadBalancer, PowerOfTwo, Prompt,
    Random, RoundRobin,
};

/// The fingerprints of prompts, by their blocks and their length.
type Prompts = Rc<RefCell<HashMap<(Vec<u64>, u64), Rc<Prompt>>>>;

/// Puts a policy of its own for each role into a configuration.
type WithPolicy = fn(MiniLbConfig) -> MiniLbConfig;

/// A router without sockets.
struct OwnRouter {
    router: MiniLoadBalancer,
    with_policy: WithPolicy,
    fleet: Fleet,
    /// The prefill servers that it knows.
    up: Vec<usize>,
    legs: HashMap<usize, Legs>,
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
    let candidate = |(name, with_policy): (&str, WithPolicy)| {
        let prompts = prompts.clone();
        Candidate::new(&format!("mini-lb:{name}"), move |fleet| {
            Box::new(OwnRouter::new(fleet, with_policy, prompts.clone()))
        })
    };
    policies.into_iter().map(candidate).collect()
}

impl OwnRouter {
    fn new(fleet: &Fleet, with_policy: WithPolicy, prompts: Prompts) -> Self {
        // The policies draw from the thread's generator.
        fastrand::seed(fleet.seed);
        let up: Vec<_> = (0..fleet.prefill).collect();
        let router = MiniLoadBalancer::new(config(fleet, &up, with_policy)).expect("a valid configuration");
        set_cache_tokens(&router, fleet.model.cache_tokens);
        Self { router, with_policy, fleet: *fleet, up, legs: HashMap::new(), prompts }
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
            self.up = fleet.up.to_vec();
            let config = config(&self.fleet, &self.up, self.with_policy);
            self.router.reload(config).expect("a valid configuration");
            set_cache_tokens(&self.router, self.fleet.model.cache_tokens);
        }
        let request = arrival.request;
        let key = (request.blocks.clone(), request.input);
        let prompt = self.prompts.borrow_mut().entry(key).or_insert_with(|| fingerprint(request)).clone();
        let legs = enter_pair(&self.router, &prompt);
        let pair = Pair { prefill: index(legs.pair.prefill()), decode: index(legs.pair.decode()) };
        self.legs.insert(arrival.index, legs);
        pair
    }

    fn prefill_done(&mut self, index: usize, _: Pair, _: PrefillEnd) {
        if let Some(legs) = self.legs.get_mut(&index) {
            legs.end_prefill();
        }
    }

    fn done(&mut self, index: usize, _: Pair) {
        self.legs.remove(&index);
    }
}

fn fingerprint(request: &Request) -> Rc<Prompt> {
    Rc::new(inspect(&[Bytes::from(body(request))], false, true).expect("a prompt"))
}

//! Data-parallel ranks as candidates: how evenly they are used, and that a prompt returns to its own.

use std::collections::VecDeque;
use std::sync::LazyLock;

use super::*;
use crate::upstream::{ConsistentHash, PowerOfTwo, Random, RoundRobin};
use crate::wire::shape::key_hash;

const RANKS: usize = 8;
const REQUESTS: usize = 10_000;

/// One prefill server with so many ranks, and a decode server.
fn fleet(policy: impl Policy, dp_size: u64) -> LiveFleet {
    let mut spec = FleetSpec::unknown(1, 1);
    spec.prefill_policy = Arc::new(policy);
    let fleet = LiveFleet::new(spec);
    tell(&fleet, dp_size);
    fleet
}

fn tell(fleet: &LiveFleet, dp_size: u64) {
    let description = Description { dp_size: Some(dp_size), ..Description::default() };
    fleet.now().prefill()[0].record_description(description);
    fleet.descriptions_changed();
}

fn prompt(text: &str, blocks: usize) -> Prompt {
    let text = format!("{text:0$}", blocks * Prompt::BLOCK_BYTES);
    let mut inspector = BodyInspector::new(Dialect::Generate).with_prompt(HashKey::from_random(1));
    inspector.feed(format!(r#"{{"text":"{text}"}}"#).as_bytes()).unwrap();
    inspector.finish().unwrap().prompt.unwrap()
}

fn rank_for(fleet: &LiveFleet, demand: Demand<'_>) -> usize {
    fleet.now().enter_pair(demand).unwrap().0.prefill_rank().unwrap()
}

/// Each is another one.
static PROMPTS: LazyLock<Vec<Prompt>> =
    LazyLock::new(|| (0..REQUESTS).map(|number| prompt(&format!("{number} "), 2)).collect());

/// How many of 10,000 requests each rank gets while so many are under way.
fn counts(policy: impl Policy, under_way: usize) -> [usize; RANKS] {
    let fleet = fleet(policy, RANKS as u64);
    let mut counts = [0; RANKS];
    let mut legs = VecDeque::new();
    for prompt in PROMPTS.iter() {
        let demand = Demand { prompt: Some(prompt), body: prompt.bytes(), ..Demand::default() };
        let (pair, prefill, decode) = fleet.now().enter_pair(demand).unwrap();
        counts[pair.prefill_rank().unwrap()] += 1;
        legs.push_back((prefill, decode));
        while legs.len() > under_way {
            legs.pop_front();
        }
    }
    drop(legs);
    let server = &fleet.servers()[0];
    assert_eq!((server.in_flight(), server.work()), (0, 0));
    assert_eq!(server.work_by_rank(), [0; RANKS]);
    counts
}

fn spread(counts: &[usize; RANKS]) -> f64 {
    let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
    (most - least) as f64 / (REQUESTS / RANKS) as f64
}

/// Looks at servers only, and takes the first of equal ones.
struct KnowsNoRanks;

impl Policy for KnowsNoRanks {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        choice.servers().iter().min_by_key(|server| server.in_flight()).unwrap()
    }
}

#[test]
fn eight_ranks_get_10_000_requests_within_5_percent() {
    for under_way in [0, 5, 64] {
        for (name, counts) in [
            ("least_load", counts(LeastLoad, under_way)),
            ("cache_aware", counts(CacheAware::new(), under_way)),
            ("round_robin", counts(RoundRobin::default(), under_way)),
            ("custom", counts(KnowsNoRanks, under_way)),
        ] {
            assert!(spread(&counts) <= 0.05, "{name}, {under_way} under way: {counts:?}");
        }
    }
    // Chance has more: its standard deviation is 2.6 %.
    for counts in [counts(Random, 64), counts(PowerOfTwo, 64)] {
        assert!(spread(&counts) <= 0.25, "{counts:?}");
    }
}

#[test]
fn a_prompt_returns_to_the_rank_that_has_it() {
    let fleet = fleet(CacheAware::new(), RANKS as u64);
    let prompts: Vec<_> = (0..40).map(|number| prompt(&format!("{number} "), 10)).collect();
    let demand = |prompt| Demand { prompt: Some(prompt), body: 1, ..Demand::default() };
    let homes: Vec<_> = prompts.iter().map(|prompt| rank_for(&fleet, demand(prompt))).collect();
    assert_eq!(homes.iter().collect::<std::collections::HashSet<_>>().len(), RANKS);
    for _ in 0..5 {
        let again: Vec<_> = prompts.iter().map(|prompt| rank_for(&fleet, demand(prompt))).collect();
        assert_eq!(again, homes);
    }
}

#[test]
fn a_key_stays_on_one_rank_in_every_router() {
    let fleets = [(); 2].map(|()| fleet(ConsistentHash, RANKS as u64));
    let mut seen = std::collections::HashSet::new();
    for number in 0..100 {
        let key = Some(key_hash(format!("conversation {number}").as_bytes()));
        let demand = Demand { key, body: 1_000, ..Demand::default() };
        let ranks = [0, 1, 0].map(|router| rank_for(&fleets[router], demand));
        assert_eq!(ranks, [ranks[0]; 3]);
        seen.insert(ranks[0]);
    }
    assert_eq!(seen.len(), RANKS);
}

#[test]
fn a_server_with_other_ranks_keeps_its_counts() {
    let fleet = fleet(LeastLoad, 1);
    let server = Arc::clone(&fleet.servers()[0]);
    let of_size = |body| Demand { body, ..Demand::default() };
    let enter = || {
        let (pair, prefill, decode) = fleet.now().enter_pair(of_size(1_000)).unwrap();
        assert!(Arc::ptr_eq(pair.prefill(), &server));
        (pair.prefill_rank(), (prefill, decode))
    };
    let (none, before) = enter();
    assert_eq!(none, None);
    tell(&fleet, 2);
    let (first, second) = (enter(), enter());
    assert_eq!(first.0.unwrap() + second.0.unwrap(), 1, "one each");
    assert_eq!((server.in_flight(), server.work()), (3, 3 * 2_024));
    assert_eq!(server.work_by_rank(), [2_024; 2]);
    tell(&fleet, 3);
    let third = enter();
    assert_eq!((server.in_flight(), server.work()), (4, 4 * 2_024));
    assert_eq!(server.work_by_rank().iter().sum::<u64>(), 2_024);
    drop((before, first, second));
    assert_eq!((server.in_flight(), server.work()), (1, 2_024));
    tell(&fleet, 1);
    assert_eq!(enter().0, None);
    drop(third);
    assert_eq!((server.in_flight(), server.work()), (0, 0));
    assert!(server.work_by_rank().is_empty());
}

#[test]
fn servers_are_chosen_as_often_as_they_have_ranks() {
    let mut spec = FleetSpec::unknown(2, 1);
    spec.prefill_policy = Arc::new(LeastLoad);
    let fleet = LiveFleet::new(spec);
    tell(&fleet, 3);
    let mut legs = Vec::new();
    for _ in 0..8 {
        legs.push(fleet.now().enter_pair(Demand { body: 1_000, ..Demand::default() }).unwrap());
    }
    let in_flight: Vec<_> = fleet.now().prefill().iter().map(|server| server.in_flight()).collect();
    assert_eq!(in_flight, [6, 2]);
}

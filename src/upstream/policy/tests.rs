//! What each policy chooses, in a fleet whose loads are set.

use std::collections::HashMap;

use super::*;
use crate::upstream::completed_prefill::Expectation;
use crate::upstream::selection::REQUEST_WORK;
use crate::upstream::{FleetSpec, InFlight, LiveFleet, ServerPair};
use crate::wire::shape::{BodyInspector, Dialect, HashKey, key_hash};
use crate::wire::usage::{CachedTokens, Usage};

const BLOCK: usize = Prompt::BLOCK_BYTES;

struct Rig {
    fleet: LiveFleet,
    spec: FleetSpec,
}

impl Rig {
    fn new<P: Policy>(servers: usize, make: impl Fn() -> P) -> Self {
        let mut spec = FleetSpec::unknown(servers, servers);
        spec.prefill_policy = Arc::new(make());
        spec.decode_policy = Arc::new(make());
        Self { fleet: LiveFleet::new(spec.clone()), spec }
    }

    fn server(&self, role: Role, index: usize) -> Arc<Backend> {
        Arc::clone(&self.fleet.now().servers(role)[index])
    }

    /// Puts a request on a server for as long as the result lives.
    fn occupy(&self, role: Role, index: usize, work: u64) -> InFlight {
        let mut leg = InFlight::enter(self.server(role, index), None);
        leg.add_work(work);
        leg
    }

    /// The pair that is chosen, by index, and its legs.
    fn send(&self, demand: Demand<'_>) -> ([usize; 2], [InFlight; 2]) {
        let (pair, prefill, decode) = self.fleet.now().enter_pair(demand).unwrap();
        (self.indices(&pair), [prefill.expect("a pair"), decode])
    }

    /// The same for a request that ends at once.
    fn pair_for(&self, demand: Demand<'_>) -> [usize; 2] {
        self.send(demand).0
    }

    fn prefill_for(&self, prompt: &Prompt) -> usize {
        self.pair_for(asking(prompt))[0]
    }

    fn indices(&self, pair: &ServerPair) -> [usize; 2] {
        let fleet = self.fleet.now();
        [pair.prefill(), pair.decode()].map(|server| {
            let servers = fleet.servers(server.role());
            servers.iter().position(|other| Arc::ptr_eq(other, server)).unwrap()
        })
    }

    fn set_cache_tokens(&self, tokens: u64) {
        for server in self.fleet.now().prefill() {
            let description =
                crate::upstream::Description { cache_tokens: Some(tokens), ..Default::default() };
            server.record_description(description);
        }
        self.fleet.descriptions_changed();
    }
}

fn asking(prompt: &Prompt) -> Demand<'_> {
    Demand { prompt: Some(prompt), body: prompt.bytes() + 100, ..Demand::default() }
}

fn of_size(bytes: u64) -> Demand<'static> {
    Demand { body: bytes, ..Demand::default() }
}

fn with_key(key: &str) -> Demand<'static> {
    Demand { key: Some(key_hash(key.as_bytes())), body: 1_000, ..Demand::default() }
}

/// A prompt of so many blocks of each text, one after the other.
fn prompt(parts: &[(&str, usize)]) -> Prompt {
    let block = |name: &str, number: usize| format!("{:BLOCK$}", format!("{name} {number} "));
    let text: String =
        parts.iter().flat_map(|(name, blocks)| (0..*blocks).map(move |number| block(name, number))).collect();
    let mut inspector =
        BodyInspector::new(Dialect::Generate).with_prompt(HashKey::from_random(1)).with_stable_prefix();
    inspector.feed(format!(r#"{{"text":"{text}"}}"#).as_bytes()).unwrap();
    inspector.finish().unwrap().prompt.unwrap()
}

#[test]
fn the_least_loaded_prefill_server_has_the_fewest_bytes_and_decode_the_fewest_requests() {
    let rig = Rig::new(3, || LeastLoad);
    let _prefill = [
        rig.occupy(Role::Prefill, 0, 5_000),
        rig.occupy(Role::Prefill, 1, 1_000),
        rig.occupy(Role::Prefill, 1, 1_000),
        rig.occupy(Role::Prefill, 2, 5_000),
    ];
    let _decode = [
        rig.occupy(Role::Decode, 0, 1),
        rig.occupy(Role::Decode, 0, 1),
        rig.occupy(Role::Decode, 1, 9_000),
        rig.occupy(Role::Decode, 2, 8_000),
    ];
    for _ in 0..20 {
        assert_eq!(rig.pair_for(of_size(10)), [1, 2]);
    }
}

#[test]
fn idle_servers_share_the_requests() {
    let rigs = [
        Rig::new(4, || LeastLoad),
        Rig::new(4, || PowerOfTwo),
        Rig::new(4, CacheAware::new),
        Rig::new(4, || ConsistentHash),
    ];
    for rig in rigs {
        let mut counts = [[0; 4]; 2];
        for _ in 0..400 {
            let pair = rig.pair_for(of_size(10));
            (0..2).for_each(|role| counts[role][pair[role]] += 1);
        }
        assert!(counts.as_flattened().iter().all(|count| *count > 50), "{counts:?}");
    }
}

#[test]
fn power_of_two_takes_the_less_loaded_of_two_different_servers() {
    let rig = Rig::new(2, || PowerOfTwo);
    let _busy = [rig.occupy(Role::Prefill, 0, 10), rig.occupy(Role::Decode, 1, 0)];
    for _ in 0..50 {
        assert_eq!(rig.pair_for(of_size(10)), [1, 0]);
    }
    // Of three, the busiest is never taken and the others are.
    let rig = Rig::new(3, || PowerOfTwo);
    let _busy = rig.occupy(Role::Prefill, 0, 10);
    let mut counts = [0; 3];
    (0..300).for_each(|_| counts[rig.pair_for(of_size(10))[0]] += 1);
    assert!(counts[0] == 0 && counts[1] > 60 && counts[2] > 60, "{counts:?}");
    let rig = Rig::new(1, || PowerOfTwo);
    assert_eq!(rig.pair_for(of_size(10)), [0, 0]);
}

#[test]
fn a_key_stays_on_its_server_in_every_router_and_a_removed_server_moves_its_own_only() {
    let (mut rig, other_router) = (Rig::new(8, || ConsistentHash), Rig::new(8, || ConsistentHash));
    let keys: Vec<_> = (0..400).map(|number| format!("session-{number}")).collect();
    let homes: HashMap<_, _> = keys.iter().map(|key| (key, rig.pair_for(with_key(key)))).collect();
    for key in &keys {
        assert_eq!(rig.pair_for(with_key(key)), homes[key]);
        assert_eq!(other_router.pair_for(with_key(key)), homes[key]);
    }
    for server in 0..8 {
        let own = homes.values().filter(|home| home[0] == server).count();
        assert!((20..100).contains(&own), "server {server} has {own} of 400 keys");
    }
    // The last, so that the others keep their places.
    rig.spec.prefill.pop();
    rig.fleet.apply(rig.spec.clone());
    for key in &keys {
        let [before, _] = homes[key];
        assert!(before == 7 || rig.pair_for(with_key(key))[0] == before);
    }
}

#[test]
fn a_key_leaves_a_server_that_has_more_than_its_share() {
    let rig = Rig::new(4, || ConsistentHash);
    let [home, decode_home] = rig.pair_for(with_key("a"));
    let load: Vec<_> = (0..4).map(|server| rig.occupy(Role::Prefill, server, 100_000)).collect();
    assert_eq!(rig.pair_for(with_key("a"))[0], home, "all have the same");
    let more = rig.occupy(Role::Prefill, home, 60_000);
    let [next, _] = rig.pair_for(with_key("a"));
    assert_ne!(next, home);
    assert_eq!(rig.pair_for(with_key("a"))[0], next, "the order is the key's own");
    drop((more, load));
    assert_eq!(rig.pair_for(with_key("a")), [home, decode_home]);
    let _requests = [rig.occupy(Role::Decode, decode_home, 0), rig.occupy(Role::Decode, decode_home, 0)];
    assert_ne!(rig.pair_for(with_key("a"))[1], decode_home);
}

#[test]
fn without_a_key_the_beginning_of_the_prompt_is_one() {
    let rig = Rig::new(8, || ConsistentHash);
    let first = rig.prefill_for(&prompt(&[("system", 2), ("a", 1)]));
    for name in ["b", "c", "d"] {
        assert_eq!(rig.prefill_for(&prompt(&[("system", 2), (name, 3)])), first);
    }
    let others = (0..40).map(|number| rig.prefill_for(&prompt(&[(&format!("system {number}"), 2)])));
    assert!(others.collect::<std::collections::HashSet<_>>().len() > 4);
}

#[test]
fn a_conversation_stays_on_the_server_that_has_it() {
    let rig = Rig::new(8, CacheAware::new);
    for conversation in 0..20 {
        let name = format!("conversation {conversation}");
        let home = rig.prefill_for(&prompt(&[(&name, 2)]));
        for blocks in 3..20 {
            assert_eq!(rig.prefill_for(&prompt(&[(&name, blocks)])), home);
        }
    }
}

#[test]
fn only_what_is_not_cached_counts_as_work() {
    let rig = Rig::new(2, CacheAware::new);
    let (first, longer) = (prompt(&[("a", 4)]), prompt(&[("a", 10)]));
    let ([home, _], legs) = rig.send(asking(&first));
    let server = rig.server(Role::Prefill, home);
    assert_eq!(server.work(), REQUEST_WORK + first.bytes());
    drop(legs);
    assert_eq!(server.work(), 0);
    let (pair, legs) = rig.send(asking(&longer));
    assert_eq!((pair[0], server.work()), (home, REQUEST_WORK + longer.bytes() - 4 * BLOCK as u64));
    let decode = rig.server(Role::Decode, pair[1]);
    assert_eq!(decode.work(), REQUEST_WORK + longer.bytes(), "decode gets all of it");
    drop(legs);
    assert_eq!((server.work(), decode.work()), (0, 0));
}

#[test]
fn a_busy_server_is_left_when_waiting_costs_more_than_computing_again() {
    let rig = Rig::new(2, CacheAware::new);
    let conversation = prompt(&[("a", 10)]);
    let home = rig.prefill_for(&conversation);
    let cached = 10 * BLOCK as u64;
    // What only one conversation has is worth four times its bytes.
    let queue = rig.occupy(Role::Prefill, home, 4 * cached - 100);
    assert_eq!(rig.prefill_for(&conversation), home);
    let _more = rig.occupy(Role::Prefill, home, 200);
    assert_eq!(rig.prefill_for(&conversation), 1 - home);
    // Now both have it.
    drop(queue);
    let _other = rig.occupy(Role::Prefill, 1 - home, 300);
    assert_eq!(rig.prefill_for(&conversation), home);
}

#[test]
fn what_many_prompts_begin_with_is_copied_sooner() {
    let rig = Rig::new(2, CacheAware::new);
    let with_system = |number: usize| prompt(&[("system", 20), (&format!("user {number}"), 1)]);
    let home = rig.prefill_for(&with_system(0));
    let wait = rig.occupy(Role::Prefill, home, 2 * 20 * BLOCK as u64);
    // A private beginning of this length would be waited for, and for the first prompts it looks like one.
    for number in 1..=16 {
        assert_eq!(rig.prefill_for(&with_system(number)), home, "{number}");
    }
    assert_eq!(rig.prefill_for(&with_system(17)), 1 - home);
    drop(wait);
}

#[test]
fn a_note_is_forgotten_when_the_server_has_filled_its_cache_since() {
    let rig = Rig::new(2, CacheAware::new);
    // 1 MiB of JSON.
    rig.set_cache_tokens(256 << 10);
    let old = prompt(&[("old", 16)]);
    let home = rig.prefill_for(&old);
    let server = rig.server(Role::Prefill, home);
    let cached = |prompt: &Prompt| {
        // Nobody else can be cheaper.
        let _busy = rig.occupy(Role::Prefill, 1 - home, 1 << 30);
        let ([chosen, _], _legs) = rig.send(asking(prompt));
        assert_eq!(chosen, home);
        REQUEST_WORK + prompt.bytes() - server.work()
    };
    let fill = |name: &str, kib: usize| cached(&prompt(&[(name, kib / 2)]));
    fill("a", 512);
    assert_eq!(cached(&old), 16 * BLOCK as u64, "half of the cache later it is there");
    fill("b", 768);
    assert_eq!(cached(&old), 16 * BLOCK as u64, "it was used since");
    fill("c", 1_100);
    assert_eq!(cached(&old), 0);
}

#[test]
fn a_server_that_comes_back_has_an_empty_cache() {
    let rig = Rig::new(2, CacheAware::new);
    let conversation = prompt(&[("a", 10)]);
    let home = rig.prefill_for(&conversation);
    let _queue = rig.occupy(Role::Prefill, home, 10);
    assert_eq!(rig.prefill_for(&conversation), home);
    rig.server(Role::Prefill, home).forget_cache();
    assert_eq!(rig.prefill_for(&conversation), 1 - home);
    // The other one has it now, and keeps it.
    let _queue = rig.occupy(Role::Prefill, 1 - home, 1_000);
    assert_eq!(rig.prefill_for(&conversation), 1 - home);
}

#[test]
fn a_server_without_a_cache_is_never_believed_to_have_anything() {
    let rig = Rig::new(2, CacheAware::new);
    rig.set_cache_tokens(0);
    let conversation = prompt(&[("a", 10)]);
    let ([home, _], legs) = rig.send(asking(&conversation));
    drop(legs);
    let _queue = rig.occupy(Role::Prefill, home, 1);
    assert_eq!(rig.prefill_for(&conversation), 1 - home);
}

#[test]
fn a_server_that_was_removed_gets_nothing_and_its_successor_inherits_nothing() {
    let mut rig = Rig::new(3, CacheAware::new);
    let conversation = prompt(&[("a", 10)]);
    let home = rig.prefill_for(&conversation);
    let removed = rig.spec.prefill.remove(home);
    rig.fleet.apply(rig.spec.clone());
    // The same place in the tables, and another server.
    rig.spec.prefill.push(removed);
    rig.fleet.apply(rig.spec.clone());
    let _queue = rig.occupy(Role::Prefill, 2, 1);
    assert_ne!(rig.prefill_for(&conversation), 2);
}

#[test]
fn a_reload_keeps_what_is_known_and_another_policy_does_not() {
    let mut rig = Rig::new(4, CacheAware::new);
    let conversation = prompt(&[("a", 10)]);
    let home = rig.prefill_for(&conversation);
    let _queue = rig.occupy(Role::Prefill, home, 10);
    rig.spec.prefill_policy = Arc::new(CacheAware::new());
    rig.fleet.apply(rig.spec.clone());
    assert_eq!(rig.prefill_for(&conversation), home);
    assert!(rig.fleet.now().needs().prompt);
    rig.spec.prefill_policy = Arc::new(LeastLoad);
    rig.fleet.apply(rig.spec.clone());
    assert_ne!(rig.prefill_for(&conversation), home);
    assert_eq!(rig.fleet.now().needs(), Needs::default());
}

#[test]
fn a_server_is_found_by_its_slot_in_small_and_large_fleets() {
    for count in [1, 16, 17, 100] {
        let mut spec = FleetSpec::unknown(count, 1);
        let fleet = LiveFleet::new(spec.clone());
        // Slots are not in the order of the servers any more.
        spec.prefill.rotate_left(count / 3);
        fleet.apply(spec.clone());
        let candidates = Candidates::new(fleet.now().prefill());
        let loads = LoadTable::default();
        let choice = Choice::new(Role::Prefill, &candidates, &loads, Demand::default());
        for index in 0..count {
            assert_eq!(choice.index_of_slot(choice.slot(index)), Some(index));
        }
        assert_eq!(choice.index_of_slot(Choice::MAX_SLOTS - 1), None);
        let few = Candidates::new(&fleet.now().prefill()[..1]);
        let choice_of_few = Choice::new(Role::Prefill, &few, &loads, Demand::default());
        assert_eq!(choice_of_few.index_of_slot(choice.slot(count - 1)), (count == 1).then_some(0));
    }
}

#[test]
fn a_selection_tells_its_reason() {
    let reason = |rig: &Rig, demand| {
        let (pair, _prefill, _decode) = rig.fleet.now().enter_pair(demand).unwrap();
        [Role::Prefill, Role::Decode].map(|role| pair.selected_by(role).reason)
    };
    for (rig, expected) in [
        (Rig::new(3, || Random), SelectionReason::Random),
        (Rig::new(3, RoundRobin::default), SelectionReason::Turn),
        (Rig::new(3, || LeastLoad), SelectionReason::Load),
        (Rig::new(3, || PowerOfTwo), SelectionReason::Load),
        (Rig::new(3, CacheAware::new), SelectionReason::Load),
        (Rig::new(3, || ConsistentHash), SelectionReason::Load),
        (Rig::new(1, || Random), SelectionReason::Only),
    ] {
        assert_eq!(reason(&rig, of_size(10)), [expected; 2]);
    }
    let rig = Rig::new(3, CacheAware::new);
    let prompt = prompt(&[("a", 4)]);
    assert_eq!(reason(&rig, asking(&prompt)), [SelectionReason::Load; 2]);
    assert_eq!(reason(&rig, asking(&prompt)), [SelectionReason::Prefix, SelectionReason::Load]);
}

#[test]
fn a_key_that_went_on_to_another_server_is_told() {
    let rig = Rig::new(3, || ConsistentHash);
    for key in 0..50 {
        let demand = with_key(&format!("conversation {key}"));
        let pair = || {
            let (pair, _prefill, _decode) = rig.fleet.now().enter_pair(demand).unwrap();
            (rig.indices(&pair), *pair.selected_by(Role::Prefill))
        };
        let ([home, _], by) = pair();
        assert_eq!(by.reason, SelectionReason::Key);
        let busy = rig.occupy(Role::Prefill, home, 1 << 20);
        let ([other, _], by) = pair();
        assert!(other != home && by.reason == SelectionReason::KeyOverflow);
        drop(busy);
        // Others may be full.
        let _busy = rig.occupy(Role::Prefill, other, 1 << 20);
        assert_eq!(pair().1.reason, SelectionReason::Key);
    }
}

/// How many tokens a prompt has where a token has four bytes.
fn tokens(bytes: u64) -> u64 {
    bytes / 4
}

/// A fleet of two servers, of which only the first is chosen and remembers what it had.
struct OneCache {
    rig: Rig,
    home: usize,
    /// The true size of its cache, in bytes, and what is in it: the last prompts, and their new bytes.
    holds: u64,
    inside: std::cell::RefCell<Vec<(String, u64)>>,
}

impl OneCache {
    fn new(rig: Rig, holds: u64) -> Self {
        Self { rig, home: 0, holds, inside: Default::default() }
    }

    /// Sends a prompt, and lets the server say what it had of it. Returns the bytes that were believed
    /// cached.
    fn ask(&self, name: &str, blocks: usize) -> u64 {
        let prompt = prompt(&[(name, blocks)]);
        let _busy = self.rig.occupy(Role::Prefill, 1 - self.home, 1 << 30);
        let ([chosen, _], [leg, _]) = self.rig.send(asking(&prompt));
        assert_eq!(chosen, self.home);
        let believed = REQUEST_WORK + prompt.bytes() - self.rig.server(Role::Prefill, chosen).work();
        let mut inside = self.inside.borrow_mut();
        let since: u64 = inside.iter().rev().take_while(|(other, _)| other != name).map(|(_, new)| new).sum();
        let is_cached = inside.iter().any(|(other, _)| other == name) && since < self.holds;
        inside.push((name.to_owned(), if is_cached { 0 } else { prompt.bytes() }));
        let told = CachedTokens::Told(if is_cached { tokens(prompt.bytes()) - 1 } else { 0 });
        let usage = Usage { prompt_tokens: tokens(prompt.bytes()), cached: told };
        leg.prefill_completed(Some(usage), None);
        believed
    }

    /// Asks for old prompts again and again, and returns for how many of the last hundred the belief was
    /// right.
    fn right_beliefs(&self, distance: usize) -> usize {
        let mut right = 0;
        for number in 0..600 {
            let name = format!("prompt {}", number % distance);
            let was = self.inside.borrow().len();
            let believed = self.ask(&name, 32) > 0;
            let is_cached = self.inside.borrow()[was].1 == 0;
            right += usize::from(number >= 500 && believed == is_cached);
        }
        right
    }
}

#[test]
fn the_size_of_a_cache_is_learned_from_cached_tokens() {
    // Told 4 MiB or nothing, and each prompt comes again after 2 MiB. The last is as it was told.
    for (told, holds) in
        [(Some(1 << 20), 1 << 20), (None, 1 << 20), (Some(1 << 18), 4 << 20), (Some(1 << 20), 4 << 20)]
    {
        let rig = Rig::new(2, CacheAware::new);
        if let Some(tokens) = told {
            rig.set_cache_tokens(tokens);
        }
        let cache = OneCache::new(rig, holds);
        let right = cache.right_beliefs(32);
        assert!(right >= 99, "told {told:?}, holds {holds}: {right}");
    }
}

#[test]
fn nothing_is_learned_from_what_was_not_computed_yet_or_differs_by_little() {
    let rig = Rig::new(2, CacheAware::new);
    rig.set_cache_tokens(1 << 20);
    let conversation = prompt(&[("a", 64)]);
    let home = rig.prefill_for(&conversation);
    let _busy = rig.occupy(Role::Prefill, 1 - home, 1 << 30);
    let answer = |cached: u64| {
        let ([chosen, _], [leg, _]) = rig.send(asking(&conversation));
        let believed = REQUEST_WORK + conversation.bytes() - rig.server(Role::Prefill, chosen).work();
        let cached = CachedTokens::Told(tokens(cached));
        leg.prefill_completed(Some(Usage { prompt_tokens: tokens(conversation.bytes()), cached }), None);
        (chosen, believed)
    };
    for _ in 0..100 {
        // All of it would be a smaller cache: but the prompt has just been sent.
        assert_eq!(answer(0), (home, 64 * BLOCK as u64));
        assert_eq!(answer(58 * BLOCK as u64), (home, 64 * BLOCK as u64));
    }
    // Half of the cache later it is still believed there.
    rig.prefill_for(&prompt(&[("other", 1_000)]));
    assert_eq!(answer(0), (home, 64 * BLOCK as u64));
}

/// Lets the servers answer, each so many seconds for 64 KiB.
fn answer_in(rig: &Rig, seconds: &[f64]) {
    let prompt = prompt(&[("a", 32)]);
    for round in 0..60 {
        for (index, seconds) in seconds.iter().enumerate() {
            // A tenth more, and a tenth less.
            let noise = 1.0 + 0.1 * f64::from(round % 3 - 1);
            let mut leg = rig.occupy(Role::Prefill, index, prompt.bytes());
            leg.set_expectation(Expectation::of_bytes(prompt.bytes()));
            leg.prefill_completed(None, Some(std::time::Duration::from_secs_f64(seconds * noise)));
        }
    }
}

#[test]
fn a_server_at_half_speed_gets_what_it_can_do_in_the_same_time() {
    fn home<P: Policy>(make: impl Fn() -> P, seconds: &[f64], work_of_fast: u64) -> usize {
        let rig = Rig::new(2, make);
        answer_in(&rig, seconds);
        let _queue = rig.occupy(Role::Prefill, 0, work_of_fast);
        rig.pair_for(of_size(100_000))[0]
    }
    for seconds in [[1.0, 2.5], [1.0, 4.0]] {
        // The first is fast: it is chosen although 60,000 bytes wait there, and not with 500,000.
        assert_eq!(home(|| LeastLoad, &seconds, 60_000), 0);
        assert_eq!(home(|| PowerOfTwo, &seconds, 60_000), 0);
        assert_eq!(home(CacheAware::new, &seconds, 60_000), 0);
        assert_eq!(home(|| LeastLoad, &seconds, 500_000), 1);
        assert_eq!(home(|| PowerOfTwo, &seconds, 500_000), 1);
        assert_eq!(home(CacheAware::new, &seconds, 500_000), 1);
    }
    // About as fast is as fast.
    assert_eq!(home(|| LeastLoad, &[1.0, 1.2], 1), 1);
}

#[test]
fn what_waits_on_a_server_beyond_the_routers_own_work_is_others() {
    let rig = Rig::new(2, || LeastLoad);
    let server = rig.server(Role::Prefill, 0);
    let own = rig.occupy(Role::Prefill, 0, 3_000);
    server.record_waiting_tokens(1_000, server.work());
    assert_eq!(server.foreign_work(), 1_000, "4,000 bytes wait, and 3,000 of them are its own");
    server.record_waiting_tokens(500, server.work());
    assert_eq!(server.foreign_work(), 0, "it computes some of its own work already");
    server.record_waiting_tokens(1_000, server.work());
    drop(own);
    assert_eq!(
        (server.work(), server.foreign_work()),
        (0, 1_000),
        "others' work is that until the next poll"
    );
    server.forget_foreign_work();
    assert_eq!(server.foreign_work(), 0);
}

#[test]
fn a_server_with_others_work_is_as_busy_as_with_ones_own() {
    fn chosen<P: Policy>(make: impl Fn() -> P) -> Vec<usize> {
        let rig = Rig::new(2, make);
        let _own = rig.occupy(Role::Prefill, 1, 10_000);
        let server = rig.server(Role::Prefill, 0);
        [0, 2_000, 3_000, 0]
            .into_iter()
            .flat_map(|tokens| {
                server.record_waiting_tokens(tokens, 0);
                [(); 9].map(|()| rig.pair_for(of_size(1_000))[0])
            })
            .collect()
    }
    let expected = [[0; 9], [0; 9], [1; 9], [0; 9]].concat();
    assert_eq!(chosen(|| LeastLoad), expected);
    assert_eq!(chosen(|| PowerOfTwo), expected);
    assert_eq!(chosen(CacheAware::new), expected);
}

fn cache_aware_with_peers() -> CacheAware {
    let policy = CacheAware::new();
    policy.set_peers(true);
    policy
}

#[test]
fn with_other_routers_a_prompt_goes_to_one_of_two_homes_of_its_beginning() {
    let rigs = [(); 4].map(|()| Rig::new(8, cache_aware_with_peers));
    assert_eq!(rigs[0].fleet.now().needs(), Needs { prompt: true, key: true });
    let mut used = [0; 8];
    for number in 0..40 {
        let name = format!("conversation {number}");
        let turns = [4, 6].map(|blocks| prompt(&[(&name, blocks)]));
        let first = rigs[number % 4].prefill_for(&turns[0]);
        used[first] += 1;
        for rig in &rigs {
            assert_eq!(rig.prefill_for(&turns[1]), first, "an idle fleet needs one of them only");
        }
        // The same other one in each router.
        let seconds = rigs.each_ref().map(|rig| {
            let _busy = rig.occupy(Role::Prefill, first, 1 << 30);
            rig.prefill_for(&turns[1])
        });
        assert!(seconds[0] != first && seconds == [seconds[0]; 4], "{seconds:?}");
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}");
}

#[test]
fn with_other_routers_servers_that_have_half_of_a_prompt_are_chosen_too() {
    let rig = Rig::new(8, cache_aware_with_peers);
    let conversation = prompt(&[("a", 8)]);
    let home = rig.prefill_for(&conversation);
    let busy = rig.occupy(Role::Prefill, home, 1 << 30);
    let second = rig.prefill_for(&conversation);
    let _both = [busy, rig.occupy(Role::Prefill, second, 1 << 30)];
    // Without the homes the third of them would have been chosen before.
    assert!([home, second].contains(&rig.prefill_for(&conversation)));
    // Another conversation with its beginning is no reason to leave the homes.
    let longer = prompt(&[("a", 8), ("b", 40)]);
    assert!([home, second].contains(&rig.prefill_for(&longer)));
}

#[test]
fn with_other_routers_what_many_prompts_begin_with_may_go_anywhere() {
    let rig = Rig::new(8, cache_aware_with_peers);
    let mut used = [0; 8];
    let mut running = Vec::new();
    for number in 0..200 {
        let own = format!("question {number}");
        let ([prefill, _], legs) = rig.send(asking(&prompt(&[("instructions", 4), (&own, 1)])));
        used[prefill] += 1;
        running.push(legs);
    }
    assert!(used.iter().all(|count| *count > 5), "two servers cannot take all: {used:?}");
    let short = [(); 64].map(|()| rig.send(asking(&prompt(&[]))).0[0]);
    assert!((0..8).filter(|server| short.contains(server)).count() > 2, "nothing of them is cached");
}

//! The counts of servers, over many requests that end in all ways.

mod ranks;

use super::*;
use crate::admission::{AdmissionController, AdmissionHandle, AdmissionOptions, BackendCaps};
use crate::upstream::{CacheAware, Description, LeastLoad, Outcome};
use crate::wire::shape::{BodyInspector, Dialect, HashKey, Prompt};

const OUTCOMES: [Outcome; 6] = [
    Outcome::Completed,
    Outcome::Refused,
    Outcome::ServerError,
    Outcome::Closed,
    Outcome::Timeout,
    Outcome::Connect,
];

fn prompts(random: &mut fastrand::Rng) -> Vec<Prompt> {
    let mut prompt = |number: usize| {
        let text = format!("{:1$}", format!("system {} user {number}", number % 7), random.usize(..40_000));
        let mut inspector = BodyInspector::new(Dialect::Generate).with_prompt(HashKey::from_random(1));
        inspector.feed(format!(r#"{{"text":"{text}"}}"#).as_bytes()).unwrap();
        inspector.finish().unwrap().prompt.unwrap()
    };
    (0..100).map(&mut prompt).collect()
}

/// Each request selects a pair with or without permits, is retried or not, and each of its legs ends by
/// itself with some outcome or by being dropped, before or after the other. Servers restart, leave and come
/// back, and have another number of ranks.
#[test]
fn after_100_000_requests_no_work_is_left() {
    let mut random = fastrand::Rng::with_seed(7);
    let prompts = prompts(&mut random);
    let mut spec = FleetSpec::unknown(5, 4);
    spec.prefill_policy = Arc::new(CacheAware::new());
    spec.decode_policy = Arc::new(LeastLoad);
    spec.is_dp_aware = true;
    let fleet = LiveFleet::new(spec.clone());
    let first = fleet.servers();
    let caps = BackendCaps { prefill: 30, decode: 40, ..BackendCaps::NONE };
    let controller = AdmissionController::new(&AdmissionOptions { caps, ..AdmissionOptions::default() });
    let handle = AdmissionHandle::new(Arc::new(controller));
    let mut legs: Vec<InFlight> = Vec::new();
    let mut most = 0;
    for request in 0..100_000 {
        let prompt = &prompts[random.usize(..prompts.len())];
        let prompt_known = random.u8(..4) > 0;
        let demand =
            Demand { prompt: prompt_known.then_some(prompt), body: prompt.bytes() + 50, ..Demand::default() };
        let now = fleet.now();
        let entered = if random.bool() {
            now.enter_pair(demand)
        } else {
            match now.acquire_pair(caps, &handle).unwrap() {
                // A client that goes away while its body is read.
                Some(permits) if random.u8(..8) == 0 => {
                    drop(permits);
                    continue;
                }
                Some(permits) => Ok(now.settle(permits, demand, caps, &handle).into_legs()),
                None => now.enter_pair(demand),
            }
        };
        let (pair, prefill, mut decode) = entered.unwrap();
        let mut prefill = prefill.unwrap();
        if random.u8(..10) == 0 {
            prefill.set_outcome(Outcome::Connect);
            drop((prefill, decode));
            let (_, other_prefill, other_decode) = match random.bool() {
                true => now.enter_other_pair(pair.prefill(), demand).unwrap(),
                false => now.acquire_other_pair(pair.decode(), demand, caps, &handle).unwrap().into_legs(),
            };
            (prefill, decode) = (other_prefill.unwrap(), other_decode);
        }
        drop(now);
        legs.extend([prefill, decode]);
        while legs.len() > 150 || (!legs.is_empty() && random.bool()) {
            let mut leg = legs.swap_remove(random.usize(..legs.len()));
            if random.bool() {
                leg.set_outcome(OUTCOMES[random.usize(..OUTCOMES.len())]);
            }
        }
        most = most.max(fleet.servers().iter().map(|server| server.work()).max().unwrap_or(0));
        if request % 5_000 == 4_999 {
            spec.prefill.rotate_left(1);
            let without = FleetSpec { prefill: spec.prefill[1..].to_vec(), ..spec.clone() };
            fleet.apply(if random.bool() { without } else { spec.clone() });
            for server in fleet.servers() {
                let dp_size = Some(random.u64(..4));
                server.record_description(Description { dp_size, ..Description::default() });
            }
            fleet.descriptions_changed();
        }
    }
    assert!(most > 100_000, "there was work: {most}");
    drop(legs);
    for server in first.iter().chain(&fleet.servers()) {
        assert_eq!((server.in_flight(), server.work()), (0, 0), "{}", server.url());
        assert!(server.ranks().iter().all(|rank| rank.load().by_requests() == 0), "{}", server.url());
    }
}

/// With permits, the pair is chosen when the request is known, and the capacity that was kept for it returns.
#[test]
fn an_admitted_request_goes_to_the_server_that_has_its_prompt() {
    let mut random = fastrand::Rng::with_seed(7);
    let prompts = prompts(&mut random);
    let mut spec = FleetSpec::unknown(4, 1);
    spec.prefill_policy = Arc::new(CacheAware::new());
    let fleet = LiveFleet::new(spec);
    let caps = BackendCaps { prefill: 2, decode: 1_000, ..BackendCaps::NONE };
    let controller = AdmissionController::new(&AdmissionOptions { caps, ..AdmissionOptions::default() });
    let handle = AdmissionHandle::new(Arc::new(controller));
    let prompt = prompts.iter().find(|prompt| prompt.blocks() > 10).unwrap();
    let demand = Demand { prompt: Some(prompt), body: prompt.bytes(), ..Demand::default() };
    let send = || {
        let now = fleet.now();
        let permits = now.acquire_pair(caps, &handle).unwrap().expect("capacity");
        let (pair, prefill, decode) = now.settle(permits, demand, caps, &handle).into_legs();
        (Arc::clone(pair.prefill()), (prefill, decode))
    };
    let (home, legs) = send();
    assert_eq!(fleet.now().prefill().iter().map(|server| server.in_flight()).sum::<usize>(), 1);
    drop(legs);
    let kept: Vec<_> = (0..2).map(|_| send()).collect();
    assert!(kept.iter().all(|(server, _)| Arc::ptr_eq(server, &home)));
    assert_eq!(home.in_flight(), 2);
    // It is full: another one serves.
    assert!(!Arc::ptr_eq(&send().0, &home));
    drop(kept);
    assert_eq!((home.in_flight(), home.work()), (0, 0));
}

#[test]
fn a_plain_server_is_counted_once_and_capped() {
    let mut spec = FleetSpec::unknown_regular(2);
    spec.regular_policy = Arc::new(CacheAware::new());
    let fleet = LiveFleet::new(spec);
    let now = fleet.now();
    assert_eq!(now.needs(), Needs { prompt: true, key: false });
    let demand = Demand { body: 100, ..Demand::default() };
    let (pair, none, leg) = now.enter_pair(demand).unwrap();
    let server = Arc::clone(leg.backend());
    assert!(none.is_none() && pair.is_single() && Arc::ptr_eq(pair.prefill(), pair.decode()));
    assert_eq!((server.in_flight(), server.work()), (1, 1_124));
    assert_eq!(pair.servers().count(), 1);
    let (_, _, other) = now.enter_other_pair(&server, demand).unwrap();
    assert!(!Arc::ptr_eq(other.backend(), &server));
    drop((leg, other));
    let caps = BackendCaps { regular: 1, ..BackendCaps::NONE };
    let controller = AdmissionController::new(&AdmissionOptions { caps, ..AdmissionOptions::default() });
    let handle = AdmissionHandle::new(Arc::new(controller));
    let admitted: Vec<_> = (0..2).map(|_| now.acquire_pair(caps, &handle).unwrap().unwrap()).collect();
    assert!(now.acquire_pair(caps, &handle).unwrap().is_none());
    let legs: Vec<_> =
        admitted.into_iter().map(|permits| now.settle(permits, demand, caps, &handle).into_legs()).collect();
    assert_eq!(fleet.servers().iter().map(|server| server.in_flight()).collect::<Vec<_>>(), [1, 1]);
    drop(legs);
    assert!(fleet.servers().iter().all(|server| server.in_flight() == 0 && server.work() == 0));
    let none = LiveFleet::new(FleetSpec::unknown_regular(0));
    assert_eq!(none.now().enter_pair(demand).err(), Some(Role::Regular));
    assert_eq!(none.now().acquire_pair(caps, &handle).err(), Some(Role::Regular));
}

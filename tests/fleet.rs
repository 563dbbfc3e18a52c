//! What the policies make of a modelled fleet: `cache_aware` is never worse than simpler policies, and finds
//! nearly as much in caches as an oracle.
//!
//! Only with the feature `internals`: it is the policies' own code, without sockets. The model is in
//! `loadtest::fleet`; `docs/ROUTING.md` has its results.

#[path = "../benches/fleet/own_router.rs"]
mod own_router;

use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use loadtest::fleet::live::{kill_behind_mini_lb, through_mini_lb};
use loadtest::fleet::trace::{Request, at_rate, conversation};
use loadtest::fleet::{Candidate, Fleet, Generator, Reference, Row, Scenario, random_use, runs};

/// Requests of a made-up load: enough for 36 beyond the p99 of all repeats.
const REQUESTS: usize = 2_000;
const REPEATS: u64 = 2;
/// The cold start is the same for all, and would be most of what is beyond p99.
const WARM_UP: f64 = 0.1;
/// How much worse is the same, as a factor and in seconds: a step of decode.
const SAME: (f64, f64) = (1.05, 0.02);

/// Simulations, each of which keeps a core busy for long, and programs, which need one when the clock says.
static MACHINE: RwLock<()> = RwLock::new(());

fn simulates() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(PoisonError::into_inner)
}

fn has_the_machine() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(PoisonError::into_inner)
}

/// A quantile of TTFT, by its name.
type Quantile = (&'static str, fn(&Row) -> f64);

fn row(fleet: &Fleet, requests: &[Request], candidate: &Candidate) -> Row {
    let runs = runs(fleet, requests, candidate, REPEATS);
    Row::new("", fleet.scenario.name(), [0.0; 3], &candidate.name, &runs)
}

/// What `cache_aware` is worse in than the best of `random`, `round_robin` and `least_load`.
fn losses(
    name: &str,
    requests: &[Request],
    scenario: Scenario,
    loads: &[f64],
    same: (f64, f64),
) -> Vec<String> {
    let fleet = Fleet { scenario, warm_up: WARM_UP, ..Fleet::default() };
    let own_use = random_use(&fleet, requests);
    let mut losses = Vec::new();
    for load in loads {
        let requests = at_rate(requests, load / own_use);
        let mut rows: Vec<_> = own_router::candidates()
            .iter()
            .filter(|candidate| {
                !candidate.name.ends_with("power_of_two") && !candidate.name.ends_with("hash")
            })
            .map(|candidate| row(&fleet, &requests, candidate))
            .collect();
        let ours = rows.pop().expect("a row of each policy");
        assert!(ours.policy.ends_with("cache_aware"));
        let quantiles: [Quantile; 3] =
            [("p50", |row| row.p50), ("p90", |row| row.p90), ("p99", |row| row.p99)];
        for (quantile, of) in quantiles {
            // Where some server has more than it can do, whoever gives it as much as the others, or more,
            // has a better p50 for it, and a much worse p99.
            let fair = *load <= 1.0 && scenario != Scenario::HalfSpeed;
            let others =
                rows.iter().filter(|row| fair || quantile != "p50" || row.policy.ends_with("least_load"));
            let best = others.map(of).fold(f64::INFINITY, f64::min);
            if of(&ours) > best * same.0 + same.1 {
                let scenario = scenario.name();
                losses.push(format!(
                    "{name}, {scenario}, load {load}: {quantile} {:.2} > {best:.2}",
                    of(&ours)
                ));
            }
        }
    }
    losses
}

#[test]
fn cache_aware_is_never_worse_than_simpler_policies() {
    let _machine = simulates();
    let generated = [Generator::Agents, Generator::Chats, Generator::OneOff, Generator::Hot]
        .map(|generator| (generator.name(), generator.requests(REQUESTS, 1)));
    let trace = ("conversation", conversation().expect("the trace"));
    let mut found = Vec::new();
    for (name, requests) in generated.iter().chain([&trace]) {
        found.extend(losses(name, requests, Scenario::Steady, &[0.5, 1.0, 1.5], SAME));
        for scenario in [Scenario::HalfSpeed, Scenario::Restart, Scenario::Join] {
            found.extend(losses(name, requests, scenario, &[0.85], SAME));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn ranks_that_are_known_are_as_good_as_servers_and_ranks_that_are_not_are_half_as_good() {
    let _machine = simulates();
    let fleet = Fleet { warm_up: WARM_UP, ..Fleet::default() };
    let requests = conversation().expect("the trace");
    let requests = at_rate(&requests, 0.85 / random_use(&fleet, &requests));
    let all: Vec<_> = own_router::candidates().into_iter().chain(own_router::with_ranks()).collect();
    let [servers, known, ignored] = ["", ":ranks", ":ranks-ignored"].map(|kind| {
        let is_it = |candidate: &&Candidate| candidate.name == format!("mini-lb:cache_aware{kind}");
        row(&fleet, &requests, all.iter().find(is_it).expect("a candidate of this name"))
    });
    let hits = [&servers, &known, &ignored].map(|row| row.hit_rate);
    assert!(hits[1] > 0.95 * hits[0] && hits[2] < 0.5 * hits[1], "{hits:?}");
    let means = [&servers, &known, &ignored].map(|row| row.mean);
    assert!(means[1] < 1.05 * means[0] && means[2] > 3.0 * means[1], "{means:?}");
}

/// The oracle is up to 0.06 s behind `least_load` here, too: it looks at caches although all servers have
/// all.
const SAME_IF_ALIKE: (f64, f64) = (1.05, 0.08);

#[test]
fn requests_that_are_all_alike_are_spread_as_by_least_load() {
    let _machine = simulates();
    let requests = Generator::Alike.requests(4 * REQUESTS, 1);
    let found = losses("alike", &requests, Scenario::Steady, &[0.5, 0.85, 1.0, 1.5], SAME_IF_ALIKE);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn cache_aware_finds_nearly_as_much_in_caches_as_an_oracle() {
    let _machine = simulates();
    let requests = conversation().expect("the trace");
    let candidates = own_router::candidates();
    let ours = candidates.last().expect("policies");
    for load in [0.85, 1.0] {
        let fleet = Fleet::default();
        let requests = at_rate(&requests, load / random_use(&fleet, &requests));
        let oracle = row(&fleet, &requests, &Candidate::reference(Reference::Oracle));
        let ours = row(&fleet, &requests, ours);
        assert!(
            ours.hit_rate > oracle.hit_rate - 0.03,
            "load {load}: {:.3}, and {:.3} by the oracle",
            ours.hit_rate,
            oracle.hit_rate
        );
        // Without a queue there is nothing to choose: the oracle's p99 is mostly the longest prompts.
        assert!(ours.p99 < oracle.p99 * 1.25, "{:.1} > {:.1}", ours.p99, oracle.p99);
    }
}

/// With `round_robin`, whose choice does not depend on what else the machine does.
#[test]
fn the_simulation_and_the_program_in_front_of_servers_on_loopback_agree() {
    let _machine = has_the_machine();
    // Of the model's clock: 40 s are 8 s of ours.
    const SPEED: f64 = 5.0;
    let fleet = Fleet { prefill: 4, decode: 4, ..Fleet::default() };
    let requests = Generator::OneOff.requests(300, 1);
    // Long queues, beside which a moment in which the machine does something else is short.
    let requests = at_rate(&requests, 1.2 / random_use(&fleet, &requests));
    let candidates = own_router::candidates();
    let round_robin = candidates.iter().find(|candidate| candidate.name == "mini-lb:round_robin");
    let simulated = runs(&fleet, &requests, round_robin.expect("a policy"), 1).remove(0);
    let program = Path::new(env!("CARGO_BIN_EXE_mini-lb"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let live = through_mini_lb(program, "round_robin", fleet, &requests, SPEED, folder).expect("a run");
    assert_eq!((live.ttft.len(), live.failed), (300, 0));
    assert_eq!(live.prompt_tokens, simulated.prompt_tokens);
    let agree = |name: &str, live: f64, simulated: f64| {
        assert!((live / simulated - 1.0).abs() < 0.1, "{name}: {live:.3}, and {simulated:.3} simulated");
    };
    let busy = |outcome: &loadtest::fleet::Outcome| -> f64 {
        outcome.prefill.iter().map(|server| server.busy).sum()
    };
    agree("seconds of prefill", busy(&live), busy(&simulated));
    agree("mean TTFT", live.mean(), simulated.mean());
    agree("p50", live.quantile(0.5), simulated.quantile(0.5));
    agree("p90", live.quantile(0.9), simulated.quantile(0.9));
}

/// At a rate at which the others have the time for what the killed one would have done.
#[test]
fn a_prefill_server_that_is_killed_takes_with_it_what_it_had_and_nothing_else() {
    let _machine = has_the_machine();
    // Of the model's clock: its 20 s of absence are 2 s of ours, in which health checks have to notice.
    const SPEED: f64 = 10.0;
    let fleet = Fleet::default();
    let mut requests = conversation().expect("the trace");
    requests.truncate(500);
    let requests = at_rate(&requests, 0.7 / random_use(&fleet, &requests));
    let program = Path::new(env!("CARGO_BIN_EXE_mini-lb"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folders = ["killed", "steady"].map(|name| folder.join(name));
    folders.iter().for_each(|folder| std::fs::create_dir_all(folder).expect("a folder"));
    let folders = folders.each_ref().map(|folder| folder.as_path());
    let outage =
        kill_behind_mini_lb(program, "cache_aware", fleet, &requests, SPEED, folders).expect("two runs");
    assert!(outage.had > 0 && outage.lost > 0, "{outage:#?}");
    let broken: Vec<_> = outage.checks().into_iter().filter(|(_, holds)| !holds).collect();
    assert!(broken.is_empty(), "{broken:#?} {outage:#?}");
}

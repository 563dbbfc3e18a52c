//! One measurement: a fresh router, one scenario, what it cost.

use std::io;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::results::{Outcome, Sample};
use super::scenario::Scenario;
use super::turns::{Sides, Turns};
use crate::bed::{Cores, Router, Running, Upstreams, generate};
use crate::load::{Kind, Mode};
use crate::process;

/// What all measurements share.
pub(super) struct Bench {
    pub(super) servers: Upstreams,
    pub(super) cores: Cores,
    /// Logs and configurations of the routers.
    pub(super) folder: PathBuf,
}

pub(super) fn measure(bench: &Bench, scenario: &Scenario, router: &Router, label: &str) -> Outcome {
    let cores = match cores_for(bench, scenario) {
        Ok(cores) => cores,
        Err(why) => return Outcome::NotMeasured(why.to_owned()),
    };
    let router_cores = if scenario.spread { &[][..] } else { &cores.router };
    let started = bench
        .servers
        .set(&scenario.plan)
        .and_then(|()| router.start(&bench.servers, scenario.workers, router_cores, &bench.folder));
    match started {
        Ok(running) => match load(bench, scenario, &running, &cores, label) {
            Ok(sample) => Outcome::Measured(Box::new(sample)),
            Err(error) => Outcome::Failed(error.to_string()),
        },
        Err(error) => Outcome::NotStarted(error.to_string()),
    }
}

fn cores_for(bench: &Bench, scenario: &Scenario) -> Result<Cores, &'static str> {
    if scenario.by_turns {
        return bench.cores.by_turns(2).ok_or("needs two cores");
    }
    let cores = if scenario.workers > 1 { Cores::share(scenario.workers) } else { bench.cores.clone() };
    if scenario.workers > 1 && !scenario.spread && !cores.are_apart() {
        return Err("needs four cores");
    }
    Ok(cores)
}

fn load(
    bench: &Bench,
    scenario: &Scenario,
    running: &Running,
    cores: &Cores,
    label: &str,
) -> io::Result<Sample> {
    let idle_kib = running.pid.map(process::rss_kib).transpose()?.unwrap_or(0);
    let (mut spread, mut turns) = (None, None);
    let meanwhile = |generator| {
        if let (true, Some(router)) = (scenario.by_turns, running.pid) {
            let sides = Sides { router, generator, servers: bench.servers.pid() };
            turns = Some(sides.alternate());
        }
        if let (true, Some(pid)) = (scenario.spread, running.pid) {
            sleep(scenario.warmup + scenario.time / 2);
            spread = process::clients_per_loop(pid, running.addr.port()).ok();
        }
    };
    let report = generate(&flags(bench, scenario, running, label), &cores.generator, meanwhile)?;
    let [prefill, decode] = bench.servers.seen()?;
    let turns = turns.transpose()?.map(|turns| Turns::within(&report, &turns));
    Ok(Sample { report, idle_kib, prefill, decode, spread, turns })
}

fn flags(bench: &Bench, scenario: &Scenario, running: &Running, label: &str) -> Vec<String> {
    let kind = match scenario.kind {
        Kind::Chat => "chat",
        Kind::ChatStream => "chat-stream",
        Kind::Logprobs => "logprobs",
        Kind::LogprobStream => "logprob-stream",
    };
    let seconds = |time: Duration| time.as_secs_f64().to_string();
    let mut flags = vec![
        ("--url", format!("http://{}", running.addr)),
        ("--kind", kind.to_owned()),
        ("--body", scenario.body.to_string()),
        ("--tokens", scenario.plan.tokens.to_string()),
        ("--connections", scenario.connections.to_string()),
        ("--ramp", seconds(scenario.ramp)),
        ("--warmup", seconds(scenario.warmup)),
        ("--seconds", seconds(scenario.time)),
        ("--label", label.to_owned()),
        ("--watch", format!("servers={}", bench.servers.pid())),
    ];
    if let Mode::Open { rate } = scenario.mode {
        flags.push(("--rate", rate.to_string()));
    }
    if let Some(pid) = running.pid {
        flags.push(("--watch", format!("router={pid}")));
    }
    flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

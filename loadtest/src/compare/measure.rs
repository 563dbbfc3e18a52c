//! One measurement: a fresh router under one scenario, and its cost.

use std::io;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::alternate::{Processes, RouterTime};
use super::results::{Outcome, Sample};
use super::scenario::Scenario;
use crate::load::{Mode, RequestKind};
use crate::process;
use crate::testbed::{Backends, Cores, Router, RunningRouter, generate};

/// What all measurements of a run share.
pub(super) struct Environment {
    pub(super) servers: Backends,
    pub(super) cores: Cores,
    /// Where logs and configuration files of the routers are written.
    pub(super) folder: PathBuf,
}

pub(super) fn measure(
    environment: &Environment,
    scenario: &Scenario,
    router: &Router,
    label: &str,
) -> Outcome {
    let cores = match cores_for(environment, scenario) {
        Ok(cores) => cores,
        Err(why) => return Outcome::NotMeasured(why.to_owned()),
    };
    let router_cores = if scenario.spread { &[][..] } else { &cores.router };
    let started = environment.servers.set(&scenario.plan).and_then(|()| {
        router.start(&environment.servers, scenario.workers, router_cores, &environment.folder)
    });
    match started {
        Ok(running) => match load(environment, scenario, &running, &cores, label) {
            Ok(sample) => Outcome::Measured(Box::new(sample)),
            Err(error) => Outcome::Failed(error.to_string()),
        },
        Err(error) => Outcome::NotStarted(error.to_string()),
    }
}

fn cores_for(environment: &Environment, scenario: &Scenario) -> Result<Cores, &'static str> {
    if scenario.alternating {
        return environment.cores.alternating(2).ok_or("needs two cores");
    }
    let cores =
        if scenario.workers > 1 { Cores::assign(scenario.workers) } else { environment.cores.clone() };
    if scenario.workers > 1 && !scenario.spread && !cores.are_separate() {
        return Err("needs four cores");
    }
    Ok(cores)
}

fn load(
    environment: &Environment,
    scenario: &Scenario,
    running: &RunningRouter,
    cores: &Cores,
    label: &str,
) -> io::Result<Sample> {
    let idle_kib = running.pid.map(process::rss_kib).transpose()?.unwrap_or(0);
    let (mut spread, mut slots) = (None, None);
    let meanwhile = |generator| {
        if let (true, Some(router)) = (scenario.alternating, running.pid) {
            let processes = Processes { router, generator, servers: environment.servers.pid() };
            slots = Some(processes.alternate());
        }
        if let (true, Some(pid)) = (scenario.spread, running.pid) {
            sleep(scenario.warmup + scenario.time / 2);
            spread = process::clients_per_loop(pid, running.addr.port()).ok();
        }
    };
    let report = generate(&flags(environment, scenario, running, label), &cores.generator, meanwhile)?;
    let [prefill, decode] = environment.servers.counts()?;
    let router_time = slots.transpose()?.map(|slots| RouterTime::within(&report, &slots));
    Ok(Sample { report, idle_kib, prefill, decode, spread, router_time })
}

fn flags(
    environment: &Environment,
    scenario: &Scenario,
    running: &RunningRouter,
    label: &str,
) -> Vec<String> {
    let kind = match scenario.kind {
        RequestKind::Chat => "chat",
        RequestKind::ChatStream => "chat-stream",
        RequestKind::Logprobs => "logprobs",
        RequestKind::LogprobStream => "logprob-stream",
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
        ("--watch", format!("servers={}", environment.servers.pid())),
    ];
    if let Mode::Open { rate } = scenario.mode {
        flags.push(("--rate", rate.to_string()));
    }
    if let Some(pid) = running.pid {
        flags.push(("--watch", format!("router={pid}")));
    }
    flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

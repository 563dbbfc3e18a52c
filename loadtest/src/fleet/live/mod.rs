//! The socket mode: the model's servers on loopback, and a trace through a real router's program.

mod plot;
mod replay;
mod routers;
mod servers;
mod text;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::runtime::Builder;

use super::experiment::{Load, random_use};
use super::report::{Outcome, Row, table};
use super::simulation::{Fleet, Scenario};
use super::trace::{Request, at_rate, duration};
use crate::process::{Cpu, peak_kib};
use crate::testbed::Cores;
use replay::{Replayed, replay};
use routers::Programs;
pub use routers::RouterPolicy;
use servers::{Clock, Servers};
pub use text::Dialect;

/// The rows without `--router`.
const DEFAULT_ROUTERS: [&str; 6] = [
    "mini-lb:random",
    "mini-lb:round_robin",
    "mini-lb:power_of_two",
    "mini-lb:least_load",
    "mini-lb:consistent_hash",
    "mini-lb:cache_aware",
];

/// Replays traces through routers, in front of simulated servers on loopback.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    load: Load,
    /// A router and its policy; may be repeated. Routers: mini-lb, sglang-router, smg, mini_lb.py. [default:
    /// mini-lb with each policy]
    #[arg(long, value_name = "ROUTER:POLICY")]
    router: Vec<RouterPolicy>,
    /// How prompts are written; may be repeated.
    #[arg(long, value_name = "NAME", default_value = "completions")]
    dialect: Vec<Dialect>,
    /// What is different with the servers; may be repeated. `restart` and `join` are for the simulation only.
    #[arg(long, value_name = "NAME", default_value = "steady")]
    scenario: Vec<Scenario>,
    /// Repeats, each with another seed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeats: u64,
    /// How many times as fast as ours the servers' clock goes.
    #[arg(long, value_name = "FACTOR", default_value_t = 10.0)]
    speed: f64,
    /// Use no more than these first seconds of a trace, before its rate is changed.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// The mini-lb program [default: `mini-lb` in this program's folder].
    #[arg(long, value_name = "PATH")]
    mini_lb: Option<PathBuf>,
    /// A Python environment that has sglang-router and smg.
    #[arg(long, value_name = "FOLDER", default_value = "target/peers")]
    peers: PathBuf,
    /// Where results are written.
    #[arg(long, value_name = "FOLDER", default_value = "target/fleet")]
    out: PathBuf,
}

/// A row of the table, and what the router itself took.
#[derive(serde::Serialize)]
struct RouterRow {
    #[serde(flatten)]
    row: Row,
    /// Milliseconds of CPU a request.
    cpu_ms: f64,
    /// Peak resident memory in MiB.
    memory_mib: f64,
    /// The greatest delay of the client, in seconds of the model.
    client_late: f64,
    /// Why the first failed request failed.
    error: Option<String>,
}

/// One replay.
struct Run {
    outcome: Outcome,
    cpu_ms: f64,
    memory_mib: f64,
    late: f64,
    error: Option<String>,
}

/// Runs everything, prints the table and writes `table.md`, `results.json` and the plots. Returns whether all
/// requests were answered.
///
/// # Errors
/// If a trace, a router or the folder is not there.
pub fn run(options: &Options) -> io::Result<bool> {
    if options.scenario.iter().any(|scenario| matches!(scenario, Scenario::Restart | Scenario::Join)) {
        return Err(io::Error::other("restart and join are for `loadtest simulate` only"));
    }
    fs::create_dir_all(&options.out)?;
    let folder = fs::canonicalize(&options.out)?;
    let mut rows = Vec::new();
    for (name, mut requests) in options.load.traces()? {
        if let Some(seconds) = options.seconds {
            requests.retain(|request| request.at <= seconds);
        }
        for scenario in &options.scenario {
            let fleet = options.load.fleet(*scenario);
            let own_use = random_use(&fleet, &requests);
            for (load, times) in options.load.rates(own_use) {
                let requests = at_rate(&requests, times);
                for dialect in &options.dialect {
                    let group = format!("{name}, {}", dialect.name());
                    let load = [load, times, own_use * times];
                    rows.extend(options.rows(&group, &fleet, load, &requests, *dialect, &folder)?);
                    write(&rows, &folder)?;
                }
            }
        }
    }
    print!("\n{}", text_of(&rows));
    Ok(rows.iter().all(|row| row.row.failed == 0))
}

impl Options {
    /// All routers at one load. Repeats take turns, so that a slow minute of the machine affects all.
    fn rows(
        &self,
        group: &str,
        fleet: &Fleet,
        load: [f64; 3],
        requests: &[Request],
        dialect: Dialect,
        folder: &Path,
    ) -> io::Result<Vec<RouterRow>> {
        let default = || DEFAULT_ROUTERS.iter().filter_map(|router| router.parse().ok()).collect();
        let routers: Vec<RouterPolicy> = if self.router.is_empty() { default() } else { self.router.clone() };
        let mut runs: Vec<Vec<Run>> = routers.iter().map(|_| Vec::new()).collect();
        for seed in 1..=self.repeats {
            for (router, runs) in routers.iter().zip(&mut runs) {
                let fleet = Fleet { seed, ..*fleet };
                let run = one(router, &self.programs()?, fleet, requests, dialect, self.speed, folder)?;
                let [p50, p99] = [0.5, 0.99].map(|share| run.outcome.quantile(share));
                let (mean, hit) = (run.outcome.mean(), run.outcome.hit_rate() * 100.0);
                eprintln!(
                    "{group}, load {:.2}, {router}: p50 {p50:.2} p99 {p99:.1} mean {mean:.2} hit {hit:.1} %",
                    load[2]
                );
                runs.push(run);
            }
        }
        let row = |(router, runs): (&RouterPolicy, Vec<Run>)| {
            let count = runs.len() as f64;
            let cpu_ms = runs.iter().map(|run| run.cpu_ms).sum::<f64>() / count;
            let memory_mib = runs.iter().map(|run| run.memory_mib).fold(0.0, f64::max);
            let client_late = runs.iter().map(|run| run.late).fold(0.0, f64::max);
            let error = runs.iter().find_map(|run| run.error.clone());
            let outcomes: Vec<_> = runs.into_iter().map(|run| run.outcome).collect();
            let row = Row::new(group, fleet.scenario.name(), load, &router.to_string(), &outcomes);
            RouterRow { row, cpu_ms, memory_mib, client_late, error }
        };
        Ok(routers.iter().zip(runs).map(row).collect())
    }

    fn programs(&self) -> io::Result<Programs> {
        let beside = std::env::current_exe()?.with_file_name("mini-lb");
        let mini_lb = self.mini_lb.clone().unwrap_or(beside);
        // Not canonical: it is a link, and Python finds its environment by where the link is.
        let python = std::path::absolute(self.peers.join("bin/python"))?;
        Ok(Programs { mini_lb: std::path::absolute(mini_lb)?, python })
    }
}

/// Replays `requests` through the mini-lb program with this policy, with a clock that goes `speed` times as
/// fast. The program's log is written to `folder`.
///
/// # Errors
/// If the program does not start, or a request fails.
pub fn through_mini_lb(
    program: &Path,
    policy: &str,
    fleet: Fleet,
    requests: &[Request],
    speed: f64,
    folder: &Path,
) -> io::Result<Outcome> {
    let router: RouterPolicy = format!("mini-lb:{policy}").parse().map_err(io::Error::other)?;
    let programs = Programs { mini_lb: program.to_owned(), python: PathBuf::new() };
    let run = one(&router, &programs, fleet, requests, Dialect::Completions, speed, folder)?;
    run.error.map_or(Ok(run.outcome), |error| Err(io::Error::other(error)))
}

fn one(
    router: &RouterPolicy,
    programs: &Programs,
    fleet: Fleet,
    requests: &[Request],
    dialect: Dialect,
    speed: f64,
    folder: &Path,
) -> io::Result<Run> {
    let cores = Cores::assign(1);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let clock = Clock::new(speed);
        let servers = Servers::start(fleet, clock).await?;
        let (child, address) = router.start(programs, &servers, &cores.router, folder).await?;
        let before = servers.counts();
        let cpu = Cpu::of(child.pid())?.busy_ns;
        let Replayed { ttft, failed, error, late } = replay(address, requests, dialect, clock).await;
        let cpu_ms = (Cpu::of(child.pid())?.busy_ns - cpu) as f64 / 1e6 / requests.len() as f64;
        let memory_mib = peak_kib(child.pid())? as f64 / 1024.0;
        let mut outcome = servers.counts();
        // What readiness took.
        outcome.prompt_tokens -= before.prompt_tokens;
        for (server, before) in outcome.prefill.iter_mut().zip(&before.prefill) {
            server.busy -= before.busy;
        }
        let outcome = Outcome { ttft, failed, seconds: duration(requests), ..outcome };
        Ok(Run { outcome, cpu_ms, memory_mib, late, error })
    })
}

fn text_of(rows: &[RouterRow]) -> String {
    let plain: Vec<_> = rows.iter().map(|row| row.row.clone()).collect();
    let mut text = table(&plain);
    text += "\n| router | load | CPU ms/request | peak MiB | client late, s |\n|---|---|---|---|---|\n";
    for RouterRow { row, cpu_ms, memory_mib, client_late, error } in rows {
        let Row { policy, random_use, .. } = row;
        text +=
            &format!("| {policy} | {random_use:.2} | {cpu_ms:.2} | {memory_mib:.1} | {client_late:.2} |\n");
        if let Some(error) = error {
            text += &format!("\n{policy}: {error}\n\n");
        }
    }
    text
}

fn write(rows: &[RouterRow], folder: &Path) -> io::Result<()> {
    fs::write(folder.join("table.md"), text_of(rows))?;
    fs::write(folder.join("results.json"), serde_json::to_string_pretty(rows)?)?;
    let mut rest = rows;
    while let Some(first) = rest.first() {
        let of = |row: &RouterRow| (row.row.trace.clone(), row.row.scenario.clone(), row.row.load.to_bits());
        let count = rest.iter().take_while(|row| of(row) == of(first)).count();
        let (group, others) = rest.split_at(count);
        let Row { trace, scenario, random_use, .. } = &first.row;
        let title = format!("TTFT: {trace}, {scenario}, load {random_use:.2}");
        let file = format!("cdf {trace} {scenario} {random_use:.2}.svg").replace([' ', ','], "_");
        let plotted: Vec<_> = group.iter().map(|row| &row.row).collect();
        fs::write(folder.join(file), plot::cdf(&title, &plotted))?;
        rest = others;
    }
    Ok(())
}

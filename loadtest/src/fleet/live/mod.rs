//! The socket mode: the model's servers on loopback, and a trace through a real router's program.

mod outage;
mod port;
mod replay;
mod routers;
mod servers;
mod text;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::runtime::Builder;

use super::experiment::{Load, random_use};
use super::plot;
use super::report::{Outcome, Row, table};
use super::simulation::{Fleet, Scenario};
use super::trace::{Request, at_rate, duration};
use crate::process::{Cpu, peak_kib};
use crate::testbed::Cores;
use outage::{Change, Fates, play};
pub use outage::{Outage, Window};
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

/// The rows of `--compare`: the policies of mini-lb that bound the others, and all peers.
const COMPARED_ROUTERS: [&str; 11] = [
    "mini-lb:random",
    "mini-lb:least_load",
    "mini-lb:cache_aware",
    "sglang-router:cache_aware",
    "sglang-router:power_of_two",
    "sglang-router:round_robin",
    "smg:cache_aware",
    "smg:prefix_hash",
    "smg:power_of_two",
    "smg:least_load",
    "mini_lb.py:random",
];

/// Replays traces through routers, in front of simulated servers on loopback.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    load: Load,
    /// A router and its policy, and further flags of the router; may be repeated. Routers: mini-lb,
    /// sglang-router, smg, mini_lb.py. [default: mini-lb with each policy]
    #[arg(long, value_name = "ROUTER:POLICY")]
    router: Vec<RouterPolicy>,
    /// Rows for mini-lb with `random`, `least_load` and `cache_aware`, and for all peers.
    #[arg(long, conflicts_with = "router")]
    compare: bool,
    /// How prompts are written; may be repeated.
    #[arg(long, value_name = "NAME", default_value = "completions")]
    dialect: Vec<Dialect>,
    /// What happens to the prefill servers; may be repeated. `restart` and `kill` are compared with a run in
    /// which nothing happens.
    #[arg(long, value_name = "NAME", default_value = "steady")]
    scenario: Vec<Scenario>,
    /// Repeats, each with another seed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeats: u64,
    /// The seed of the first repeat.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How many times as fast as ours the servers' clock goes.
    #[arg(long, value_name = "FACTOR", default_value_t = 10.0)]
    speed: f64,
    /// Servers answer `/v1/loads`, as SGLang does since 0.5.21. Without, routers have their own counts only,
    /// which serves smg better.
    #[arg(long)]
    loads: bool,
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
    /// By repeat: what a server's stop and start did.
    outages: Vec<Outage>,
}

/// One replay.
struct Run {
    fleet: Fleet,
    speed: f64,
    outcome: Outcome,
    fates: Fates,
    change: Option<Change>,
    cpu_ms: f64,
    memory_mib: f64,
    late: f64,
    error: Option<String>,
}

/// Runs everything, prints the table and writes `table.md`, `results.json` and the plots. Returns whether all
/// requests were answered, but for those that a server had that stopped.
///
/// # Errors
/// If a trace, a router or the folder is not there.
pub fn run(options: &Options) -> io::Result<bool> {
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
    Ok(rows.iter().all(|row| match row.outages.as_slice() {
        [] => row.row.failed == 0,
        outages => outages.iter().all(|outage| outage.lost_beyond.is_empty()),
    }))
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
        let named = if self.compare { &COMPARED_ROUTERS[..] } else { &DEFAULT_ROUTERS };
        let named = || named.iter().filter_map(|router| router.parse().ok()).collect();
        let routers: Vec<RouterPolicy> = if self.router.is_empty() { named() } else { self.router.clone() };
        let mut runs: Vec<Vec<Run>> = routers.iter().map(|_| Vec::new()).collect();
        let mut outages: Vec<Vec<Outage>> = vec![Vec::new(); routers.len()];
        for seed in self.seed..self.seed + self.repeats {
            for (number, router) in routers.iter().enumerate() {
                let fleet = Fleet { seed, ..*fleet };
                let (programs, speed, loads) = (self.programs()?, self.speed, self.loads);
                let rig = Rig { programs, dialect, speed, loads, folder };
                let without = match fleet.scenario {
                    Scenario::Restart | Scenario::Kill => {
                        let steady = Fleet { scenario: Scenario::Steady, ..fleet };
                        Some(rig.play(router, steady, requests)?)
                    }
                    _ => None,
                };
                let run = rig.play(router, fleet, requests)?;
                if let Some(outage) = run.outage(requests, without.as_ref()) {
                    outages[number].push(outage);
                }
                let [p50, p99] = [0.5, 0.99].map(|share| run.outcome.quantile(share));
                let (mean, hit) = (run.outcome.mean(), run.outcome.hit_rate() * 100.0);
                eprintln!(
                    "{group}, load {:.2}, {router}: p50 {p50:.2} p99 {p99:.1} mean {mean:.2} hit {hit:.1} %",
                    load[2]
                );
                runs[number].push(run);
            }
        }
        let row = |((router, runs), outages): ((&RouterPolicy, Vec<Run>), Vec<Outage>)| {
            let count = runs.len() as f64;
            let cpu_ms = runs.iter().map(|run| run.cpu_ms).sum::<f64>() / count;
            let memory_mib = runs.iter().map(|run| run.memory_mib).fold(0.0, f64::max);
            let client_late = runs.iter().map(|run| run.late).fold(0.0, f64::max);
            let error = runs.iter().find_map(|run| run.error.clone());
            let outcomes: Vec<_> = runs.into_iter().map(|run| run.outcome).collect();
            let row = Row::new(group, fleet.scenario.name(), load, &router.to_string(), &outcomes);
            RouterRow { row, cpu_ms, memory_mib, client_late, error, outages }
        };
        Ok(routers.iter().zip(runs).zip(outages).map(row).collect())
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
    let run = Rig::of_mini_lb(program, speed, folder).play(&mini_lb(policy)?, fleet, requests)?;
    run.error.map_or(Ok(run.outcome), |error| Err(io::Error::other(error)))
}

/// The same with the first prefill server killed, and what came of it. A replay in which it is not killed
/// goes on at the same time, so that both have the same of the machine. Logs are written to the two folders.
///
/// # Errors
/// If the program does not start, or a request of the other replay fails.
pub fn kill_behind_mini_lb(
    program: &Path,
    policy: &str,
    fleet: Fleet,
    requests: &[Request],
    speed: f64,
    folders: [&Path; 2],
) -> io::Result<Outage> {
    let router = mini_lb(policy)?;
    let play = |scenario, folder| {
        Rig::of_mini_lb(program, speed, folder).play(&router, Fleet { scenario, ..fleet }, requests)
    };
    let (killed, steady) = std::thread::scope(|scope| {
        let steady = scope.spawn(|| play(Scenario::Steady, folders[1]));
        (play(Scenario::Kill, folders[0]), steady.join())
    });
    let steady = steady.map_err(|_| io::Error::other("the replay without a kill panicked"))??;
    if let Some(error) = steady.error {
        return Err(io::Error::other(error));
    }
    killed?.outage(requests, Some(&steady)).ok_or_else(|| io::Error::other("nobody was killed"))
}

fn mini_lb(policy: &str) -> io::Result<RouterPolicy> {
    format!("mini-lb:{policy}").parse().map_err(io::Error::other)
}

/// What a replay needs besides a router and a fleet.
struct Rig<'a> {
    programs: Programs,
    dialect: Dialect,
    speed: f64,
    /// Whether servers answer `/v1/loads`.
    loads: bool,
    folder: &'a Path,
}

impl<'a> Rig<'a> {
    fn of_mini_lb(program: &Path, speed: f64, folder: &'a Path) -> Self {
        let programs = Programs { mini_lb: program.to_owned(), python: PathBuf::new() };
        Self { programs, dialect: Dialect::Completions, speed, loads: false, folder }
    }

    fn play(&self, router: &RouterPolicy, fleet: Fleet, requests: &[Request]) -> io::Result<Run> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.replay(router, fleet, requests))
    }

    async fn replay(&self, router: &RouterPolicy, fleet: Fleet, requests: &[Request]) -> io::Result<Run> {
        let cores = Cores::assign(1);
        let clock = Clock::new(self.speed);
        let mut servers = Servers::start(fleet, clock, self.loads).await?;
        let (child, address) = router.start(&self.programs, &servers, &cores.router, self.folder).await?;
        // What readiness took.
        let before = servers.counts(0.0);
        let cpu = Cpu::of(child.pid())?.busy_ns;
        let start = clock.now();
        let (Replayed { ttft, late }, change) = tokio::join!(
            replay(address, requests, self.dialect, clock, start),
            play(fleet.scenario, &mut servers, clock, start, requests, address)
        );
        let cpu_ms = (Cpu::of(child.pid())?.busy_ns - cpu) as f64 / 1e6 / requests.len() as f64;
        let memory_mib = peak_kib(child.pid())? as f64 / 1024.0;
        let mut outcome = servers.counts(start);
        for (server, before) in outcome.prefill.iter_mut().zip(&before.prefill) {
            server.busy -= before.busy;
        }
        let error = ttft.iter().find_map(|ttft| ttft.as_ref().err().cloned());
        let mut answered: Vec<_> = ttft.iter().filter_map(|ttft| ttft.as_ref().ok().copied()).collect();
        answered.sort_by(f64::total_cmp);
        let failed = (ttft.len() - answered.len()) as u64;
        let outcome = Outcome { ttft: answered, failed, seconds: duration(requests), ..outcome };
        let fates = Fates::new(ttft, servers.taken(start));
        let speed = self.speed;
        Ok(Run { fleet, speed, outcome, fates, change: change?, cpu_ms, memory_mib, late, error })
    }
}

impl Run {
    /// What the server's stop and start did, if there was one, beside the same requests `without`.
    fn outage(&self, requests: &[Request], without: Option<&Self>) -> Option<Outage> {
        let change = self.change.as_ref()?;
        let without = without.map(|run| &run.fates);
        Some(Outage::new(&self.fleet, requests, self.speed, change, &self.fates, without))
    }
}

fn text_of(rows: &[RouterRow]) -> String {
    let plain: Vec<_> = rows.iter().map(|row| row.row.clone()).collect();
    let mut text = table(&plain);
    text += "\n| router | load | CPU ms/request | peak MiB | client late, s |\n|---|---|---|---|---|\n";
    for RouterRow { row, cpu_ms, memory_mib, client_late, .. } in rows {
        let Row { policy, random_use, .. } = row;
        text +=
            &format!("| {policy} | {random_use:.2} | {cpu_ms:.2} | {memory_mib:.1} | {client_late:.2} |\n");
    }
    for RouterRow { row, error, .. } in rows {
        if let Some(error) = error {
            text +=
                &format!("\n{}, {}: the first of {} errors: {error}\n", row.policy, row.scenario, row.failed);
        }
    }
    text + &text_of_outages(rows)
}

/// The table of outages, and what has to hold of each.
fn text_of_outages(rows: &[RouterRow]) -> String {
    let outages = || rows.iter().flat_map(|row| row.outages.iter().map(move |outage| (&row.row, outage)));
    if outages().next().is_none() {
        return String::new();
    }
    let mut text = format!(
        "\n| router | scenario | load | {} |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
        outage::HEAD
    );
    for (Row { policy, random_use, .. }, outage) in outages() {
        text += &format!("| {policy} | {} | {random_use:.2} | {} |\n", outage.scenario, outage.row());
    }
    text.push('\n');
    for (Row { policy, random_use, .. }, outage) in outages() {
        for (what, holds) in outage.checks() {
            let holds = if holds { "PASS" } else { "FAIL" };
            text += &format!("- {holds} {policy}, {}, load {random_use:.2}: {what}\n", outage.scenario);
        }
    }
    text
}

fn write(rows: &[RouterRow], folder: &Path) -> io::Result<()> {
    fs::write(folder.join("table.md"), text_of(rows))?;
    fs::write(folder.join("results.json"), serde_json::to_string_pretty(rows)?)?;
    plot::write(&rows.iter().map(|row| &row.row).collect::<Vec<_>>(), folder)
}

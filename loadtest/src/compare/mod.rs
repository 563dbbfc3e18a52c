//! This router beside its peers: the same load on each, in rounds that take turns, and what each cost.
//!
//! Every measurement has a fresh router, so that memory is its own and nothing else runs on its core. A peer that
//! cannot be found, does not start or answers wrongly is named as such and never ends the run.

mod measure;
mod metric;
mod plots;
mod reach;
mod results;
mod scenario;
mod table;
mod turns;

use std::fs;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::bed::{Cores, Places, Router, Upstreams};
use crate::process;
use measure::{Bench, measure};
pub use metric::Metric;
pub use results::{Machine, Outcome, Results, Row, Sample};
pub use scenario::Scenario;
pub use turns::Turns;

/// With fewer, two workers and their load cannot run at the same time.
const FEW_CORES: usize = 4;

/// What to compare, and where to put what was found.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    places: Places,
    /// How often every scenario is run with every router.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds that are measured each time; three times that for the thousand streams and the open loop.
    #[arg(long, default_value_t = 1.2)]
    seconds: f64,
    /// Only these scenarios; may be repeated.
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Only these routers; may be repeated.
    #[arg(long, value_name = "NAME")]
    router: Vec<String>,
    /// Where `results.json`, `table.md` and the plots go.
    #[arg(long, value_name = "FOLDER", default_value = "target/loadtest")]
    out: PathBuf,
}

impl Options {
    fn wants(list: &[String], name: &str) -> bool {
        list.is_empty() || list.iter().any(|wanted| wanted == name)
    }

    fn scenarios(&self) -> io::Result<Vec<Scenario>> {
        let time = Duration::try_from_secs_f64(self.seconds).map_err(io::Error::other)?;
        let all = scenario::all(time, process::cores().len() < FEW_CORES);
        let unknown = self.scenario.iter().find(|name| all.iter().all(|scenario| scenario.name != **name));
        if let Some(name) = unknown {
            let names: Vec<_> = all.iter().map(|scenario| scenario.name).collect();
            return Err(io::Error::other(format!("no scenario {name}; there are {}", names.join(", "))));
        }
        Ok(all.into_iter().filter(|scenario| Self::wants(&self.scenario, scenario.name)).collect())
    }
}

/// Runs the comparison and writes what it found; whether this router answered everything rightly.
///
/// # Errors
/// If this router is not there, or a file cannot be written.
pub fn run(options: &Options) -> io::Result<bool> {
    let started = Instant::now();
    let scenarios = options.scenarios()?;
    check_descriptors(&scenarios)?;
    fs::create_dir_all(&options.out)?;
    let out = fs::canonicalize(&options.out)?;
    let (found, missing) = options.places.find()?;
    for name in &missing {
        eprintln!("{name} was not found and is left out; loadtest/README.md says how to install it");
    }
    let routers: Vec<_> =
        found.into_iter().filter(|router| Options::wants(&options.router, router.name())).collect();
    let cores = Cores::share(1);
    let servers = Upstreams::start(&cores.upstreams)?;
    let bench = Bench { servers, cores, folder: out.clone() };
    let mut results = Results::new(Machine::here(&bench.cores, options.rounds), missing);
    rounds(options.rounds, &scenarios, &bench, &routers, &mut results);
    results.machine.seconds = started.elapsed().as_secs_f64();
    let table = table::markdown(&results);
    fs::write(out.join("results.json"), serde_json::to_vec_pretty(&results)?)?;
    fs::write(out.join("table.md"), &table)?;
    plots::write(&results, &out)?;
    println!("{table}\nresults.json, table.md and the plots are in {}", options.out.display());
    Ok(results.rows.iter().filter(|row| row.router == "mini-lb").all(|row| row.why_invalid().is_none()))
}

/// A stream takes three connections, and haproxy wants as many descriptors again.
fn check_descriptors(scenarios: &[Scenario]) -> io::Result<()> {
    let most = scenarios.iter().map(|scenario| scenario.connections as u64 * 10).max().unwrap_or(0);
    if process::descriptor_limit() < most {
        return Err(io::Error::other(format!("too few open files are allowed: `ulimit -n {most}` first")));
    }
    Ok(())
}

/// The measurements of a round: each router once, and again as often as it has slices.
fn turns<'a>(
    scenario: &'a Scenario,
    routers: &'a [Router],
) -> impl Iterator<Item = (&'a Scenario, &'a Router)> {
    let slices = 0..routers.iter().map(|router| scenario.slices(router)).max().unwrap_or(1);
    let suited = move |router: &&Router| scenario.suits(router);
    slices.flat_map(move |slice| {
        let now = routers.iter().filter(suited).filter(move |router| slice < scenario.slices(router));
        now.map(move |router| (scenario, router))
    })
}

fn rounds(rounds: usize, scenarios: &[Scenario], bench: &Bench, routers: &[Router], results: &mut Results) {
    let pairs: Vec<(&Scenario, &Router)> =
        scenarios.iter().flat_map(|scenario| turns(scenario, routers)).collect();
    let all = pairs.len() * rounds;
    for round in 0..rounds {
        for (index, (scenario, router)) in pairs.iter().enumerate() {
            let label = format!(
                "[{}/{all}] round {} {} {}",
                round * pairs.len() + index + 1,
                round + 1,
                scenario.name,
                router.name()
            );
            if results.has_failed_to_start(router.name()) {
                continue;
            }
            // On a terminal the generator shows it.
            if !io::stderr().is_terminal() {
                eprintln!("{label}");
            }
            results.add(scenario, router, measure(bench, scenario, router, &label));
        }
    }
}

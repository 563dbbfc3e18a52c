//! Compares mini-lb with other routers: the same load on each, in rounds, and what each of them cost.
//!
//! Each measurement has a fresh router, so that its memory is its own and nothing else runs on its core. A
//! peer that is not installed, does not start or responds wrongly is reported as such and does not end the
//! run.

mod alternate;
mod measure;
mod metric;
mod plots;
mod promises;
mod results;
mod scenario;
mod table;

use std::fs;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::process;
use crate::testbed::{Backends, Cores, Router, RouterPaths};
pub use alternate::RouterTime;
use measure::{Environment, measure};
pub use metric::{Metric, Spread};
pub use results::{Machine, Outcome, Results, Row, Sample};
pub use scenario::Scenario;

/// With fewer cores, two workers and their load cannot run at the same time.
const FEW_CORES: usize = 4;

/// Flags of `loadtest compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    router_paths: RouterPaths,
    /// How many times each scenario is measured with each router.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measured time in seconds; three times as long for the thousand streams and the open loop.
    #[arg(long, default_value_t = 1.2)]
    seconds: f64,
    /// Measure only this scenario; may be repeated.
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// Measure only this router; may be repeated.
    #[arg(long, value_name = "NAME")]
    router: Vec<String>,
    /// Where `results.json`, `table.md` and the plots are written.
    #[arg(long, value_name = "FOLDER", default_value = "target/loadtest")]
    out: PathBuf,
}

impl Options {
    fn includes(list: &[String], name: &str) -> bool {
        list.is_empty() || list.iter().any(|wanted| wanted == name)
    }

    fn scenarios(&self) -> io::Result<Vec<Scenario>> {
        let time = Duration::try_from_secs_f64(self.seconds).map_err(io::Error::other)?;
        let all = scenario::all(time, process::cores().len() < FEW_CORES);
        let unknown = self.scenario.iter().find(|name| all.iter().all(|scenario| scenario.name != **name));
        if let Some(name) = unknown {
            let names: Vec<_> = all.iter().map(|scenario| scenario.name).collect();
            return Err(io::Error::other(format!("unknown scenario {name}; known are {}", names.join(", "))));
        }
        Ok(all.into_iter().filter(|scenario| Self::includes(&self.scenario, scenario.name)).collect())
    }
}

/// Runs the comparison and writes its results. Returns whether all of mini-lb's responses were correct.
///
/// # Errors
/// If mini-lb is not found, or a file cannot be written.
pub fn run(options: &Options) -> io::Result<bool> {
    let started = Instant::now();
    let scenarios = options.scenarios()?;
    check_descriptors(&scenarios)?;
    fs::create_dir_all(&options.out)?;
    let out = fs::canonicalize(&options.out)?;
    let (found, missing) = options.router_paths.find()?;
    for name in &missing {
        eprintln!("{name} is not installed and is left out; see loadtest/README.md");
    }
    let routers: Vec<_> =
        found.into_iter().filter(|router| Options::includes(&options.router, router.name())).collect();
    let cores = Cores::assign(1);
    let servers = Backends::start(&cores.backends)?;
    let environment = Environment { servers, cores, folder: out.clone() };
    let mut results = Results::new(Machine::current(&environment.cores, options.rounds), missing);
    rounds(options.rounds, &scenarios, &environment, &routers, &mut results);
    results.machine.seconds = started.elapsed().as_secs_f64();
    let table = table::markdown(&results);
    fs::write(out.join("results.json"), serde_json::to_vec_pretty(&results)?)?;
    fs::write(out.join("table.md"), &table)?;
    plots::write(&results, &out)?;
    println!("{table}\nresults.json, table.md and the plots are in {}", options.out.display());
    Ok(results.rows.iter().filter(|row| row.router == "mini-lb").all(|row| row.why_invalid().is_none()))
}

/// Checks the limit of open files: a stream is three connections, and haproxy needs twice as many
/// descriptors.
fn check_descriptors(scenarios: &[Scenario]) -> io::Result<()> {
    let most = scenarios.iter().map(|scenario| scenario.connections as u64 * 10).max().unwrap_or(0);
    if process::descriptor_limit() < most {
        return Err(io::Error::other(format!(
            "the limit of open files is too low: run `ulimit -n {most}` first"
        )));
    }
    Ok(())
}

/// The measurements of a round: each router once per slice of the scenario.
fn measurements_of_round<'a>(
    scenario: &'a Scenario,
    routers: &'a [Router],
) -> impl Iterator<Item = (&'a Scenario, &'a Router)> {
    let slices = 0..routers.iter().map(|router| scenario.slices(router)).max().unwrap_or(1);
    let applicable = move |router: &&Router| scenario.applies_to(router);
    slices.flat_map(move |slice| {
        let now = routers.iter().filter(applicable).filter(move |router| slice < scenario.slices(router));
        now.map(move |router| (scenario, router))
    })
}

fn rounds(
    rounds: usize,
    scenarios: &[Scenario],
    environment: &Environment,
    routers: &[Router],
    results: &mut Results,
) {
    let pairs: Vec<(&Scenario, &Router)> =
        scenarios.iter().flat_map(|scenario| measurements_of_round(scenario, routers)).collect();
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
            // On a terminal the generator shows it in its progress line.
            if !io::stderr().is_terminal() {
                eprintln!("{label}");
            }
            results.add(scenario, router, measure(environment, scenario, router, &label));
        }
    }
}

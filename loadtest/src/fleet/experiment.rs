//! Policies × traces × loads × seeds: which runs the fast mode does.

use std::io::{self, Write as _};
use std::path::PathBuf;

use super::generate::Generator;
use super::plot;
use super::report::{Outcome, Row, table};
use super::router::{Reference, Router};
use super::simulation::{Fleet, Scenario, simulate};
use super::trace::{self, Request, at_rate, duration};

/// Makes a router for a fleet of a seed.
type MakeRouter = Box<dyn Fn(&Fleet) -> Box<dyn Router>>;

/// A policy under test.
pub struct Candidate {
    /// Its row in the table.
    pub name: String,
    /// A fresh router with this policy.
    pub make: MakeRouter,
}

impl Candidate {
    /// A policy with this row in the table.
    pub fn new(name: &str, make: impl Fn(&Fleet) -> Box<dyn Router> + 'static) -> Self {
        Self { name: name.to_owned(), make: Box::new(make) }
    }

    /// A policy of the lab.
    pub fn reference(policy: Reference) -> Self {
        Self::new(policy.name(), move |fleet| {
            policy.router(fleet.prefill, fleet.decode, &fleet.model, fleet.seed)
        })
    }
}

/// The share of prefill's time that `random` uses for `requests` as they come. The work of a policy does not
/// depend much on the rate, so half of it is used at half the rate.
pub fn random_use(fleet: &Fleet, requests: &[Request]) -> f64 {
    let fleet = Fleet { scenario: Scenario::Steady, ..*fleet };
    let mut router = Reference::Random.router(fleet.prefill, fleet.decode, &fleet.model, fleet.seed);
    let outcome = simulate(&fleet, requests, &mut *router);
    outcome.utilisation().iter().sum::<f64>() / fleet.prefill as f64
}

/// What is sent, and to how many servers.
#[derive(Clone, Debug, clap::Args)]
pub struct Load {
    /// A trace in Mooncake's format; may be repeated. [default, if there is no `--generate` either: ten
    /// minutes of Mooncake's conversation trace]
    #[arg(long, value_name = "FILE")]
    pub trace: Vec<PathBuf>,
    /// A made-up load; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub generate: Vec<Generator>,
    /// Requests of a made-up load.
    #[arg(long, value_name = "N", default_value_t = 4_000)]
    pub requests: usize,
    /// Set the rate so that `random` would use this share of prefill's time; may be repeated. [default: 0.85,
    /// 1.0]
    #[arg(long, value_name = "SHARE", conflicts_with = "times")]
    pub load: Vec<f64>,
    /// Set the rate to this multiple of the trace's own; may be repeated.
    #[arg(long, value_name = "FACTOR")]
    pub times: Vec<f64>,
    /// Prefill servers.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub prefill: usize,
    /// Decode servers.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub decode: usize,
    /// Tokens of the cache of a prefill server.
    #[arg(long, value_name = "TOKENS", default_value_t = 1_000_000)]
    pub cache_tokens: u64,
}

impl Load {
    pub(super) fn traces(&self) -> io::Result<Vec<(String, Vec<Request>)>> {
        let mut traces = Vec::new();
        for path in &self.trace {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            traces.push((name, trace::read(path)?));
        }
        for generator in &self.generate {
            traces.push((generator.name().to_owned(), generator.requests(self.requests, 1)));
        }
        if traces.is_empty() {
            traces.push(("mooncake_conversation_10min".to_owned(), trace::conversation()?));
        }
        if traces.iter().any(|(_, requests)| duration(requests) <= 0.0) {
            return Err(io::Error::other("a trace of no duration"));
        }
        Ok(traces)
    }

    pub(super) fn fleet(&self, scenario: Scenario) -> Fleet {
        let (prefill, decode) = (self.prefill, self.decode);
        let mut fleet = Fleet { prefill, decode, scenario, ..Fleet::default() };
        fleet.model.cache_tokens = self.cache_tokens;
        fleet
    }

    /// Each load, and the multiple of the trace's rate that gives it. `own_use` is [`random_use`] at the
    /// trace's rate.
    pub(super) fn rates(&self, own_use: f64) -> Vec<(f64, f64)> {
        if !self.times.is_empty() {
            return self.times.iter().map(|times| (*times, *times)).collect();
        }
        let loads = if self.load.is_empty() { &[0.85, 1.0][..] } else { &self.load };
        loads.iter().map(|load| (*load, load / own_use)).collect()
    }
}

/// Plays traces through policies, without sockets.
#[derive(Clone, Debug, clap::Args)]
pub struct Experiment {
    /// What is played.
    #[command(flatten)]
    pub load: Load,
    /// What happens to the prefill servers; may be repeated.
    #[arg(long, value_name = "NAME", default_value = "steady")]
    pub scenario: Vec<Scenario>,
    /// Only rows with this name; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub policy: Vec<String>,
    /// Repeats, each with another seed.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeats: u64,
    /// Play this share of the requests before measuring starts.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub warm_up: f64,
    /// Write all rows as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write plots: TTFT of all rows of a load, and work over time of each.
    #[arg(long, value_name = "FOLDER")]
    pub plots: Option<PathBuf>,
}

impl Experiment {
    /// Runs everything and prints the tables. `others` are policies besides those of the lab.
    ///
    /// # Errors
    /// If a trace cannot be read, or the JSON cannot be written.
    pub fn run(&self, others: Vec<Candidate>) -> io::Result<Vec<Row>> {
        let all = Reference::ALL.map(Candidate::reference).into_iter().chain(others);
        let candidates: Vec<_> =
            all.filter(|one| self.policy.is_empty() || self.policy.contains(&one.name)).collect();
        let mut rows = Vec::new();
        for (name, requests) in self.load.traces()? {
            for scenario in &self.scenario {
                rows.extend(self.rows(&name, &requests, *scenario, &candidates));
            }
        }
        print!("{}", table(&rows));
        if let Some(path) = &self.json {
            let mut file = std::fs::File::create(path)?;
            writeln!(file, "{}", serde_json::to_string_pretty(&rows)?)?;
        }
        if let Some(folder) = &self.plots {
            std::fs::create_dir_all(folder)?;
            plot::write(&rows.iter().collect::<Vec<_>>(), folder)?;
        }
        Ok(rows)
    }

    fn rows(
        &self,
        name: &str,
        requests: &[Request],
        scenario: Scenario,
        candidates: &[Candidate],
    ) -> Vec<Row> {
        let fleet = Fleet { warm_up: self.warm_up, ..self.load.fleet(scenario) };
        let own_use = random_use(&fleet, requests);
        let mut rows = Vec::new();
        for (load, times) in self.load.rates(own_use) {
            let requests = at_rate(requests, times);
            for candidate in candidates {
                let runs = runs(&fleet, &requests, candidate, self.repeats);
                let load = [load, times, own_use * times];
                rows.push(Row::new(name, scenario.name(), load, &candidate.name, &runs));
            }
        }
        rows
    }
}

/// The same load with each of the seeds from 1.
pub fn runs(fleet: &Fleet, requests: &[Request], candidate: &Candidate, repeats: u64) -> Vec<Outcome> {
    let run = |seed| {
        let fleet = Fleet { seed, ..*fleet };
        simulate(&fleet, requests, &mut *(candidate.make)(&fleet))
    };
    (1..=repeats).map(run).collect()
}

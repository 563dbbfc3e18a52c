//! Measured data, as written to `results.json`.

use serde::{Deserialize, Serialize};

use super::alternate::RouterTime;
use super::metric::{Metric, Spread};
use super::scenario::Scenario;
use crate::canned::RequestCounts;
use crate::load::{Distribution, Report};
use crate::process;
use crate::testbed::{Cores, Router};

/// One completed measurement.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// The generator's report; `router` and `servers` are among its watched processes.
    pub report: Report,
    /// The router's resident memory before the load, in KiB.
    pub idle_kib: u64,
    /// Counters of prefill.
    pub prefill: RequestCounts,
    /// Counters of decode.
    pub decode: RequestCounts,
    /// Client connections of each of the router's event loops.
    pub spread: Option<Vec<usize>>,
    /// The router's time slots, if it alternated with the load.
    pub router_time: Option<RouterTime>,
}

/// Outcome of one measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Completed; responses may still have been wrong.
    Measured(Box<Sample>),
    /// The router did not start.
    NotStarted(String),
    /// Another error.
    Failed(String),
    /// This machine has too few cores for it.
    NotMeasured(String),
}

/// A router in a scenario, over all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Name of the scenario.
    pub scenario: String,
    /// Description of the scenario.
    pub title: String,
    /// Name of the router.
    pub router: String,
    /// Connections of the generator.
    pub connections: usize,
    /// Size of a request body, in bytes.
    pub body: usize,
    /// Measurements per round.
    pub slices: usize,
    /// Worker threads of the router.
    pub workers: usize,
    /// Whether it was a closed loop without pacing.
    pub is_closed: bool,
    /// Whether responses are streams.
    pub is_stream: bool,
    /// Outcomes in chronological order, `slices` per round.
    pub rounds: Vec<Outcome>,
}

/// Below this utilisation of its core, the router was not the bottleneck of a closed loop.
pub(super) const BUSY: f64 = 0.85;

/// In cores: if other programs used more, a latency measurement is left out.
pub(super) const MAX_OTHER_CORES: f64 = 0.1;

impl Row {
    /// The completed measurements.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.rounds.iter().filter_map(|outcome| match outcome {
            Outcome::Measured(sample) => Some(&**sample),
            _ => None,
        })
    }

    /// Median and range of a metric over all rounds.
    pub fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.samples().filter_map(|sample| metric.of(self, sample)))
    }

    /// All latencies of an open loop, of `round` or of all rounds, without the measurements that other
    /// programs disturbed.
    pub fn pooled(&self, round: Option<usize>) -> Distribution {
        let rounds = self.rounds.chunks(self.slices.max(1)).enumerate();
        let wanted = rounds.filter(|(index, _)| round.is_none_or(|round| round == *index));
        let mut all = Distribution::default();
        for outcome in wanted.flat_map(|(_, slices)| slices) {
            if let Outcome::Measured(sample) = outcome
                && sample.report.other_cores <= MAX_OTHER_CORES
            {
                all.add(&sample.report.times);
            }
        }
        all
    }

    /// How many measurements [`Self::pooled`] leaves out.
    pub fn disturbed(&self) -> usize {
        self.samples().filter(|sample| sample.report.other_cores > MAX_OTHER_CORES).count()
    }

    /// Why the row is invalid: responses were wrong or missing, so its cost is not that of a working router.
    pub fn why_invalid(&self) -> Option<String> {
        for outcome in &self.rounds {
            match outcome {
                Outcome::NotStarted(why) | Outcome::Failed(why) => return Some(why.clone()),
                Outcome::NotMeasured(_) => {}
                Outcome::Measured(sample) => {
                    let report = &sample.report;
                    if report.errors > 0 {
                        let first = report.first_error.as_deref().unwrap_or("?");
                        return Some(format!("{} wrong responses, first: {first}", report.errors));
                    }
                    if report.unmerged > 0 {
                        let all = report.requests;
                        return Some(format!(
                            "{} of {all} responses without prompt logprobs",
                            report.unmerged
                        ));
                    }
                    if report.requests == 0 && report.tokens == 0 {
                        return Some("no response within the time that was measured".to_owned());
                    }
                }
            }
        }
        None
    }

    /// Why this machine cannot measure it.
    pub fn why_not_measured(&self) -> Option<&str> {
        self.rounds.iter().find_map(|outcome| match outcome {
            Outcome::NotMeasured(why) => Some(&**why),
            _ => None,
        })
    }

    /// Whether the generator or the backends were the bottleneck of a closed loop.
    pub fn is_bound_by_generator(&self) -> bool {
        if self.samples().next().is_none() {
            return false;
        }
        let share = |metric| self.spread(metric).map_or(0.0, |share| share.median);
        self.is_closed && share(Metric::RouterBusy) + share(Metric::RouterWaited) < BUSY
    }
}

/// The machine and the conditions of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Processor model.
    pub cpu: String,
    /// Kernel version.
    pub kernel: String,
    /// Number of usable cores.
    pub cores: usize,
    /// Which process ran on which cores.
    pub pinning: String,
    /// Number of cores of generator and backends together.
    pub load_cores: usize,
    /// Number of rounds.
    pub rounds: usize,
    /// Load average (one minute) before the run.
    pub load_before: f64,
    /// Duration of the whole run.
    pub seconds: f64,
}

impl Machine {
    pub(super) fn current(cores: &Cores, rounds: usize) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let pinning = if cores.router.is_empty() {
            "no process pinned to a core: numbers are unreliable".to_owned()
        } else {
            let Cores { router, backends, generator } = cores;
            format!("router on {router:?}, servers on {backends:?}, generator on {generator:?}")
        };
        Self {
            cpu: cpu.map_or("unknown", |(_, name)| name).to_owned(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cores: process::cores().len(),
            load_cores: if cores.are_separate() { 2 } else { 1 },
            pinning,
            rounds,
            load_before: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
            seconds: 0.0,
        }
    }
}

/// All results of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// The machine.
    pub machine: Machine,
    /// Peers that are not installed.
    pub missing: Vec<String>,
    /// One row per scenario and router.
    pub rows: Vec<Row>,
}

impl Results {
    pub(super) fn new(machine: Machine, missing: Vec<&str>) -> Self {
        Self { machine, missing: missing.into_iter().map(str::to_owned).collect(), rows: Vec::new() }
    }

    pub(super) fn has_failed_to_start(&self, router: &str) -> bool {
        let rounds = self.rows.iter().filter(|row| row.router == router).flat_map(|row| &row.rounds);
        rounds.into_iter().any(|outcome| matches!(outcome, Outcome::NotStarted(_)))
    }

    pub(super) fn add(&mut self, scenario: &Scenario, router: &Router, outcome: Outcome) {
        let (slices, router) = (scenario.slices(router), router.name());
        let found = self.rows.iter().position(|row| row.router == router && row.scenario == scenario.name);
        let at = found.unwrap_or_else(|| {
            self.rows.push(Row {
                scenario: scenario.name.to_owned(),
                title: scenario.title.to_owned(),
                router: router.to_owned(),
                connections: scenario.connections,
                body: scenario.body,
                slices,
                workers: scenario.workers,
                is_closed: scenario.mode == crate::load::Mode::Closed && scenario.plan.interval.is_zero(),
                is_stream: scenario.is_stream(),
                rounds: Vec::new(),
            });
            self.rows.len() - 1
        });
        self.rows[at].rounds.push(outcome);
    }

    /// Names of the scenarios, in order.
    pub(super) fn scenarios(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&&*row.scenario) {
                names.push(&row.scenario);
            }
        }
        names
    }

    /// The row of a router in a scenario.
    pub fn row(&self, scenario: &str, router: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.scenario == scenario && row.router == router)
    }

    /// The median of a router's metric in a scenario.
    pub fn median(&self, scenario: &str, router: &str, metric: Metric) -> Option<f64> {
        Some(self.row(scenario, router)?.spread(metric)?.median)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::load::ProcessCost;

    /// A row of mini-lb with one round.
    pub(in super::super) fn row(report: Report) -> Row {
        let sample = Sample { report, ..Sample::default() };
        Row {
            scenario: "chat_300b".to_owned(),
            title: String::new(),
            router: "mini-lb".to_owned(),
            connections: 1,
            body: 300,
            slices: 1,
            workers: 1,
            is_closed: true,
            is_stream: false,
            rounds: vec![Outcome::Measured(Box::new(sample))],
        }
    }

    fn busy(cpu_ns: u64, waited_ns: u64) -> Row {
        let router = ProcessCost { name: "router".to_owned(), cpu_ns, waited_ns, ..ProcessCost::default() };
        row(Report { seconds: 1.0, requests: 1000, processes: vec![router], ..Report::default() })
    }

    #[test]
    fn a_row_with_an_idle_router_is_limited_by_the_generator() {
        assert!(busy(800_000_000, 0).is_bound_by_generator());
        assert!(!busy(900_000_000, 0).is_bound_by_generator());
        assert!(!busy(500_000_000, 400_000_000).is_bound_by_generator(), "it waited for its core");
    }

    #[test]
    fn wrong_and_missing_responses_make_a_row_invalid() {
        assert_eq!(busy(1, 0).why_invalid(), None);
        let why = |report| row(report).why_invalid().unwrap_or_default();
        assert!(why(Report { requests: 5, errors: 1, ..Report::default() }).starts_with("1 wrong responses"));
        assert!(
            why(Report { requests: 5, unmerged: 2, ..Report::default() }).starts_with("2 of 5 responses")
        );
        assert!(why(Report::default()).starts_with("no response"));
    }

    #[test]
    fn costs_are_per_request() {
        let spread = busy(2_000_000, 0).spread(Metric::CpuPerRequest).expect("a watched router");
        assert!((spread.median - 2.0).abs() < 1e-9, "{spread:?}");
        assert_eq!(busy(1, 0).spread(Metric::CpuPerToken), None, "there were none");
    }
}

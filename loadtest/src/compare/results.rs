//! What was measured, as it goes into `results.json`.

use serde::{Deserialize, Serialize};

use super::metric::{Metric, Spread};
use super::scenario::Scenario;
use super::turns::Turns;
use crate::bed::{Cores, Router};
use crate::canned::Seen;
use crate::load::{Distribution, Report};
use crate::process;

/// One measurement that was made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// What the generator found; `router` and `servers` are among the watched.
    pub report: Report,
    /// The router's resident memory before the load, in KiB.
    pub idle_kib: u64,
    /// What prefill saw.
    pub prefill: Seen,
    /// What decode saw.
    pub decode: Seen,
    /// Clients' connections of each of the router's event loops.
    pub spread: Option<Vec<usize>>,
    /// If load and router took turns: the router's.
    pub turns: Option<Turns>,
}

/// How one measurement went.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As planned; its answers may still be wrong.
    Measured(Box<Sample>),
    /// The router did not come up.
    NotStarted(String),
    /// Something else went wrong.
    Failed(String),
    /// This machine cannot measure it.
    NotMeasured(String),
}

/// A router in a scenario, all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The scenario's name.
    pub scenario: String,
    /// What the scenario is.
    pub title: String,
    /// The router's name.
    pub router: String,
    /// Connections of the generator.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// Measurements of a round.
    pub slices: usize,
    /// Threads of this router that serve clients.
    pub workers: usize,
    /// Whether requests wait for answers.
    pub is_closed: bool,
    /// Whether answers are streams.
    pub is_stream: bool,
    /// A measurement for each round.
    pub rounds: Vec<Outcome>,
}

/// Below this share of its core, a router was not what limited a closed loop.
pub(super) const BUSY: f64 = 0.85;

/// In cores: with more, something else was busy while a latency was measured.
pub(super) const OTHERS: f64 = 0.1;

impl Row {
    /// The measurements that were made.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.rounds.iter().filter_map(|outcome| match outcome {
            Outcome::Measured(sample) => Some(&**sample),
            _ => None,
        })
    }

    /// The median and the range of a metric over all rounds.
    pub fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.samples().filter_map(|sample| metric.of(self, sample)))
    }

    /// All latencies of an open loop, of `round` or of all rounds. What was measured while something else was busy is
    /// left out.
    pub fn pooled(&self, round: Option<usize>) -> Distribution {
        let rounds = self.rounds.chunks(self.slices.max(1)).enumerate();
        let wanted = rounds.filter(|(index, _)| round.is_none_or(|round| round == *index));
        let mut all = Distribution::default();
        for outcome in wanted.flat_map(|(_, slices)| slices) {
            if let Outcome::Measured(sample) = outcome
                && sample.report.others <= OTHERS
            {
                all.add(&sample.report.times);
            }
        }
        all
    }

    /// How many of the measurements are left out of [`Self::pooled`].
    pub fn disturbed(&self) -> usize {
        self.samples().filter(|sample| sample.report.others > OTHERS).count()
    }

    /// Why its numbers are not those of a router that does its work.
    pub fn why_invalid(&self) -> Option<String> {
        for outcome in &self.rounds {
            match outcome {
                Outcome::NotStarted(why) | Outcome::Failed(why) => return Some(why.clone()),
                Outcome::NotMeasured(_) => {}
                Outcome::Measured(sample) => {
                    let report = &sample.report;
                    if report.errors > 0 {
                        let first = report.first_error.as_deref().unwrap_or("?");
                        return Some(format!("{} wrong answers, first: {first}", report.errors));
                    }
                    if report.unmerged > 0 {
                        let all = report.requests;
                        return Some(format!("{} of {all} answers without prompt logprobs", report.unmerged));
                    }
                    if report.requests == 0 && report.tokens == 0 {
                        return Some("no answer within the time that was measured".to_owned());
                    }
                }
            }
        }
        None
    }

    /// Why this machine could not measure it.
    pub fn why_not_measured(&self) -> Option<&str> {
        self.rounds.iter().find_map(|outcome| match outcome {
            Outcome::NotMeasured(why) => Some(&**why),
            _ => None,
        })
    }

    /// Whether something other than the router limited its requests a second.
    pub fn is_bound_by_generator(&self) -> bool {
        if self.samples().next().is_none() {
            return false;
        }
        let share = |metric| self.spread(metric).map_or(0.0, |share| share.median);
        self.is_closed && share(Metric::RouterBusy) + share(Metric::RouterWaited) < BUSY
    }
}

/// Where it was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// The kernel.
    pub kernel: String,
    /// Cores that could be used.
    pub cores: usize,
    /// Which did what.
    pub pinning: String,
    /// Cores that generator and servers have between them.
    pub load_cores: usize,
    /// How often each was measured.
    pub rounds: usize,
    /// The load average before, of one minute.
    pub load_before: f64,
    /// How long all took.
    pub seconds: f64,
}

impl Machine {
    pub(super) fn here(cores: &Cores, rounds: usize) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let pinning = if cores.router.is_empty() {
            "nothing pinned: numbers are worth little".to_owned()
        } else {
            let Cores { router, upstreams, generator } = cores;
            format!("router on {router:?}, servers on {upstreams:?}, generator on {generator:?}")
        };
        Self {
            cpu: cpu.map_or("unknown", |(_, name)| name).to_owned(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cores: process::cores().len(),
            load_cores: if cores.are_apart() { 2 } else { 1 },
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

/// Everything that was found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// Peers that were not there.
    pub missing: Vec<String>,
    /// What each router did in each scenario.
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

    /// The names of the scenarios, in order.
    pub(super) fn scenarios(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&&*row.scenario) {
                names.push(&row.scenario);
            }
        }
        names
    }

    /// A router's row in a scenario.
    pub fn row(&self, scenario: &str, router: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.scenario == scenario && row.router == router)
    }

    /// A router's median in a scenario.
    pub fn median(&self, scenario: &str, router: &str, metric: Metric) -> Option<f64> {
        Some(self.row(scenario, router)?.spread(metric)?.median)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::load::Watched;

    /// A row of mini-lb's with one round.
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
        let router = Watched { name: "router".to_owned(), cpu_ns, waited_ns, ..Watched::default() };
        row(Report { seconds: 1.0, requests: 1000, watched: vec![router], ..Report::default() })
    }

    #[test]
    fn router_that_idles_was_bound_by_the_generator() {
        assert!(busy(800_000_000, 0).is_bound_by_generator());
        assert!(!busy(900_000_000, 0).is_bound_by_generator());
        assert!(!busy(500_000_000, 400_000_000).is_bound_by_generator(), "it waited for its core");
    }

    #[test]
    fn wrong_and_missing_answers_make_a_row_invalid() {
        assert_eq!(busy(1, 0).why_invalid(), None);
        let why = |report| row(report).why_invalid().unwrap_or_default();
        assert!(why(Report { requests: 5, errors: 1, ..Report::default() }).starts_with("1 wrong answers"));
        assert!(why(Report { requests: 5, unmerged: 2, ..Report::default() }).starts_with("2 of 5 answers"));
        assert!(why(Report::default()).starts_with("no answer"));
    }

    #[test]
    fn costs_are_per_request() {
        let spread = busy(2_000_000, 0).spread(Metric::CpuPerRequest).expect("a router that was watched");
        assert!((spread.median - 2.0).abs() < 1e-9, "{spread:?}");
        assert_eq!(busy(1, 0).spread(Metric::CpuPerToken), None, "there were none");
    }
}

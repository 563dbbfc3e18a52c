//! What a run gave, as numbers, a table and JSON.

use std::fmt::Write as _;

use serde::Serialize;

/// What one prefill server did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ServerLoad {
    /// Requests that it took.
    pub requests: u64,
    /// Seconds that it computed.
    pub busy: f64,
}

/// What one run gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Seconds from arrival to the first token of each request that had one, ascending.
    pub ttft: Vec<f64>,
    /// Requests that failed.
    pub failed: u64,
    /// Tokens of all prompts that were answered.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// From the first to the last arrival.
    pub seconds: f64,
    /// Each prefill server.
    pub prefill: Vec<ServerLoad>,
    /// Requests of each decode server.
    pub decode_requests: Vec<u64>,
    /// By prefill server: when its queue changed, and when it would have been empty from then on.
    pub queues: Vec<Vec<(f64, f64)>>,
}

impl Outcome {
    /// The smallest TTFT that at least this share of the requests does not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        quantile(&self.ttft, share)
    }

    /// The mean TTFT.
    pub fn mean(&self) -> f64 {
        self.ttft.iter().sum::<f64>() / self.ttft.len().max(1) as f64
    }

    /// The share of prompt tokens that were cached.
    pub fn hit_rate(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }

    /// The share of its time that each prefill server computed; above 1 if it fell behind.
    pub fn utilisation(&self) -> Vec<f64> {
        self.prefill.iter().map(|server| server.busy / self.seconds).collect()
    }

    /// By prefill server: the seconds of work that it had at each of [`WORK_POINTS`] + 1 instants.
    fn work(&self) -> Vec<Vec<f64>> {
        let at = |point: usize| self.seconds * point as f64 / WORK_POINTS as f64;
        let work = |queue: &Vec<(f64, f64)>, now: f64| {
            let changes = queue.partition_point(|(changed, _)| *changed <= now);
            let last = changes.checked_sub(1).map_or(0.0, |last| queue[last].1 - now);
            last.max(0.0)
        };
        let of = |queue| (0..=WORK_POINTS).map(|point| work(queue, at(point))).collect();
        self.queues.iter().map(of).collect()
    }
}

/// Steps of a plot of work over time: 50 KB for eight servers, and 2.5 s of ten minutes.
const WORK_POINTS: usize = 240;

pub(super) fn quantile(ascending: &[f64], share: f64) -> f64 {
    let rank = (share * ascending.len() as f64).ceil() as usize;
    ascending.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// A row of the table: a policy at a load, over all repeats.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The trace or the generator.
    pub trace: String,
    /// What happens to the servers.
    pub scenario: String,
    /// The load: see [`Row::random_use`].
    pub load: f64,
    /// How many times as fast as the trace its requests came.
    pub times: f64,
    /// The share of prefill's time that `random` would use at this rate.
    pub random_use: f64,
    /// The policy, or the router and its policy.
    pub policy: String,
    /// Repeats.
    pub repeats: usize,
    /// Requests of all repeats, and those that failed.
    pub requests: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Of the TTFT of all repeats together.
    pub p50: f64,
    /// 90 % were faster.
    pub p90: f64,
    /// 99 % were faster.
    pub p99: f64,
    /// The mean.
    pub mean: f64,
    /// The least and the greatest p99 of a repeat.
    pub p99_range: (f64, f64),
    /// The least and the greatest mean of a repeat.
    pub mean_range: (f64, f64),
    /// The share of prompt tokens that were cached.
    pub hit_rate: f64,
    /// The mean use of prefill servers.
    pub use_mean: f64,
    /// The use of the busiest one, in the mean of the repeats.
    pub use_max: f64,
    /// Requests of the decode server with the most, relative to the mean of all.
    pub decode_max: f64,
    /// The 101 quantiles of the TTFT from 0 to 1.
    pub cdf: Vec<f64>,
    /// Seconds from the first to the last arrival of the first repeat.
    pub seconds: f64,
    /// Its work over time by prefill server, in seconds: for plots.
    #[serde(skip)]
    pub work: Vec<Vec<f64>>,
}

impl Row {
    /// Sums up the repeats of one policy at one load.
    pub fn new(
        trace: &str,
        scenario: &str,
        [load, times, random_use]: [f64; 3],
        policy: &str,
        runs: &[Outcome],
    ) -> Self {
        let mut ttft: Vec<f64> = runs.iter().flat_map(|run| &run.ttft).copied().collect();
        ttft.sort_by(f64::total_cmp);
        let count = runs.len().max(1) as f64;
        let mean_of = |value: &dyn Fn(&Outcome) -> f64| runs.iter().map(value).sum::<f64>() / count;
        let range = |value: &dyn Fn(&Outcome) -> f64| {
            let values = runs.iter().map(value);
            (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max))
        };
        let cached: u64 = runs.iter().map(|run| run.cached_tokens).sum();
        let prompt: u64 = runs.iter().map(|run| run.prompt_tokens).sum();
        let failed = runs.iter().map(|run| run.failed).sum();
        Self {
            trace: trace.to_owned(),
            scenario: scenario.to_owned(),
            load,
            times,
            random_use,
            policy: policy.to_owned(),
            repeats: runs.len(),
            requests: ttft.len() as u64 + failed,
            failed,
            p50: quantile(&ttft, 0.5),
            p90: quantile(&ttft, 0.9),
            p99: quantile(&ttft, 0.99),
            mean: ttft.iter().sum::<f64>() / ttft.len().max(1) as f64,
            p99_range: range(&|run| run.quantile(0.99)),
            mean_range: range(&Outcome::mean),
            hit_rate: cached as f64 / prompt.max(1) as f64,
            use_mean: mean_of(&|run| run.utilisation().iter().sum::<f64>() / run.prefill.len().max(1) as f64),
            use_max: mean_of(&|run| run.utilisation().into_iter().fold(0.0, f64::max)),
            decode_max: mean_of(&|run| {
                let total: u64 = run.decode_requests.iter().sum();
                let most = run.decode_requests.iter().max().copied().unwrap_or(0);
                most as f64 * run.decode_requests.len() as f64 / total.max(1) as f64
            }),
            cdf: (0..=100).map(|percent| quantile(&ttft, f64::from(percent) / 100.0)).collect(),
            seconds: runs.first().map_or(0.0, |run| run.seconds),
            work: runs.first().map(Outcome::work).unwrap_or_default(),
        }
    }
}

/// The rows as Markdown, a table for each trace and scenario.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut last = None;
    for row in rows {
        let group = (&row.trace, &row.scenario);
        if last != Some(group) {
            let title = format!("{}, {}", row.trace, row.scenario);
            let _ = write!(text, "\n## {title}\n\n{HEAD}");
            last = Some(group);
        }
        let spread = |(least, greatest): (f64, f64)| {
            if row.repeats > 1 {
                format!(" ({}–{})", seconds(least), seconds(greatest))
            } else {
                String::new()
            }
        };
        let _ = writeln!(
            text,
            "| {} | {:.2} | {} | {} | {}{} | {}{} | {:.1} | {:.2}/{:.2} | {:.2} | {} | {} |",
            row.policy,
            row.random_use,
            seconds(row.p50),
            seconds(row.p90),
            seconds(row.p99),
            spread(row.p99_range),
            seconds(row.mean),
            spread(row.mean_range),
            row.hit_rate * 100.0,
            row.use_mean,
            row.use_max,
            row.decode_max,
            row.requests,
            row.failed,
        );
    }
    text
}

const HEAD: &str = "\
| policy | load | p50 | p90 | p99 | mean | hit % | prefill use mean/max | decode max/mean | requests | failed |
|---|---|---|---|---|---|---|---|---|---|---|
";

/// Three significant digits.
pub(super) fn seconds(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

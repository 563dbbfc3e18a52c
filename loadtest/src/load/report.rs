//! The result of a run, for printing and as JSON.

use std::fmt;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::distribution::Distribution;

/// Percentiles of a distribution of times, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Number of values; if it is 0, so is everything else.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Maximum.
    pub max: f64,
}

impl Percentiles {
    /// From a histogram of nanoseconds.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        let max = histogram.max() as f64 / 1e3;
        Self { count: histogram.len(), p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50, p90, p99, p999, max, .. } = self;
        write!(out, "p50 {p50:.0} p90 {p90:.0} p99 {p99:.0} p99.9 {p999:.0} max {max:.0} µs")
    }
}

/// CPU time, memory and descriptors of a process during a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessCost {
    /// Its label.
    pub name: String,
    /// CPU time in nanoseconds, of all its threads and descendants.
    pub cpu_ns: u64,
    /// Nanoseconds that they were runnable while something else had the core.
    pub waited_ns: u64,
    /// Resident memory at the end, in KiB.
    pub rss_kib: u64,
    /// Peak resident memory so far, in KiB.
    pub peak_kib: u64,
    /// Open descriptors at the end.
    pub descriptors: u64,
}

/// Results of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// When measuring started, in nanoseconds of the system's clock.
    pub started_at_ns: u64,
    /// Measured time.
    pub seconds: f64,
    /// Requests with a correct response.
    pub requests: u64,
    /// Requests that failed, or whose response was wrong.
    pub errors: u64,
    /// The first error.
    pub first_error: Option<String>,
    /// Of the requests: streams whose client disconnected on purpose.
    pub cancelled: u64,
    /// Of the requests: responses without the prompt logprobs that were requested. They count as requests
    /// because they cost the router CPU.
    pub unmerged: u64,
    /// Tokens of streams.
    pub tokens: u64,
    /// Latency, from when a request was due to the end of its response.
    pub latency: Percentiles,
    /// All latencies; open loop only.
    pub times: Distribution,
    /// Time to the first byte of the body, from when a request was due.
    pub first_byte: Percentiles,
    /// Delay of a token, from the server's write to the client's read.
    pub token_delay: Percentiles,
    /// How late the generator itself sent, in an open loop.
    pub late: Percentiles,
    /// Cores that other processes kept busy (neither this one nor a watched one), to about a hundredth.
    pub other_cores: f64,
    /// The watched processes; the generator itself is the last.
    pub processes: Vec<ProcessCost>,
}

impl Report {
    /// A watched process, by its label.
    pub fn process(&self, name: &str) -> Option<&ProcessCost> {
        self.processes.iter().find(|processes| processes.name == name)
    }

    fn write_cost(&self, processes: &ProcessCost, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProcessCost { name, cpu_ns, rss_kib, peak_kib, descriptors, .. } = processes;
        let each = *cpu_ns as f64 / 1e3 / self.requests.max(1) as f64;
        let busy = 100.0 * self.cores(name);
        writeln!(
            out,
            "{name:15} {each:.1} µs of CPU per request, {busy:.0} % of a core, {rss_kib} KiB (peak {peak_kib}), {descriptors} descriptors"
        )
    }

    /// How many cores a process kept busy.
    pub fn cores(&self, name: &str) -> f64 {
        self.process(name).map_or(0.0, |processes| processes.cpu_ns as f64 / 1e9 / self.seconds)
    }

    /// How many more cores a process would have kept busy if other processes had not had them.
    pub fn waited(&self, name: &str) -> f64 {
        self.process(name).map_or(0.0, |processes| processes.waited_ns as f64 / 1e9 / self.seconds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = self.requests as f64 / self.seconds;
        writeln!(out, "{} requests in {:.1} s, {per_second:.0} per second", self.requests, self.seconds)?;
        if self.errors > 0 {
            writeln!(out, "{} errors, first: {}", self.errors, self.first_error.as_deref().unwrap_or("?"))?;
        }
        if self.unmerged > 0 {
            writeln!(out, "{} responses without prompt logprobs", self.unmerged)?;
        }
        for (name, times) in [
            ("latency", &self.latency),
            ("first byte", &self.first_byte),
            ("token delay", &self.token_delay),
            ("generator late", &self.late),
        ] {
            if times.max > 0.0 {
                writeln!(out, "{name:15} {times}")?;
            }
        }
        self.processes.iter().try_for_each(|processes| self.write_cost(processes, out))
    }
}

//! What a run found, as it is printed and as JSON.

use std::fmt;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::distribution::Distribution;

/// Of a distribution of times: in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Values in it; all others are 0 if there are none.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// Of a histogram of nanoseconds.
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

/// What a process cost while it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    /// What it was called.
    pub name: String,
    /// Nanoseconds on a core, all its threads and descendants together.
    pub cpu_ns: u64,
    /// Nanoseconds that they were ready to run and something else had the core.
    pub waited_ns: u64,
    /// Resident memory at the end, in KiB.
    pub rss_kib: u64,
    /// Most resident memory so far, in KiB.
    pub peak_kib: u64,
    /// Open descriptors at the end.
    pub descriptors: u64,
}

/// One run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// When measuring began, in nanoseconds of the system's clock.
    pub began_ns: u64,
    /// How long was measured.
    pub seconds: f64,
    /// Requests answered as they should be.
    pub requests: u64,
    /// Requests that were not.
    pub errors: u64,
    /// What went wrong first.
    pub first_error: Option<String>,
    /// Of the requests: streams whose client left on purpose.
    pub left_early: u64,
    /// Of the requests: answers without the prompt logprobs that were asked for, as they cost their router something.
    pub unmerged: u64,
    /// Tokens of streams.
    pub tokens: u64,
    /// From when a request was due to the end of its answer.
    pub latency: Percentiles,
    /// The same, every one of them: of an open loop only.
    pub times: Distribution,
    /// From when a request was due to its answer's first byte.
    pub first_byte: Percentiles,
    /// From when the server wrote a token to when it was here.
    pub token_delay: Percentiles,
    /// How late the generator itself was in an open loop.
    pub late: Percentiles,
    /// Cores that something else kept busy, to about a hundredth: neither this process nor a watched one.
    pub others: f64,
    /// The watched processes; the generator itself comes last.
    pub watched: Vec<Watched>,
}

impl Report {
    /// A watched process.
    pub fn process(&self, name: &str) -> Option<&Watched> {
        self.watched.iter().find(|watched| watched.name == name)
    }

    fn write_cost(&self, watched: &Watched, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Watched { name, cpu_ns, rss_kib, peak_kib, descriptors, .. } = watched;
        let each = *cpu_ns as f64 / 1e3 / self.requests.max(1) as f64;
        let busy = 100.0 * self.cores(name);
        writeln!(
            out,
            "{name:15} {each:.1} µs of CPU a request, {busy:.0} % of a core, {rss_kib} KiB (at most {peak_kib}), {descriptors} descriptors"
        )
    }

    /// How many cores a process kept busy.
    pub fn cores(&self, name: &str) -> f64 {
        self.process(name).map_or(0.0, |watched| watched.cpu_ns as f64 / 1e9 / self.seconds)
    }

    /// How many cores a process would have kept busy beyond those if nothing else had had them.
    pub fn waited(&self, name: &str) -> f64 {
        self.process(name).map_or(0.0, |watched| watched.waited_ns as f64 / 1e9 / self.seconds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = self.requests as f64 / self.seconds;
        writeln!(out, "{} requests in {:.1} s, {per_second:.0} a second", self.requests, self.seconds)?;
        if self.errors > 0 {
            writeln!(out, "{} errors, first: {}", self.errors, self.first_error.as_deref().unwrap_or("?"))?;
        }
        if self.unmerged > 0 {
            writeln!(out, "{} answers without prompt logprobs", self.unmerged)?;
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
        self.watched.iter().try_for_each(|watched| self.write_cost(watched, out))
    }
}

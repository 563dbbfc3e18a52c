//! Counters and histograms of a run, since measuring started.

use hdrhistogram::Histogram;

use super::connection::ResponseTimes;
use super::distribution::Distribution;
use super::report::{Percentiles, ProcessCost, Report};
use super::response::RequestError;
use super::schedule::SendTime;

/// Latencies in nanoseconds up to ten minutes, with three significant digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(600_000_000_000, 3).expect("constant bounds that a histogram can have")
}

pub(super) struct Measurements {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) tokens: u64,
    cancelled: u64,
    unmerged: u64,
    first_error: Option<String>,
    latency: Histogram<u64>,
    first_byte: Histogram<u64>,
    token_delay: Histogram<u64>,
    late: Histogram<u64>,
}

impl Default for Measurements {
    fn default() -> Self {
        Self {
            requests: 0,
            errors: 0,
            tokens: 0,
            cancelled: 0,
            unmerged: 0,
            first_error: None,
            latency: histogram(),
            first_byte: histogram(),
            token_delay: histogram(),
            late: histogram(),
        }
    }
}

impl Measurements {
    pub(super) fn count(&mut self, send_time: &SendTime, times: &ResponseTimes) {
        self.requests += 1;
        self.unmerged += u64::from(!times.is_merged);
        if times.cancelled {
            self.cancelled += 1;
            return;
        }
        let nanos = |from, to: tokio::time::Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        self.latency.saturating_record(nanos(send_time.due, times.end));
        self.first_byte.saturating_record(nanos(send_time.due, times.first_byte));
        self.late.saturating_record(nanos(send_time.due, send_time.issued));
    }

    pub(super) fn token(&mut self, delay_ns: u64) {
        self.tokens += 1;
        self.token_delay.saturating_record(delay_ns);
    }

    pub(super) fn failed(&mut self, why: RequestError) {
        self.errors += 1;
        self.first_error.get_or_insert(why.0);
    }

    /// All latencies.
    pub(super) fn times(&self) -> Distribution {
        Distribution::of(&self.latency)
    }

    pub(super) fn report(&self, seconds: f64, processes: Vec<ProcessCost>) -> Report {
        Report {
            seconds,
            requests: self.requests,
            errors: self.errors,
            first_error: self.first_error.clone(),
            cancelled: self.cancelled,
            unmerged: self.unmerged,
            tokens: self.tokens,
            latency: Percentiles::of(&self.latency),
            first_byte: Percentiles::of(&self.first_byte),
            token_delay: Percentiles::of(&self.token_delay),
            late: Percentiles::of(&self.late),
            processes,
            ..Report::default()
        }
    }
}

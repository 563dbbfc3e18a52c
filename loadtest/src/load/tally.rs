//! What was counted and timed since measuring began.

use hdrhistogram::Histogram;

use super::answer::Wrong;
use super::connection::Times;
use super::distribution::Distribution;
use super::pace::Ticket;
use super::report::{Percentiles, Report, Watched};

/// Latencies in nanoseconds up to ten minutes, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(600_000_000_000, 3).expect("constant bounds that a histogram can have")
}

pub(super) struct Tally {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) tokens: u64,
    left_early: u64,
    unmerged: u64,
    first_error: Option<String>,
    latency: Histogram<u64>,
    first_byte: Histogram<u64>,
    token_delay: Histogram<u64>,
    late: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            requests: 0,
            errors: 0,
            tokens: 0,
            left_early: 0,
            unmerged: 0,
            first_error: None,
            latency: histogram(),
            first_byte: histogram(),
            token_delay: histogram(),
            late: histogram(),
        }
    }
}

impl Tally {
    pub(super) fn count(&mut self, ticket: &Ticket, times: &Times) {
        self.requests += 1;
        self.unmerged += u64::from(!times.is_merged);
        if times.left_early {
            self.left_early += 1;
            return;
        }
        let nanos = |from, to: tokio::time::Instant| {
            u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
        };
        self.latency.saturating_record(nanos(ticket.due, times.end));
        self.first_byte.saturating_record(nanos(ticket.due, times.first_byte));
        self.late.saturating_record(nanos(ticket.due, ticket.told));
    }

    pub(super) fn token(&mut self, delay_ns: u64) {
        self.tokens += 1;
        self.token_delay.saturating_record(delay_ns);
    }

    pub(super) fn failed(&mut self, why: Wrong) {
        self.errors += 1;
        self.first_error.get_or_insert(why.0);
    }

    /// All latencies.
    pub(super) fn times(&self) -> Distribution {
        Distribution::of(&self.latency)
    }

    pub(super) fn report(&self, seconds: f64, watched: Vec<Watched>) -> Report {
        Report {
            seconds,
            requests: self.requests,
            errors: self.errors,
            first_error: self.first_error.clone(),
            left_early: self.left_early,
            unmerged: self.unmerged,
            tokens: self.tokens,
            latency: Percentiles::of(&self.latency),
            first_byte: Percentiles::of(&self.first_byte),
            token_delay: Percentiles::of(&self.token_delay),
            late: Percentiles::of(&self.late),
            watched,
            ..Report::default()
        }
    }
}

//! Numbers that are read off a measurement, and their spread over rounds.

use super::results::{Row, Sample};

/// A number that a measurement has, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// CPU time of the router for a request, in microseconds.
    CpuPerRequest,
    /// CPU time of the router for a token of a stream, in microseconds.
    CpuPerToken,
    /// Requests a second, of the router's own turns if it had any.
    Rate,
    /// Median latency, in microseconds.
    P50,
    /// 90 % of the latencies are below it.
    P90,
    /// 99 %.
    P99,
    /// 99.9 %.
    P999,
    /// Median time to the first byte of an answer's body.
    FirstByte,
    /// Median time of a token from the server to the client.
    TokenP50,
    /// 99 % of these times are below it.
    TokenP99,
    /// Resident memory of the router under load, in MiB.
    Memory,
    /// The most that it ever was, in MiB.
    Peak,
    /// Memory that a connection adds, in KiB.
    MemoryPerConnection,
    /// The peak as a multiple of the bodies in flight.
    PeakPerBodies,
    /// Connections that servers saw.
    Connections,
    /// How busy the router's cores were, one for each worker; 1 is always.
    RouterBusy,
    /// How much of the time it had to wait for its core, because of something that does not belong here.
    RouterWaited,
    /// How busy the generator kept a core.
    GeneratorBusy,
    /// How busy the servers kept a core.
    ServersBusy,
    /// How late the generator was in an open loop, 99 %, in microseconds.
    GeneratorLate,
    /// By how many connections the router's threads differ.
    Unevenness,
    /// How busy the least busy of its workers was in the router's turns; 1 is always.
    IdlestWorker,
}

impl Metric {
    /// Its value in a sample of `row`.
    pub fn of(self, row: &Row, sample: &Sample) -> Option<f64> {
        let report = &sample.report;
        let router = report.process("router");
        let requests = (report.requests > 0).then_some(report.requests as f64);
        let tokens = (report.tokens > 0).then_some(report.tokens as f64);
        // In turns a latency is mostly the time that someone was stopped.
        let timed = requests.filter(|_| sample.turns.is_none());
        let turns = sample.turns.as_ref();
        // Of one core for each worker, while the router may run.
        let busy = |cores: f64| {
            cores * turns.map_or(1.0, |turns| report.seconds / turns.seconds) / row.workers as f64
        };
        let has_delays = row.is_stream && report.token_delay.count > 0;
        let (latency, delay) = (&report.latency, &report.token_delay);
        match self {
            Self::CpuPerRequest => Some(router?.cpu_ns as f64 / 1e3 / requests?),
            Self::CpuPerToken => Some(router?.cpu_ns as f64 / 1e3 / tokens?),
            Self::Rate => Some(requests? / turns.map_or(report.seconds, |turns| turns.seconds)),
            Self::P50 => timed.map(|_| latency.p50),
            Self::P90 => timed.map(|_| latency.p90),
            Self::P99 => timed.map(|_| latency.p99),
            Self::P999 => timed.map(|_| latency.p999),
            Self::FirstByte => timed.map(|_| report.first_byte.p50),
            Self::TokenP50 => has_delays.then_some(delay.p50),
            Self::TokenP99 => has_delays.then_some(delay.p99),
            Self::Memory => Some(router?.rss_kib as f64 / 1024.0),
            Self::Peak => Some(router?.peak_kib as f64 / 1024.0),
            Self::MemoryPerConnection => {
                Some((router?.rss_kib as f64 - sample.idle_kib as f64) / row.connections as f64)
            }
            Self::PeakPerBodies => {
                Some(router?.peak_kib as f64 * 1024.0 / (row.connections * row.body) as f64)
            }
            Self::Connections => {
                router.map(|_| (sample.prefill.connections + sample.decode.connections) as f64)
            }
            Self::RouterBusy => router.map(|_| busy(report.cores("router"))),
            Self::RouterWaited => router.map(|_| busy(report.waited("router"))),
            Self::GeneratorBusy => Some(report.cores("generator")),
            Self::ServersBusy => Some(report.cores("servers")),
            Self::GeneratorLate => Some(report.late.p99),
            Self::Unevenness => unevenness(sample.spread.as_ref()?),
            Self::IdlestWorker => turns?.idlest(row.workers),
        }
    }
}

/// The difference between the two threads with the most connections: loops without any are not workers.
fn unevenness(counts: &[usize]) -> Option<f64> {
    let most = *counts.first()?;
    Some((most - counts.get(1).copied().unwrap_or(0)) as f64)
}

/// A metric over several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of any values, if there are some.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_median_and_range() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0].into_iter()), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0].into_iter()).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of([].into_iter()), None);
    }

    #[test]
    fn unevenness_is_between_workers() {
        assert_eq!(unevenness(&[17, 15, 0]), Some(2.0));
        assert_eq!(unevenness(&[32, 0, 0]), Some(32.0));
        assert_eq!(unevenness(&[32]), Some(32.0));
    }
}

//! Metrics of a measurement, and their spread over rounds.

use super::results::{Row, Sample};

/// A metric, which a measurement may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The router's CPU time per request, in microseconds.
    CpuPerRequest,
    /// The router's CPU time per streamed token, in microseconds.
    CpuPerToken,
    /// Requests per second; of the router's own time slots if it alternated with the load.
    Rate,
    /// Median latency, in microseconds.
    P50,
    /// 90th percentile of the latency.
    P90,
    /// 99th percentile.
    P99,
    /// 99.9th percentile.
    P999,
    /// Median time to the first byte of the response body.
    FirstByte,
    /// Median delay of a token from the server's write to the client's read.
    TokenP50,
    /// 99th percentile of that delay.
    TokenP99,
    /// Resident memory of the router under load, in MiB.
    Memory,
    /// Peak resident memory of the router, in MiB.
    Peak,
    /// Memory per connection, in KiB.
    MemoryPerConnection,
    /// Peak memory as a multiple of the bodies in flight.
    PeakPerBodies,
    /// Connections that the router opened to backends.
    Connections,
    /// Utilisation of the router's cores, one per worker; 1 is fully busy.
    RouterBusy,
    /// Share of the time that the router was runnable while another program had its core.
    RouterWaited,
    /// Utilisation of a core by the generator.
    GeneratorBusy,
    /// Utilisation of a core by the backends.
    ServersBusy,
    /// How late the generator sent in an open loop, 99th percentile, in microseconds.
    GeneratorLate,
    /// Difference in connections between the router's event loops.
    ConnectionImbalance,
    /// Utilisation of the least busy worker in the router's time slots; 1 is fully busy.
    LeastBusyWorker,
}

impl Metric {
    /// Its value in a sample of `row`.
    pub fn of(self, row: &Row, sample: &Sample) -> Option<f64> {
        let report = &sample.report;
        let router = report.process("router");
        let requests = (report.requests > 0).then_some(report.requests as f64);
        let tokens = (report.tokens > 0).then_some(report.tokens as f64);
        // While load and router alternate, a latency is mostly the time that a process was stopped.
        let timed = requests.filter(|_| sample.router_time.is_none());
        let router_time = sample.router_time.as_ref();
        // Share of one core per worker, in the time that the router may run.
        let busy = |cores: f64| {
            cores * router_time.map_or(1.0, |router_time| report.seconds / router_time.seconds)
                / row.workers as f64
        };
        let has_delays = row.is_stream && report.token_delay.count > 0;
        let (latency, delay) = (&report.latency, &report.token_delay);
        match self {
            Self::CpuPerRequest => Some(router?.cpu_ns as f64 / 1e3 / requests?),
            Self::CpuPerToken => Some(router?.cpu_ns as f64 / 1e3 / tokens?),
            Self::Rate => {
                Some(requests? / router_time.map_or(report.seconds, |router_time| router_time.seconds))
            }
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
            Self::ConnectionImbalance => imbalance(sample.spread.as_ref()?),
            Self::LeastBusyWorker => router_time?.least_busy_share(row.workers),
        }
    }
}

/// Difference between the two event loops with the most connections: loops without any belong to no worker.
fn imbalance(counts: &[usize]) -> Option<f64> {
    let most = *counts.first()?;
    Some((most - counts.get(1).copied().unwrap_or(0)) as f64)
}

/// A metric over several rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Median; the mean of the middle two if their number is even.
    pub median: f64,
    /// Minimum.
    pub min: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// From any values; `None` if there are none.
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
    fn a_spread_has_the_median_and_the_range() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0].into_iter()), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0].into_iter()).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of([].into_iter()), None);
    }

    #[test]
    fn imbalance_is_computed_between_workers() {
        assert_eq!(imbalance(&[17, 15, 0]), Some(2.0));
        assert_eq!(imbalance(&[32, 0, 0]), Some(32.0));
        assert_eq!(imbalance(&[32]), Some(32.0));
    }
}

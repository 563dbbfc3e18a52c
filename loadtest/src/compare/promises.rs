//! The performance promises of mini-lb, and whether a comparison shows that they are kept.
//!
//! Each promise is a ratio within one run, or a number that does not depend on the speed of the machine.

use super::metric::{Metric, Spread};
use super::results::{BUSY, Outcome, Results, Row};
use crate::memory::STREAM_KIB;
use crate::testbed::{FLOOR, HYPER, ONE_LEG};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// What checking, choosing and watching may cost beside the work of the kernel, which a bare relay has too.
const MAX_OF_FLOOR: f64 = 1.15;

/// A promise and its measured value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Promise {
    pub(super) what: &'static str,
    bound: Bound,
    /// `None` if a peer is not installed, cores are missing, or too few measurements were undisturbed.
    pub(super) measured: Option<f64>,
    /// The value of each round, if it is a ratio to a peer.
    pub(super) rounds: Vec<f64>,
}

impl Promise {
    pub(super) fn bound(&self) -> String {
        match self.bound {
            Bound::AtMost(limit) => format!("≤ {limit}"),
            Bound::AtLeast(limit) => format!("≥ {limit}"),
        }
    }

    pub(super) fn verdict(&self) -> &'static str {
        match (self.measured, self.bound) {
            (None, _) => "not measured",
            (Some(value), Bound::AtMost(limit)) if value <= limit => "kept",
            (Some(value), Bound::AtLeast(limit)) if value >= limit => "kept",
            _ => "**missed**",
        }
    }
}

/// All promises.
pub(super) fn promises(results: &Results) -> Vec<Promise> {
    let at_most =
        |what, limit, measured| Promise { what, bound: Bound::AtMost(limit), measured, rounds: Vec::new() };
    let at_least =
        |what, limit, measured| Promise { what, bound: Bound::AtLeast(limit), measured, rounds: Vec::new() };
    let ours = |scenario, metric| results.median(scenario, "mini-lb", metric);
    let added = |what, share| Promise {
        rounds: (0..results.machine.rounds).filter_map(|round| added(results, share, Some(round))).collect(),
        ..at_most(what, 1.3, added(results, share, None))
    };
    let compared = |promise: Promise, rounds: Vec<f64>| Promise {
        measured: Spread::of(rounds.iter().copied()).map(|spread| spread.median),
        rounds,
        ..promise
    };
    let ratios_of = |ours, scenario, metric, peer| {
        let rows = results.row(scenario, ours).zip(results.row(scenario, peer));
        rows.map_or_else(Vec::new, |(ours, theirs)| ratios(ours, theirs, metric))
    };
    let ratios = |scenario, metric, peer| ratios_of("mini-lb", scenario, metric, peer);
    let cpu_of = |ours, what, limit, scenario| {
        let rounds = ratios_of(ours, scenario, Metric::CpuPerRequest, "haproxy");
        compared(at_most(what, limit, None), rounds)
    };
    let cpu = |what, limit, scenario| cpu_of("mini-lb", what, limit, scenario);
    let floor_cpu = |what, scenario| {
        compared(at_most(what, MAX_OF_FLOOR, None), ratios(scenario, Metric::CpuPerRequest, FLOOR))
    };
    let hyper_cpu = |what, limit, scenario| cpu_of(HYPER, what, limit, scenario);
    let one_leg_cpu = |what, limit, scenario| cpu_of(ONE_LEG, what, limit, scenario);
    let less = |what, limit, scenario, peer| {
        let rounds = ratios(scenario, Metric::CpuPerRequest, peer);
        compared(at_least(what, limit, None), rounds.into_iter().map(|ratio| 1.0 / ratio).collect())
    };
    vec![
        cpu("300 B chat: CPU per request, relative to haproxy", 1.2, "chat_300b"),
        less("300 B chat: times less CPU than sglang-router", 7.0, "chat_300b", "sglang-router"),
        cpu("streams of 64 tokens: CPU, relative to haproxy", 0.9, "stream_64"),
        cpu("64 KiB prompts: CPU, relative to haproxy", 1.25, "body_64k"),
        cpu("1 MiB bodies: CPU, relative to haproxy", 1.65, "body_1m"),
        cpu("8 MiB bodies: CPU, relative to haproxy", 1.75, "body_8m"),
        floor_cpu("300 B chat: CPU per request, relative to the bare relay", "chat_300b"),
        floor_cpu("streams of 64 tokens: CPU, relative to the bare relay", "stream_64"),
        floor_cpu("streams in one write: CPU, relative to the bare relay", "stream_burst"),
        floor_cpu("64 KiB prompts: CPU, relative to the bare relay", "body_64k"),
        floor_cpu("1 MiB bodies: CPU, relative to the bare relay", "body_1m"),
        floor_cpu("8 MiB bodies: CPU, relative to the bare relay", "body_8m"),
        floor_cpu("logprobs, merged: CPU, relative to the bare relay, which does not", "logprobs"),
        floor_cpu("logprob streams, merged: CPU, relative to the bare relay", "logprob_stream"),
        compared(
            at_most("1,000 streams: CPU per token, relative to the bare relay", MAX_OF_FLOOR, None),
            ratios("paced_1000", Metric::CpuPerToken, FLOOR),
        ),
        at_most(
            "8 MiB bodies: peak memory, relative to the bodies in flight",
            1.2,
            ours("body_8m", Metric::PeakPerBodies),
        ),
        compared(
            at_most("1,000 streams: CPU per token, relative to haproxy", 0.8, None),
            ratios("paced_1000", Metric::CpuPerToken, "haproxy"),
        ),
        at_most("1,000 streams: KiB per stream", STREAM_KIB, ours("paced_1000", Metric::MemoryPerConnection)),
        less("logprobs: times less CPU than sglang-router", 6.0, "logprobs", "sglang-router"),
        less("logprobs: times less CPU than smg", 6.0, "logprobs", "smg"),
        less("logprob streams: times less CPU than sglang-router", 3.0, "logprob_stream", "sglang-router"),
        less("logprob streams: times less CPU than smg", 3.0, "logprob_stream", "smg"),
        at_most(
            "prefill 100 ms late: first byte, ms later than haproxy, which has no prefill",
            1.0,
            later(results),
        ),
        at_least(workers_label(results), 1.8, workers(results)),
        at_most(
            "32 long streams: difference in connections between two workers",
            2.0,
            ours("spread_32", Metric::ConnectionImbalance),
        ),
        one_leg_cpu("one leg, 300 B chat: CPU per request, relative to haproxy", 1.0, "chat_300b"),
        hyper_cpu("hyper engine, 300 B chat: CPU per request, relative to haproxy", 2.4, "chat_300b"),
        hyper_cpu("hyper engine, streams of 64 tokens: CPU, relative to haproxy", 1.5, "stream_64"),
        hyper_cpu("hyper engine, 64 KiB prompts: CPU, relative to haproxy", 1.35, "body_64k"),
        at_most(
            "hyper engine, 1,000 streams: KiB per stream",
            40.0,
            results.median("paced_1000", HYPER, Metric::MemoryPerConnection),
        ),
        added("500/s: added latency, p50, relative to haproxy", 0.5),
        added("500/s: added latency, p99, relative to haproxy", 0.99),
    ]
}

/// Ratio of mini-lb's cost to a peer's, round by round: what slows the machine for a while slows both and
/// cancels out.
fn ratios(ours: &Row, theirs: &Row, metric: Metric) -> Vec<f64> {
    let of = |row: &Row, outcome: &Outcome| match outcome {
        Outcome::Measured(sample) => metric.of(row, sample),
        _ => None,
    };
    let rounds = ours.rounds.iter().zip(&theirs.rounds);
    rounds.filter_map(|(our, their)| Some(of(ours, our)? / of(theirs, their)?)).collect()
}

fn alternating(results: &Results) -> bool {
    results.scenarios().contains(&"one_worker")
}

fn workers_label(results: &Results) -> &'static str {
    if alternating(results) {
        "two workers: throughput relative to one, load and router alternating"
    } else {
        "two workers: throughput relative to one"
    }
}

/// Throughput of two workers relative to one, only if the router was the bottleneck in both and no worker ran
/// idle.
fn workers(results: &Results) -> Option<f64> {
    let is_busy = |row: &&Row| row.spread(Metric::LeastBusyWorker).is_none_or(|share| share.median >= BUSY);
    let one = if alternating(results) { "one_worker" } else { "chat_300b" };
    let [one, two] = [one, "two_workers"].map(|scenario| {
        results.row(scenario, "mini-lb").filter(|row| !row.is_bound_by_generator()).filter(is_busy)
    });
    Some(two?.spread(Metric::Rate)?.median / one?.spread(Metric::Rate)?.median)
}

/// Difference of the median first byte to that of a proxy that does not contact prefill, in milliseconds.
fn later(results: &Results) -> Option<f64> {
    let of = |router| results.median("prefill_late", router, Metric::FirstByte);
    Some((of("mini-lb")? - of("haproxy")?) / 1e3)
}

/// Latency that mini-lb adds at a quantile, relative to what haproxy adds; of all rounds together, or of one.
fn added(results: &Results, share: f64, round: Option<usize>) -> Option<f64> {
    let of = |router| {
        let all = results.row("open_500", router)?.pooled(round);
        // At least ten responses beyond the quantile, so that it does not depend on a single one.
        all.quantile(share).filter(|_| (1.0 - share) * all.count() as f64 >= 10.0)
    };
    let direct = of("direct")?;
    Some((of("mini-lb")? - direct) / (of("haproxy")? - direct).max(1.0))
}

#[cfg(test)]
mod tests {
    use super::super::results::Sample;
    use super::super::results::tests::row as single_round;
    use super::*;
    use crate::load::{ProcessCost, Report};

    fn promise(bound: Bound, measured: Option<f64>) -> &'static str {
        Promise { what: "", bound, measured, rounds: Vec::new() }.verdict()
    }

    fn row(cpu_ns: &[u64]) -> Row {
        let measured = |&cpu_ns| {
            let router = ProcessCost { name: "router".to_owned(), cpu_ns, ..ProcessCost::default() };
            let report = Report { seconds: 1.0, requests: 1, processes: vec![router], ..Report::default() };
            Outcome::Measured(Box::new(Sample { report, ..Sample::default() }))
        };
        Row { rounds: cpu_ns.iter().map(measured).collect(), ..single_round(Report::default()) }
    }

    #[test]
    fn ratios_are_computed_within_a_round() {
        let (mut ours, theirs) = (row(&[2_000, 60_000, 4_000]), row(&[1_000, 30_000, 1_000]));
        assert_eq!(ratios(&ours, &theirs, Metric::CpuPerRequest), [2.0, 2.0, 4.0]);
        ours.rounds[0] = Outcome::Failed(String::new());
        assert_eq!(ratios(&ours, &theirs, Metric::CpuPerRequest), [2.0, 4.0]);
    }

    #[test]
    fn a_promise_is_kept_missed_or_not_measured() {
        assert_eq!(promise(Bound::AtMost(1.5), Some(1.5)), "kept");
        assert_eq!(promise(Bound::AtMost(1.5), Some(1.51)), "**missed**");
        assert_eq!(promise(Bound::AtLeast(7.0), Some(7.0)), "kept");
        assert_eq!(promise(Bound::AtLeast(7.0), Some(6.9)), "**missed**");
        assert_eq!(promise(Bound::AtLeast(7.0), None), "not measured");
    }
}

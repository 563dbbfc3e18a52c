//! What this router promises to reach, and whether a comparison shows it.
//!
//! Every promise is a ratio within one run, or a number that does not depend on the machine's speed.

use super::metric::Metric;
use super::results::{BUSY, Results, Row};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// A promise, and what was measured.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Promise {
    pub(super) what: &'static str,
    bound: Bound,
    /// Nothing if a peer or a core was missing, or if too little of it was undisturbed.
    pub(super) measured: Option<f64>,
    /// Of each round, where the rounds are put together before they are compared.
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
    // Above 1 is more than the peer.
    let cpu = |scenario, peer| ratio(results, scenario, Metric::CpuPerRequest, peer);
    let less = |scenario, peer| cpu(scenario, peer).map(|ratio| 1.0 / ratio);
    vec![
        at_most("300 B chat: CPU a request, of haproxy's", 1.5, cpu("chat_300b", "haproxy")),
        at_least("300 B chat: times less CPU than sglang-router", 7.0, less("chat_300b", "sglang-router")),
        at_most("streams of 64 tokens: CPU, of haproxy's", 1.5, cpu("stream_64", "haproxy")),
        at_most("64 KiB prompts: CPU, of haproxy's", 1.2, cpu("body_64k", "haproxy")),
        at_most("1 MiB bodies: CPU, of haproxy's", 2.4, cpu("body_1m", "haproxy")),
        at_most("8 MiB bodies: CPU, of haproxy's", 2.4, cpu("body_8m", "haproxy")),
        at_most(
            "8 MiB bodies: peak memory, of the bodies in flight",
            1.2,
            ours("body_8m", Metric::PeakPerBodies),
        ),
        at_most(
            "1,000 streams: CPU a token, of haproxy's",
            1.25,
            ratio(results, "paced_1000", Metric::CpuPerToken, "haproxy"),
        ),
        at_most("1,000 streams: KiB a stream", 20.0, ours("paced_1000", Metric::MemoryPerConnection)),
        at_least("logprobs: times less CPU than sglang-router", 6.0, less("logprobs", "sglang-router")),
        at_least("logprobs: times less CPU than smg", 6.0, less("logprobs", "smg")),
        at_least(
            "logprob streams: times less CPU than sglang-router",
            3.0,
            less("logprob_stream", "sglang-router"),
        ),
        at_least("logprob streams: times less CPU than smg", 3.0, less("logprob_stream", "smg")),
        at_most(
            "prefill 100 ms late: first byte, ms later than haproxy's, which has no prefill",
            1.0,
            later(results),
        ),
        at_least(workers_how(results), 1.8, workers(results)),
        at_most(
            "32 long streams: connections between two workers",
            2.0,
            ours("spread_32", Metric::Unevenness),
        ),
        added("500/s: latency added, p50, of haproxy's", 0.5),
        added("500/s: latency added, p99, of haproxy's", 0.99),
    ]
}

fn ratio(results: &Results, scenario: &str, metric: Metric, peer: &str) -> Option<f64> {
    Some(results.median(scenario, "mini-lb", metric)? / results.median(scenario, peer, metric)?)
}

fn by_turns(results: &Results) -> bool {
    results.scenarios().contains(&"one_worker")
}

fn workers_how(results: &Results) -> &'static str {
    if by_turns(results) {
        "two workers: times the requests of one, load and router by turns"
    } else {
        "two workers: times the requests of one"
    }
}

/// Only if both were limited by the router, and in turns by nothing else: every worker was busy all the time.
fn workers(results: &Results) -> Option<f64> {
    let is_busy = |row: &&Row| row.spread(Metric::IdlestWorker).is_none_or(|share| share.median >= BUSY);
    let one = if by_turns(results) { "one_worker" } else { "chat_300b" };
    let [one, two] = [one, "two_workers"].map(|scenario| {
        results.row(scenario, "mini-lb").filter(|row| !row.is_bound_by_generator()).filter(is_busy)
    });
    Some(two?.spread(Metric::Rate)?.median / one?.spread(Metric::Rate)?.median)
}

/// How much later the median first byte is than that of a proxy that does not know of prefill.
fn later(results: &Results) -> Option<f64> {
    let of = |router| results.median("prefill_late", router, Metric::FirstByte);
    Some((of("mini-lb")? - of("haproxy")?) / 1e3)
}

/// What each adds to a quantile of the latency without a router, of all rounds together or of one.
fn added(results: &Results, share: f64, round: Option<usize>) -> Option<f64> {
    let of = |router| {
        let all = results.row("open_500", router)?.pooled(round);
        // So that the quantile is not one single answer.
        all.quantile(share).filter(|_| (1.0 - share) * all.count() as f64 >= 10.0)
    };
    let direct = of("direct")?;
    Some((of("mini-lb")? - direct) / (of("haproxy")? - direct).max(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(bound: Bound, measured: Option<f64>) -> &'static str {
        Promise { what: "", bound, measured, rounds: Vec::new() }.verdict()
    }

    #[test]
    fn verdict_is_kept_missed_or_not_measured() {
        assert_eq!(promise(Bound::AtMost(1.5), Some(1.5)), "kept");
        assert_eq!(promise(Bound::AtMost(1.5), Some(1.51)), "**missed**");
        assert_eq!(promise(Bound::AtLeast(7.0), Some(7.0)), "kept");
        assert_eq!(promise(Bound::AtLeast(7.0), Some(6.9)), "**missed**");
        assert_eq!(promise(Bound::AtLeast(7.0), None), "not measured");
    }
}

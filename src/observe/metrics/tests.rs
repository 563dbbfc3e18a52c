//! The metrics of requests, without a socket.

use std::sync::Arc;

use super::pairs::MAX_PAIRS;
use super::*;
use crate::admission::{AdmissionOptions, BackendCaps};
use crate::http1::{BodyProgress, WriteTiming};
use crate::observe::record::{Endpoint, Recorder};
use crate::upstream::{Demand, FleetSpec, InFlight, LiveFleet};

/// The text of a scrape, without admission limits.
fn scrape(metrics: &Metrics, fleet: &LiveFleet) -> String {
    let options = AdmissionOptions {
        max_concurrent: None,
        queue_size: 0,
        queue_timeout: Duration::from_secs(1),
        rate: None,
        caps: BackendCaps::NONE,
        max_buffered: usize::MAX,
    };
    metrics.to_text(&fleet.snapshot(), &AdmissionController::new(&options))
}

/// A request that succeeds on the next pair.
fn succeed(recorder: &Arc<Recorder>, fleet: &LiveFleet) {
    let mut record = recorder.begin();
    record.set_endpoint(Endpoint::Generate);
    record.body_read(10, false, None);
    let pair = fleet.now().select_pair(Demand::default()).unwrap();
    let attempt = record.sample_and_prompt().0.begin_attempt(&pair);
    let sent = WriteTiming { on_reused: true, written_at: Some(std::time::Instant::now()) };
    for server in [pair.prefill(), pair.decode()] {
        let mut leg = attempt.begin_leg(InFlight::enter(Arc::clone(server), None));
        leg.response_head_received(sent, BodyProgress::Some);
    }
    record.set_status(200);
    record.first_chunk_sent(false);
    record.set_bytes_out(5);
    record.set_complete();
}

/// The values of all series of `name`, by their labels.
fn series<'a>(text: &'a str, name: &str) -> Vec<(&'a str, u64)> {
    let of = |line: &'a str| {
        let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} ")?;
        Some((labels, value.parse().ok()?))
    };
    text.lines().filter_map(of).collect()
}

const GAPS: &str = "mini_lb_pair_gap_seconds_count";

#[test]
fn counts_of_workers_are_summed() {
    let (metrics, fleet) = (Metrics::default(), LiveFleet::new(FleetSpec::unknown(1, 1)));
    for requests in [1, 2] {
        let recorder = Recorder::new(vec![metrics.worker() as _]);
        (0..requests).for_each(|_| succeed(&recorder, &fleet));
    }
    let text = scrape(&metrics, &fleet);
    let ok = r#"mini_lb_requests_total{endpoint="generate",status="200",streaming="false"} 3"#;
    assert!(text.contains(ok), "{text}");
    assert_eq!(series(&text, GAPS), [(r#"prefill="http://prefill-0:80",decode="http://decode-0:80""#, 3)]);
}

#[test]
fn pairs_beyond_the_bound_share_series_until_a_backend_is_gone() {
    let metrics = Metrics::default();
    // Round robin over numbers without a common divisor, so that each pair is chosen once.
    let (prefill, decode) = (16, 9);
    let fleet = LiveFleet::new(FleetSpec::unknown(prefill, decode));
    let recorder = Recorder::new(vec![metrics.worker() as _]);
    for _ in 0..prefill * decode {
        succeed(&recorder, &fleet);
    }
    let text = scrape(&metrics, &fleet);
    let gaps = series(&text, GAPS);
    assert_eq!(gaps.len(), MAX_PAIRS + 1);
    let other = r#"prefill="other",decode="other""#;
    assert!(gaps.contains(&(other, (prefill * decode - MAX_PAIRS) as u64)), "{gaps:?}");

    fleet.apply(FleetSpec::unknown(2, 2));
    let gaps_of = |text: &str| series(text, GAPS).len();
    assert!(gaps_of(&scrape(&metrics, &fleet)) <= 2 * 2 + 1, "the others' series are gone");
    (0..4).for_each(|_| succeed(&recorder, &fleet));
    let text = scrape(&metrics, &fleet);
    assert!(text.contains(r#"mini_lb_pair_gap_seconds_count{prefill="http://prefill-1:80""#), "{text}");
    // A counter must not decrease while its series exists.
    assert!(series(&text, GAPS).contains(&(other, (prefill * decode - MAX_PAIRS) as u64)));
}

#[test]
fn every_family_is_described_once() {
    let fleet = LiveFleet::new(FleetSpec::unknown(1, 1));
    let text = scrape(&Metrics::default(), &fleet);
    let mut described: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let count = described.len();
    described.sort_unstable();
    described.dedup();
    assert_eq!(described.len(), count);
    assert!(count > 30, "{count}");
}

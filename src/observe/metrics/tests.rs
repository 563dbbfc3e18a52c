//! What is counted of requests, without a socket.

use std::sync::Arc;

use super::pairs::MAX_PAIRS;
use super::*;
use crate::admission::{AdmissionOptions, BackendCaps};
use crate::http1::{BodyProgress, WriteTiming};
use crate::observe::record::{Endpoint, Recorder};
use crate::upstream::{FleetSpec, InFlight, LiveFleet};

/// All numbers, where no request is limited.
fn shown(metrics: &Metrics, fleet: &LiveFleet) -> String {
    let gate = AdmissionOptions {
        max_concurrent: None,
        queue_size: 0,
        queue_timeout: Duration::from_secs(1),
        rate: None,
        caps: BackendCaps::NONE,
    };
    metrics.to_text(&fleet.snapshot(), &AdmissionController::new(&gate))
}

/// A request that goes well on the next pair.
fn request(recorder: &Arc<Recorder>, fleet: &LiveFleet) {
    let mut record = recorder.begin();
    record.is(Endpoint::Generate);
    record.body_read(10, false, None);
    let pair = fleet.now().select_pair().unwrap();
    let attempt = record.sent_to(&pair);
    let sent = WriteTiming { on_reused: true, written_at: Some(std::time::Instant::now()) };
    for server in [pair.prefill(), pair.decode()] {
        attempt.leg(InFlight::enter(Arc::clone(server))).head_came(sent, BodyProgress::Some);
    }
    record.answered(200);
    record.gives(5, false);
    record.completed();
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
fn workers_add_up() {
    let (metrics, fleet) = (Metrics::default(), LiveFleet::new(FleetSpec::unknown(1, 1)));
    for requests in [1, 2] {
        let recorder = Recorder::new(vec![metrics.worker() as _]);
        (0..requests).for_each(|_| request(&recorder, &fleet));
    }
    let text = shown(&metrics, &fleet);
    let ok = r#"mini_lb_requests_total{endpoint="generate",status="200",streaming="false"} 3"#;
    assert!(text.contains(ok), "{text}");
    assert_eq!(series(&text, GAPS), [(r#"prefill="http://prefill-0:80",decode="http://decode-0:80""#, 3)]);
}

#[test]
fn pairs_without_a_place_share_one_until_a_server_goes() {
    let metrics = Metrics::default();
    // In turns, so that each pair is seen once: the numbers have no common divisor.
    let (prefill, decode) = (16, 9);
    let fleet = LiveFleet::new(FleetSpec::unknown(prefill, decode));
    let recorder = Recorder::new(vec![metrics.worker() as _]);
    for _ in 0..prefill * decode {
        request(&recorder, &fleet);
    }
    let text = shown(&metrics, &fleet);
    let gaps = series(&text, GAPS);
    assert_eq!(gaps.len(), MAX_PAIRS + 1);
    let other = r#"prefill="other",decode="other""#;
    assert!(gaps.contains(&(other, (prefill * decode - MAX_PAIRS) as u64)), "{gaps:?}");

    fleet.apply(FleetSpec::unknown(2, 2));
    let gaps_of = |text: &str| series(text, GAPS).len();
    assert!(gaps_of(&shown(&metrics, &fleet)) <= 2 * 2 + 1, "the others' series are gone");
    (0..4).for_each(|_| request(&recorder, &fleet));
    let text = shown(&metrics, &fleet);
    assert!(text.contains(r#"mini_lb_pair_gap_seconds_count{prefill="http://prefill-1:80""#), "{text}");
    // Numbers never fall while their series is there.
    assert!(series(&text, GAPS).contains(&(other, (prefill * decode - MAX_PAIRS) as u64)));
}

#[test]
fn every_family_is_described_once() {
    let fleet = LiveFleet::new(FleetSpec::unknown(1, 1));
    let text = shown(&Metrics::default(), &fleet);
    let mut described: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let count = described.len();
    described.sort_unstable();
    described.dedup();
    assert_eq!(described.len(), count);
    assert!(count > 30, "{count}");
}

//! What is counted of requests, without a socket.

use std::sync::Arc;

use super::pairs::MAX_PAIRS;
use super::*;
use crate::record::{Kind, Recorder};
use crate::upstream::{Address, HealthOptions, InFlight, LiveFleet, PrefillSpec, RoundRobin, Sent, Wanted};

/// Servers that are never asked.
fn wanted(prefill: usize, decode: usize) -> Wanted {
    let address = |role: &str, number| Address::parse(&format!("http://{role}-{number}:80")).unwrap();
    let spec = |number| PrefillSpec {
        bootstrap_host: "p".into(),
        address: address("prefill", number),
        bootstrap_port: None,
    };
    Wanted {
        prefill: (0..prefill).map(spec).collect(),
        decode: (0..decode).map(|number| address("decode", number)).collect(),
        prefill_policy: Arc::new(RoundRobin::default()),
        decode_policy: Arc::new(RoundRobin::default()),
        health: HealthOptions {
            enabled: false,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            failure_threshold: 1,
            success_threshold: 1,
            startup_interval: Duration::from_secs(1),
            startup_timeout: Duration::from_secs(1_800),
        },
    }
}

/// A request that goes well on the next pair.
fn request(recorder: &Arc<Recorder>, fleet: &LiveFleet) {
    let mut record = recorder.begin();
    record.is(Kind::Generate);
    record.body_read(10, false);
    let pair = fleet.now().select_pair().unwrap();
    let attempt = record.sent_to(&pair);
    let sent = Sent { on_kept: true, written_at: Some(std::time::Instant::now()) };
    for server in [pair.prefill(), pair.decode()] {
        attempt.leg(InFlight::enter(Arc::clone(server))).head_came(sent, true);
    }
    record.answered(200);
    record.gives(5);
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
    let (metrics, fleet) = (Metrics::default(), LiveFleet::new(wanted(1, 1)));
    for requests in [1, 2] {
        let recorder = Recorder::new(vec![metrics.worker() as _]);
        (0..requests).for_each(|_| request(&recorder, &fleet));
    }
    let text = metrics.to_text(&fleet.snapshot());
    let ok = r#"mini_lb_requests_total{endpoint="generate",status="200",streaming="false"} 3"#;
    assert!(text.contains(ok), "{text}");
    assert_eq!(series(&text, GAPS), [(r#"prefill="http://prefill-0:80",decode="http://decode-0:80""#, 3)]);
}

#[test]
fn pairs_without_a_place_share_one_until_a_server_goes() {
    let metrics = Metrics::default();
    // In turns, so that each pair is seen once: the numbers have no common divisor.
    let (prefill, decode) = (16, 9);
    let fleet = LiveFleet::new(wanted(prefill, decode));
    let recorder = Recorder::new(vec![metrics.worker() as _]);
    for _ in 0..prefill * decode {
        request(&recorder, &fleet);
    }
    let text = metrics.to_text(&fleet.snapshot());
    let gaps = series(&text, GAPS);
    assert_eq!(gaps.len(), MAX_PAIRS + 1);
    let other = r#"prefill="other",decode="other""#;
    assert!(gaps.contains(&(other, (prefill * decode - MAX_PAIRS) as u64)), "{gaps:?}");

    fleet.become_as(wanted(2, 2));
    let gaps_of = |text: &str| series(text, GAPS).len();
    assert!(gaps_of(&metrics.to_text(&fleet.snapshot())) <= 2 * 2 + 1, "the others' series are gone");
    (0..4).for_each(|_| request(&recorder, &fleet));
    let text = metrics.to_text(&fleet.snapshot());
    assert!(text.contains(r#"mini_lb_pair_gap_seconds_count{prefill="http://prefill-1:80""#), "{text}");
    // Numbers never fall while their series is there.
    assert!(series(&text, GAPS).contains(&(other, (prefill * decode - MAX_PAIRS) as u64)));
}

#[test]
fn every_family_is_described_once() {
    let fleet = LiveFleet::new(wanted(1, 1));
    let text = Metrics::default().to_text(&fleet.snapshot());
    let mut described: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let count = described.len();
    described.sort_unstable();
    described.dedup();
    assert_eq!(described.len(), count);
    assert!(count > 30, "{count}");
}

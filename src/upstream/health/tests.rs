use super::Signal::{ProbeFailed, ProbeRefused, ProbeSucceeded, RequestFailed, RequestSucceeded};
use super::*;

fn options(enabled: bool) -> HealthOptions {
    HealthOptions {
        enabled,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(5),
        failure_threshold: 3,
        success_threshold: 2,
        startup_interval: Duration::from_secs(1),
        startup_timeout: Duration::from_secs(1_800),
        load_poll_interval: Duration::ZERO,
    }
}

fn tracker(enabled: bool) -> HealthTracker {
    HealthTracker::new(Arc::new(SharedHealthOptions::new(options(enabled))), Arc::default())
}

/// The state after these signals, and how many servers are excluded.
fn after(health: &HealthTracker, signals: &[Signal]) -> (HealthState, usize) {
    for signal in signals {
        health.record(*signal);
    }
    (health.state(), health.excluded.load(Relaxed))
}

/// A server that a probe has found healthy.
fn healthy_tracker() -> HealthTracker {
    let health = tracker(true);
    health.record(ProbeSucceeded);
    health
}

#[test]
fn one_refused_probe_drains_a_server_until_probes_succeed() {
    for before in [&[][..], &[RequestFailed], &[ProbeFailed, ProbeFailed]] {
        let health = healthy_tracker();
        after(&health, before);
        assert_eq!(health.record(ProbeRefused), Some(HealthState::Draining), "{before:?}");
        let others = [RequestSucceeded, RequestFailed, RequestFailed, RequestFailed, RequestSucceeded];
        assert_eq!(after(&health, &others), (HealthState::Draining, 1));
        let probes = [ProbeSucceeded, ProbeRefused, ProbeSucceeded];
        assert_eq!(after(&health, &probes), (HealthState::Draining, 1));
        assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
        // Nothing is left of what was before.
        assert_eq!(after(&health, &[RequestFailed, RequestFailed]), (HealthState::Suspect, 0));
    }
}

#[test]
fn a_server_that_drained_and_is_gone_is_unhealthy() {
    let health = healthy_tracker();
    assert_eq!(after(&health, &[ProbeRefused, ProbeFailed, ProbeFailed]), (HealthState::Draining, 1));
    assert_eq!(health.record(ProbeFailed), Some(HealthState::Unhealthy));
    // It is back and loads its model.
    assert_eq!(after(&health, &[ProbeRefused]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[ProbeSucceeded, ProbeSucceeded]), (HealthState::Healthy, 0));
}

#[test]
fn a_server_that_was_never_up_and_refuses_probes_is_starting() {
    let health = tracker(true);
    assert_eq!(health.record(ProbeRefused), Some(HealthState::Starting));
    assert_eq!(after(&health, &[ProbeRefused, RequestSucceeded]), (HealthState::Starting, 1));
    assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
}

#[test]
fn completed_requests_do_not_hide_failed_probes() {
    let health = healthy_tracker();
    for _ in 0..2 {
        assert_eq!(after(&health, &[ProbeFailed, RequestSucceeded]), (HealthState::Suspect, 0));
    }
    assert!(health.is_recovering());
    assert_eq!(after(&health, &[ProbeFailed]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[RequestSucceeded; 9]), (HealthState::Unhealthy, 1));
}

#[test]
fn successful_probes_do_not_hide_broken_connections() {
    let health = healthy_tracker();
    for _ in 0..2 {
        assert_eq!(after(&health, &[RequestFailed, ProbeSucceeded]), (HealthState::Suspect, 0));
        assert!(!health.is_recovering());
    }
    assert_eq!(after(&health, &[RequestFailed]), (HealthState::Unhealthy, 1));
    let health = healthy_tracker();
    assert_eq!(after(&health, &[RequestFailed, ProbeFailed, RequestFailed]), (HealthState::Unhealthy, 1));
    let health = healthy_tracker();
    let flapping = [RequestFailed, RequestFailed, RequestSucceeded, RequestFailed, RequestFailed];
    assert_eq!(after(&health, &flapping), (HealthState::Suspect, 0));
}

#[test]
fn only_broken_connections_count_but_5xx_too_hasten_a_probe() {
    for outcome in Outcome::ALL {
        let is_broken = matches!(
            outcome,
            Outcome::Connect | Outcome::ConnectTimeout | Outcome::Closed | Outcome::BadResponse
        );
        assert_eq!(health_signal(outcome) == Some(RequestFailed), is_broken, "{outcome:?}");
        assert_eq!(hastens_probe(outcome), is_broken || outcome == Outcome::ServerError, "{outcome:?}");
    }
}

#[test]
fn only_consecutive_failures_and_successes_reach_the_thresholds() {
    let health = tracker(true);
    assert_eq!(after(&health, &[]), (HealthState::Unknown, 0));
    assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
    assert_eq!(after(&health, &[ProbeFailed, ProbeFailed]), (HealthState::Suspect, 0));
    assert_eq!(after(&health, &[ProbeSucceeded, ProbeFailed, ProbeFailed]), (HealthState::Suspect, 0));
    assert_eq!(after(&health, &[ProbeFailed]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[ProbeSucceeded, ProbeFailed, ProbeSucceeded]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
}

#[test]
fn one_failure_excludes_a_server_that_was_never_healthy() {
    let health = tracker(true);
    assert_eq!(health.record(ProbeFailed), Some(HealthState::Starting));
    assert_eq!(after(&health, &[ProbeFailed, ProbeFailed]), (HealthState::Starting, 1));
    assert_eq!(health.record(ProbeSucceeded), Some(HealthState::Healthy));
    assert_eq!(after(&health, &[]), (HealthState::Healthy, 0));
}

#[test]
fn a_starting_server_is_excluded_until_its_first_success() {
    let health = HealthTracker::starting(Arc::new(SharedHealthOptions::new(options(true))), Arc::default());
    assert_eq!(after(&health, &[]), (HealthState::Starting, 1));
    assert_eq!(health.record(ProbeFailed), None);
    assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
}

#[test]
fn only_changes_of_state_are_reported() {
    let health = tracker(true);
    let reported: Vec<_> = [
        ProbeSucceeded,
        ProbeSucceeded,
        ProbeFailed,
        ProbeFailed,
        ProbeFailed,
        ProbeFailed,
        ProbeSucceeded,
        ProbeSucceeded,
        ProbeSucceeded,
    ]
    .into_iter()
    .map(|signal| health.record(signal))
    .collect();
    let (healthy, unhealthy) = (Some(HealthState::Healthy), Some(HealthState::Unhealthy));
    assert_eq!(reported, [healthy, None, None, None, unhealthy, None, None, healthy, None]);
}

#[test]
fn reloaded_options_apply_from_the_next_signal() {
    let health = tracker(true);
    assert_eq!(after(&health, &[ProbeSucceeded, ProbeFailed]), (HealthState::Suspect, 0));
    health.options.apply(HealthOptions { failure_threshold: 2, ..options(true) });
    assert_eq!(after(&health, &[ProbeFailed]), (HealthState::Unhealthy, 1));
    health.options.apply(HealthOptions { success_threshold: 1, ..options(true) });
    assert_eq!(after(&health, &[ProbeSucceeded]), (HealthState::Healthy, 0));
}

#[test]
fn a_server_counts_as_excluded_until_it_is_dropped() {
    let health = tracker(true);
    assert_eq!(after(&health, &[ProbeFailed]), (HealthState::Starting, 1));
    health.options.apply(options(false));
    assert_eq!(after(&health, &[]), (HealthState::Healthy, 1));
    let excluded = Arc::clone(&health.excluded);
    drop(health);
    assert_eq!(excluded.load(Relaxed), 0);
}

#[test]
fn without_health_checks_every_server_is_healthy() {
    assert_eq!(after(&tracker(false), &[ProbeFailed; 5]), (HealthState::Healthy, 0));
}

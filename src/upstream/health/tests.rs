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
    }
}

fn tracker(enabled: bool) -> HealthTracker {
    HealthTracker::new(Arc::new(SharedHealthOptions::new(options(enabled))), Arc::default())
}

/// The state after these signals, and how many servers are excluded.
fn after(health: &HealthTracker, signals: &[bool]) -> (HealthState, usize) {
    for success in signals {
        health.record(*success);
    }
    (health.state(), health.excluded.load(Relaxed))
}

#[test]
fn only_consecutive_failures_and_successes_reach_the_thresholds() {
    let health = tracker(true);
    assert_eq!(after(&health, &[]), (HealthState::Unknown, 0));
    assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
    assert_eq!(after(&health, &[false, false]), (HealthState::Suspect, 0));
    assert_eq!(after(&health, &[true, false, false]), (HealthState::Suspect, 0));
    assert_eq!(after(&health, &[false]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[true, false, true]), (HealthState::Unhealthy, 1));
    assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
}

#[test]
fn one_failure_excludes_a_server_that_was_never_healthy() {
    let health = tracker(true);
    assert_eq!(health.record(false), Some(HealthState::Starting));
    assert_eq!(after(&health, &[false, false]), (HealthState::Starting, 1));
    assert_eq!(health.record(true), Some(HealthState::Healthy));
    assert_eq!(after(&health, &[]), (HealthState::Healthy, 0));
}

#[test]
fn a_starting_server_is_excluded_until_its_first_success() {
    let health = HealthTracker::starting(Arc::new(SharedHealthOptions::new(options(true))), Arc::default());
    assert_eq!(after(&health, &[]), (HealthState::Starting, 1));
    assert_eq!(health.record(false), None);
    assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
}

#[test]
fn only_changes_of_state_are_reported() {
    let health = tracker(true);
    let reported: Vec<_> = [true, true, false, false, false, false, true, true, true]
        .into_iter()
        .map(|success| health.record(success))
        .collect();
    let (healthy, unhealthy) = (Some(HealthState::Healthy), Some(HealthState::Unhealthy));
    assert_eq!(reported, [healthy, None, None, None, unhealthy, None, None, healthy, None]);
}

#[test]
fn reloaded_options_apply_from_the_next_signal() {
    let health = tracker(true);
    assert_eq!(after(&health, &[true, false]), (HealthState::Suspect, 0));
    health.options.apply(HealthOptions { failure_threshold: 2, ..options(true) });
    assert_eq!(after(&health, &[false]), (HealthState::Unhealthy, 1));
    health.options.apply(HealthOptions { success_threshold: 1, ..options(true) });
    assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
}

#[test]
fn a_server_counts_as_excluded_until_it_is_dropped() {
    let health = tracker(true);
    assert_eq!(after(&health, &[false]), (HealthState::Starting, 1));
    health.options.apply(options(false));
    assert_eq!(after(&health, &[]), (HealthState::Healthy, 1));
    let excluded = Arc::clone(&health.excluded);
    drop(health);
    assert_eq!(excluded.load(Relaxed), 0);
}

#[test]
fn without_health_checks_every_server_is_healthy() {
    assert_eq!(after(&tracker(false), &[false; 5]), (HealthState::Healthy, 0));
}

//! Whether a server is well, by what probes and requests have shown of it.
//!
//! Signs come in and a state comes out. Nobody is asked here (`control::probes`
//! does that) and nothing is chosen (`fleet` does).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::Outcome;

/// How servers are watched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HealthOptions {
    /// Without it every server counts as well.
    pub(crate) enabled: bool,
    /// From one probe of a healthy server to the next.
    pub(crate) interval: Duration,
    /// How long a server may take to answer a probe.
    pub(crate) timeout: Duration,
    /// Failures in a row that make a server unhealthy.
    pub(crate) failure_threshold: u32,
    /// Successes in a row that make it healthy again.
    pub(crate) success_threshold: u32,
    /// From one probe of a server to the next that has not come up yet.
    pub(crate) startup_interval: Duration,
    /// How long that one is asked so often.
    pub(crate) startup_timeout: Duration,
}

/// The options as they are now, for all servers.
#[derive(Debug)]
pub(crate) struct Watching {
    /// As in the options; asked at the end of each leg.
    enabled: AtomicBool,
    options: ArcSwap<HealthOptions>,
}

impl Watching {
    pub(super) fn new(options: HealthOptions) -> Self {
        Self { enabled: AtomicBool::new(options.enabled), options: ArcSwap::from_pointee(options) }
    }

    /// Takes over other options. What is known of servers is judged by them at the next sign.
    pub(super) fn become_as(&self, options: HealthOptions) {
        self.enabled.store(options.enabled, Relaxed);
        self.options.store(Arc::new(options));
    }

    pub(crate) fn options(&self) -> Arc<HealthOptions> {
        self.options.load_full()
    }
}

/// What is known of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HealthState {
    /// Nothing yet. It gets requests, but does not make the router ready.
    Unknown,
    /// It was never well. It gets no requests unless all of its role are like this, or worse; one success is enough.
    Starting,
    Healthy,
    /// It has failed, but not often enough.
    Suspect,
    /// It gets no requests unless all of its role are like this.
    Unhealthy,
}

impl HealthState {
    /// Whether policies are spared the server.
    pub(super) fn is_out(self) -> bool {
        matches!(self, Self::Starting | Self::Unhealthy)
    }

    /// In one word, for operators.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Suspect => "suspect",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// The health of one server.
#[derive(Debug)]
pub(super) struct HealthTracker {
    /// A [`HealthState`]; written under the lock only, read without.
    state: AtomicU8,
    in_a_row: Mutex<InARow>,
    watching: Arc<Watching>,
    /// The unhealthy servers of this one's role.
    unhealthy: Arc<AtomicUsize>,
}

/// Signs since the last of the other kind.
#[derive(Debug, Default)]
struct InARow {
    failures: u32,
    successes: u32,
}

impl HealthTracker {
    /// For a server that requests may be tried on before it was asked.
    pub(super) fn new(watching: Arc<Watching>, unhealthy: Arc<AtomicUsize>) -> Self {
        let state = AtomicU8::new(HealthState::Unknown as u8);
        Self { state, in_a_row: Mutex::default(), watching, unhealthy }
    }

    /// For a server that must come up first, as there are others.
    pub(super) fn starting(watching: Arc<Watching>, unhealthy: Arc<AtomicUsize>) -> Self {
        let health = Self::new(watching, unhealthy);
        if health.is_watched() {
            health.state.store(HealthState::Starting as u8, Relaxed);
            health.unhealthy.fetch_add(1, Relaxed);
        }
        health
    }

    pub(super) fn state(&self) -> HealthState {
        if self.is_watched() { self.known() } else { HealthState::Healthy }
    }

    fn is_watched(&self) -> bool {
        self.watching.enabled.load(Relaxed)
    }

    /// What has been seen, whether anybody minds or not.
    fn known(&self) -> HealthState {
        const STATES: [HealthState; 5] = [
            HealthState::Unknown,
            HealthState::Starting,
            HealthState::Healthy,
            HealthState::Suspect,
            HealthState::Unhealthy,
        ];
        STATES[usize::from(self.state.load(Relaxed))]
    }

    /// Takes a sign. Returns the new state if the server has become healthy or unhealthy by it.
    pub(super) fn note(&self, well: bool) -> Option<HealthState> {
        // The usual case takes no lock: this runs at the end of each leg.
        if !self.is_watched() || (well && self.known() == HealthState::Healthy) {
            return None;
        }
        // The numbers are whole whatever happens under the lock.
        let mut in_a_row = self.in_a_row.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.known();
        let after =
            if well { self.success(before, &mut in_a_row) } else { self.failure(before, &mut in_a_row) };
        self.state.store(after as u8, Relaxed);
        match (before.is_out(), after.is_out()) {
            (false, true) => self.unhealthy.fetch_add(1, Relaxed),
            (true, false) => self.unhealthy.fetch_sub(1, Relaxed),
            _ => return (before == HealthState::Unknown).then_some(after),
        };
        Some(after)
    }

    fn success(&self, before: HealthState, in_a_row: &mut InARow) -> HealthState {
        in_a_row.failures = 0;
        in_a_row.successes = in_a_row.successes.saturating_add(1);
        let recovering = before == HealthState::Unhealthy
            && in_a_row.successes < self.watching.options.load().success_threshold;
        if recovering { HealthState::Unhealthy } else { HealthState::Healthy }
    }

    fn failure(&self, before: HealthState, in_a_row: &mut InARow) -> HealthState {
        in_a_row.successes = 0;
        in_a_row.failures = in_a_row.failures.saturating_add(1);
        match before {
            // It has never been seen well: it may be starting, or have another address.
            HealthState::Unknown | HealthState::Starting => HealthState::Starting,
            HealthState::Unhealthy => HealthState::Unhealthy,
            HealthState::Healthy | HealthState::Suspect
                if in_a_row.failures >= self.watching.options.load().failure_threshold =>
            {
                HealthState::Unhealthy
            }
            HealthState::Healthy | HealthState::Suspect => HealthState::Suspect,
        }
    }
}

/// A server that is gone counts no more. Until then it may count although it gets no requests, which costs a look at
/// each server's health and nothing else.
impl Drop for HealthTracker {
    fn drop(&mut self) {
        if self.known().is_out() {
            self.unhealthy.fetch_sub(1, Relaxed);
        }
    }
}

/// What a leg's end says of its server: that it is well, that it is not, or nothing.
pub(super) fn sign(outcome: Outcome) -> Option<bool> {
    match outcome {
        Outcome::Completed => Some(true),
        Outcome::ServerError
        | Outcome::Connect
        | Outcome::ConnectTimeout
        | Outcome::Closed
        | Outcome::BadResponse => Some(false),
        // A refusal is the request's fault, or says that there is too much to do; a leg that waits may wait for its
        // partner.
        Outcome::Refused
        | Outcome::Exhausted
        | Outcome::Stale
        | Outcome::Timeout
        | Outcome::TooLarge
        | Outcome::Cancelled => None,
    }
}

#[cfg(test)]
mod tests {
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

    fn health(enabled: bool) -> HealthTracker {
        HealthTracker::new(Arc::new(Watching::new(options(enabled))), Arc::default())
    }

    fn after(health: &HealthTracker, signs: &[bool]) -> (HealthState, usize) {
        for well in signs {
            health.note(*well);
        }
        (health.state(), health.unhealthy.load(Relaxed))
    }

    #[test]
    fn three_failures_in_a_row_and_two_successes_in_a_row() {
        let health = health(true);
        assert_eq!(after(&health, &[]), (HealthState::Unknown, 0));
        assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
        assert_eq!(after(&health, &[false, false]), (HealthState::Suspect, 0));
        assert_eq!(after(&health, &[true, false, false]), (HealthState::Suspect, 0));
        assert_eq!(after(&health, &[false]), (HealthState::Unhealthy, 1));
        assert_eq!(after(&health, &[true, false, true]), (HealthState::Unhealthy, 1));
        assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
    }

    #[test]
    fn one_failure_is_enough_for_a_server_that_was_never_well() {
        let health = health(true);
        assert_eq!(health.note(false), Some(HealthState::Starting));
        assert_eq!(after(&health, &[false, false]), (HealthState::Starting, 1));
        assert_eq!(health.note(true), Some(HealthState::Healthy));
        assert_eq!(after(&health, &[]), (HealthState::Healthy, 0));
    }

    #[test]
    fn a_server_that_must_come_up_first_is_out_until_one_success() {
        let health = HealthTracker::starting(Arc::new(Watching::new(options(true))), Arc::default());
        assert_eq!(after(&health, &[]), (HealthState::Starting, 1));
        assert_eq!(health.note(false), None);
        assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
    }

    #[test]
    fn only_changes_are_told() {
        let health = health(true);
        let told: Vec<_> = [true, true, false, false, false, false, true, true, true]
            .into_iter()
            .map(|well| health.note(well))
            .collect();
        let (well, unwell) = (Some(HealthState::Healthy), Some(HealthState::Unhealthy));
        assert_eq!(told, [well, None, None, None, unwell, None, None, well, None]);
    }

    #[test]
    fn other_options_hold_for_the_next_sign() {
        let health = health(true);
        assert_eq!(after(&health, &[true, false]), (HealthState::Suspect, 0));
        health.watching.become_as(HealthOptions { failure_threshold: 2, ..options(true) });
        assert_eq!(after(&health, &[false]), (HealthState::Unhealthy, 1));
        health.watching.become_as(HealthOptions { success_threshold: 1, ..options(true) });
        assert_eq!(after(&health, &[true]), (HealthState::Healthy, 0));
    }

    #[test]
    fn a_server_that_nobody_watches_any_more_counts_until_it_is_gone() {
        let health = health(true);
        assert_eq!(after(&health, &[false]), (HealthState::Starting, 1));
        health.watching.become_as(options(false));
        assert_eq!(after(&health, &[]), (HealthState::Healthy, 1));
        let unhealthy = Arc::clone(&health.unhealthy);
        drop(health);
        assert_eq!(unhealthy.load(Relaxed), 0);
    }

    #[test]
    fn without_checks_every_server_is_well() {
        assert_eq!(after(&health(false), &[false; 5]), (HealthState::Healthy, 0));
    }
}

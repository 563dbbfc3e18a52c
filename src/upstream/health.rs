//! The health of one backend, from probes and from requests (active and passive health
//! checks).
//!
//! Signals go in and a state comes out. Probes are sent in `admin::probes`, and backends
//! are selected in `fleet`.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::Outcome;

/// How health is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HealthOptions {
    /// If not, every server counts as healthy.
    pub(crate) enabled: bool,
    /// Time between two probes of a healthy server.
    pub(crate) interval: Duration,
    /// Longest time for the response to a probe.
    pub(crate) timeout: Duration,
    /// Consecutive failures that make a server unhealthy.
    pub(crate) failure_threshold: u32,
    /// Consecutive successes that make it healthy again.
    pub(crate) success_threshold: u32,
    /// Time between two probes of a server that has not started yet.
    pub(crate) startup_interval: Duration,
    /// How long a server is probed at `startup_interval` before it is probed at `interval`.
    pub(crate) startup_timeout: Duration,
}

/// The options in force, shared by all servers and replaced on reload.
#[derive(Debug)]
pub(crate) struct SharedHealthOptions {
    /// As in `options`; read at the end of every leg.
    enabled: AtomicBool,
    options: ArcSwap<HealthOptions>,
}

impl SharedHealthOptions {
    pub(super) fn new(options: HealthOptions) -> Self {
        Self { enabled: AtomicBool::new(options.enabled), options: ArcSwap::from_pointee(options) }
    }

    /// Replaces the options. States stay as they are until the next signal.
    pub(super) fn apply(&self, options: HealthOptions) {
        self.enabled.store(options.enabled, Relaxed);
        self.options.store(Arc::new(options));
    }

    pub(crate) fn options(&self) -> Arc<HealthOptions> {
        self.options.load_full()
    }
}

/// The health state of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HealthState {
    /// Never checked. It is selected, but does not make the router ready.
    Unknown,
    /// Never healthy so far. Excluded from selection; the first success makes it healthy.
    Starting,
    Healthy,
    /// It has failed, but less often than the threshold. It is selected.
    Suspect,
    /// Excluded from selection until it has succeeded as often as the threshold.
    Unhealthy,
}

impl HealthState {
    /// Whether the backend is excluded from selection, unless all of its role are.
    pub(super) fn is_excluded(self) -> bool {
        matches!(self, Self::Starting | Self::Unhealthy)
    }

    /// The state's name, as in `GET /workers`.
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

/// Computes one server's state from its signals.
#[derive(Debug)]
pub(super) struct HealthTracker {
    /// A [`HealthState`]: written under the lock of `streak`, read without.
    state: AtomicU8,
    streak: Mutex<Streak>,
    options: Arc<SharedHealthOptions>,
    /// How many servers of this role are excluded; see `fleet`.
    excluded: Arc<AtomicUsize>,
}

/// Consecutive signals of one kind; the other count is 0.
#[derive(Debug, Default)]
struct Streak {
    failures: u32,
    successes: u32,
}

impl HealthTracker {
    /// For a server that is selected before its first probe.
    pub(super) fn new(options: Arc<SharedHealthOptions>, excluded: Arc<AtomicUsize>) -> Self {
        let state = AtomicU8::new(HealthState::Unknown as u8);
        Self { state, streak: Mutex::default(), options, excluded }
    }

    /// For a server that must succeed once before it is selected.
    pub(super) fn starting(options: Arc<SharedHealthOptions>, excluded: Arc<AtomicUsize>) -> Self {
        let tracker = Self::new(options, excluded);
        // Without checks no probe would ever end the state.
        if tracker.is_enabled() {
            tracker.state.store(HealthState::Starting as u8, Relaxed);
            tracker.excluded.fetch_add(1, Relaxed);
        }
        tracker
    }

    pub(super) fn state(&self) -> HealthState {
        if self.is_enabled() { self.last_state() } else { HealthState::Healthy }
    }

    fn is_enabled(&self) -> bool {
        self.options.enabled.load(Relaxed)
    }

    /// The state after the last signal, also if checks have been disabled since.
    fn last_state(&self) -> HealthState {
        const STATES: [HealthState; 5] = [
            HealthState::Unknown,
            HealthState::Starting,
            HealthState::Healthy,
            HealthState::Suspect,
            HealthState::Unhealthy,
        ];
        STATES[usize::from(self.state.load(Relaxed))]
    }

    /// Records a signal. Returns the new state if the server has become healthy, or is excluded, by it.
    pub(super) fn record(&self, success: bool) -> Option<HealthState> {
        // The usual case takes no lock: this runs at the end of every leg.
        if !self.is_enabled() || (success && self.last_state() == HealthState::Healthy) {
            return None;
        }
        // Poisoning is ignored: counters are valid in any state.
        let mut streak = self.streak.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.last_state();
        let after =
            if success { self.on_success(before, &mut streak) } else { self.on_failure(before, &mut streak) };
        self.state.store(after as u8, Relaxed);
        match (before.is_excluded(), after.is_excluded()) {
            (false, true) => self.excluded.fetch_add(1, Relaxed),
            (true, false) => self.excluded.fetch_sub(1, Relaxed),
            // The first signal is worth a log line, good or bad; otherwise only exclusion and recovery are.
            _ => return (before == HealthState::Unknown).then_some(after),
        };
        Some(after)
    }

    fn on_success(&self, before: HealthState, streak: &mut Streak) -> HealthState {
        streak.failures = 0;
        streak.successes = streak.successes.saturating_add(1);
        // The threshold is for servers that were healthy before: it keeps one that flaps out of rotation.
        let is_recovering = before == HealthState::Unhealthy
            && streak.successes < self.options.options.load().success_threshold;
        if is_recovering { HealthState::Unhealthy } else { HealthState::Healthy }
    }

    fn on_failure(&self, before: HealthState, streak: &mut Streak) -> HealthState {
        streak.successes = 0;
        streak.failures = streak.failures.saturating_add(1);
        match before {
            // One failure is enough: a server that was never healthy is starting, or its address is wrong.
            HealthState::Unknown | HealthState::Starting => HealthState::Starting,
            HealthState::Unhealthy => HealthState::Unhealthy,
            HealthState::Healthy | HealthState::Suspect
                if streak.failures >= self.options.options.load().failure_threshold =>
            {
                HealthState::Unhealthy
            }
            HealthState::Healthy | HealthState::Suspect => HealthState::Suspect,
        }
    }
}

/// A server that is dropped is not counted any more. Until then a removed server may count as excluded, which
/// costs selection a look at each server's health and changes no choice.
impl Drop for HealthTracker {
    fn drop(&mut self) {
        if self.last_state().is_excluded() {
            self.excluded.fetch_sub(1, Relaxed);
        }
    }
}

/// What a leg's outcome means for its server's health: a success, a failure, or neither.
pub(super) fn health_signal(outcome: Outcome) -> Option<bool> {
    match outcome {
        Outcome::Completed => Some(true),
        Outcome::ServerError
        | Outcome::Connect
        | Outcome::ConnectTimeout
        | Outcome::Closed
        | Outcome::BadResponse => Some(false),
        // A refusal is caused by the request, or by overload; a leg that times out may have waited for its
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
mod tests;

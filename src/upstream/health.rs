//! The health of one backend, from probes and from requests (active and passive health
//! checks).
//!
//! Signals go in and a state comes out. What a probe has said, only a probe can undo. Probes
//! are sent in `admin::probes`, and backends are selected in `fleet`.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// Time between two polls of a prefill server's load. Zero: off.
    pub(crate) load_poll_interval: Duration,
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
    /// Excluded from selection until its probes have succeeded as often as the threshold.
    Unhealthy,
    /// It has answered a probe with 503, as SGLang does from SIGTERM on: it finishes its requests and exits.
    /// Excluded from selection as an unhealthy one.
    Draining,
}

/// What a probe or a request says about its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    ProbeSucceeded,
    /// The server works, and says that it wants no requests (503).
    ProbeRefused,
    ProbeFailed,
    RequestSucceeded,
    RequestFailed,
}

impl HealthState {
    /// Whether the backend is excluded from selection, unless all of its role are.
    pub(super) fn is_excluded(self) -> bool {
        matches!(self, Self::Starting | Self::Unhealthy | Self::Draining)
    }

    /// The state's name, as in `GET /workers`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Suspect => "suspect",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
        }
    }
}

/// Computes one server's state from its signals.
#[derive(Debug)]
pub(super) struct HealthTracker {
    /// A [`HealthState`]: written under the lock of `counts`, read without.
    state: AtomicU8,
    counts: Mutex<SignalCounts>,
    options: Arc<SharedHealthOptions>,
    /// How many servers of this role are excluded; see `fleet`.
    excluded: Arc<AtomicUsize>,
}

/// Consecutive signals. Those of probes and of requests are apart: under load requests complete all the time,
/// and must not hide that probes fail.
#[derive(Debug, Default)]
struct SignalCounts {
    failed_probes: u32,
    failed_requests: u32,
    /// Since the last failure of either kind.
    successful_probes: u32,
}

impl HealthTracker {
    /// For a server that is selected before its first probe.
    pub(super) fn new(options: Arc<SharedHealthOptions>, excluded: Arc<AtomicUsize>) -> Self {
        let state = AtomicU8::new(HealthState::Unknown as u8);
        Self { state, counts: Mutex::default(), options, excluded }
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
        const STATES: [HealthState; 6] = [
            HealthState::Unknown,
            HealthState::Starting,
            HealthState::Healthy,
            HealthState::Suspect,
            HealthState::Unhealthy,
            HealthState::Draining,
        ];
        STATES[usize::from(self.state.load(Relaxed))]
    }

    /// Whether the last probe failed, or probes must succeed before the server is selected again.
    pub(super) fn is_recovering(&self) -> bool {
        self.is_enabled() && (self.last_state().is_excluded() || self.lock().failed_probes > 0)
    }

    fn lock(&self) -> MutexGuard<'_, SignalCounts> {
        // Poisoning is ignored: counters are valid in any state.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a signal. Returns the new state if it is worth a log line.
    pub(super) fn record(&self, signal: Signal) -> Option<HealthState> {
        // The usual case takes no lock: this runs at the end of every leg.
        if !self.is_enabled() || self.says_nothing_new(signal) {
            return None;
        }
        let mut counts = self.lock();
        let before = self.last_state();
        let after = self.next_state(before, signal, &mut counts);
        self.state.store(after as u8, Relaxed);
        match (before.is_excluded(), after.is_excluded()) {
            (false, true) => self.excluded.fetch_add(1, Relaxed),
            (true, false) => self.excluded.fetch_sub(1, Relaxed),
            // The first signal is worth a log line, good or bad, and so is the end of a server that drains;
            // otherwise only exclusion and recovery are.
            _ => {
                let is_gone = before == HealthState::Draining && after == HealthState::Unhealthy;
                return (before == HealthState::Unknown || is_gone).then_some(after);
            }
        };
        Some(after)
    }

    /// Whether a signal cannot change anything.
    fn says_nothing_new(&self, signal: Signal) -> bool {
        match signal {
            Signal::ProbeSucceeded => self.last_state() == HealthState::Healthy,
            // Requests end only what requests have begun.
            Signal::RequestSucceeded => {
                !matches!(self.last_state(), HealthState::Unknown | HealthState::Suspect)
            }
            _ => false,
        }
    }

    fn next_state(&self, before: HealthState, signal: Signal, counts: &mut SignalCounts) -> HealthState {
        match signal {
            Signal::ProbeSucceeded => {
                counts.failed_probes = 0;
                counts.successful_probes = counts.successful_probes.saturating_add(1);
                self.after_success(before, counts)
            }
            Signal::RequestSucceeded => {
                counts.failed_requests = 0;
                match before {
                    HealthState::Unknown | HealthState::Suspect => self.after_success(before, counts),
                    // A probe's result was recorded since the check without the lock.
                    _ => before,
                }
            }
            Signal::ProbeRefused => {
                counts.successful_probes = 0;
                match before {
                    // SGLang refuses probes while it loads the model, too. One that was down is loading
                    // again.
                    HealthState::Unknown | HealthState::Starting => HealthState::Starting,
                    HealthState::Unhealthy => HealthState::Unhealthy,
                    // One is enough: it is no failure but the server's own word.
                    HealthState::Healthy | HealthState::Suspect | HealthState::Draining => {
                        HealthState::Draining
                    }
                }
            }
            Signal::ProbeFailed => {
                counts.failed_probes = counts.failed_probes.saturating_add(1);
                self.after_failure(before, counts)
            }
            Signal::RequestFailed => {
                counts.failed_requests = counts.failed_requests.saturating_add(1);
                self.after_failure(before, counts)
            }
        }
    }

    fn after_success(&self, before: HealthState, counts: &mut SignalCounts) -> HealthState {
        match before {
            HealthState::Unhealthy | HealthState::Draining
                if counts.successful_probes < self.options.options.load().success_threshold =>
            {
                // The threshold is for servers that were healthy before: it keeps one that flaps out of
                // rotation.
                before
            }
            // A probe's success does not end what requests have begun: a server may respond to probes and
            // break every other connection.
            HealthState::Suspect if counts.failed_probes + counts.failed_requests > 0 => before,
            _ => {
                counts.failed_requests = 0;
                HealthState::Healthy
            }
        }
    }

    fn after_failure(&self, before: HealthState, counts: &mut SignalCounts) -> HealthState {
        counts.successful_probes = 0;
        let threshold = self.options.options.load().failure_threshold;
        match before {
            // One failure is enough: a server that was never healthy is starting, or its address is wrong.
            HealthState::Unknown | HealthState::Starting => HealthState::Starting,
            HealthState::Unhealthy => HealthState::Unhealthy,
            // Requests that it still had may fail; that it is gone, its probes say.
            HealthState::Draining if counts.failed_probes < threshold => HealthState::Draining,
            HealthState::Healthy | HealthState::Suspect
                if counts.failed_probes.saturating_add(counts.failed_requests) < threshold =>
            {
                HealthState::Suspect
            }
            HealthState::Healthy | HealthState::Suspect | HealthState::Draining => HealthState::Unhealthy,
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

/// What a leg's outcome says about its server's health, if anything.
pub(super) fn health_signal(outcome: Outcome) -> Option<Signal> {
    match outcome {
        Outcome::Completed => Some(Signal::RequestSucceeded),
        Outcome::Connect | Outcome::ConnectTimeout | Outcome::Closed | Outcome::BadResponse => {
            Some(Signal::RequestFailed)
        }
        // A status is a response, and may be caused by the request (SGLang has 500 for a broken image) or by
        // overload; a leg that times out may have waited for its partner.
        Outcome::ServerError
        | Outcome::Refused
        | Outcome::Exhausted
        | Outcome::Stale
        | Outcome::Timeout
        | Outcome::TooLarge
        | Outcome::Cancelled => None,
    }
}

/// Whether an outcome is a reason to probe the server at once.
pub(super) fn hastens_probe(outcome: Outcome) -> bool {
    outcome == Outcome::ServerError || health_signal(outcome) == Some(Signal::RequestFailed)
}

#[cfg(test)]
mod tests;

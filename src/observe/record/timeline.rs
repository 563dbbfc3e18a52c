//! When a request reached which phase.
//!
//! Shared by a request and its legs, which are polled by one task and so never write at
//! the same time: the fields are atomic only because the futures of tasks must be `Send`.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::RequestId;
use crate::upstream::Role;

/// A point in a request's life, reached at most once per attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The last byte of the request's body was read from the client.
    BodyRead,
    /// The request was written to the prefill backend.
    PrefillWritten,
    /// The request was written to the decode backend, or to the plain one; so below.
    DecodeWritten,
    /// The head of prefill's response arrived.
    PrefillHead,
    /// The head of decode's response arrived.
    DecodeHead,
    /// The first byte of decode's response body arrived.
    DecodeByte,
    /// The end of prefill's response arrived.
    PrefillEnd,
    /// The first chunk of the response body was handed to the client's connection.
    FirstByteToClient,
}

const PHASES: usize = Phase::FirstByteToClient as usize + 1;

/// Nanoseconds since the request's head was read. Never 0, which the atomics below use for "not reached"; 64
/// bits last for 584 years.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SinceHead(u64);

impl SinceHead {
    /// The moment in which the head was read.
    pub(super) const HEAD: Self = Self(1);
}

/// When one request reached its phases, and what became of the legs of its last attempt.
#[derive(Debug)]
pub(super) struct Timeline {
    /// When the request's head was read.
    pub(super) started_at: Instant,
    /// For log lines of a leg that outlives the request.
    pub(super) request_id: Option<RequestId>,
    /// By phase, as in [`SinceHead`]; 0 is not reached.
    reached: [AtomicU64; PHASES],
    /// When the first leg failed, as in [`SinceHead`].
    failed_at: AtomicU64,
    /// Which leg failed first: 1 is prefill, 2 is decode, 3 is a plain server's, 0 is none.
    failed: AtomicU8,
    /// By leg: nanoseconds that it ran after its partner had failed; 0 if it did not.
    after_partner_failure: [AtomicU64; 2],
    opened_connection: AtomicBool,
    merged: AtomicBool,
}

impl Timeline {
    pub(super) fn new(started_at: Instant) -> Self {
        Self {
            started_at,
            request_id: None,
            reached: Default::default(),
            failed_at: AtomicU64::new(0),
            failed: AtomicU8::new(0),
            after_partner_failure: Default::default(),
            opened_connection: AtomicBool::new(false),
            merged: AtomicBool::new(false),
        }
    }

    pub(super) fn now(&self) -> SinceHead {
        self.since_head(Instant::now())
    }

    pub(super) fn since_head(&self, moment: Instant) -> SinceHead {
        let nanos = moment.saturating_duration_since(self.started_at).as_nanos() as u64;
        SinceHead(nanos.max(1))
    }

    pub(super) fn mark(&self, phase: Phase) {
        self.mark_at(phase, self.now());
    }

    pub(super) fn mark_at(&self, phase: Phase, at: SinceHead) {
        // Relaxed, as everything here: one task writes and reads, and the runtime orders what it does.
        self.reached[phase as usize].store(at.0, Relaxed);
    }

    pub(super) fn has_reached(&self, phase: Phase) -> bool {
        self.reached[phase as usize].load(Relaxed) != 0
    }

    /// Nanoseconds from the request's head to a phase.
    pub(super) fn nanos_to(&self, phase: Phase) -> Option<u64> {
        non_zero(&self.reached[phase as usize])
    }

    /// When a phase was reached.
    pub(super) fn moment_of(&self, phase: Phase) -> Option<SinceHead> {
        self.nanos_to(phase).map(SinceHead)
    }

    /// Time from the request's head to a phase.
    pub(super) fn time_to(&self, phase: Phase) -> Option<Duration> {
        self.nanos_to(phase).map(Duration::from_nanos)
    }

    /// Time from a phase to a moment after it.
    pub(super) fn time_between(&self, phase: Phase, end: SinceHead) -> Option<Duration> {
        self.nanos_to(phase).map(|start| Duration::from_nanos(end.0.saturating_sub(start)))
    }

    pub(super) fn instant_of(&self, phase: Phase) -> Option<Instant> {
        self.time_to(phase).map(|after| self.started_at + after)
    }

    /// Forgets what the backends of the attempt before have done: times and failures are those of the last
    /// attempt.
    pub(super) fn begin_attempt(&self) {
        // The phases are in the order of an attempt. The one before belongs to the client, and stays.
        for phase in &self.reached[Phase::PrefillWritten as usize..] {
            phase.store(0, Relaxed);
        }
        // `after_partner_failure` stays: it is of the attempt that has just failed.
        self.failed_at.store(0, Relaxed);
        self.failed.store(0, Relaxed);
        self.opened_connection.store(false, Relaxed);
    }

    pub(super) fn set_opened_connection(&self) {
        self.opened_connection.store(true, Relaxed);
    }

    pub(super) fn has_opened_connection(&self) -> bool {
        self.opened_connection.load(Relaxed)
    }

    pub(super) fn set_merged(&self) {
        self.merged.store(true, Relaxed);
    }

    pub(super) fn is_merged(&self) -> bool {
        self.merged.load(Relaxed)
    }

    /// A leg has failed. A failure of prefill after decode's first byte is ignored: decode has the KV cache
    /// by then, and the response does not depend on prefill any more.
    pub(super) fn leg_failed(&self, role: Role) {
        // The partner of a leg that failed is closed, and may fail because of that.
        if self.failed.load(Relaxed) != 0 || (role == Role::Prefill && self.has_reached(Phase::DecodeByte)) {
            return;
        }
        self.failed_at.store(self.now().0, Relaxed);
        self.failed.store(1 + role as u8, Relaxed);
    }

    pub(super) fn failed_leg(&self) -> Option<Role> {
        match self.failed.load(Relaxed) {
            0 => None,
            1 => Some(Role::Prefill),
            2 => Some(Role::Decode),
            _ => Some(Role::Regular),
        }
    }

    /// A leg has been cancelled. If that was because its partner failed, notes how much later: the time in
    /// which the backend may have worked on a request that cannot succeed.
    pub(super) fn leg_cancelled(&self, role: Role) {
        if self.failed_leg().is_some_and(|failed| failed != role) {
            // At least 1: a cancellation in the same nanosecond is one.
            let nanos = self.now().0.saturating_sub(self.failed_at.load(Relaxed));
            self.after_partner_failure[role.leg()].store(nanos.max(1), Relaxed);
        }
    }

    pub(super) fn after_partner_failure(&self, role: Role) -> Option<Duration> {
        non_zero(&self.after_partner_failure[role.leg()]).map(Duration::from_nanos)
    }
}

fn non_zero(nanos: &AtomicU64) -> Option<u64> {
    let nanos = nanos.load(Relaxed);
    (nanos != 0).then_some(nanos)
}

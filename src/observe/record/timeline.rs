//! When a request reached which phase.
//!
//! Shared by a request and its legs, which are polled by one task: what is atomic
//! here is so only because tasks must be `Send`.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::upstream::Role;

/// What happens to a request, once an attempt at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The last byte of the request's body was there.
    BodyRead,
    /// The request was written to the prefill server.
    PrefillWritten,
    /// The request was written to the decode server.
    DecodeWritten,
    /// The head of prefill's answer came.
    PrefillHead,
    /// The head of decode's answer came.
    DecodeHead,
    /// The first byte of decode's body came.
    DecodeByte,
    /// Prefill's answer was at its end.
    PrefillEnd,
    /// The first piece of the answer's body was given to the client's connection.
    ConnectionHandler,
}

const PHASES: usize = Phase::ConnectionHandler as usize + 1;

/// Nanoseconds from a request's begin; never 0, which is no moment. There are 584 years of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The begin itself.
    pub(super) const FIRST: Self = Self(1);
}

/// The moments of one request.
#[derive(Debug)]
pub(super) struct Timeline {
    pub(super) begun: Instant,
    /// Nanoseconds from `begun`; 0 is not reached.
    reached: [AtomicU64; PHASES],
    /// When a leg failed first, and which: 1 is prefill, 2 is decode.
    failed_at: AtomicU64,
    failed: AtomicU8,
    /// By role.
    ran_on: [AtomicU64; 2],
    dialled: AtomicBool,
    merged: AtomicBool,
}

impl Timeline {
    pub(super) fn new(begun: Instant) -> Self {
        Self {
            begun,
            reached: Default::default(),
            failed_at: AtomicU64::new(0),
            failed: AtomicU8::new(0),
            ran_on: Default::default(),
            dialled: AtomicBool::new(false),
            merged: AtomicBool::new(false),
        }
    }

    pub(super) fn now(&self) -> Moment {
        self.at(Instant::now())
    }

    pub(super) fn at(&self, moment: Instant) -> Moment {
        let nanos = moment.saturating_duration_since(self.begun).as_nanos() as u64;
        Moment(nanos.max(1))
    }

    pub(super) fn reach(&self, phase: Phase) {
        self.reach_at(phase, self.now());
    }

    pub(super) fn reach_at(&self, phase: Phase, moment: Moment) {
        self.reached[phase as usize].store(moment.0, Relaxed);
    }

    pub(super) fn has_reached(&self, phase: Phase) -> bool {
        self.reached[phase as usize].load(Relaxed) != 0
    }

    /// After how many nanoseconds.
    pub(super) fn nanos(&self, phase: Phase) -> Option<u64> {
        let nanos = self.reached[phase as usize].load(Relaxed);
        (nanos != 0).then_some(nanos)
    }

    pub(super) fn reached(&self, phase: Phase) -> Option<Duration> {
        self.nanos(phase).map(Duration::from_nanos)
    }

    pub(super) fn instant(&self, phase: Phase) -> Option<Instant> {
        self.reached(phase).map(|after| self.begun + after)
    }

    /// What the servers of another attempt do counts anew.
    pub(super) fn begin_attempt(&self) {
        for phase in &self.reached[Phase::PrefillWritten as usize..] {
            phase.store(0, Relaxed);
        }
        self.failed_at.store(0, Relaxed);
        self.failed.store(0, Relaxed);
        self.dialled.store(false, Relaxed);
    }

    pub(super) fn dialled(&self) {
        self.dialled.store(true, Relaxed);
    }

    pub(super) fn has_dialled(&self) -> bool {
        self.dialled.load(Relaxed)
    }

    pub(super) fn merge(&self) {
        self.merged.store(true, Relaxed);
    }

    pub(super) fn is_merged(&self) -> bool {
        self.merged.load(Relaxed)
    }

    /// A leg has failed. Prefill's failure means nothing once decode has begun to send: its work is done.
    pub(super) fn fail(&self, role: Role) {
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
            _ => Some(Role::Decode),
        }
    }

    /// A leg has been cancelled.
    pub(super) fn cancelled(&self, role: Role) {
        if self.failed_leg().is_some_and(|failed| failed != role) {
            let ran_on = self.now().0.saturating_sub(self.failed_at.load(Relaxed));
            self.ran_on[role as usize].store(ran_on.max(1), Relaxed);
        }
    }

    pub(super) fn ran_on(&self, role: Role) -> Option<Duration> {
        duration(&self.ran_on[role as usize])
    }
}

fn duration(nanos: &AtomicU64) -> Option<Duration> {
    match nanos.load(Relaxed) {
        0 => None,
        nanos => Some(Duration::from_nanos(nanos)),
    }
}

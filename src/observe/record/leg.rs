//! One leg of a request: counted on its server, and its moments noted.

use std::sync::Arc;

use super::timeline::{Moment, Phase, Timeline};
use crate::http1::{BodyProgress, WriteTiming};
use crate::upstream::{Backend, InFlight, Outcome, Role};

/// A leg that is under way, until this is dropped.
pub(crate) struct LegRecord {
    server: InFlight,
    timeline: Arc<Timeline>,
    role: Role,
    /// Nothing was said of its end: dropped like this, it was cancelled.
    is_open: bool,
    /// When all of the answer had come, if it came with the head.
    ended_at: Option<Moment>,
}

impl LegRecord {
    pub(super) fn new(server: InFlight, timeline: Arc<Timeline>) -> Self {
        let role = server.backend().role();
        Self { server, timeline, role, is_open: true, ended_at: None }
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        self.server.backend()
    }

    /// The head of the answer has come, and with it so much of the body.
    pub(crate) fn head_came(&mut self, sent: WriteTiming, come: BodyProgress) {
        let now = self.timeline.now();
        let (written, head) = match self.role {
            Role::Prefill => (Phase::PrefillWritten, Phase::PrefillHead),
            Role::Decode => (Phase::DecodeWritten, Phase::DecodeHead),
        };
        if let Some(at) = sent.written_at {
            self.timeline.reach_at(written, self.timeline.at(at));
        }
        self.timeline.reach_at(head, now);
        if come != BodyProgress::None && self.role == Role::Decode {
            self.timeline.reach_at(Phase::DecodeByte, now);
        }
        self.ended_at = (come == BodyProgress::All).then_some(now);
        if !sent.on_reused {
            self.timeline.dialled();
        }
    }

    /// Some of the body has come. For each piece: the clock is read for the first one only.
    pub(crate) fn body_came(&self) {
        if self.role == Role::Decode && !self.timeline.has_reached(Phase::DecodeByte) {
            self.timeline.reach(Phase::DecodeByte);
        }
    }

    /// Says how the leg ended. A leg of which nothing is said was cancelled.
    pub(crate) fn ends_as(&mut self, outcome: Outcome) {
        self.server.set_outcome(outcome);
        self.is_open = false;
        match outcome {
            Outcome::Completed if self.role == Role::Prefill => {
                self.timeline
                    .reach_at(Phase::PrefillEnd, self.ended_at.unwrap_or_else(|| self.timeline.now()));
            }
            Outcome::Completed | Outcome::Cancelled => {}
            _ => self.timeline.fail(self.role),
        }
    }
}

impl Drop for LegRecord {
    fn drop(&mut self) {
        if self.is_open {
            self.timeline.cancelled(self.role);
        }
    }
}

//! One leg of a request: its phases, and its outcome for the backend that it runs on.

use std::sync::Arc;

use super::RequestId;
use super::timeline::{Phase, SinceHead, Timeline};
use crate::http1::{BodyProgress, WriteTiming};
use crate::upstream::{Backend, InFlight, Outcome, Role};
use crate::wire::usage::Usage;

/// A leg in progress. Dropped without an outcome, it counts as cancelled.
pub(crate) struct LegRecord {
    in_flight: InFlight,
    timeline: Arc<Timeline>,
    role: Role,
    has_outcome: bool,
    /// When the whole response had arrived, if it arrived together with its head.
    ended_with_head: Option<SinceHead>,
}

impl LegRecord {
    pub(super) fn new(in_flight: InFlight, timeline: Arc<Timeline>) -> Self {
        let role = in_flight.backend().role();
        Self { in_flight, timeline, role, has_outcome: false, ended_with_head: None }
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        self.in_flight.backend()
    }

    /// The id of the request.
    pub(crate) fn request_id(&self) -> Option<&str> {
        self.timeline.request_id.as_ref().map(RequestId::as_str)
    }

    /// The backend had closed the kept-alive connection; the leg goes on with a new one. Counted beside the
    /// leg's own outcome.
    pub(crate) fn connection_was_stale(&self) {
        self.in_flight.connection_was_stale();
    }

    /// The request was written, wholly if there is a time for it.
    pub(crate) fn request_written(&self, write: WriteTiming) {
        let written = match self.role {
            Role::Prefill => Phase::PrefillWritten,
            Role::Decode | Role::Regular => Phase::DecodeWritten,
        };
        if let Some(at) = write.written_at {
            self.timeline.mark_at(written, self.timeline.since_head(at));
        }
    }

    /// The head of the response has arrived, and with it this much of the body.
    pub(crate) fn response_head_received(&mut self, write: WriteTiming, body: BodyProgress) {
        let now = self.timeline.now();
        let head = match self.role {
            Role::Prefill => Phase::PrefillHead,
            Role::Decode | Role::Regular => Phase::DecodeHead,
        };
        self.request_written(write);
        self.timeline.mark_at(head, now);
        // A short response arrives in one read: its first byte, and perhaps its end, have the time of its
        // head.
        if body != BodyProgress::None && self.role != Role::Prefill {
            self.timeline.mark_at(Phase::DecodeByte, now);
        }
        self.ended_with_head = (body == BodyProgress::All).then_some(now);
        if !write.on_reused {
            self.timeline.set_opened_connection();
        }
    }

    /// A part of the response body has arrived. Called for each chunk, so the clock is read for the first one
    /// only.
    pub(crate) fn body_received(&self) {
        if self.role != Role::Prefill && !self.timeline.has_reached(Phase::DecodeByte) {
            self.timeline.mark(Phase::DecodeByte);
        }
    }

    /// The whole response of prefill has arrived, and says this.
    pub(crate) fn prefill_completed(&self, usage: Option<Usage>) {
        let ended = self.ended_with_head.unwrap_or_else(|| self.timeline.now());
        self.in_flight.prefill_completed(usage, self.timeline.time_between(Phase::PrefillWritten, ended));
    }

    /// Sets how the leg ended. Without this call it was cancelled.
    pub(crate) fn set_outcome(&mut self, outcome: Outcome) {
        self.in_flight.set_outcome(outcome);
        self.has_outcome = true;
        match outcome {
            Outcome::Completed if self.role == Role::Prefill => {
                let ended = self.ended_with_head.unwrap_or_else(|| self.timeline.now());
                self.timeline.mark_at(Phase::PrefillEnd, ended);
            }
            // The end of the leg that generates is the end of the request, which the record notes by itself.
            Outcome::Completed | Outcome::Cancelled => {}
            _ => self.timeline.leg_failed(self.role),
        }
    }
}

impl Drop for LegRecord {
    fn drop(&mut self) {
        if !self.has_outcome {
            self.timeline.leg_cancelled(self.role);
        }
    }
}

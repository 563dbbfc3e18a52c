//! What an event on one of a request's two legs means for the request: the only place that decides it. A
//! plain server's leg stands in decode's place, as if prefill's had ended well.
//!
//! Events go in and actions come out. There is no socket, clock or async code here, so that all orders of
//! events can be enumerated (`decision/tests.rs`, which also holds the invariants). Events are observed, and
//! actions carried out, in [`leg_pair`](super::leg_pair) until the response starts and by
//! [`relay`](super::relay) after that.

use crate::upstream::Role;

/// What has happened on a leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum LegEvent {
    /// It has a connection. Nothing was written to it.
    Connected,
    /// No connection could be opened.
    ConnectFailed,
    /// Its kept-alive connection was closed by the server as idle: before the request was written, or so
    /// shortly after that the close was on its way already.
    Stale,
    /// The head of a 2xx response.
    Accepted { is_stream: bool },
    /// The head of any other response.
    Refused,
    /// Some of the body, or the end of an empty one.
    Data,
    /// The 2xx response is a stream, and reports an error in an event.
    ErrorEvent,
    /// The clean end of the body.
    Ended,
    /// The connection or the response failed.
    Broken,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// Nothing.
    Wait,
    /// Write the request to both legs, or to the one that there is.
    SendBoth,
    /// Open a new connection to the same server.
    Reconnect(Role),
    /// Write the request to the new connection.
    SendAgain(Role),
    /// Nothing was written to either server: choose another pair, without this leg's server.
    OtherPair(Role),
    /// Start the response with this leg's head and relay its body. The other leg is closed, except prefill
    /// beside an accepted response of decode.
    Relay(Role),
    /// As `Relay(Decode)`, with prefill's logprobs spliced in.
    RelayMerged,
    /// The response is the error that prefill reported in its stream. Both legs are over.
    RespondHiddenError,
    /// The request has failed on this leg, which is to be named. Both legs are over. Before the response has
    /// started the client gets an error status; after that, the response is cut.
    Fail(Role),
    /// Prefill has failed, but decode's response does not need it any more.
    LogLateFailure,
    /// The response is complete. Prefill is drained if it still runs.
    Finish,
}

/// How long the next event is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Limit {
    /// The request's deadline.
    Deadline,
    /// The time in which a stream's first event can still be awaited with its head.
    FirstEvent,
    /// The time in which decode may still respond after prefill has reported an error in its stream.
    HiddenError,
    /// The time limits of the response's body.
    Body,
    /// None: both legs are over.
    Never,
}

/// How far a leg has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Connecting,
    /// It waits for its partner's connection.
    Connected,
    Sent,
    /// Its server closed the kept-alive connection, and gets the request again on a new one.
    Reconnecting,
    SentAgain,
    Responding {
        is_stream: bool,
        has_data: bool,
    },
    /// It has reported an error in its stream.
    HiddenError,
    Ended,
    /// It has failed or is closed.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    /// The client has received nothing.
    Deciding,
    /// The response has started.
    Relaying(Role),
    Over,
}

/// The state of a request's two legs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Decision {
    /// The response needs prefill's whole response as well.
    is_merge: bool,
    /// There is one leg, in decode's place.
    is_single: bool,
    prefill: Phase,
    decode: Phase,
    stage: Stage,
}

impl Decision {
    pub(super) fn new(is_merge: bool) -> Self {
        let (prefill, decode) = (Phase::Connecting, Phase::Connecting);
        Self { is_merge, is_single: false, prefill, decode, stage: Stage::Deciding }
    }

    /// That of a request to a plain server.
    pub(super) fn single() -> Self {
        Self { is_single: true, prefill: Phase::Ended, ..Self::new(false) }
    }

    /// Decides what follows from an event.
    pub(super) fn on(&mut self, role: Role, event: LegEvent) -> Action {
        match self.stage {
            Stage::Deciding => self.on_before_response(role, event),
            Stage::Relaying(source) => self.on_while_relaying(source, role, event),
            Stage::Over => Action::Wait,
        }
    }

    fn on_before_response(&mut self, role: Role, event: LegEvent) -> Action {
        match event {
            LegEvent::Connected => self.on_connected(role),
            LegEvent::ConnectFailed if self.is_unsent(role) => {
                self.end();
                Action::OtherPair(role)
            }
            LegEvent::Stale => self.on_stale(role),
            // A response of either server is better than an error of the router's.
            LegEvent::Refused => {
                *self.phase(role) = Phase::Responding { is_stream: false, has_data: false };
                *self.phase(other(role)) = Phase::Over;
                self.relay(role)
            }
            LegEvent::ConnectFailed | LegEvent::Broken => self.fail(role),
            LegEvent::Accepted { is_stream } => {
                *self.phase(role) = Phase::Responding { is_stream, has_data: false };
                self.merge_if_ready()
            }
            LegEvent::Data => {
                self.record_data(role);
                if role == Role::Decode && !self.is_merge { self.relay(role) } else { Action::Wait }
            }
            // Decode may report the same error as a plain refusal, as a single server would.
            LegEvent::ErrorEvent if role == Role::Prefill => {
                self.prefill = Phase::HiddenError;
                Action::Wait
            }
            // Prefill waits for a transfer that will not happen, so there is nothing to merge.
            LegEvent::ErrorEvent => {
                self.prefill = Phase::Over;
                self.relay(role)
            }
            LegEvent::Ended => {
                *self.phase(role) = Phase::Ended;
                if role == Role::Decode && !self.is_merge { self.relay(role) } else { self.merge_if_ready() }
            }
        }
    }

    /// The request is written when both legs have a connection: an orphan waits in SGLang's queue for its
    /// partner, for seconds.
    fn on_connected(&mut self, role: Role) -> Action {
        if *self.phase(role) == Phase::Reconnecting {
            *self.phase(role) = Phase::SentAgain;
            return Action::SendAgain(role);
        }
        *self.phase(role) = Phase::Connected;
        if self.is_single {
            self.decode = Phase::Sent;
            return Action::SendBoth;
        }
        if *self.phase(other(role)) != Phase::Connected {
            return Action::Wait;
        }
        (self.prefill, self.decode) = (Phase::Sent, Phase::Sent);
        Action::SendBoth
    }

    /// Whether no server has the request when this leg could not be connected. If its kept-alive connection
    /// was closed as idle, the partner has the request; without a partner nobody has.
    fn is_unsent(&mut self, role: Role) -> bool {
        match *self.phase(role) {
            Phase::Connecting => true,
            Phase::Reconnecting => self.is_single,
            _ => false,
        }
    }

    /// The same server gets the request on a new connection, once: its partner has it already, and no server
    /// of its own role may have it a second time.
    fn on_stale(&mut self, role: Role) -> Action {
        *self.phase(role) = match *self.phase(role) {
            Phase::Connected => Phase::Connecting,
            Phase::Sent => Phase::Reconnecting,
            _ => return self.fail(role),
        };
        Action::Reconnect(role)
    }

    fn merge_if_ready(&mut self) -> Action {
        let has_decode = matches!(self.decode, Phase::Ended | Phase::Responding { is_stream: true, .. });
        if !self.is_merge || self.prefill != Phase::Ended || !has_decode {
            return Action::Wait;
        }
        self.stage = Stage::Relaying(Role::Decode);
        Action::RelayMerged
    }

    fn on_while_relaying(&mut self, source: Role, role: Role, event: LegEvent) -> Action {
        if role != source {
            // Beside a refusal the other leg is closed.
            return if role == Role::Prefill { self.on_prefill_beside(event) } else { Action::Wait };
        }
        match event {
            LegEvent::Ended => {
                // Beside decode's response prefill may still run, and is then drained.
                *self.phase(role) = Phase::Ended;
                self.stage = Stage::Over;
                Action::Finish
            }
            LegEvent::Data => {
                self.record_data(role);
                Action::Wait
            }
            LegEvent::Broken => self.fail(role),
            // A response that has started has its head, and no other events than its body's.
            _ => Action::Wait,
        }
    }

    /// Decode's first byte shows that the KV cache has arrived; until then decode depends on prefill.
    fn on_prefill_beside(&mut self, event: LegEvent) -> Action {
        match event {
            LegEvent::Ended => self.prefill = Phase::Ended,
            LegEvent::Accepted { is_stream } => {
                self.prefill = Phase::Responding { is_stream, has_data: false };
            }
            LegEvent::Refused | LegEvent::ErrorEvent | LegEvent::Broken | LegEvent::Stale
                if matches!(self.decode, Phase::Responding { has_data: true, .. } | Phase::Ended) =>
            {
                self.prefill = Phase::Over;
                return Action::LogLateFailure;
            }
            LegEvent::Refused | LegEvent::ErrorEvent | LegEvent::Broken | LegEvent::Stale => {
                return self.fail(Role::Prefill);
            }
            LegEvent::Connected | LegEvent::ConnectFailed | LegEvent::Data => {}
        }
        Action::Wait
    }

    /// What the next event is waited for with.
    pub(super) fn limit(&self) -> Limit {
        match (self.stage, self.prefill, self.decode) {
            (Stage::Over, ..) => Limit::Never,
            (Stage::Relaying(_), ..) => Limit::Body,
            (Stage::Deciding, Phase::HiddenError, _) => Limit::HiddenError,
            (Stage::Deciding, _, Phase::Responding { is_stream: true, has_data: false })
                if !self.is_merge =>
            {
                Limit::FirstEvent
            }
            (Stage::Deciding, ..) => Limit::Deadline,
        }
    }

    /// Decides what follows when this time is over: that of [`limit`](Self::limit), or the deadline.
    pub(super) fn on_limit(&mut self, limit: Limit) -> Action {
        match (limit, self.stage) {
            (Limit::Never, _) | (_, Stage::Over) => Action::Wait,
            (Limit::HiddenError, _) => {
                self.end();
                Action::RespondHiddenError
            }
            // The client gets the head, and events when there are any.
            (Limit::FirstEvent, _) => self.relay(Role::Decode),
            (Limit::Body | Limit::Deadline, Stage::Relaying(source)) => self.fail(source),
            (Limit::Body | Limit::Deadline, Stage::Deciding) => {
                let waits_for_prefill = self.is_merge && self.prefill != Phase::Ended;
                self.fail(if waits_for_prefill { Role::Prefill } else { Role::Decode })
            }
        }
    }

    /// The client has disconnected, or the router's grace period is over.
    #[cfg(test)]
    pub(super) fn on_cancel(&mut self) {
        self.end();
    }

    /// Whether prefill's response is drained beside decode's, and after its end: closing it could abort the
    /// transfer.
    pub(super) fn drains_prefill(&self) -> bool {
        self.stage != Stage::Relaying(Role::Prefill)
            && matches!(self.prefill, Phase::Sent | Phase::SentAgain | Phase::Responding { .. })
    }

    /// Whether both servers have the request.
    pub(super) fn is_sent(&self) -> bool {
        let is_sent = |phase| !matches!(phase, Phase::Connecting | Phase::Connected | Phase::Reconnecting);
        is_sent(self.prefill) && is_sent(self.decode)
    }

    /// Whether prefill's response is there as a whole.
    pub(super) fn has_prefill_ended(&self) -> bool {
        self.prefill == Phase::Ended
    }

    /// Whether a leg is to be closed.
    pub(super) fn is_over(&self, role: Role) -> bool {
        let phase = match role {
            Role::Prefill => self.prefill,
            Role::Decode | Role::Regular => self.decode,
        };
        phase == Phase::Over
    }

    fn relay(&mut self, source: Role) -> Action {
        // What has reported an error is closed, and the request is not at hand to be sent again.
        if matches!(self.prefill, Phase::HiddenError | Phase::Reconnecting) {
            self.prefill = Phase::Over;
        }
        self.stage = Stage::Relaying(source);
        Action::Relay(source)
    }

    fn fail(&mut self, role: Role) -> Action {
        self.end();
        Action::Fail(role)
    }

    fn end(&mut self) {
        (self.prefill, self.decode, self.stage) = (Phase::Over, Phase::Over, Stage::Over);
    }

    fn record_data(&mut self, role: Role) {
        if let Phase::Responding { has_data, .. } = self.phase(role) {
            *has_data = true;
        }
    }

    fn phase(&mut self, role: Role) -> &mut Phase {
        match role {
            Role::Prefill => &mut self.prefill,
            Role::Decode | Role::Regular => &mut self.decode,
        }
    }
}

fn other(role: Role) -> Role {
    match role {
        Role::Prefill => Role::Decode,
        Role::Decode | Role::Regular => Role::Prefill,
    }
}

#[cfg(test)]
mod tests;

//! Both legs of a request, or the one to a plain server: observes their events, asks
//! [`decision`](super::decision) what follows, and does it.
//!
//! Both legs are polled by the request's own task at every wait. Which bytes the client gets from them is for
//! [`relay`](super::relay); which servers they run on, for [`exchange`](super::exchange).

use std::mem::offset_of;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::warn;

use super::abort::AbortOnDrop;
use super::decision::{Action, Decision, LegEvent, Limit};
use super::leg::{ErrorSearch, HeldBody, HeldResponse, Leg, Reading};
use super::merge::PrefillLists;
use crate::admission::{AdmissionHandle, Reservation};
use crate::error::{Cause, Error};
use crate::http1::{OutgoingRequest, ResponseHead};
use crate::observe::record::LegRecord;
use crate::observe::report::log_limit;
use crate::timer::Timer;
use crate::upstream::{Backend, Pools, Registration, Role};
use crate::wire::logprobs::{Merge, PromptLogprobs};

/// How long the head of a stream waits for the first event, so that a failure in this time has an error
/// status. SGLang sends the head of a `/generate` stream before it does any work, so the client loses nothing
/// by the wait.
const FIRST_EVENT_GRACE: Duration = Duration::from_millis(100);

/// How long decode may still respond after an error event of prefill. Both servers reject a prompt that is
/// too long, for example, and then decode's response is the one that a single server would send.
const HIDDEN_ERROR_GRACE: Duration = Duration::from_millis(100);

/// The moment at which a timeout ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    /// The whole timeout, for the error message.
    pub(super) timeout: Duration,
}

impl Deadline {
    pub(super) fn from_now(timeout: Duration) -> Self {
        Self::since(Instant::now(), timeout)
    }

    pub(super) fn since(start: Instant, timeout: Duration) -> Self {
        Self { at: start + timeout, timeout }
    }
}

/// What the legs of one attempt need until they are decided.
pub(super) struct AttemptContext<'a, R> {
    pub(super) pools: &'a Arc<Pools>,
    pub(super) deadline: Deadline,
    /// When the client of a stream gets a head whether it is decided or not.
    pub(super) early_head_at: Option<Instant>,
    /// Makes the requests to prefill and to decode, each time the same.
    pub(super) requests: R,
}

/// The requests of one attempt. That to a plain server is in decode's place.
pub(super) struct LegRequests {
    pub(super) prefill: Option<OutgoingRequest>,
    pub(super) decode: OutgoingRequest,
}

/// A merge of both responses.
pub(super) struct MergeOptions<'a> {
    pub(super) merge: Merge,
    /// Decode's response is a stream that starts without prefill's, which only late events need.
    pub(super) is_late: bool,
    /// Most bytes of each response that are held.
    pub(super) max_held: usize,
    /// Where their memory is counted.
    pub(super) admission: &'a Arc<AdmissionHandle>,
}

/// How the wait for a decision ends.
pub(super) enum Wait {
    Decided(Action),
    /// It is not decided, and the client is to get the head of a stream.
    EarlyHead,
}

/// The two legs of one attempt. In this order, so that what a token needs of both is in one cache line.
#[repr(C)]
pub(super) struct LegPair {
    decision: Decision,
    decode: Leg,
    /// `None`: the other leg is that to a plain server.
    prefill: Option<Leg>,
    /// What follows from the connections that were open from the start.
    first_action: Action,
    /// For a merge.
    lists: Option<Box<PrefillLists>>,
    /// Of what a merge holds.
    memory: Option<Reservation>,
    /// The short limit in force, and when it ends.
    grace: Option<(Limit, Instant)>,
    /// A leg has its connection and has waited for its partner's.
    has_waited: bool,
    /// An event that is decided on after its partner's.
    postponed: Option<(Role, LegEvent)>,
    /// The servers whose kept-alive connection was stale, by role.
    resent: [bool; 2],
    abort: Option<Box<AbortOnDrop>>,
    /// Dropped with the legs: until then the request can be aborted by its id.
    _registration: Option<Registration>,
}

const _: () = assert!(offset_of!(LegPair, decode) + Leg::NEEDED_BY_A_TOKEN <= 64, "one cache line");

impl LegPair {
    /// Starts both legs, or the one to a plain server. With `merge` both responses are held until they can be
    /// merged; with a late one, prefill's.
    pub(super) fn new(
        pools: &Arc<Pools>,
        prefill: Option<LegRecord>,
        decode: LegRecord,
        merge: Option<MergeOptions<'_>>,
    ) -> Box<Self> {
        let is_held = merge.as_ref().is_some_and(|merge| !merge.is_late);
        let reading = |otherwise| match &merge {
            Some(merge) => Reading::Hold(HeldBody::new(merge.max_held)),
            None => otherwise,
        };
        let prefill =
            prefill.map(|prefill| Leg::new(pools, prefill, reading(Reading::Discard(ErrorSearch::Pending))));
        let decode = Leg::new(pools, decode, if is_held { reading(Reading::Peek) } else { Reading::Peek });
        let mut decision = if prefill.is_some() { Decision::new(is_held) } else { Decision::single() };
        let mut first_action = Action::Wait;
        for (role, leg) in [(Role::Prefill, prefill.as_ref()), (Role::Decode, Some(&decode))] {
            if leg.is_some_and(Leg::is_connected) {
                first_action = decision.on(role, LegEvent::Connected);
            }
        }
        // Boxed: it moves from the attempt to the response and on to the connection that writes it.
        Box::new(Self {
            decision,
            prefill,
            decode,
            first_action,
            lists: merge.as_ref().map(|merge| Box::new(PrefillLists::new(merge.merge, merge.is_late))),
            memory: merge.as_ref().map(|merge| Reservation::empty(merge.admission)),
            grace: None,
            has_waited: false,
            postponed: None,
            resent: [false; 2],
            abort: None,
            _registration: None,
        })
    }

    /// Makes the request one that is known by its id and, with `abort`, aborted if it ends early.
    pub(super) fn identify(&mut self, registration: Registration, abort: Option<AbortOnDrop>) {
        (self._registration, self.abort) = (Some(registration), abort.map(Box::new));
    }

    /// Reads in a plain server's response what it says of the prompt.
    pub(super) fn read_usage(&mut self) {
        self.decode.read_usage();
    }

    /// Runs both legs until the response can start, or the attempt has failed.
    pub(super) fn poll_decided(
        &mut self,
        context: &AttemptContext<'_, impl Fn() -> LegRequests>,
        timer: &mut Timer,
        cx: &mut Context<'_>,
    ) -> Poll<Wait> {
        loop {
            let Poll::Ready(action) = self.poll_action(context.deadline, timer, cx) else {
                let Some(early_head_at) = context.early_head_at.filter(|_| self.decision.is_sent()) else {
                    return Poll::Pending;
                };
                return timer.poll_until(early_head_at, cx).map(|()| Wait::EarlyHead);
            };
            match action {
                Action::Reconnect(role) => {
                    self.resent[role.leg()] = true;
                    self.leg_mut(role).reconnect(context.pools);
                }
                Action::SendBoth => {
                    self.abort.iter_mut().for_each(|abort| abort.arm());
                    let LegRequests { prefill, decode } = (context.requests)();
                    if let (Some(leg), Some(request)) = (&mut self.prefill, prefill) {
                        leg.send(request);
                    }
                    self.decode.send(decode);
                }
                Action::SendAgain(role) => {
                    let LegRequests { prefill, decode } = (context.requests)();
                    let of_prefill = prefill.filter(|_| role == Role::Prefill);
                    self.leg_mut(role).send(of_prefill.unwrap_or(decode));
                }
                decided => return Poll::Ready(Wait::Decided(decided)),
            }
        }
    }

    /// The next action that is more than to wait.
    pub(super) fn poll_action(
        &mut self,
        deadline: Deadline,
        timer: &mut Timer,
        cx: &mut Context<'_>,
    ) -> Poll<Action> {
        let first = std::mem::replace(&mut self.first_action, Action::Wait);
        if first != Action::Wait {
            return Poll::Ready(first);
        }
        loop {
            let event = self.poll_event(cx);
            self.charge_memory();
            let action = match event {
                Poll::Ready((role, event)) => self.decision.on(role, event),
                Poll::Pending => {
                    self.has_waited = true;
                    let limit = ready!(self.poll_limit(deadline, timer, cx));
                    let action = self.decision.on_limit(limit);
                    if let Action::Fail(role) = action {
                        self.leg_mut(role).set_failure(Cause::Timeout(deadline.timeout));
                    }
                    action
                }
            };
            if action != Action::Wait {
                self.close_what_is_over();
                return Poll::Ready(action);
            }
        }
    }

    /// Counts what a merge holds, also above the bound: it is under way, and ends only if it goes on.
    fn charge_memory(&mut self) {
        if let Some(memory) = &mut self.memory {
            let held = self.prefill.as_ref().map_or(0, Leg::held_length) + self.decode.held_length();
            memory.charge(held.saturating_sub(memory.bytes()));
        }
    }

    /// The memory that a merge holds. It is counted until this is dropped.
    pub(super) fn take_memory(&mut self) -> Option<Reservation> {
        self.memory.take()
    }

    /// The next event of either leg.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<(Role, LegEvent)> {
        if let Some(postponed) = self.postponed.take() {
            return Poll::Ready(postponed);
        }
        // Prefill first: without its KV cache decode waits for 300 s, so its failure decides.
        let (role, event) = match self.poll_prefill(cx) {
            Poll::Ready(event) => (Role::Prefill, event),
            Poll::Pending => (Role::Decode, ready!(self.decode.poll_event(cx))),
        };
        // While one leg waited for the other's connection, its own may have been closed as idle.
        if event == LegEvent::Connected && self.has_waited {
            let (other, leg) = match role {
                Role::Prefill => (Role::Decode, Some(&mut self.decode)),
                Role::Decode | Role::Regular => (Role::Prefill, self.prefill.as_mut()),
            };
            if let Some(Err(lost)) = leg.map(Leg::check_connection) {
                self.postponed = Some((role, event));
                return Poll::Ready((other, lost));
            }
        }
        Poll::Ready((role, event))
    }

    /// The next event of prefill. For a merge its response has ended when its lists are read.
    fn poll_prefill(&mut self, cx: &mut Context<'_>) -> Poll<LegEvent> {
        let Some(prefill) = &mut self.prefill else { return Poll::Pending };
        if self.lists.as_ref().is_none_or(|lists| lists.is_awaited()) {
            let event = ready!(prefill.poll_event(cx));
            if event != LegEvent::Ended {
                return Poll::Ready(event);
            }
            // Its last part is not counted yet.
            self.charge_memory();
            let prefill = self.leg_mut(Role::Prefill);
            let body = prefill.take_held();
            prefill.park();
            let Some(lists) = &mut self.lists else { return Poll::Ready(event) };
            lists.begin(body);
        }
        let Some(lists) = self.lists.as_mut().filter(|_| !self.decision.has_prefill_ended()) else {
            return Poll::Pending;
        };
        Poll::Ready(match ready!(lists.poll_read(cx)) {
            Ok(()) => LegEvent::Ended,
            Err(reason) => {
                self.leg_mut(Role::Prefill).set_failure(Cause::Unmergeable(reason));
                LegEvent::Broken
            }
        })
    }

    /// Waits until the time for the next event is over.
    fn poll_limit(&mut self, deadline: Deadline, timer: &mut Timer, cx: &mut Context<'_>) -> Poll<Limit> {
        let limit = self.decision.limit();
        let grace = match limit {
            Limit::FirstEvent => FIRST_EVENT_GRACE,
            Limit::HiddenError => HIDDEN_ERROR_GRACE,
            Limit::Deadline | Limit::Body | Limit::Never => {
                return timer.poll_until(deadline.at, cx).map(|()| Limit::Deadline);
            }
        };
        let ends = match self.grace {
            Some((begun, ends)) if begun == limit => ends,
            _ => Instant::now() + grace,
        };
        self.grace = Some((limit, ends));
        if deadline.at <= ends {
            return timer.poll_until(deadline.at, cx).map(|()| Limit::Deadline);
        }
        timer.poll_until(ends, cx).map(|()| limit)
    }

    fn close_what_is_over(&mut self) {
        let legs = [(Role::Prefill, self.prefill.as_mut()), (Role::Decode, Some(&mut self.decode))];
        for (role, leg) in legs {
            if let Some(leg) = leg.filter(|_| self.decision.is_over(role)) {
                leg.close();
            }
        }
    }

    /// The servers that got the request again because their kept-alive connection was stale.
    pub(super) fn resent(&self) -> impl Iterator<Item = &Arc<Backend>> {
        let legs = self.prefill.iter().chain([&self.decode]).map(Leg::backend);
        legs.filter(|backend| self.resent[backend.role().leg()])
    }

    /// The leg of this role. There is only one to a plain server.
    pub(super) fn leg(&self, role: Role) -> &Leg {
        // The role first: whether there is a prefill leg is a cache line away from decode's.
        match role {
            Role::Prefill => self.prefill.as_ref().unwrap_or(&self.decode),
            _ => &self.decode,
        }
    }

    pub(super) fn leg_mut(&mut self, role: Role) -> &mut Leg {
        match role {
            Role::Prefill => self.prefill.as_mut().unwrap_or(&mut self.decode),
            _ => &mut self.decode,
        }
    }

    /// The error of the leg on which the request has failed.
    pub(super) fn take_error(&mut self, role: Role) -> Error {
        let leg = self.leg_mut(role);
        leg.take_failure().unwrap_or_else(|| {
            // It has refused the request, which its outcome says already.
            let status = leg.status().map_or(0, |status| status.as_u16());
            Error::upstream(leg.backend(), Cause::LateRefusal(status))
        })
    }

    /// The head of the response that is relayed, and what was held of its body.
    pub(super) fn take_response(&mut self, source: Role) -> (ResponseHead, Vec<Bytes>) {
        let leg = self.leg_mut(source);
        (leg.take_head(), leg.take_held())
    }

    pub(super) fn take_hidden_error(&mut self) -> HeldResponse {
        self.leg_mut(Role::Prefill).take_hidden_error()
    }

    /// Prefill's lists, for a merge.
    pub(super) fn take_lists(&mut self) -> Option<PromptLogprobs> {
        self.lists.take().and_then(|lists| lists.into_lists())
    }

    /// Whether late events of decode's stream need prefill's lists.
    pub(super) fn has_late_merge(&self) -> bool {
        self.lists.as_ref().is_some_and(|lists| lists.is_late())
    }

    /// Takes prefill's lists for a late merge, or why there are none. `None` while they are awaited.
    pub(super) fn take_late_lists(&mut self) -> Option<Result<PromptLogprobs, Error>> {
        let taken = self.lists.as_mut().and_then(|lists| lists.take());
        // After an error event of its own, prefill's response was not read to its end.
        taken.or_else(|| (!self.decision.drains_prefill()).then(|| Err(self.take_error(Role::Prefill))))
    }

    /// Prefill has failed, and so far decode's response has not needed it.
    fn record_late_failure(&mut self) {
        let Some(mut lists) = self.lists.take() else {
            return log_late_failure(self.leg_mut(Role::Prefill));
        };
        lists.fail(self.take_error(Role::Prefill));
        self.leg_mut(Role::Prefill).close();
        self.lists = Some(lists);
    }

    /// Polls prefill beside decode's response. Returns why the response fails, if it depends on prefill.
    pub(super) fn poll_beside(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        while self.decision.drains_prefill() {
            let polled = self.poll_prefill(cx);
            self.charge_memory();
            let Poll::Ready(event) = polled else { return None };
            match self.decision.on(Role::Prefill, event) {
                Action::Fail(_) => return Some(self.take_error(Role::Prefill)),
                Action::LogLateFailure => self.record_late_failure(),
                _ => {}
            }
        }
        None
    }

    /// The next data of the response.
    pub(super) fn poll_data(
        &mut self,
        source: Role,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Error>>> {
        let data = ready!(self.leg_mut(source).poll_data(cx));
        if let Some(Err(_)) = &data {
            self.decision.on(source, LegEvent::Broken);
        }
        Poll::Ready(data)
    }

    /// The first bytes of the response have been passed on.
    pub(super) fn record_first_data(&mut self, source: Role) {
        self.decision.on(source, LegEvent::Data);
    }

    /// Ends a complete response. Returns prefill's leg if it is still to be drained.
    pub(super) fn finish(mut self: Box<Self>, source: Role) -> Option<Leg> {
        self.decision.on(source, LegEvent::Ended);
        self.abort.iter_mut().for_each(|abort| abort.disarm());
        self.leg_mut(source).park();
        let lists = self.lists.take();
        let prefill = self.prefill.as_mut()?;
        if let Some(lists) = lists {
            prefill.discard_held();
            if let Some(error) = lists.into_failure() {
                log_late_error(prefill, Some(error));
            }
        }
        // The request's record ends now, and prefill's head may come later.
        prefill.record_write_time();
        self.prefill.take_if(|_| self.decision.drains_prefill())
    }

    /// Fails a response that has started, for a reason that the router has found.
    pub(super) fn fail(&mut self, source: Role, cause: Cause) -> Error {
        let is_timeout = matches!(cause, Cause::Timeout(_));
        if is_timeout {
            self.decision.on_limit(Limit::Body);
        } else {
            self.decision.on(source, LegEvent::Broken);
        }
        self.leg_mut(source).fail_with(cause)
    }
}

/// Logs a failure of prefill that the client does not notice, because decode's response has started.
pub(super) fn log_late_failure(prefill: &mut Leg) {
    let error = prefill.take_failure();
    log_late_error(prefill, error);
    prefill.close();
}

fn log_late_error(prefill: &Leg, error: Option<Error>) {
    let (url, request_id) = (prefill.backend().url(), prefill.request_id().unwrap_or("-"));
    match (error, prefill.status()) {
        _ if !log_limit::allow("late_prefill") => {}
        // The error names the server.
        (Some(error), _) => warn!(
            request_id,
            code = error.code(),
            "{error}, after decode had started to respond; the client gets decode's response"
        ),
        (None, status) => warn!(
            request_id,
            status = status.map(|status| status.as_u16()),
            "prefill server {url} refused the request after decode had started to respond; the client gets \
             decode's response",
        ),
    }
}

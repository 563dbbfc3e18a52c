//! One request and its attempts: sends both legs at once, or the one to a plain server, and decides when and
//! with what the response starts.
//!
//! How it was read is for [`request`](super::request), and what the client receives from the start of the
//! response on for [`relay`](super::relay). Servers are chosen by `upstream`; here is decided only whether a
//! request is sent again.

use std::future::poll_fn;
use std::sync::Arc;

use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use tokio::time::Instant;
use tracing::debug;

use super::abort::AbortOnDrop;
use super::decision::Action;
use super::leg::HeldResponse;
use super::leg_pair::{AttemptContext, Deadline, LegPair, LegRequests, MergeOptions, Wait};
use super::merge;
use super::relay::{MAX_REFUSAL_PAUSE, Relay, TimeLimit};
use super::request::{Proxy, ReadRequest, SamplePlan};
use crate::admission::AdmissionHandle;
use crate::error::{Cause, Error, OwnResponse};
use crate::http1::{OutgoingBody, OutgoingRequest};
use crate::observe::record::{Attempt, RequestId, SampleRecord};
use crate::timer::Timer;
use crate::upstream::{Backend, Demand, Entered, InFlight, LiveFleet, PairPermits, Pools, Role, ServerPair};
use crate::wire::bootstrap::MAX_BOOTSTRAP_ROOM;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers;
use crate::wire::logprobs::StreamSplicer;
use crate::wire::shape::Prompt;

/// A response that has started.
pub(crate) struct UpstreamResponse {
    pub(crate) head: ClientResponseHead,
    /// Boxed, because it is moved several times on its way to the connection that writes it.
    pub(crate) body: Box<Relay>,
}

/// The head of a stream that begins with a comment, before a server has begun its response.
pub(super) fn early_head() -> ClientResponseHead {
    let mut head = OwnResponse::default();
    head.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    head.into_parts().0.into()
}

impl Proxy {
    /// Sends one sample of a request to a pair, and to another one after a failure that allows it. `admitted`
    /// is the pair if the requests in flight on each server are limited; otherwise the policy chooses it
    /// here. `prompt` is that of the request if it is in the record.
    pub(crate) async fn dispatch(
        &self,
        request: &ReadRequest,
        sample: &SamplePlan,
        admitted: Option<AdmittedPair>,
        prompt: Option<&Prompt>,
        record: &mut SampleRecord,
        timer: &mut Timer,
    ) -> Result<UpstreamResponse, Error> {
        let exchange =
            Exchange { fleet: &self.fleet, pools: &self.pools, admission: &self.admission, request, sample };
        let demand = request.demand(prompt);
        let admission = admitted.as_ref().map(|admitted| Arc::clone(&admitted.admission));
        let (mut pair, mut legs) = match admitted {
            Some(AdmittedPair { permits, admission }) => {
                let caps = admission.controller().caps();
                let permits = self.fleet.now().settle(permits, demand, caps, &admission);
                with_legs(permits.into_legs())
            }
            None => with_legs(self.fleet.now().enter_pair(demand).map_err(Error::NoServer)?),
        };
        let mut retries = request.limits.max_retries;
        loop {
            debug!(
                request_id = record.request_id().map(RequestId::as_str),
                prefill = pair.prefill().url(),
                decode = pair.decode().url(),
                prefill_rank = pair.prefill_rank(),
                decode_rank = pair.decode_rank(),
                selection = %pair.summary(),
                "selected a pair"
            );
            let mut resent = Vec::new();
            let result = exchange.attempt(record.begin_attempt(&pair), legs, timer, &mut resent).await;
            resent.iter().for_each(|backend| record.add_resend(backend));
            let retry = if retries > 0 { exchange.retry_target(&pair, &result) } else { None };
            let Some(failed) = retry else { return result.into_response() };
            record.add_retry(&failed, result.unsent_error());
            // Closes both legs before the next attempt: a leg without its partner holds a slot of its server,
            // for up to 300 s.
            drop(result);
            (pair, legs) =
                exchange.select_other_pair(&failed, demand, admission.as_ref()).map_err(Error::NoServer)?;
            retries -= 1;
        }
    }
}

/// The attempts of one sample.
struct Exchange<'a> {
    fleet: &'a LiveFleet,
    pools: &'a Arc<Pools>,
    admission: &'a Arc<AdmissionHandle>,
    request: &'a ReadRequest,
    sample: &'a SamplePlan,
}

impl Exchange<'_> {
    /// Selects a pair without the server that has failed, if its role has another one.
    fn select_other_pair(
        &self,
        failed: &Arc<Backend>,
        demand: Demand<'_>,
        admission: Option<&Arc<AdmissionHandle>>,
    ) -> Result<(ServerPair, Legs), Role> {
        let fleet = self.fleet.now();
        let entered = match admission {
            Some(admission) => {
                let caps = admission.controller().caps();
                fleet.acquire_other_pair(failed, demand, caps, admission).map(PairPermits::into_legs)
            }
            None => fleet.enter_other_pair(failed, demand),
        };
        entered.map(with_legs)
    }

    /// If the request is to be sent to another pair: the server to avoid.
    fn retry_target(&self, pair: &ServerPair, result: &AttemptResult) -> Option<Arc<Backend>> {
        match result {
            // Nothing was written to either server.
            AttemptResult::Unsent(error) => {
                debug!(code = error.code(), "retrying the request: {error}");
                error.server().cloned()
            }
            AttemptResult::ErrorResponse(role, response) => {
                let status = response.head.status().as_u16();
                if !self.request.limits.retry_on.contains(&status) {
                    return None;
                }
                let server = match role {
                    Role::Prefill => pair.prefill(),
                    Role::Decode | Role::Regular => pair.decode(),
                };
                let role = server.role();
                debug!(status, "retrying the request: {role} server {} responded {status}", server.url());
                Some(Arc::clone(server))
            }
            AttemptResult::Response(_) | AttemptResult::Failed(_) => None,
        }
    }

    /// Sends the request to one pair. If this fails, both legs have ended. The servers that got it again
    /// because their kept-alive connection was stale are appended to `resent`.
    async fn attempt(
        &self,
        attempt: Attempt<'_>,
        (on_prefill, on_decode): Legs,
        timer: &mut Timer,
        resent: &mut Vec<Arc<Backend>>,
    ) -> AttemptResult {
        let ReadRequest { limits, shape, deadline, .. } = self.request;
        let on_prefill = on_prefill.map(|on_prefill| attempt.begin_leg(on_prefill));
        let on_decode = attempt.begin_leg(on_decode);
        let (max_held, admission) = (limits.max_merge_size, self.admission);
        let merge = shape.merge.map(|merge| {
            let is_late = shape.stream && merge.is_late();
            MergeOptions { merge, is_late, max_held, admission }
        });
        let mut pair = LegPair::new(self.pools, on_prefill, on_decode, merge);
        if self.request.reads_usage {
            pair.read_usage();
        }
        let SamplePlan { rids, abort, is_copy, .. } = self.sample;
        if !rids.is_empty() {
            let abort = abort.as_ref().map(|abort| AbortOnDrop::new(abort, attempt.pair, self.pools));
            pair.identify(self.fleet.running().register(rids, attempt.pair), abort);
        }
        // A new room for each attempt: two live requests in one room crash both schedulers (sglang #40125),
        // and the last attempt may still be live on its servers. Decode takes room 0 for "not arrived yet".
        let bootstrap_room = attempt.pair.bootstrap_room(fastrand::u64(1..=MAX_BOOTSTRAP_ROOM));
        let requests = || self.leg_requests(&attempt, bootstrap_room);
        let early_head_at =
            limits.stream_keepalive.filter(|_| shape.stream && !is_copy).map(|after| Instant::now() + after);
        let context = AttemptContext { pools: self.pools, deadline: *deadline, early_head_at, requests };
        let wait = poll_fn(|cx| pair.poll_decided(&context, timer, cx)).await;
        resent.extend(pair.resent().map(Arc::clone));
        let action = match wait {
            Wait::Decided(action) => action,
            Wait::EarlyHead => return AttemptResult::Response(self.early_head(pair)),
        };
        match action {
            Action::Relay(source) => self.relay(pair, source),
            Action::RelayMerged => {
                attempt.set_merged();
                // Boxed: few requests need a merge, and the others would have a larger future.
                AttemptResult::Response(Box::pin(self.merge(pair)).await)
            }
            Action::RespondHiddenError => {
                let HeldResponse { head, body } = pair.take_hidden_error();
                let response = UpstreamResponse { head, body: Relay::buffered(body).into() };
                AttemptResult::ErrorResponse(Role::Prefill, response)
            }
            Action::OtherPair(role) => AttemptResult::Unsent(pair.take_error(role)),
            Action::Fail(role) => AttemptResult::Failed(pair.take_error(role)),
            // The others do not end an attempt.
            other => {
                debug_assert!(false, "{other:?} decides no attempt");
                AttemptResult::Failed(Error::Internal)
            }
        }
    }

    /// The requests to prefill and to decode, or to the plain server.
    fn leg_requests(&self, attempt: &Attempt<'_>, bootstrap_room: u64) -> LegRequests {
        let ReadRequest { upstream_head, body, shape, .. } = self.request;
        let SamplePlan { plan, .. } = self.sample;
        let (prefill, decode) = (attempt.pair.prefill(), attempt.pair.decode());
        let lines = |role| attempt.trace_headers(role);
        // A plain server has none, and gets the client's body.
        let Some(fields) = prefill.bootstrap() else {
            let request = self.generating_request(decode, lines(Role::Regular), &plan.single_body(body));
            return LegRequests { prefill: None, decode: request };
        };
        let told = attempt.pair.told_ranks();
        let bodies = if told.is_none() || shape.ranks.is_set {
            plan.bodies(body, fields, bootstrap_room)
        } else {
            plan.bodies_with_ranks(body, fields, bootstrap_room, told)
        };
        // Prefill's response is always read: it may be a refusal, also inside a stream.
        let to_prefill =
            upstream_head.for_readable_response(prefill.target(), lines(Role::Prefill), bodies.prefill());
        let to_decode = self.generating_request(decode, lines(Role::Decode), bodies.decode());
        LegRequests { prefill: Some(to_prefill), decode: to_decode }
    }

    /// The request to the server whose response the client gets.
    fn generating_request(&self, server: &Backend, lines: &[u8], body: &OutgoingBody) -> OutgoingRequest {
        let ReadRequest { limits, upstream_head, shape, .. } = self.request;
        // An early head with comments in plain text may go out before decode has chosen a coding.
        let is_plain = shape.merge.is_some()
            || self.sample.is_copy
            || (shape.stream && limits.stream_keepalive.is_some());
        if is_plain {
            upstream_head.for_readable_response(server.target(), lines, body)
        } else {
            upstream_head.for_backend(server.target(), lines, body)
        }
    }

    /// Passes on the response of one server.
    fn relay(&self, mut pair: Box<LegPair>, source: Role) -> AttemptResult {
        let (head, held) = pair.take_response(source);
        let (is_success, is_stream) = (head.status.is_success(), head.is_event_stream);
        let is_late = is_success && is_stream && pair.has_late_merge();
        if is_late && headers::unreadable_encoding(&head.headers).is_some() {
            let cause = Cause::Unmergeable("the response is compressed");
            return AttemptResult::Failed(pair.fail(source, cause));
        }
        // Plain text would be garbage in an encoded body.
        let is_readable = !headers::is_encoded(&head.headers);
        let time_limit = if is_success {
            self.time_limit(is_stream)
        } else {
            TimeLimit::new(Deadline::from_now(MAX_REFUSAL_PAUSE), Some(MAX_REFUSAL_PAUSE))
        };
        let late = is_late.then(|| StreamSplicer::late(self.request.limits.max_merge_size));
        let relay = Relay::pass_through(pair, source, held, late, time_limit);
        let format = self.request.dialect.into();
        let body = relay.with_event_stream(is_success && is_stream && is_readable, format).into();
        let mut head = ClientResponseHead::from(head);
        if is_late {
            // An event grows, by how much is not known before it comes.
            head.remove(&CONTENT_LENGTH);
        }
        let response = UpstreamResponse { head, body };
        if is_success {
            AttemptResult::Response(response)
        } else {
            AttemptResult::ErrorResponse(source, response)
        }
    }

    fn time_limit(&self, is_stream: bool) -> TimeLimit {
        let limits = &self.request.limits;
        if !is_stream {
            return TimeLimit::new(self.request.deadline, None);
        }
        let limit = TimeLimit::new(self.request.deadline, Some(limits.stream_idle_timeout));
        limit.with_keep_alive(limits.stream_keepalive)
    }

    /// The response to a stream that is not decided yet. Decode's head is not known, and is dropped later.
    fn early_head(&self, pair: Box<LegPair>) -> UpstreamResponse {
        let max_event = self.request.limits.max_merge_size;
        let relay = Relay::undecided(pair, max_event, self.time_limit(true));
        let body = relay.with_event_stream(true, self.request.dialect.into()).into();
        UpstreamResponse { head: early_head(), body }
    }

    /// Makes the response to a request for prompt logprobs, from both servers' responses.
    async fn merge(&self, mut pair: Box<LegPair>) -> UpstreamResponse {
        let (head, held) = pair.take_response(Role::Decode);
        let is_stream = head.is_event_stream;
        let mut head = ClientResponseHead::from(head);
        let lists = pair.take_lists().expect("a merge begins when the lists are read");
        if is_stream {
            // The events grow by prefill's logprobs, by how much is not known before the last one.
            head.remove(&CONTENT_LENGTH);
            let splicer = lists.into_splicer(self.request.limits.max_merge_size);
            let relay = Relay::merging(pair, held, splicer, self.time_limit(true));
            let body = relay.with_event_stream(true, self.request.dialect.into()).into();
            return UpstreamResponse { head, body };
        }
        let memory = pair.take_memory();
        pair.finish(Role::Decode);
        let body = merge::splice(lists, held).await;
        head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        UpstreamResponse { head, body: Relay::buffered(body).with_memory(memory).into() }
    }
}

/// What became of one attempt.
enum AttemptResult {
    /// A response with a status of success. Of a stream it is only the start.
    Response(UpstreamResponse),
    /// The error response of one server, of which nothing has been sent to the client.
    ErrorResponse(Role, UpstreamResponse),
    /// A server could not be connected, and nothing was written to either.
    Unsent(Error),
    Failed(Error),
}

impl AttemptResult {
    fn into_response(self) -> Result<UpstreamResponse, Error> {
        match self {
            Self::Response(response) | Self::ErrorResponse(_, response) => Ok(response),
            Self::Unsent(error) | Self::Failed(error) => Err(error),
        }
    }

    fn unsent_error(&self) -> Option<&Error> {
        match self {
            Self::Unsent(error) => Some(error),
            _ => None,
        }
    }
}

/// The entries of one request in the in-flight counts of prefill, if it runs on a pair, and of decode.
type Legs = (Option<InFlight>, InFlight);

/// A pair with a permit on each server. The permits were taken before the request's body was read.
pub(crate) struct AdmittedPair {
    pub(crate) permits: PairPermits,
    /// Wakes the wait queue when the permits are returned.
    pub(crate) admission: Arc<AdmissionHandle>,
}

fn with_legs((pair, on_prefill, on_decode): Entered) -> (ServerPair, Legs) {
    (pair, (on_prefill, on_decode))
}

//! One request and its attempts: sends both legs at once, and decides when and with what the response starts.
//!
//! What the client receives from then on is for [`relay`](super::relay). Servers are chosen by `upstream`;
//! here is decided only whether a request is sent again.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use tokio::time::{Instant, Sleep, sleep};
use tracing::debug;

use super::intake;
use super::leg::{
    CollectLimits, ConnectionChoice, Deadline, DeadlineTimer, ErrorResponse, Leg, PrefillEnd, PrefillRun,
    run_prefill,
};
use super::relay::{Relay, TimeLimit};
use crate::admission::AdmissionHandle;
use crate::error::{Cause, Error};
use crate::http1::{OutgoingRequest, RequestHead, ResponseHead};
use crate::observe::record::{Attempt, Record};
use crate::timer::Timer;
use crate::transport::RequestBody;
use crate::upstream::{Backend, InFlight, LiveFleet, PairPermits, Pools, Role, ServerPair};
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::MAX_BOOTSTRAP_ROOM;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{BodyShape, Dialect};
use crate::wire::upstream_request::UpstreamHead;

/// Sends generation requests to pairs of servers.
pub(crate) struct Proxy {
    fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    limits: Arc<ArcSwap<RequestLimits>>,
}

/// Bounds of one request.
pub(crate) struct RequestLimits {
    /// Largest request body, in bytes.
    pub(crate) max_payload_size: usize,
    /// Longest pause in the request body.
    pub(crate) body_idle_timeout: Duration,
    /// Most bytes of a response, or of one event, that are held in memory for a logprob merge.
    pub(crate) max_merge_size: usize,
    /// From the last byte of the request to the end of the response, or to the first byte of a stream.
    pub(crate) request_timeout: Duration,
    /// Longest pause in a stream.
    pub(crate) stream_idle_timeout: Duration,
    /// Most retries of a request.
    pub(crate) max_retries: u32,
    /// Statuses of a server upon which the request is retried.
    pub(crate) retry_on: Vec<u16>,
}

/// A generation request whose body has been read. It keeps its limits if a reload changes them.
pub(crate) struct ReadRequest {
    limits: Arc<RequestLimits>,
    upstream_head: UpstreamHead,
    body: ClientBody,
    shape: BodyShape,
    deadline: Deadline,
}

impl ReadRequest {
    /// Bounds of prefill's response if its body is needed, which is for a merge only. Then the client waits
    /// for prefill, and the deadline covers both legs.
    fn collect_limits(&self) -> Option<CollectLimits> {
        let limits = CollectLimits { max_bytes: self.limits.max_merge_size, deadline: self.deadline };
        self.shape.merge.map(|_| limits)
    }
}

/// A response that has started.
pub(crate) struct UpstreamResponse {
    pub(crate) head: ClientResponseHead,
    /// Boxed, because it is moved several times on its way to the connection that writes it.
    pub(crate) body: Box<Relay>,
}

impl Proxy {
    pub(crate) fn new(fleet: Arc<LiveFleet>, pools: Arc<Pools>, limits: Arc<ArcSwap<RequestLimits>>) -> Self {
        Self { fleet, pools, limits }
    }

    /// Reads the body of a generation request.
    pub(crate) async fn read(
        &self,
        dialect: Dialect,
        head: &RequestHead,
        request: &mut impl RequestBody,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<ReadRequest, Error> {
        let limits = self.limits.load_full();
        let (max, idle) = (limits.max_payload_size, limits.body_idle_timeout);
        let (body, shape, waited) = intake::read(&head.headers, request, dialect, max, idle, timer).await?;
        let now = Instant::now();
        record.body_read(body.len(), shape.stream, waited.then(|| now.into_std()));
        // SGLang runs the n samples of a request in one bootstrap room, and decode hangs (#24223, #26486).
        if shape.parallel_sampling {
            return Err(Error::ManySamples);
        }
        let deadline = Deadline::since(now, limits.request_timeout);
        let upstream_head = UpstreamHead::new(&head.method, head.target.as_str(), &head.headers, true);
        Ok(ReadRequest { limits, upstream_head, body, shape, deadline })
    }

    /// Sends a request to a pair, and again after a failure that allows a retry. `admitted` is the pair if
    /// the requests in flight on each server are limited; otherwise the policy chooses it here.
    pub(crate) async fn dispatch(
        &self,
        request: &ReadRequest,
        admitted: Option<AdmittedPair>,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<UpstreamResponse, Error> {
        let exchange = Exchange { fleet: &self.fleet, pools: &self.pools, request };
        let admission = admitted.as_ref().map(|admitted| Arc::clone(&admitted.admission));
        let (mut pair, mut legs) = match admitted {
            Some(admitted) => from_permits(admitted.permits),
            None => unlimited(self.fleet.now().select_pair().map_err(Error::NoServer)?),
        };
        let mut connection = ConnectionChoice::Any;
        let mut retries = request.limits.max_retries;
        loop {
            let attempt = record.begin_attempt(&pair);
            let result = exchange.attempt(&attempt, legs, connection, timer).await;
            let retry = if retries > 0 { exchange.retry_target(&pair, &result) } else { None };
            let Some((failed, next)) = retry else { return result.map(AttemptResult::into_response) };
            record.add_retry(&failed, result.as_ref().err());
            // Closes both legs before the next attempt: a leg without its partner holds a slot of its server,
            // for up to 300 s.
            drop(result);
            (pair, legs) =
                exchange.select_other_pair(&failed, admission.as_ref()).map_err(Error::NoServer)?;
            connection = next;
            retries -= 1;
        }
    }
}

/// The attempts of one request.
struct Exchange<'a> {
    fleet: &'a LiveFleet,
    pools: &'a Arc<Pools>,
    request: &'a ReadRequest,
}

impl Exchange<'_> {
    /// Selects a pair without the server that has failed, if its role has another one.
    fn select_other_pair(
        &self,
        failed: &Arc<Backend>,
        admission: Option<&Arc<AdmissionHandle>>,
    ) -> Result<(ServerPair, Legs), Role> {
        let fleet = self.fleet.now();
        match admission {
            Some(admission) => {
                fleet.acquire_other_pair(failed, admission.controller().caps(), admission).map(from_permits)
            }
            None => fleet.select_other_pair(failed).map(unlimited),
        }
    }

    /// If the request is to be retried: the server to avoid, and which connections to use.
    fn retry_target(
        &self,
        pair: &ServerPair,
        result: &Result<AttemptResult, Error>,
    ) -> Option<(Arc<Backend>, ConnectionChoice)> {
        match result {
            // No server can have read the request, so a retry does not run it twice. Other pooled connections
            // may be as stale as this one was.
            Err(error) if error.is_unseen() => {
                debug!(code = error.code(), "retrying the request: {error}");
                Some((Arc::clone(error.server()?), ConnectionChoice::New))
            }
            Ok(AttemptResult::ErrorResponse(role, response)) => {
                let status = response.head.status().as_u16();
                if !self.request.limits.retry_on.contains(&status) {
                    return None;
                }
                let server = match role {
                    Role::Prefill => pair.prefill(),
                    Role::Decode => pair.decode(),
                };
                debug!(status, "retrying the request: {role} server {} responded {status}", server.url());
                Some((Arc::clone(server), ConnectionChoice::Any))
            }
            _ => None,
        }
    }

    /// The requests to prefill and to decode, which share one body.
    fn leg_requests(&self, attempt: &Attempt<'_>) -> (OutgoingRequest, OutgoingRequest) {
        let ReadRequest { upstream_head, body, shape, .. } = self.request;
        let (prefill, decode) = (attempt.pair.prefill(), attempt.pair.decode());
        let fields = prefill.bootstrap().expect("a prefill server has bootstrap fields");
        // A new room for each attempt: two live requests in one room crash both schedulers (sglang #40125),
        // and the last attempt may still be live on its servers. Decode takes room 0 for "not arrived yet".
        let body = body.with_bootstrap(&shape.edit, fields, fastrand::u64(1..=MAX_BOOTSTRAP_ROOM));
        let lines = |role| attempt.trace_headers(role);
        // Prefill's response is always read: it may be a refusal, also inside a stream.
        let to_prefill =
            upstream_head.for_readable_response(prefill.host_header(), lines(Role::Prefill), &body);
        let to_decode = match shape.merge {
            Some(_) => upstream_head.for_readable_response(decode.host_header(), lines(Role::Decode), &body),
            None => upstream_head.for_backend(decode.host_header(), lines(Role::Decode), &body),
        };
        (to_prefill, to_decode)
    }

    /// Sends the request to one pair. If this fails, both legs have ended.
    async fn attempt(
        &self,
        attempt: &Attempt<'_>,
        (on_prefill, on_decode): Legs,
        connection: ConnectionChoice,
        timer: &mut Timer,
    ) -> Result<AttemptResult, Error> {
        let (to_prefill, to_decode) = self.leg_requests(attempt);
        let collect = self.request.collect_limits();
        let (on_prefill, on_decode) = (attempt.begin_leg(on_prefill), attempt.begin_leg(on_decode));
        let prefill = run_prefill(Arc::clone(self.pools), on_prefill, to_prefill, connection, collect);
        let mut prefill = PrefillLeg::Running(prefill);
        let mut timer = DeadlineTimer { deadline: self.request.deadline, timer };
        // Both at once: prefill responds only after decode has connected to it and taken the KV cache, so one
        // leg after the other would wait for SGLang's own timeout of 300 s.
        let winner = {
            // Pinned here: passed by value, the future would be copied at every step to where it is polled.
            let decode = Leg::start(self.pools, on_decode, to_decode, connection, Some(&mut timer));
            prefill.race(pin!(decode)).await?
        };
        let (head, leg) = match winner {
            RaceWinner::Decode(response) => response,
            RaceWinner::PrefillError(response) => return Ok(AttemptResult::prefill_error(response)),
        };
        if !head.status.is_success() {
            // Prefill is dropped with it: no one takes its KV cache.
            return Ok(self.decode_error(head, leg));
        }
        let Some(merge) = self.request.shape.merge else {
            return self.pass_through(prefill, head, leg, timer).await;
        };
        let body = match prefill.end().await? {
            PrefillEnd::Completed(body) => body,
            PrefillEnd::ErrorResponse { response, .. } => return Ok(AttemptResult::prefill_error(response)),
        };
        attempt.set_merged();
        // Boxed: few requests need a merge, and the others would have a larger future.
        let merged = Box::pin(self.merge(attempt.pair, merge, &body, head, leg, timer));
        merged.await.map(AttemptResult::Response)
    }

    /// Decode's error response, which is passed on as it arrives, within the deadline.
    fn decode_error(&self, head: ResponseHead, leg: Leg) -> AttemptResult {
        let relay = Relay::pass_through(leg, None, self.time_limit(false, self.request.deadline));
        let response = UpstreamResponse { head: head.into(), body: relay.into() };
        AttemptResult::ErrorResponse(Role::Decode, response)
    }

    /// Makes the response of decode's alone. Until decode's body starts, the failure of either leg can still
    /// become a response with an error status.
    async fn pass_through(
        &self,
        mut prefill: PrefillLeg,
        head: ResponseHead,
        mut leg: Leg,
        DeadlineTimer { deadline, timer }: DeadlineTimer<'_>,
    ) -> Result<AttemptResult, Error> {
        let is_stream = head.is_event_stream;
        let grace = if is_stream { Instant::now() + FIRST_EVENT_GRACE } else { deadline.at };
        let winner = {
            let started = pin!(prefill.race(leg.body_started()));
            timer.before(grace.min(deadline.at), started).await.transpose()?
        };
        match winner {
            Some(RaceWinner::Decode(())) => {}
            Some(RaceWinner::PrefillError(response)) => return Ok(AttemptResult::prefill_error(response)),
            // The grace is over, but not the timeout: the client gets the head, and
            // events when there are any.
            None if grace < deadline.at => {}
            None => return Err(leg.record_failure(Cause::Timeout(deadline.timeout))),
        }
        let prefill = match prefill {
            // The head is due and decode is silent: an error status is worth more than the rest of its grace.
            PrefillLeg::HiddenError(response, _) if !leg.has_body_started() => {
                return Ok(AttemptResult::prefill_error(response));
            }
            PrefillLeg::Running(run) => Some(run),
            PrefillLeg::Completed(_) | PrefillLeg::HiddenError(..) => None,
        };
        let relay = Relay::pass_through(leg, prefill, self.time_limit(is_stream, deadline));
        // An error event in plain text cannot be read behind a body in a coding.
        let takes_events = is_stream && !headers::is_encoded(&head.headers);
        let body = relay.with_event_stream(takes_events).into();
        Ok(AttemptResult::Response(UpstreamResponse { head: head.into(), body }))
    }

    fn time_limit(&self, is_stream: bool, deadline: Deadline) -> TimeLimit {
        TimeLimit::new(deadline, is_stream.then_some(self.request.limits.stream_idle_timeout))
    }

    /// Makes the response to a request for prompt logprobs, from both servers' responses.
    async fn merge(
        &self,
        pair: &ServerPair,
        merge: Merge,
        prefill: &Bytes,
        head: ResponseHead,
        leg: Leg,
        mut deadline: DeadlineTimer<'_>,
    ) -> Result<UpstreamResponse, Error> {
        let unmergeable = |server: &Arc<Backend>, what| Error::upstream(server, Cause::Unmergeable(what));
        let lists = PromptLogprobs::read(merge, prefill)
            .map_err(|error| unmergeable(pair.prefill(), error.reason))?;
        let is_stream = head.is_event_stream;
        if headers::unreadable_encoding(&head.headers).is_some() {
            return Err(unmergeable(pair.decode(), "the response is compressed"));
        }
        let max = self.request.limits.max_merge_size;
        let mut head = ClientResponseHead::from(head);
        if is_stream {
            // The events grow by prefill's logprobs, by how much is not known before the last one.
            head.remove(&CONTENT_LENGTH);
            let time_limit = self.time_limit(true, deadline.deadline);
            let relay = Relay::merging(leg, lists.into_splicer(max), time_limit);
            return Ok(UpstreamResponse { head, body: relay.with_event_stream(true).into() });
        }
        let body = lists.splice_body(&leg.collect(max, Some(&mut deadline)).await?);
        head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(UpstreamResponse { head, body: Relay::buffered(body).into() })
    }
}

/// What a pair responded to one attempt.
enum AttemptResult {
    /// A response with a status of success. Of a stream it is only the start.
    Response(UpstreamResponse),
    /// The error response of one server, of which nothing has been sent to the client.
    ErrorResponse(Role, UpstreamResponse),
}

impl AttemptResult {
    fn prefill_error(ErrorResponse { mut head, body }: ErrorResponse) -> Self {
        // The body was read whole, whatever its framing was, or is one event of a stream.
        head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Self::ErrorResponse(Role::Prefill, UpstreamResponse { head, body: Relay::buffered(body).into() })
    }

    fn into_response(self) -> UpstreamResponse {
        match self {
            Self::Response(response) | Self::ErrorResponse(_, response) => response,
        }
    }
}

/// How long the head of a stream waits for the first event, so that a failure in this time has an error
/// status. SGLang sends the head of a `/generate` stream before it does any work, so the client loses nothing
/// by the wait.
const FIRST_EVENT_GRACE: Duration = Duration::from_millis(100);

/// How long decode may still respond after an error event of prefill. Both servers reject a prompt that is
/// too long, for example, and then decode's response is the one that a single server would send.
const HIDDEN_ERROR_GRACE: Duration = Duration::from_millis(100);

/// Which leg decides the response.
enum RaceWinner<T> {
    /// Decode has what was waited for.
    Decode(T),
    /// Prefill has responded with an error.
    PrefillError(ErrorResponse),
}

/// The prefill leg while decode's response is waited for.
enum PrefillLeg {
    Running(PrefillRun),
    /// With the response's body, for a merge.
    Completed(Bytes),
    /// It has failed inside a 200. Decode has until the end of [`HIDDEN_ERROR_GRACE`].
    HiddenError(ErrorResponse, Pin<Box<Sleep>>),
}

impl PrefillLeg {
    /// Waits for `decode`, or for prefill to fail. Both are polled in the request's own task.
    async fn race<T>(
        &mut self,
        decode: impl Future<Output = Result<T, Error>>,
    ) -> Result<RaceWinner<T>, Error> {
        let mut decode = pin!(decode);
        std::future::poll_fn(|cx| {
            // Prefill first: without its KV cache decode waits for 300 s, so its failure decides.
            if let Self::Running(run) = self
                && let Poll::Ready(end) = Pin::new(run).poll(cx)
            {
                match end? {
                    PrefillEnd::Completed(body) => *self = Self::Completed(body),
                    PrefillEnd::ErrorResponse { response, hidden: false } => {
                        return Poll::Ready(Ok(RaceWinner::PrefillError(response)));
                    }
                    PrefillEnd::ErrorResponse { response, hidden: true } => {
                        *self = Self::HiddenError(response, Box::pin(sleep(HIDDEN_ERROR_GRACE)));
                    }
                }
            }
            if let Poll::Ready(result) = decode.as_mut().poll(cx) {
                return Poll::Ready(result.map(RaceWinner::Decode));
            }
            let Self::HiddenError(response, grace) = self else { return Poll::Pending };
            ready!(grace.as_mut().poll(cx));
            Poll::Ready(Ok(RaceWinner::PrefillError(std::mem::take(response))))
        })
        .await
    }

    /// Waits for the end of the leg.
    async fn end(self) -> Result<PrefillEnd, Error> {
        match self {
            Self::Running(run) => run.await,
            Self::Completed(body) => Ok(PrefillEnd::Completed(body)),
            Self::HiddenError(response, _) => Ok(PrefillEnd::ErrorResponse { response, hidden: true }),
        }
    }
}

/// The entries of one request in the in-flight counts of prefill and of decode.
type Legs = (InFlight, InFlight);

/// A pair with a permit on each server. The permits were taken before the request's body was read.
pub(crate) struct AdmittedPair {
    pub(crate) permits: PairPermits,
    /// Wakes the wait queue when the permits are returned.
    pub(crate) admission: Arc<AdmissionHandle>,
}

fn from_permits(permits: PairPermits) -> (ServerPair, Legs) {
    let (pair, on_prefill, on_decode) = permits.into_legs();
    (pair, (on_prefill, on_decode))
}

/// Counts a request in flight on servers that have no limit.
fn unlimited(pair: ServerPair) -> (ServerPair, Legs) {
    let enter = |server: &Arc<Backend>| InFlight::enter(Arc::clone(server));
    let legs = (enter(pair.prefill()), enter(pair.decode()));
    (pair, legs)
}

//! One request and its attempts: sends both legs at once, or the one to a plain server, and decides when and
//! with what the response starts.
//!
//! What the client receives from then on is for [`relay`](super::relay). Servers are chosen by `upstream`;
//! here is decided only whether a request is sent again.

use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use tokio::time::Instant;
use tracing::debug;

use super::abort::{AbortOnDrop, AbortRequest, new_rid};
use super::decision::Action;
use super::intake::{self, IntakeLimits, ReadBody};
use super::leg::HeldResponse;
use super::leg_pair::{AttemptContext, Deadline, LegPair, LegRequests, MergeOptions, Wait};
use super::merge;
use super::relay::{MAX_REFUSAL_PAUSE, Relay, TimeLimit};
use crate::admission::{AdmissionHandle, Reservation};
use crate::error::{Cause, Error, OwnResponse};
use crate::http1::{BodyTimeouts, HeaderId, OutgoingBody, OutgoingRequest, RawHeaders, RequestHead};
use crate::observe::record::{Attempt, Record, RequestId, SampleRecord};
use crate::timer::Timer;
use crate::transport::RequestBody;
use crate::upstream::{
    Backend, Demand, Entered, InFlight, LiveFleet, Needs, PairPermits, Pools, Role, ServerPair,
};
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::MAX_BOOTSTRAP_ROOM;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers;
use crate::wire::logprobs::StreamSplicer;
use crate::wire::plan::{OwnIds, RequestPlan};
use crate::wire::shape::{BodyShape, Dialect, HashKey, InternalFields, Prompt, RequestedSamples, key_hash};
use crate::wire::upstream_request::UpstreamHead;

/// Sends generation requests to pairs of servers.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(super) fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    limits: Arc<ArcSwap<RequestLimits>>,
    /// Where memory for bodies is reserved.
    pub(super) admission: Arc<AdmissionHandle>,
}

/// Bounds of one request.
pub(crate) struct RequestLimits {
    /// Largest request body, in bytes.
    pub(crate) max_payload_size: usize,
    pub(crate) body_timeouts: BodyTimeouts,
    /// Most bytes of a response, or of one event, that are held in memory for a logprob merge.
    pub(crate) max_merge_size: usize,
    /// From the last byte of the request to the end of the response, or to the first byte of a stream.
    pub(crate) request_timeout: Duration,
    /// Longest pause in a stream.
    pub(crate) stream_idle_timeout: Duration,
    /// A stream that is silent for this long gets a comment.
    pub(crate) stream_keepalive: Option<Duration>,
    /// Most retries of a request.
    pub(crate) max_retries: u32,
    /// Statuses of a server upon which the request is retried.
    pub(crate) retry_on: Vec<u16>,
    /// Headers that name a request's conversation, the first of which counts.
    pub(crate) hash_key_headers: Vec<String>,
    pub(crate) internal_fields: InternalFields,
    /// Servers are asked to abort a request whose client has left.
    pub(crate) abort_on_disconnect: bool,
    /// Most samples of each prompt (`n`).
    pub(crate) max_samples: u32,
}

/// Random in each process, and the same for all workers: they share what they know of prompts.
static HASH_KEY: LazyLock<HashKey> =
    LazyLock::new(|| HashKey::from_random(RandomState::new().build_hasher().finish()));

/// How prompts are hashed, if a policy or a load trace wants to know them.
fn hash_key(needs: Needs, is_traced: bool) -> Option<HashKey> {
    match needs {
        Needs { prompt: true, .. } => Some(*HASH_KEY),
        Needs { key: true, .. } => Some(HashKey::STABLE),
        Needs { .. } => is_traced.then(|| *HASH_KEY),
    }
}

/// A generation request whose body has been read. It keeps its limits if a reload changes them.
pub(crate) struct ReadRequest {
    pub(super) limits: Arc<RequestLimits>,
    pub(super) dialect: Dialect,
    upstream_head: UpstreamHead,
    body: ClientBody,
    /// Its prompt is in the record if a load trace is written: it outlives this.
    pub(super) shape: BodyShape,
    /// If it has one sample.
    own: SamplePlan,
    /// What a plain server says of the prompt is for a policy that knows prompts.
    reads_usage: bool,
    /// The hash of a header that names the conversation.
    key: Option<u64>,
    pub(super) deadline: Deadline,
    /// Of the body's memory. Dropped after it.
    _reservation: Reservation,
}

/// What servers get for one sample of a request, and by which ids they know it.
pub(crate) struct SamplePlan {
    plan: RequestPlan,
    rids: Vec<String>,
    /// With which servers are asked to abort it.
    abort: Option<Arc<AbortRequest>>,
    /// It is one of several, whose responses are merged.
    is_copy: bool,
}

impl SamplePlan {
    /// Of a request with one sample.
    fn new(plan: RequestPlan, rids: Vec<String>, limits: &RequestLimits, headers: &RawHeaders) -> Self {
        let is_aborted = limits.abort_on_disconnect && !rids.is_empty();
        let abort = is_aborted.then(|| Arc::new(AbortRequest::new(&rids, headers)));
        Self { plan, rids, abort, is_copy: false }
    }

    /// The ids that servers know it by.
    pub(super) fn rids(&self) -> &[String] {
        &self.rids
    }

    /// Of one of several samples. `rid` is this copy's own.
    pub(super) fn of_copy(request: &ReadRequest, rid: Option<String>, headers: &RawHeaders) -> Self {
        // The client's part of it may be any text.
        let escaped = rid.as_ref().map(|rid| serde_json::json!(rid).to_string());
        let ids = OwnIds { rid: escaped.as_deref().map(|rid| &rid[1..rid.len() - 1]), request_id: None };
        let fields = &request.shape.fields;
        let plan = match &request.shape.samples {
            RequestedSamples::Many(samples) => RequestPlan::sglang_sample(fields, samples, ids),
            RequestedSamples::One | RequestedSamples::Refused(_) => RequestPlan::sglang(fields, ids),
        };
        Self { is_copy: true, ..Self::new(plan, Vec::from_iter(rid), &request.limits, headers) }
    }
}

impl ReadRequest {
    /// What its servers get, if it has one sample.
    pub(crate) fn own(&self) -> &SamplePlan {
        &self.own
    }

    /// How many samples of each prompt it has.
    pub(crate) fn samples(&self) -> u32 {
        match &self.shape.samples {
            RequestedSamples::Many(samples) => samples.count,
            RequestedSamples::One | RequestedSamples::Refused(_) => 1,
        }
    }

    /// What policies may know of it. `kept` is its prompt if it is in the record.
    fn demand<'a>(&'a self, kept: Option<&'a Prompt>) -> Demand<'a> {
        let prompt = self.shape.prompt.as_ref().or(kept);
        Demand { prompt, body: self.body.len() as u64, key: self.key, ranks: self.shape.ranks }
    }
}

/// A response that has started.
pub(crate) struct UpstreamResponse {
    pub(crate) head: ClientResponseHead,
    /// Boxed, because it is moved several times on its way to the connection that writes it.
    pub(crate) body: Box<Relay>,
}

impl Proxy {
    pub(crate) fn new(
        fleet: Arc<LiveFleet>,
        pools: Arc<Pools>,
        limits: Arc<ArcSwap<RequestLimits>>,
        admission: Arc<AdmissionHandle>,
    ) -> Self {
        Self { fleet, pools, limits, admission }
    }

    /// Reads the body of a generation request, or of another one (no dialect) that a plain server gets.
    pub(crate) async fn read(
        &self,
        dialect: Option<Dialect>,
        head: &RequestHead,
        request: &mut impl RequestBody,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<ReadRequest, Error> {
        let limits = self.limits.load_full();
        let (max, timeouts) = (limits.max_payload_size, limits.body_timeouts);
        let (needs, refuses_media, is_regular) = {
            let fleet = self.fleet.now();
            (fleet.needs(), fleet.encoders().are_down(), fleet.is_regular())
        };
        let is_traced = record.wants_prompt();
        let is_lenient = is_regular && limits.internal_fields.passes_all();
        // Fields that an operator does not want at servers are looked for in any JSON.
        let looks = !is_lenient && !is_multipart(&head.headers);
        let scanned = dialect.or(looks.then_some(Dialect::Generate));
        let reading = IntakeLimits {
            max,
            timeouts,
            admission: &self.admission,
            hash_key: hash_key(needs, is_traced),
            // With the key alone all hashes are the same in every process.
            stable_prefix: needs.prompt && needs.key,
            internal_fields: limits.internal_fields,
            refuses_media,
            is_lenient,
        };
        let read = intake::read(&head.headers, request, scanned, reading, timer).await?;
        let ReadBody { body, mut shape, waited, reservation } = read;
        let now = Instant::now();
        record.body_read(body.len(), shape.stream, waited.then(|| now.into_std()));
        if !is_regular {
            check_samples(&shape, &limits)?;
            if shape.has_previous_response {
                return Err(Error::PreviousResponse);
            }
        }
        if is_traced && let Some(prompt) = shape.prompt.take() {
            record.set_prompt(prompt);
        }
        let deadline = Deadline::since(now, limits.request_timeout);
        let upstream_head = UpstreamHead::new(&head.method, head.target.as_str(), &head.headers, !is_regular);
        let names = limits.hash_key_headers.iter().filter(|_| needs.key);
        let key = names.filter_map(|name| head.headers.get(name.as_str())).next().map(key_hash);
        let reads_usage = is_regular && needs.prompt && dialect.is_some();
        let dialect = dialect.unwrap_or(Dialect::Generate);
        let own = match is_regular {
            true => plain_plan(&mut shape, &limits, &head.headers),
            false => plan(dialect, &mut shape, &limits, &head.headers),
        };
        Ok(ReadRequest {
            limits,
            dialect,
            upstream_head,
            body,
            shape,
            own,
            reads_usage,
            key,
            deadline,
            _reservation: reservation,
        })
    }

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

/// What the legs of a request with one sample get, and with what they are aborted, if they are. An id that
/// the router sets is one of its ids from then on.
fn plan(dialect: Dialect, shape: &mut BodyShape, limits: &RequestLimits, headers: &RawHeaders) -> SamplePlan {
    let is_response = dialect == Dialect::Responses;
    // Each of the two servers would draw another id for the response.
    let response_id =
        (is_response && !shape.has_request_id).then(|| format!("resp_{:032x}", fastrand::u128(..)));
    let needs_rid = limits.abort_on_disconnect && !is_response && !shape.has_rid;
    let rid = if needs_rid { new_rid() } else { None };
    let ids = OwnIds { rid: rid.as_deref(), request_id: response_id.as_deref() };
    let plan = RequestPlan::sglang(&shape.fields, ids);
    let mut rids = std::mem::take(&mut shape.rids);
    rids.extend(rid.into_iter().chain(response_id));
    SamplePlan::new(plan, rids, limits, headers)
}

/// What a plain server gets: the client's body, without fields that an operator does not want there. Nothing
/// is merged, the server itself makes several samples, and a request can be aborted by the client's own ids
/// only.
fn plain_plan(shape: &mut BodyShape, limits: &RequestLimits, headers: &RawHeaders) -> SamplePlan {
    (shape.merge, shape.samples) = (None, RequestedSamples::One);
    let plan = match limits.internal_fields.passes_all() {
        true => RequestPlan::untouched(),
        false => RequestPlan::sglang(&shape.fields, OwnIds::default()),
    };
    SamplePlan::new(plan, std::mem::take(&mut shape.rids), limits, headers)
}

/// Whether a body is a form, which has no fields of JSON: SGLang takes audio so.
fn is_multipart(headers: &RawHeaders) -> bool {
    let media_type = headers.get(HeaderId::ContentType).unwrap_or_default();
    media_type.get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"multipart/"))
}

/// Rejects what a regular server rejects, and more samples than are allowed.
fn check_samples(shape: &BodyShape, limits: &RequestLimits) -> Result<(), Error> {
    match &shape.samples {
        RequestedSamples::Many(samples) if samples.count > limits.max_samples => {
            Err(Error::TooManySamples { samples: samples.count, limit: limits.max_samples })
        }
        RequestedSamples::Refused(refused) => Err(Error::InvalidSamples(refused)),
        RequestedSamples::One | RequestedSamples::Many(_) => Ok(()),
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
        let mut head = OwnResponse::default();
        head.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        let max_event = self.request.limits.max_merge_size;
        let relay = Relay::undecided(pair, max_event, self.time_limit(true));
        let body = relay.with_event_stream(true, self.request.dialect.into()).into();
        UpstreamResponse { head: head.into_parts().0.into(), body }
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

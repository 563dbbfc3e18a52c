//! A generation request as it is read: its bounds, and what its servers get of it.
//!
//! Which servers those are, and what becomes of their responses, is for [`exchange`](super::exchange).

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::abort::{AbortRequest, new_rid};
use super::intake::{self, IntakeLimits, ReadBody};
use super::leg_pair::Deadline;
use crate::admission::{AdmissionHandle, Reservation};
use crate::error::Error;
use crate::http1::{BodyTimeouts, HeaderId, RawHeaders, RequestHead};
use crate::observe::record::Record;
use crate::timer::Timer;
use crate::transport::RequestBody;
use crate::upstream::{Demand, LiveFleet, Needs, Pools};
use crate::wire::body::ClientBody;
use crate::wire::plan::{OwnIds, RequestPlan};
use crate::wire::shape::{BodyShape, Dialect, HashKey, InternalFields, Prompt, RequestedSamples, key_hash};
use crate::wire::upstream_request::UpstreamHead;

/// Reads requests, and sends them ([`dispatch`](Self::dispatch)) to pairs of servers or to plain ones.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(super) fleet: Arc<LiveFleet>,
    pub(super) pools: Arc<Pools>,
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
    pub(super) upstream_head: UpstreamHead,
    pub(super) body: ClientBody,
    /// Its prompt is in the record if a load trace is written: it outlives this.
    pub(super) shape: BodyShape,
    /// If it has one sample.
    own: SamplePlan,
    /// What a plain server says of the prompt is for a policy that knows prompts.
    pub(super) reads_usage: bool,
    /// The hash of a header that names the conversation.
    key: Option<u64>,
    pub(super) deadline: Deadline,
    /// Of the body's memory. Dropped after it.
    _reservation: Reservation,
}

/// What servers get for one sample of a request, and by which ids they know it.
pub(crate) struct SamplePlan {
    pub(super) plan: RequestPlan,
    /// The ids that servers know it by.
    pub(super) rids: Vec<String>,
    /// With which servers are asked to abort it.
    pub(super) abort: Option<Arc<AbortRequest>>,
    /// It is one of several, whose responses are merged.
    pub(super) is_copy: bool,
}

impl SamplePlan {
    /// Of a request with one sample.
    fn new(plan: RequestPlan, rids: Vec<String>, limits: &RequestLimits, headers: &RawHeaders) -> Self {
        let is_aborted = limits.abort_on_disconnect && !rids.is_empty();
        let abort = is_aborted.then(|| Arc::new(AbortRequest::new(&rids, headers)));
        Self { plan, rids, abort, is_copy: false }
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
    pub(super) fn demand<'a>(&'a self, kept: Option<&'a Prompt>) -> Demand<'a> {
        let prompt = self.shape.prompt.as_ref().or(kept);
        Demand { prompt, body: self.body.len() as u64, key: self.key, ranks: self.shape.ranks }
    }
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

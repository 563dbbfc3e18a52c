//! One client request, two legs: sends both at once and decides when and with
//! what the answer starts.

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
use crate::http1::{RequestHead, ResponseHead};
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

/// Sends requests to pairs of servers.
pub(crate) struct Proxy {
    fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    limits: Arc<ArcSwap<RequestLimits>>,
}

/// What a request may take.
pub(crate) struct RequestLimits {
    /// Bytes of its body.
    pub(crate) max_payload_size: usize,
    /// Between two pieces of its body.
    pub(crate) body_idle_timeout: Duration,
    /// Bytes of an answer, or of one event, that are held for a logprob merge.
    pub(crate) max_merge_size: usize,
    /// From its last byte to the end of the answer, or to the first byte of a stream.
    pub(crate) request_timeout: Duration,
    /// Between two pieces of a stream.
    pub(crate) stream_idle_timeout: Duration,
    /// How often a request is sent again.
    pub(crate) max_retries: u32,
    /// With which statuses a server says that another one should be asked.
    pub(crate) retry_on: Vec<u16>,
}

/// A generation request that has been read. It keeps the limits that it began with.
pub(crate) struct ReadRequest {
    limits: Arc<RequestLimits>,
    outgoing: UpstreamHead,
    body: ClientBody,
    shape: BodyShape,
    deadline: Deadline,
}

/// An answer that has begun.
pub(crate) struct UpstreamResponse {
    pub(crate) head: ClientResponseHead,
    pub(crate) body: Box<Relay>,
}

impl Proxy {
    pub(crate) fn new(fleet: Arc<LiveFleet>, pools: Arc<Pools>, limits: Arc<ArcSwap<RequestLimits>>) -> Self {
        Self { fleet, pools, limits }
    }

    /// Reads a generation request.
    pub(crate) async fn read(
        &self,
        dialect: Dialect,
        head: &RequestHead,
        upload: &mut impl RequestBody,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<ReadRequest, Error> {
        let limits = self.limits.load_full();
        let (max, idle) = (limits.max_payload_size, limits.body_idle_timeout);
        let (body, shape, waited) = intake::read(&head.fields, upload, dialect, max, idle, timer).await?;
        let now = Instant::now();
        record.body_read(body.len(), shape.stream, waited.then(|| now.into_std()));
        if shape.parallel_sampling {
            return Err(Error::ManySamples);
        }
        let deadline = Deadline::since(now, limits.request_timeout);
        let outgoing = UpstreamHead::new(&head.method, head.target.as_str(), &head.fields, true);
        Ok(ReadRequest { limits, outgoing, body, shape, deadline })
    }

    /// Answers a request. One that no server can have seen is sent again, and one that was refused with a
    /// status that says so. Where servers have so many requests at a time only, it comes with its seats.
    pub(crate) async fn dispatch(
        &self,
        asked: &ReadRequest,
        seats: Option<AdmittedPair>,
        record: &mut Record,
        timer: &mut Timer,
    ) -> Result<UpstreamResponse, Error> {
        let exchange = Exchange { fleet: &self.fleet, pools: &self.pools, asked };
        let limited = seats.as_ref().map(|seated| Arc::clone(&seated.admission));
        let (mut pair, mut legs) = match seats {
            Some(seated) => from_permits(seated.permits),
            None => unlimited(self.fleet.now().select_pair().map_err(Error::NoServer)?),
        };
        let mut connection = ConnectionChoice::Any;
        let mut retries = asked.limits.max_retries;
        loop {
            let attempt = record.begin_attempt(&pair);
            let answered = exchange.attempt(&attempt, legs, connection, timer).await;
            let again = if retries > 0 { exchange.sent_again(&pair, &answered) } else { None };
            let Some((server, next)) = again else { return answered.map(Answered::into_answer) };
            record.add_retry(&server, answered.as_ref().err());
            // Both legs end here.
            drop(answered);
            (pair, legs) = exchange.other(&server, limited.as_ref()).map_err(Error::NoServer)?;
            connection = next;
            retries -= 1;
        }
    }
}

/// One request's way.
struct Exchange<'a> {
    fleet: &'a LiveFleet,
    pools: &'a Arc<Pools>,
    asked: &'a ReadRequest,
}

impl Exchange<'_> {
    /// Another pair than the one of a server that has failed.
    fn other(
        &self,
        failed: &Arc<Backend>,
        limited: Option<&Arc<AdmissionHandle>>,
    ) -> Result<(ServerPair, Legs), Role> {
        let fleet = self.fleet.now();
        match limited {
            Some(entrance) => {
                fleet.acquire_other_pair(failed, entrance.controller().caps(), entrance).map(from_permits)
            }
            None => fleet.select_other_pair(failed).map(unlimited),
        }
    }

    /// Whether a request is sent again after this: which server is to be avoided, and on which connections.
    fn sent_again(
        &self,
        pair: &ServerPair,
        answered: &Result<Answered, Error>,
    ) -> Option<(Arc<Backend>, ConnectionChoice)> {
        match answered {
            Err(error) if error.is_unseen() => {
                debug!(code = error.code(), "sending again: {error}");
                Some((Arc::clone(error.server()?), ConnectionChoice::New))
            }
            Ok(Answered::Refused(role, refusal))
                if self.asked.limits.retry_on.contains(&refusal.head.status().as_u16()) =>
            {
                let server = match role {
                    Role::Prefill => pair.prefill(),
                    Role::Decode => pair.decode(),
                };
                debug!(
                    status = refusal.head.status().as_u16(),
                    "sending again: {role} server {} refused",
                    server.url()
                );
                Some((Arc::clone(server), ConnectionChoice::Any))
            }
            _ => None,
        }
    }

    /// Sends a request to a pair, in a room of its own. Both legs have ended when this fails.
    async fn attempt(
        &self,
        attempt: &Attempt<'_>,
        (on_prefill, on_decode): Legs,
        connection: ConnectionChoice,
        timer: &mut Timer,
    ) -> Result<Answered, Error> {
        let ReadRequest { limits, outgoing, body, shape, deadline } = self.asked;
        let deadline = *deadline;
        let pair = attempt.pair;
        let fields = pair.prefill().bootstrap().expect("a prefill server has bootstrap fields");
        let body = body.with_bootstrap(&shape.edit, fields, fastrand::u64(1..=MAX_BOOTSTRAP_ROOM));
        let to = |server: &Backend, role| {
            outgoing.for_backend(server.host_header(), attempt.trace_headers(role), &body)
        };
        let (to_prefill, to_decode) = (to(pair.prefill(), Role::Prefill), to(pair.decode(), Role::Decode));
        let keep = shape.merge.map(|_| CollectLimits { most: limits.max_merge_size, deadline });
        let on_prefill = attempt.begin_leg(on_prefill);
        let prefill = run_prefill(Arc::clone(self.pools), on_prefill, to_prefill, connection, keep);
        let mut prefill = Prefill::Running(prefill);
        let mut limit = DeadlineTimer { deadline, timer };
        let begun = {
            let on_decode = attempt.begin_leg(on_decode);
            // Pinned here: handed on by value, it would be copied at every step on the way to where it is polled.
            let decode = Leg::start(self.pools, on_decode, to_decode, connection, Some(&mut limit));
            prefill.race_prefill_failure(pin!(decode)).await?
        };
        let (head, leg) = match begun {
            First::Decode(begun) => begun,
            First::Refused(refusal) => return Ok(Answered::by_prefill(refusal)),
        };
        match shape.merge {
            // Decode's refusal is the answer; prefill is dropped.
            _ if !head.status.is_success() => {
                let body = Relay::piped(leg, None, self.time_limit(false, deadline));
                Ok(Answered::Refused(Role::Decode, UpstreamResponse { head: head.into(), body: body.into() }))
            }
            None => self.piped(prefill, head, leg, limit).await,
            Some(merge) => match prefill.end().await? {
                PrefillEnd::Answered(lists) => {
                    attempt.set_merged();
                    // Boxed, so that requests with nothing to merge are not as large.
                    let merged = Box::pin(self.merged(pair, merge, &lists, head, leg, limit));
                    merged.await.map(Answered::Prefixed)
                }
                PrefillEnd::Refused { refusal, .. } => Ok(Answered::by_prefill(refusal)),
            },
        }
    }

    /// Makes the answer of decode's alone. Until something of its body is there, either leg can still fail with a
    /// status of its own.
    async fn piped(
        &self,
        mut prefill: Prefill,
        head: ResponseHead,
        mut leg: Leg,
        DeadlineTimer { deadline, timer }: DeadlineTimer<'_>,
    ) -> Result<Answered, Error> {
        let events = head.is_event_stream;
        // A `/generate` stream has its head at once, and its first event when prefill is done.
        let grace = if events { Instant::now() + HEAD_GRACE } else { deadline.at };
        let begun = {
            let begun = pin!(prefill.race_prefill_failure(leg.begun()));
            timer.before(grace.min(deadline.at), begun).await.transpose()?
        };
        match begun {
            Some(First::Decode(())) => {}
            Some(First::Refused(refusal)) => return Ok(Answered::by_prefill(refusal)),
            None if grace < deadline.at => {}
            None => return Err(leg.fail(Cause::Timeout(deadline.after))),
        }
        let prefill = match prefill {
            Prefill::Refusing(PrefillEnd::Refused { refusal, .. }, _) if !leg.has_begun() => {
                return Ok(Answered::by_prefill(refusal));
            }
            Prefill::Running(run) => Some(run),
            Prefill::Answered(_) | Prefill::Refusing(..) => None,
        };
        let relay = Relay::piped(leg, prefill, self.time_limit(events, deadline));
        Ok(Answered::Prefixed(UpstreamResponse { head: head.into(), body: relay.with_events(events).into() }))
    }

    fn time_limit(&self, events: bool, deadline: Deadline) -> TimeLimit {
        TimeLimit::new(deadline, events.then_some(self.asked.limits.stream_idle_timeout))
    }

    /// Makes the answer to a request for prompt logprobs, of both servers' answers.
    async fn merged(
        &self,
        pair: &ServerPair,
        merge: Merge,
        prefill: &Bytes,
        head: ResponseHead,
        leg: Leg,
        mut limit: DeadlineTimer<'_>,
    ) -> Result<UpstreamResponse, Error> {
        let unmergeable = |server: &Arc<Backend>, what| Error::upstream(server, Cause::Unmergeable(what));
        let lists = PromptLogprobs::read(merge, prefill)
            .map_err(|error| unmergeable(pair.prefill(), error.reason))?;
        let events = head.is_event_stream;
        if headers::unreadable_encoding(&head.fields).is_some() {
            return Err(unmergeable(pair.decode(), "the answer is compressed"));
        }
        let max = self.asked.limits.max_merge_size;
        let mut head = ClientResponseHead::from(head);
        if events {
            head.remove(&CONTENT_LENGTH);
            let relay = Relay::spliced(leg, lists.into_splicer(max), self.time_limit(true, limit.deadline));
            return Ok(UpstreamResponse { head, body: relay.with_events(true).into() });
        }
        let body = lists.splice_body(&leg.collect(max, Some(&mut limit)).await?);
        head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(UpstreamResponse { head, body: Relay::whole(body).into() })
    }
}

/// What came of sending a request to a pair.
enum Answered {
    /// What was asked for, or the beginning of it.
    Prefixed(UpstreamResponse),
    /// One server's own words, of which the client has seen nothing yet.
    Refused(Role, UpstreamResponse),
}

impl Answered {
    /// Prefill's own words.
    fn by_prefill(ErrorResponse { mut head, body }: ErrorResponse) -> Self {
        head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Self::Refused(Role::Prefill, UpstreamResponse { head, body: Relay::whole(body).into() })
    }

    fn into_answer(self) -> UpstreamResponse {
        match self {
            Self::Prefixed(answer) | Self::Refused(_, answer) => answer,
        }
    }
}

/// How long a stream's head waits for its first event, so that a failure in this time has a status. The client
/// loses nothing: a head says no more than that the server listens.
const HEAD_GRACE: Duration = Duration::from_millis(100);

/// What comes first: what decode was asked for, or prefill's refusal.
enum First<T> {
    Decode(T),
    Refused(ErrorResponse),
}

/// How long decode may still answer when prefill has refused within a 200. A prompt that is too long, say, is
/// refused by both in this way, and decode's answer is the one that a single server would give.
const HIDDEN_GRACE: Duration = Duration::from_millis(100);

/// The prefill leg, beside decode's.
enum Prefill {
    Running(PrefillRun),
    Answered(Bytes),
    /// It has refused within a 200; until the timer ends decode may answer.
    Refusing(PrefillEnd, Pin<Box<Sleep>>),
}

impl Prefill {
    /// Waits for `decode`, and for prefill to fail. Whatever it waits for is polled in this one task.
    async fn race_prefill_failure<T>(
        &mut self,
        decode: impl Future<Output = Result<T, Error>>,
    ) -> Result<First<T>, Error> {
        let mut decode = pin!(decode);
        std::future::poll_fn(|cx| {
            // Prefill first: when it has failed, decode's silence means nothing.
            if let Self::Running(run) = self
                && let Poll::Ready(end) = run.as_mut().poll(cx)
            {
                match end? {
                    PrefillEnd::Answered(answer) => *self = Self::Answered(answer),
                    PrefillEnd::Refused { refusal, hidden: false, .. } => {
                        return Poll::Ready(Ok(First::Refused(refusal)));
                    }
                    hidden => *self = Self::Refusing(hidden, Box::pin(sleep(HIDDEN_GRACE))),
                }
            }
            if let Poll::Ready(begun) = decode.as_mut().poll(cx) {
                return Poll::Ready(begun.map(First::Decode));
            }
            match self {
                Self::Refusing(PrefillEnd::Refused { refusal, .. }, timer) => {
                    ready!(timer.as_mut().poll(cx));
                    Poll::Ready(Ok(First::Refused(std::mem::take(refusal))))
                }
                _ => Poll::Pending,
            }
        })
        .await
    }

    /// Waits for its end.
    async fn end(self) -> Result<PrefillEnd, Error> {
        match self {
            Self::Running(run) => run.await,
            Self::Answered(answer) => Ok(PrefillEnd::Answered(answer)),
            Self::Refusing(refused, _) => Ok(refused),
        }
    }
}

/// The request under way on prefill, and on decode.
type Legs = (InFlight, InFlight);

/// A pair with a place on each server, taken before the request was read.
pub(crate) struct AdmittedPair {
    pub(crate) permits: PairPermits,
    /// Who is told when they are free.
    pub(crate) admission: Arc<AdmissionHandle>,
}

fn from_permits(seats: PairPermits) -> (ServerPair, Legs) {
    let (pair, on_prefill, on_decode) = seats.into_legs();
    (pair, (on_prefill, on_decode))
}

fn unlimited(pair: ServerPair) -> (ServerPair, Legs) {
    let enter = |server: &Arc<Backend>| InFlight::enter(Arc::clone(server));
    let legs = (enter(pair.prefill()), enter(pair.decode()));
    (pair, legs)
}

//! One client request, two legs: sends both at once and decides when and with
//! what the answer starts.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::http::response;
use hyper::{Request, Response};
use tokio::time::{Sleep, sleep};
use tracing::debug;

use super::intake;
use super::leg::{Connection, Deadline, Keep, Leg, PrefillEnd, PrefillRun, run_prefill};
use super::relay::{Relay, TimeLimit};
use crate::error::{Cause, Error};
use crate::gate::Entrance;
use crate::record::{Attempt, Record};
use crate::upstream::{Backend, InFlight, LiveFleet, Pools, Role, Seats, ServerPair};
use crate::wire::answer::Head;
use crate::wire::body::ClientBody;
use crate::wire::bootstrap::MAX_ROOM;
use crate::wire::headers;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::request::RequestHead;
use crate::wire::shape::{Dialect, Shape};

/// Sends requests to pairs of servers.
pub(crate) struct Proxy {
    fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    limits: Arc<ArcSwap<Limits>>,
}

/// One request's way. It keeps the limits that it began with.
pub(crate) struct Exchange<'a> {
    fleet: &'a LiveFleet,
    pools: &'a Arc<Pools>,
    limits: Arc<Limits>,
}

/// What a request may take.
pub(crate) struct Limits {
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

impl Proxy {
    pub(crate) fn new(fleet: Arc<LiveFleet>, pools: Arc<Pools>, limits: Arc<ArcSwap<Limits>>) -> Self {
        Self { fleet, pools, limits }
    }

    pub(crate) fn begin(&self) -> Exchange<'_> {
        Exchange { fleet: &self.fleet, pools: &self.pools, limits: self.limits.load_full() }
    }
}

impl Exchange<'_> {
    /// Answers a generation request. One that no server can have seen is sent again, and one that was refused with a
    /// status that says so. Where servers have so many requests at a time only, it comes with its seats.
    pub(crate) async fn handle(
        &self,
        dialect: Dialect,
        request: Request<Incoming>,
        seats: Option<Seated>,
        record: &mut Record,
    ) -> Result<Response<Relay>, Error> {
        let (head, body) = request.into_parts();
        let (body, shape) = intake::read(
            &head.headers,
            body,
            dialect,
            self.limits.max_payload_size,
            self.limits.body_idle_timeout,
        )
        .await?;
        record.body_read(body.len(), shape.stream);
        if shape.many_samples {
            return Err(Error::ManySamples);
        }
        let deadline = Deadline::after(self.limits.request_timeout);
        let outgoing = RequestHead::new(&head.method, head.uri.path_and_query(), &head.headers, true);
        let limited = seats.as_ref().map(|seated| Arc::clone(&seated.entrance));
        let (mut pair, mut legs) = match seats {
            Some(seated) => divided(seated.seats),
            None => entered(self.fleet.now().select_pair().map_err(Error::NoServer)?),
        };
        let mut connection = Connection::Any;
        let mut retries = self.limits.max_retries;
        loop {
            let attempt = record.sent_to(&pair);
            let answered = self.attempt(&attempt, legs, connection, &outgoing, &body, &shape, deadline).await;
            let again = if retries > 0 { self.sent_again(&pair, &answered) } else { None };
            let Some((server, next)) = again else { return answered.map(Answered::into_response) };
            record.tried_again(&server, answered.as_ref().err());
            // Both legs end here.
            drop(answered);
            (pair, legs) = self.other(&server, limited.as_ref()).map_err(Error::NoServer)?;
            connection = next;
            retries -= 1;
        }
    }

    /// Another pair than the one of a server that has failed.
    fn other(
        &self,
        failed: &Arc<Backend>,
        limited: Option<&Arc<Entrance>>,
    ) -> Result<(ServerPair, Legs), Role> {
        let fleet = self.fleet.now();
        match limited {
            Some(entrance) => fleet.other_seats(failed, entrance.gate().caps(), entrance).map(divided),
            None => fleet.select_other_pair(failed).map(entered),
        }
    }

    /// Whether a request is sent again after this: which server is to be avoided, and on which connections.
    fn sent_again(
        &self,
        pair: &ServerPair,
        answered: &Result<Answered, Error>,
    ) -> Option<(Arc<Backend>, Connection)> {
        match answered {
            Err(error) if error.is_unseen() => {
                debug!(code = error.code(), "sending again: {error}");
                Some((Arc::clone(error.server()?), Connection::New))
            }
            Ok(Answered::Refused(role, refusal))
                if self.limits.retry_on.contains(&refusal.status().as_u16()) =>
            {
                let server = match role {
                    Role::Prefill => pair.prefill(),
                    Role::Decode => pair.decode(),
                };
                debug!(
                    status = refusal.status().as_u16(),
                    "sending again: {role} server {} refused",
                    server.url()
                );
                Some((Arc::clone(server), Connection::Any))
            }
            _ => None,
        }
    }

    /// Sends a request to a pair, in a room of its own. Both legs have ended when this fails.
    #[expect(
        clippy::too_many_arguments,
        reason = "what stays the same from one attempt to the next, and what does not"
    )]
    async fn attempt(
        &self,
        attempt: &Attempt<'_>,
        (on_prefill, on_decode): Legs,
        connection: Connection,
        outgoing: &RequestHead,
        body: &ClientBody,
        shape: &Shape,
        deadline: Deadline,
    ) -> Result<Answered, Error> {
        let pair = attempt.pair;
        let fields = pair.prefill().bootstrap().expect("a prefill server has bootstrap fields");
        let body = body.with_fields(&shape.edit, fields, fastrand::u64(1..=MAX_ROOM));
        let to_prefill =
            outgoing.to(pair.prefill().host_header(), attempt.lines(Role::Prefill), body.clone());
        let to_decode = outgoing.to(pair.decode().host_header(), attempt.lines(Role::Decode), body);
        let keep = shape.merge.map(|_| Keep { limit: self.limits.max_merge_size, deadline });
        let on_prefill = attempt.leg(on_prefill);
        let prefill = run_prefill(Arc::clone(self.pools), on_prefill, to_prefill, connection, keep);
        let mut prefill = Prefill::Running(prefill);
        // Pinned here: handed on by value, it would be copied at every step on the way to where it is polled.
        let decode =
            pin!(Leg::start(self.pools, attempt.leg(on_decode), to_decode, connection, Some(deadline)));
        let (head, leg) = match prefill.unless_it_fails(decode).await? {
            First::Decode(begun) => begun,
            First::Refused(answer) => return Ok(Answered::by_prefill(answer)),
        };
        match shape.merge {
            // Decode's refusal is the answer; prefill is dropped.
            _ if !head.status.is_success() => {
                let answer =
                    reply(head.into_parts(), Relay::piped(leg, None, self.time_limit(false, deadline)));
                Ok(Answered::Refused(Role::Decode, answer))
            }
            None => self.piped(prefill, head, leg, deadline).await,
            Some(merge) => match prefill.end().await? {
                PrefillEnd::Answered(lists) => {
                    attempt.merges();
                    // Boxed, so that requests with nothing to merge are not as large.
                    let merged = Box::pin(self.merged(pair, merge, &lists, head, leg, deadline));
                    merged.await.map(Answered::Begun)
                }
                PrefillEnd::Refused { answer, .. } => Ok(Answered::by_prefill(answer)),
            },
        }
    }

    /// Makes the answer of decode's alone. Until something of its body is there, either leg can still fail with a
    /// status of its own.
    async fn piped(
        &self,
        mut prefill: Prefill,
        head: Head,
        mut leg: Leg,
        deadline: Deadline,
    ) -> Result<Answered, Error> {
        let events = head.is_event_stream;
        let begun = prefill.unless_it_fails(leg.begun());
        let begun = if events {
            // A `/generate` stream has its head at once, and its first event when prefill is done.
            tokio::time::timeout(HEAD_GRACE, begun).await.unwrap_or(Ok(First::Decode(())))
        } else {
            begun.await
        };
        let prefill = match (begun?, prefill) {
            (First::Refused(answer), _) => return Ok(Answered::by_prefill(answer)),
            (_, Prefill::Refusing(PrefillEnd::Refused { answer, .. }, _)) if !leg.has_begun() => {
                return Ok(Answered::by_prefill(answer));
            }
            (_, Prefill::Running(run)) => Some(run),
            (_, Prefill::Answered(_) | Prefill::Refusing(..)) => None,
        };
        let relay = Relay::piped(leg, prefill, self.time_limit(events, deadline));
        Ok(Answered::Begun(reply(head.into_parts(), relay.with_events(events))))
    }

    fn time_limit(&self, events: bool, deadline: Deadline) -> TimeLimit {
        TimeLimit::new(deadline, events.then_some(self.limits.stream_idle_timeout))
    }

    /// Makes the answer to a request for prompt logprobs, of both servers' answers.
    async fn merged(
        &self,
        pair: &ServerPair,
        merge: Merge,
        prefill: &Bytes,
        head: Head,
        leg: Leg,
        deadline: Deadline,
    ) -> Result<Response<Relay>, Error> {
        let unmergeable = |server: &Arc<Backend>, what| Error::upstream(server, Cause::Unmergeable(what));
        let lists =
            PromptLogprobs::read(merge, prefill).map_err(|error| unmergeable(pair.prefill(), error.what))?;
        let events = head.is_event_stream;
        let mut head = head.into_parts();
        if headers::unreadable_encoding(&head.headers).is_some() {
            return Err(unmergeable(pair.decode(), "the answer is compressed"));
        }
        if events {
            head.headers.remove(CONTENT_LENGTH);
            let splicer = lists.into_splicer(self.limits.max_merge_size);
            let relay = Relay::spliced(leg, splicer, self.time_limit(true, deadline));
            return Ok(reply(head, relay.with_events(true)));
        }
        let body = leg.collect(self.limits.max_merge_size).await?;
        let body = lists.splice_body(&body);
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(reply(head, Relay::whole(body)))
    }
}

/// What came of sending a request to a pair.
enum Answered {
    /// What was asked for, or the beginning of it.
    Begun(Response<Relay>),
    /// One server's own words, of which the client has seen nothing yet.
    Refused(Role, Response<Relay>),
}

impl Answered {
    fn by_prefill(answer: Response<Bytes>) -> Self {
        Self::Refused(Role::Prefill, refusal(answer))
    }

    fn into_response(self) -> Response<Relay> {
        match self {
            Self::Begun(answer) | Self::Refused(_, answer) => answer,
        }
    }
}

/// How long a stream's head waits for its first event, so that a failure in this time has a status. The client
/// loses nothing: a head says no more than that the server listens.
const HEAD_GRACE: Duration = Duration::from_millis(100);

/// What comes first: what decode was asked for, or prefill's refusal.
enum First<T> {
    Decode(T),
    Refused(Response<Bytes>),
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
    async fn unless_it_fails<T>(
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
                    PrefillEnd::Refused { answer, hidden: false, .. } => {
                        return Poll::Ready(Ok(First::Refused(answer)));
                    }
                    hidden => *self = Self::Refusing(hidden, Box::pin(sleep(HIDDEN_GRACE))),
                }
            }
            if let Poll::Ready(begun) = decode.as_mut().poll(cx) {
                return Poll::Ready(begun.map(First::Decode));
            }
            match self {
                Self::Refusing(PrefillEnd::Refused { answer, .. }, timer) => {
                    ready!(timer.as_mut().poll(cx));
                    Poll::Ready(Ok(First::Refused(std::mem::take(answer))))
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
pub(crate) struct Seated {
    pub(crate) seats: Seats,
    /// Who is told when they are free.
    pub(crate) entrance: Arc<Entrance>,
}

fn divided(seats: Seats) -> (ServerPair, Legs) {
    let (pair, on_prefill, on_decode) = seats.into_legs();
    (pair, (on_prefill, on_decode))
}

fn entered(pair: ServerPair) -> (ServerPair, Legs) {
    let enter = |server: &Arc<Backend>| InFlight::enter(Arc::clone(server));
    let legs = (enter(pair.prefill()), enter(pair.decode()));
    (pair, legs)
}

fn reply(mut head: response::Parts, body: Relay) -> Response<Relay> {
    headers::for_client(&mut head.headers);
    Response::from_parts(head, body)
}

/// Prefill's own words, when it refused.
fn refusal(answer: Response<Bytes>) -> Response<Relay> {
    let (mut head, body) = answer.into_parts();
    head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    reply(head, Relay::whole(body))
}

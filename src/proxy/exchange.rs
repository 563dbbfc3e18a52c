//! One client request, two legs: sends both at once and decides when and with
//! what the answer starts.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::http::{request, response};
use hyper::{Request, Response, Uri};
use tokio::time::Instant;

use super::intake;
use super::leg::{Leg, PrefillEnd, PrefillRun, run_prefill};
use super::relay::Relay;
use crate::error::{Cause, Error};
use crate::upstream::{Backend, Fleet, InFlight, Pools, ServerPair};
use crate::wire::body::LegBody;
use crate::wire::bootstrap::MAX_ROOM;
use crate::wire::headers;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::shape::{Dialect, Shape};

/// Sends requests to pairs of servers.
pub(crate) struct Proxy {
    fleet: Arc<Fleet>,
    pools: Arc<Pools>,
    limits: Limits,
}

/// What a request may take.
pub(crate) struct Limits {
    /// Bytes of its body.
    pub(crate) max_payload_size: usize,
    /// Bytes of an answer, or of one event, that are held for a logprob merge.
    pub(crate) max_merge_size: usize,
    /// From its last byte to the end of the answer, or to the first byte of a stream.
    pub(crate) request_timeout: Duration,
}

impl Proxy {
    pub(crate) fn new(fleet: Arc<Fleet>, pools: Arc<Pools>, limits: Limits) -> Self {
        Self { fleet, pools, limits }
    }

    /// Answers a generation request.
    pub(crate) async fn handle(
        &self,
        dialect: Dialect,
        request: Request<Incoming>,
    ) -> Result<Response<Relay>, Error> {
        let (head, body) = request.into_parts();
        let (body, shape) = intake::read(&head.headers, body, dialect, self.limits.max_payload_size).await?;
        if shape.many_samples {
            return Err(Error::ManySamples);
        }
        let deadline = Instant::now() + self.limits.request_timeout;
        let pair = self.fleet.select_pair();
        let fields = pair.prefill().bootstrap().expect("a prefill server has bootstrap fields");
        let body = body.with_fields(&shape.edit, fields, fastrand::u64(1..=MAX_ROOM));
        let (to_prefill, to_decode) = leg_requests(head, &pair, body);

        let keep = shape.merge.map(|_| self.limits.max_merge_size);
        let prefill = run_prefill(Arc::clone(&self.pools), enter(pair.prefill()), to_prefill, keep);
        let decode = Leg::start(&self.pools, enter(pair.decode()), to_decode);
        self.answer(pair.clone(), prefill, decode, &shape, deadline).await
    }

    /// Waits for decode's head, unless prefill fails first, and makes the answer of it.
    async fn answer(
        &self,
        pair: ServerPair,
        mut prefill: PrefillRun,
        decode: impl Future<Output = Result<(response::Parts, Leg), Error>>,
        shape: &Shape,
        deadline: Instant,
    ) -> Result<Response<Relay>, Error> {
        let mut prefill_end = None;
        let started = self.before(deadline, pair.decode(), first_of(&mut prefill, &mut prefill_end, decode));
        let (head, leg) = match started.await? {
            Start::Decode(head, leg) => (head, leg),
            Start::Refused(answer) => return Ok(refusal(answer)),
        };
        let prefill = if prefill_end.is_some() { None } else { Some(prefill) };
        let Some(merge) = shape.merge.filter(|_| head.status.is_success()) else {
            let prefill = prefill.filter(|_| head.status.is_success());
            let time_limit = (!shape.stream).then_some((deadline, self.limits.request_timeout));
            return Ok(reply(head, Relay::piped(leg, prefill, time_limit)));
        };
        let end = match (prefill_end, prefill) {
            (Some(end), _) => end,
            (None, Some(prefill)) => self.before(deadline, pair.prefill(), prefill).await?,
            (None, None) => unreachable!("prefill has ended or it runs"),
        };
        match end {
            PrefillEnd::Answered(lists) => self.merged(&pair, merge, &lists, head, leg, deadline).await,
            PrefillEnd::Refused(answer) => Ok(refusal(answer)),
        }
    }

    /// Makes the answer to a request for prompt logprobs, of both servers' answers.
    async fn merged(
        &self,
        pair: &ServerPair,
        merge: Merge,
        prefill: &Bytes,
        mut head: response::Parts,
        leg: Leg,
        deadline: Instant,
    ) -> Result<Response<Relay>, Error> {
        let unmergeable = |server: &Arc<Backend>, what| Error::upstream(server, Cause::Unmergeable(what));
        let lists =
            PromptLogprobs::read(merge, prefill).map_err(|error| unmergeable(pair.prefill(), error.what))?;
        if headers::unreadable_encoding(&head.headers).is_some() {
            return Err(unmergeable(pair.decode(), "the answer is compressed"));
        }
        if is_event_stream(&head.headers) {
            head.headers.remove(CONTENT_LENGTH);
            return Ok(reply(head, Relay::spliced(leg, lists.into_splicer(self.limits.max_merge_size))));
        }
        let body = self.before(deadline, pair.decode(), leg.collect(self.limits.max_merge_size)).await?;
        let body = lists.splice_body(&body);
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        Ok(reply(head, Relay::whole(body)))
    }

    /// Bounds a wait for `server` by the request's deadline.
    async fn before<T>(
        &self,
        deadline: Instant,
        server: &Arc<Backend>,
        wait: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout_at(deadline, wait).await {
            Ok(result) => result,
            Err(_) => Err(Error::upstream(server, Cause::Timeout(self.limits.request_timeout))),
        }
    }
}

/// What the answer can be made of.
#[expect(
    clippy::large_enum_variant,
    reason = "it lives for a moment, and the large variant is the usual one"
)]
enum Start {
    Decode(response::Parts, Leg),
    Refused(Response<Bytes>),
}

/// Polls both legs until decode's head is there or prefill has failed. When prefill ends well before that, it is
/// noted in `prefill_end`.
async fn first_of(
    prefill: &mut PrefillRun,
    prefill_end: &mut Option<PrefillEnd>,
    decode: impl Future<Output = Result<(response::Parts, Leg), Error>>,
) -> Result<Start, Error> {
    let mut decode = std::pin::pin!(decode);
    std::future::poll_fn(|cx| {
        // Prefill first: when it has failed, decode's silence means nothing.
        if prefill_end.is_none() {
            match prefill.as_mut().poll(cx) {
                Poll::Ready(Ok(PrefillEnd::Refused(answer))) => {
                    return Poll::Ready(Ok(Start::Refused(answer)));
                }
                Poll::Ready(Ok(end)) => *prefill_end = Some(end),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        decode.as_mut().poll(cx).map_ok(|(head, leg)| Start::Decode(head, leg))
    })
    .await
}

fn enter(server: &Arc<Backend>) -> InFlight {
    InFlight::enter(Arc::clone(server))
}

/// The same request for both servers, except for `Host`.
fn leg_requests(
    head: request::Parts,
    pair: &ServerPair,
    body: LegBody,
) -> (Request<LegBody>, Request<LegBody>) {
    let mut headers = head.headers;
    headers::for_backend_json(&mut headers);
    let uri = origin_form(&head.uri);
    let request = |server: &Backend, mut headers: HeaderMap, uri: Uri, body| {
        headers.insert(HOST, server.host_header());
        let mut request = Request::new(body);
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        request
    };
    (
        request(pair.prefill(), headers.clone(), uri.clone(), body.clone()),
        request(pair.decode(), headers, uri, body),
    )
}

/// Path and query, which is what a server expects to be asked for (RFC 9112, section 3.2.1).
fn origin_form(uri: &Uri) -> Uri {
    uri.path_and_query().cloned().map_or_else(Uri::default, Uri::from)
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
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

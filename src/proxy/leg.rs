//! One request on one server: connection, head, body.
//!
//! A leg that is dropped closes its connection, and the server takes that as a
//! cancellation. It gives the connection back only when its body has ended.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use tokio::time::Instant;

use crate::error::{Cause, Error};
use crate::http1::{BodyProgress, OutgoingRequest, ResponseHead};
use crate::observe::record::LegRecord;
use crate::timer::Timer;
use crate::upstream::{Backend, Lease, Outcome, Pools};
use crate::wire::client_response::ClientResponseHead;
use crate::wire::sse::{EventSplitter, EventTooLarge};
use crate::wire::stream_error;

/// Which connections will do.
#[derive(Debug, Clone, Copy)]
pub(super) enum ConnectionChoice {
    /// A kept one, if there is any.
    Any,
    /// A new one: kept ones have failed the request, and others may be as old.
    New,
}

/// When something must have happened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    /// How long that was from the beginning, for the error.
    pub(super) after: Duration,
}

impl Deadline {
    pub(super) fn after(limit: Duration) -> Self {
        Self::since(Instant::now(), limit)
    }

    pub(super) fn since(begun: Instant, limit: Duration) -> Self {
        Self { at: begun + limit, after: limit }
    }
}

/// Until when there is time, and the timer that tells when it is over.
pub(super) struct DeadlineTimer<'a> {
    pub(super) deadline: Deadline,
    pub(super) timer: &'a mut Timer,
}

async fn before<T>(
    limit: Option<&mut DeadlineTimer<'_>>,
    wait: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Cause> {
    let Some(DeadlineTimer { deadline, timer }) = limit else { return Ok(wait.await) };
    timer.before(deadline.at, wait).await.ok_or(Cause::Timeout(deadline.after))
}

/// A leg whose answer has begun.
pub(super) struct Leg {
    lease: Lease,
    server: LegRecord,
    /// How it ends if its body does.
    outcome: Outcome,
}

impl Leg {
    /// Takes a connection, sends the request, and waits for the head of the answer.
    pub(super) async fn start(
        pools: &Pools,
        mut server: LegRecord,
        request: OutgoingRequest,
        connection: ConnectionChoice,
        limit: Option<&mut DeadlineTimer<'_>>,
    ) -> Result<(ResponseHead, Self), Error> {
        let sent = {
            let sent = pin!(send(pools, server.backend(), request, connection));
            before(limit, sent).await.flatten()
        };
        match sent {
            Ok((lease, head)) => {
                server.response_head_received(lease.write_timing(), lease.body_progress());
                let outcome = outcome(head.status);
                if !head.status.is_success() {
                    // That is said, whether the rest of it is read or not.
                    server.set_outcome(outcome);
                }
                Ok((head, Self { lease, server, outcome }))
            }
            Err(cause) => Err(failed(&mut server, cause)),
        }
    }

    /// The next data of the body.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let data = ready!(self.lease.poll_data(cx));
        if let Some(Ok(_)) = data {
            self.server.body_received();
        }
        Poll::Ready(data.map(|data| data.map_err(|error| self.fail(error))))
    }

    /// Waits for the first data, or for the end of an empty body. Both are still to be had afterwards.
    pub(super) async fn begun(&mut self) -> Result<(), Error> {
        match self.lease.body_started().await {
            Ok(()) => {
                self.server.body_received();
                Ok(())
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// The whole body, which may have `most` bytes, and the connection back to the pool.
    pub(super) async fn collect(
        mut self,
        most: usize,
        limit: Option<&mut DeadlineTimer<'_>>,
    ) -> Result<Bytes, Error> {
        let whole = self.whole(most, limit).await?;
        self.park();
        Ok(whole)
    }

    async fn whole(&mut self, most: usize, limit: Option<&mut DeadlineTimer<'_>>) -> Result<Bytes, Error> {
        let whole = before(limit, pin!(self.lease.collect(most))).await;
        match whole {
            Ok(Ok(whole)) => Ok(whole),
            Ok(Err(error)) => Err(self.fail(error)),
            Err(late) => Err(self.fail(late)),
        }
    }

    /// Reads the body to its end and throws it away, and gives the connection back to the pool; or finds a refusal
    /// in it. `events`: the body is a stream of events.
    async fn drain(mut self, events: bool) -> Result<Option<HiddenError>, Error> {
        let mut events = events.then(|| EventSplitter::new(MAX_REFUSAL));
        while let Some(data) = poll_fn(|cx| self.poll_data(cx)).await.transpose()? {
            let Some(watched) = &mut events else { continue };
            watched.push(data);
            match next_refusal(watched) {
                Ok(None) => {}
                Ok(Some(refusal)) => {
                    self.server.set_outcome(Outcome::Refused);
                    return Ok(Some(refusal));
                }
                // An event that large is no refusal, and what comes after it is not looked at.
                Err(EventTooLarge { .. }) => events = None,
            }
        }
        self.park();
        Ok(None)
    }

    /// Whether something of the body is there, or all of an empty one.
    pub(super) fn has_begun(&self) -> bool {
        self.lease.body_progress() != BodyProgress::None
    }

    /// Gives the connection back. Only for a leg whose body has ended.
    pub(super) fn park(mut self) {
        self.server.set_outcome(self.outcome);
        self.lease.park();
    }

    /// The leg has failed of a cause; what is left to do is to drop it.
    pub(super) fn fail(&mut self, cause: impl Into<Cause>) -> Error {
        failed(&mut self.server, cause.into())
    }

    /// Whether the body has been read to its end.
    pub(super) fn is_ended(&self) -> bool {
        self.lease.is_ended()
    }

    /// What is left of a body of announced length.
    pub(super) fn remaining(&self) -> Option<u64> {
        self.lease.remaining()
    }
}

async fn send(
    pools: &Pools,
    server: &Backend,
    request: OutgoingRequest,
    connection: ConnectionChoice,
) -> Result<(Lease, ResponseHead), Cause> {
    let mut lease = match connection {
        ConnectionChoice::Any => pools.lease(server).await?,
        ConnectionChoice::New => Box::pin(pools.lease_new(server)).await?,
    };
    let head = lease.send(request).await?;
    Ok((lease, head))
}

fn failed(server: &mut LegRecord, cause: Cause) -> Error {
    server.set_outcome(cause.outcome());
    Error::upstream(server.backend(), cause)
}

/// How a leg ends when its answer is complete.
fn outcome(status: StatusCode) -> Outcome {
    match status {
        StatusCode::SERVICE_UNAVAILABLE => Outcome::Refused,
        status if status.is_server_error() => Outcome::ServerError,
        status if status.is_success() => Outcome::Completed,
        _ => Outcome::Refused,
    }
}

/// Largest error answer of a prefill server that is passed on.
const MAX_REFUSAL: usize = 1 << 20;

/// How a prefill leg ended, if it came to an answer.
pub(super) enum PrefillEnd {
    /// The answer's body, or nothing of it when nobody wants it.
    Answered(Bytes),
    /// An answer that says no. It was `hidden` in a 200.
    Refused { server: Arc<Backend>, refusal: ErrorResponse, hidden: bool },
}

/// A server's words when it says no.
#[derive(Debug, Default)]
pub(super) struct ErrorResponse {
    pub(super) head: ClientResponseHead,
    pub(super) body: Bytes,
}

/// A prefill leg under way. It is boxed because it is handed on as it stands: from waiting for decode's head, to
/// the answer's body, to a task of its own when decode is done first.
pub(super) type PrefillRun = Pin<Box<dyn Future<Output = Result<PrefillEnd, Error>> + Send>>;

/// A refusal in a 200: its status and its JSON.
struct HiddenError {
    status: StatusCode,
    json: Bytes,
}

fn next_refusal(events: &mut EventSplitter) -> Result<Option<HiddenError>, EventTooLarge> {
    while let Some(event) = events.next().transpose()? {
        if let Some(refusal) = stream_error::in_event(&event) {
            let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return Ok(Some(HiddenError { status, json: event.slice(refusal.json) }));
        }
    }
    Ok(None)
}

/// The answer that a server would have given, had it refused before its 200.
fn into_response(head: ResponseHead, hidden: HiddenError) -> ErrorResponse {
    let mut head = ClientResponseHead::from(head);
    head.set_status(hidden.status);
    head.set(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    ErrorResponse { head, body: hidden.json }
}

/// An answer of prefill's that is wanted: up to how many bytes, and until when.
#[derive(Clone, Copy)]
pub(super) struct CollectLimits {
    pub(super) most: usize,
    pub(super) deadline: Deadline,
}

/// Starts a prefill leg. Its answer is kept only if `keep` says how; otherwise it is drained, so that
/// the server can finish in peace and the connection is used again. Only an answer that is waited for has a
/// deadline.
pub(super) fn run_prefill(
    pools: Arc<Pools>,
    server: LegRecord,
    request: OutgoingRequest,
    connection: ConnectionChoice,
    keep: Option<CollectLimits>,
) -> PrefillRun {
    Box::pin(async move {
        let backend = Arc::clone(server.backend());
        let mut timer = Timer::default();
        let mut limit = keep.map(|keep| DeadlineTimer { deadline: keep.deadline, timer: &mut timer });
        let (head, mut leg) = Leg::start(&pools, server, request, connection, limit.as_mut()).await?;
        if !head.status.is_success() {
            let body = leg.collect(MAX_REFUSAL, limit.as_mut()).await?;
            let refusal = ErrorResponse { head: head.into(), body };
            return Ok(PrefillEnd::Refused { server: backend, refusal, hidden: false });
        }
        let events = head.is_event_stream;
        let (answer, hidden) = match keep {
            Some(CollectLimits { most, .. }) => {
                let answer = leg.whole(most, limit.as_mut()).await?;
                let hidden = if events { refusal_in(answer.clone()) } else { None };
                if hidden.is_some() {
                    leg.outcome = Outcome::Refused;
                }
                leg.park();
                (answer, hidden)
            }
            None => (Bytes::new(), leg.drain(events).await?),
        };
        Ok(match hidden {
            Some(hidden) => {
                let refusal = into_response(head, hidden);
                PrefillEnd::Refused { server: backend, refusal, hidden: true }
            }
            None => PrefillEnd::Answered(answer),
        })
    })
}

fn refusal_in(answer: Bytes) -> Option<HiddenError> {
    let mut events = EventSplitter::new(answer.len());
    events.push(answer);
    next_refusal(&mut events).ok().flatten()
}

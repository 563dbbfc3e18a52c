//! A leg: the part of a request that runs on one of its two servers.
//!
//! A leg that is dropped closes its connection, which SGLang takes as an abort. The connection returns to its
//! pool only after the body has ended. Which pair serves, whether to retry, and what the client receives is
//! decided in [`exchange`](super::exchange) and [`relay`](super::relay).

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

/// Which connections a leg may use.
#[derive(Debug, Clone, Copy)]
pub(super) enum ConnectionChoice {
    /// An idle connection of the pool if there is one, otherwise a new one.
    Any,
    /// A new connection: a pooled one was stale, and the others may have been idle for as long.
    New,
}

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

/// A deadline, and the timer to wait for it with.
pub(super) struct DeadlineTimer<'a> {
    pub(super) deadline: Deadline,
    pub(super) timer: &'a mut Timer,
}

/// Waits for `future` until the deadline, if there is one.
async fn before<T>(
    deadline: Option<&mut DeadlineTimer<'_>>,
    future: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Cause> {
    let Some(DeadlineTimer { deadline, timer }) = deadline else { return Ok(future.await) };
    timer.before(deadline.at, future).await.ok_or(Cause::Timeout(deadline.timeout))
}

/// A leg whose response head has been read.
pub(super) struct Leg {
    lease: Lease,
    record: LegRecord,
    /// The leg's outcome if the response is read to its end.
    outcome: Outcome,
}

impl Leg {
    /// Takes a connection, sends the request, and reads the head of the response.
    pub(super) async fn start(
        pools: &Pools,
        mut record: LegRecord,
        request: OutgoingRequest,
        connection: ConnectionChoice,
        deadline: Option<&mut DeadlineTimer<'_>>,
    ) -> Result<(ResponseHead, Self), Error> {
        let sent = {
            let sent = pin!(send(pools, record.backend(), request, connection));
            before(deadline, sent).await.flatten()
        };
        let (lease, head) = match sent {
            Ok(sent) => sent,
            Err(cause) => return Err(record_failure(&mut record, cause)),
        };
        record.response_head_received(lease.write_timing(), lease.body_progress());
        let outcome = outcome(head.status);
        if !head.status.is_success() {
            // The status settles the outcome: dropping the rest of an error response is not a cancelled leg.
            record.set_outcome(outcome);
        }
        Ok((head, Self { lease, record, outcome }))
    }

    /// The next data of the body.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let data = ready!(self.lease.poll_data(cx));
        // For every chunk, but the record reads the clock for the first one only.
        if let Some(Ok(_)) = data {
            self.record.body_received();
        }
        Poll::Ready(data.map(|data| data.map_err(|error| self.record_failure(error))))
    }

    /// Waits for the first data, or for the end of an empty body. [`poll_data`](Self::poll_data) still
    /// returns both.
    pub(super) async fn body_started(&mut self) -> Result<(), Error> {
        match self.lease.body_started().await {
            Ok(()) => {
                self.record.body_received();
                Ok(())
            }
            Err(error) => Err(self.record_failure(error)),
        }
    }

    /// Reads the whole body, of at most `max` bytes, and parks the connection.
    pub(super) async fn collect(
        mut self,
        max: usize,
        deadline: Option<&mut DeadlineTimer<'_>>,
    ) -> Result<Bytes, Error> {
        let body = self.read_body(max, deadline).await?;
        self.park();
        Ok(body)
    }

    async fn read_body(
        &mut self,
        max: usize,
        deadline: Option<&mut DeadlineTimer<'_>>,
    ) -> Result<Bytes, Error> {
        let result = before(deadline, pin!(self.lease.collect(max))).await;
        match result {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) => Err(self.record_failure(error)),
            Err(timeout) => Err(self.record_failure(timeout)),
        }
    }

    /// Reads the body to its end, discards it, and parks the connection. Stops at an error event, if the body
    /// is an event stream, and returns it.
    async fn drain(mut self, is_event_stream: bool) -> Result<Option<HiddenError>, Error> {
        let mut events = is_event_stream.then(|| EventSplitter::new(MAX_ERROR_RESPONSE));
        while let Some(data) = poll_fn(|cx| self.poll_data(cx)).await.transpose()? {
            let Some(unread) = &mut events else { continue };
            unread.push(data);
            match next_error(unread) {
                Ok(None) => {}
                Ok(Some(error)) => {
                    // Not parked: the rest of the stream is unread. The request has failed,
                    // so closing aborts nothing.
                    self.record.set_outcome(Outcome::Refused);
                    return Ok(Some(error));
                }
                // An error event is a few hundred bytes. One of over 1 MiB is something else, and the rest of
                // the stream is drained without a search.
                Err(EventTooLarge { .. }) => events = None,
            }
        }
        self.park();
        Ok(None)
    }

    /// Whether some of the body has been read, or all of an empty one.
    pub(super) fn has_body_started(&self) -> bool {
        self.lease.body_progress() != BodyProgress::None
    }

    /// Records the outcome and returns the connection to its pool. Only for a leg whose body has ended.
    pub(super) fn park(mut self) {
        self.record.set_outcome(self.outcome);
        self.lease.park();
    }

    /// Records why the leg failed, and makes the error of it. The connection closes when the leg is dropped.
    pub(super) fn record_failure(&mut self, cause: impl Into<Cause>) -> Error {
        record_failure(&mut self.record, cause.into())
    }

    /// Whether the body has been read to its end.
    pub(super) fn is_ended(&self) -> bool {
        self.lease.is_ended()
    }

    /// Unread bytes of a body with a `Content-Length`.
    pub(super) fn remaining(&self) -> Option<u64> {
        self.lease.remaining()
    }
}

async fn send(
    pools: &Pools,
    backend: &Backend,
    request: OutgoingRequest,
    connection: ConnectionChoice,
) -> Result<(Lease, ResponseHead), Cause> {
    let mut lease = match connection {
        ConnectionChoice::Any => pools.lease(backend).await?,
        // Boxed: only retries take this path, and dialling would enlarge the future of every leg.
        ConnectionChoice::New => Box::pin(pools.lease_new(backend)).await?,
    };
    let head = lease.send(request).await?;
    Ok((lease, head))
}

fn record_failure(record: &mut LegRecord, cause: Cause) -> Error {
    record.set_outcome(cause.outcome());
    Error::upstream(record.backend(), cause)
}

/// The outcome of a leg whose response is complete.
fn outcome(status: StatusCode) -> Outcome {
    match status {
        // SGLang returns 503 while it starts, shuts down, or is out of memory for KV cache. That is no fault
        // of the process, so it must not count towards ejection as other 5xx do.
        StatusCode::SERVICE_UNAVAILABLE => Outcome::Refused,
        status if status.is_server_error() => Outcome::ServerError,
        status if status.is_success() => Outcome::Completed,
        _ => Outcome::Refused,
    }
}

/// Largest error response of a prefill server that is passed on to the client.
const MAX_ERROR_RESPONSE: usize = 1 << 20;

/// How a prefill leg ended, if its response could be read.
pub(super) enum PrefillEnd {
    /// With the response's body, which is empty if it was not collected.
    Completed(Bytes),
    /// With an error. `hidden`: the status was 200, and the error was an event of the stream.
    ErrorResponse { response: ErrorResponse, hidden: bool },
}

/// A server's response with an error status.
#[derive(Debug, Default)]
pub(super) struct ErrorResponse {
    pub(super) head: ClientResponseHead,
    pub(super) body: Bytes,
}

/// A prefill leg in flight.
pub(super) struct PrefillRun {
    backend: Arc<Backend>,
    /// Boxed because it moves while it runs: it is polled beside decode's head, then with the response's
    /// body, and last in a task of its own if decode finishes first.
    future: Pin<Box<dyn Future<Output = Result<PrefillEnd, Error>> + Send>>,
}

impl PrefillRun {
    pub(super) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }
}

impl Future for PrefillRun {
    type Output = Result<PrefillEnd, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.future.as_mut().poll(cx)
    }
}

/// An error inside a response with status 200: the status it should have had, and the JSON of the event.
struct HiddenError {
    status: StatusCode,
    json: Bytes,
}

impl HiddenError {
    /// Makes the response that the server would have sent, had it failed before its head was out.
    fn into_end(self, head: ResponseHead) -> PrefillEnd {
        let mut head = ClientResponseHead::from(head);
        head.set_status(self.status);
        head.set(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        PrefillEnd::ErrorResponse { response: ErrorResponse { head, body: self.json }, hidden: true }
    }
}

fn next_error(events: &mut EventSplitter) -> Result<Option<HiddenError>, EventTooLarge> {
    while let Some(event) = events.next().transpose()? {
        if let Some(error) = stream_error::in_event(&event) {
            let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return Ok(Some(HiddenError { status, json: event.slice(error.json) }));
        }
    }
    Ok(None)
}

/// Bounds of a prefill response that is collected for a merge.
#[derive(Clone, Copy)]
pub(super) struct CollectLimits {
    pub(super) max_bytes: usize,
    pub(super) deadline: Deadline,
}

/// Makes a prefill leg, which starts when it is first polled. Without `limits` its response is drained: a
/// prefill leg that is closed before it has responded aborts the KV transfer, and the request fails on
/// decode. A drained leg has no deadline, because nothing waits for it.
pub(super) fn run_prefill(
    pools: Arc<Pools>,
    record: LegRecord,
    request: OutgoingRequest,
    connection: ConnectionChoice,
    limits: Option<CollectLimits>,
) -> PrefillRun {
    let backend = Arc::clone(record.backend());
    let future = Box::pin(async move {
        let mut timer = Timer::default();
        let mut deadline =
            limits.map(|limits| DeadlineTimer { deadline: limits.deadline, timer: &mut timer });
        let (head, mut leg) = Leg::start(&pools, record, request, connection, deadline.as_mut()).await?;
        if !head.status.is_success() {
            // Read whole, because it is the response to the client if decode does not respond first.
            let body = leg.collect(MAX_ERROR_RESPONSE, deadline.as_mut()).await?;
            let response = ErrorResponse { head: head.into(), body };
            return Ok(PrefillEnd::ErrorResponse { response, hidden: false });
        }
        let is_event_stream = head.is_event_stream;
        let (body, error) = match limits {
            Some(CollectLimits { max_bytes, .. }) => {
                let body = leg.read_body(max_bytes, deadline.as_mut()).await?;
                // The clone shares the bytes.
                let error = if is_event_stream { error_in(body.clone()) } else { None };
                if error.is_some() {
                    // Counted as an error status would be: the server works, and rejects this request.
                    leg.outcome = Outcome::Refused;
                }
                leg.park();
                (body, error)
            }
            None => (Bytes::new(), leg.drain(is_event_stream).await?),
        };
        Ok(error.map_or(PrefillEnd::Completed(body), |error| error.into_end(head)))
    });
    PrefillRun { backend, future }
}

/// The error event of a stream that is all here, if it has one.
fn error_in(body: Bytes) -> Option<HiddenError> {
    let mut events = EventSplitter::new(body.len());
    events.push(body);
    next_error(&mut events).ok().flatten()
}

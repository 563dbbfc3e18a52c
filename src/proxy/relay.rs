//! The body of a response: decode's bytes, passed on as soon as they arrive.
//!
//! What is left of the prefill leg is drained here too, in the same task. Dropping a relay early closes both
//! connections. Retries are over before there is a relay; how the bytes are framed for the client is for
//! [`transport`](crate::transport).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tracing::warn;

use super::leg::{Deadline, Leg, PrefillEnd, PrefillRun};
use crate::error::{Cause, Error};
use crate::observe::report::log_limit;
use crate::timer::Timer;
use crate::upstream::Backend;
use crate::wire::logprobs::StreamSplicer;
use crate::wire::segments::SegmentedBytes;

/// The body of a response on its way to the client.
pub(crate) struct Relay {
    source: Source,
    /// The prefill leg, if it was still in flight when the response started.
    prefill: Option<PrefillRun>,
    time_limit: Option<TimeLimit>,
    /// The client reads server-sent events, so an error can be reported as one.
    is_event_stream: bool,
    /// Some of decode's body has arrived.
    started: bool,
    /// The last bytes that were passed on end an event.
    at_event_end: bool,
    failure: Option<Failure>,
}

/// Where the bytes come from.
enum Source {
    /// Decode's body, unchanged.
    PassThrough(Leg),
    /// Decode's events with prefill's logprobs inserted.
    Merging(Box<(Leg, StreamSplicer)>),
    /// A body that is held in memory as a whole.
    Buffered(SegmentedBytes),
    Ended,
}

/// How long a body may take, or how long a stream may pause.
pub(super) struct TimeLimit {
    deadline: Deadline,
    /// Longest pause in a stream. The first chunk has until the deadline.
    idle: Option<Duration>,
    timer: Timer,
}

impl TimeLimit {
    /// At the deadline the body must be complete or, with `idle`, have started.
    pub(super) fn new(deadline: Deadline, idle: Option<Duration>) -> Self {
        Self { deadline, idle, timer: Timer::default() }
    }

    /// Moves the deadline after a chunk. The timer is not reset, which would cost more than the chunk.
    fn restart_idle(&mut self) {
        if let Some(idle) = self.idle {
            self.deadline = Deadline::from_now(idle);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // The first chunk of a stream brings the deadline forward, later ones put it
        // off; the timer handles both.
        self.timer.poll_until(self.deadline.at, cx)
    }
}

/// The end of a response that cannot be completed: in a stream an event with the error, and then the error
/// itself, upon which the connection is cut off (RFC 9112, section 8: so the client sees that the body is
/// incomplete).
struct Failure {
    event: Option<Bytes>,
    /// hyper flushes what it has written when the body is pending, but not when the body fails.
    flushed: bool,
    error: Option<Error>,
}

impl Failure {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<SegmentedBytes>, Error>>> {
        if let Some(event) = self.event.take() {
            return Poll::Ready(Some(Ok(Frame::data(event.into()))));
        }
        if !self.flushed {
            self.flushed = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.error.take().map(Err))
    }
}

impl Relay {
    fn new(source: Source, prefill: Option<PrefillRun>, time_limit: Option<TimeLimit>) -> Self {
        Self {
            source,
            prefill,
            time_limit,
            is_event_stream: false,
            started: false,
            at_event_end: true,
            failure: None,
        }
    }

    /// Passes on decode's body, and drains prefill's.
    pub(super) fn pass_through(leg: Leg, prefill: Option<PrefillRun>, time_limit: TimeLimit) -> Self {
        let started = leg.has_body_started();
        let mut relay = Self::new(Source::PassThrough(leg), prefill, Some(time_limit));
        relay.started = started;
        relay
    }

    /// Merges prefill's logprobs into each of decode's events.
    pub(super) fn merging(leg: Leg, splicer: StreamSplicer, time_limit: TimeLimit) -> Self {
        Self::new(Source::Merging(Box::new((leg, splicer))), None, Some(time_limit))
    }

    /// Sends a body that is held in memory as a whole.
    pub(super) fn buffered(body: impl Into<SegmentedBytes>) -> Self {
        Self::new(Source::Buffered(body.into()), None, None)
    }

    /// Sets whether the client reads server-sent events.
    pub(super) fn with_event_stream(mut self, is_event_stream: bool) -> Self {
        self.is_event_stream = is_event_stream;
        self
    }

    /// Why the response cannot be completed, until this error has been returned from `poll_frame`.
    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failure.as_ref().and_then(|failure| failure.error.as_ref())
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<SegmentedBytes, Error>>> {
        match &mut self.source {
            Source::PassThrough(leg) => leg.poll_data(cx).map_ok(SegmentedBytes::One),
            Source::Merging(merging) => {
                let (leg, splicer) = &mut **merging;
                poll_merged(leg, splicer, cx)
            }
            Source::Buffered(body) if body.is_empty() => Poll::Ready(None),
            Source::Buffered(body) => Poll::Ready(Some(Ok(std::mem::take(body)))),
            Source::Ended => Poll::Ready(None),
        }
    }

    /// Drains the prefill leg. Its failure fails the response only while decode is silent: after decode's
    /// first byte the KV cache has been transferred, and decode no longer needs prefill.
    fn poll_prefill(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        let Poll::Ready(end) = Pin::new(self.prefill.as_mut()?).poll(cx) else { return None };
        let ended = self.prefill.take()?;
        if self.started {
            log_late_end(ended.backend(), end);
            return None;
        }
        // A merge has waited for prefill before, and a buffered response needs no leg.
        let Source::PassThrough(_) = &self.source else { return None };
        match end {
            Ok(PrefillEnd::Completed(_)) => None,
            Ok(PrefillEnd::ErrorResponse { response, .. }) => {
                Some(Error::upstream(ended.backend(), Cause::LateRefusal(response.head.status().as_u16())))
            }
            Err(error) => Some(error),
        }
    }

    fn poll_time_limit(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let leg = match &mut self.source {
            Source::PassThrough(leg) => leg,
            Source::Merging(merging) => &mut merging.0,
            // No server is waited for.
            Source::Buffered(_) | Source::Ended => return Poll::Pending,
        };
        let Some(limit) = &mut self.time_limit else { return Poll::Pending };
        ready!(limit.poll(cx));
        Poll::Ready(leg.record_failure(Cause::Timeout(limit.deadline.timeout)))
    }

    fn record_chunk(&mut self, data: &SegmentedBytes) {
        self.started = true;
        self.at_event_end = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
        if let Some(limit) = &mut self.time_limit {
            limit.restart_idle();
        }
    }

    /// Ends a response that is complete: parks decode's connection, and leaves a prefill leg that is still in
    /// flight to a task of its own.
    fn finish(&mut self) {
        match std::mem::replace(&mut self.source, Source::Ended) {
            Source::PassThrough(leg) => leg.park(),
            Source::Merging(merging) => merging.0.park(),
            Source::Buffered(_) | Source::Ended => {}
        }
        if let Some(prefill) = self.prefill.take() {
            drain_in_background(prefill);
        }
    }

    /// Fails the response: closes both connections, and prepares what the client is still to be sent.
    fn fail_response(&mut self, error: Error) {
        // With a Content-Length the event would count as decode's bytes, and could
        // make a cut body look complete.
        let sends_event = self.is_event_stream && self.size_hint().exact().is_none();
        self.source = Source::Ended;
        self.prefill = None;
        // A blank line first if decode stopped inside an event, which would otherwise run into this one.
        let separator = if self.at_event_end { "" } else { "\n\n" };
        let event = sends_event.then(|| format!("{separator}data: {}\n\n", error.to_json()).into());
        self.failure = Some(Failure { event, flushed: false, error: Some(error) });
    }
}

fn poll_merged(
    leg: &mut Leg,
    splicer: &mut StreamSplicer,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<SegmentedBytes, Error>>> {
    loop {
        if let Some(events) = splicer.next() {
            let mut too_large = |limit| leg.record_failure(Cause::TooLarge { limit });
            return Poll::Ready(Some(events.map_err(|error| too_large(error.limit))));
        }
        match ready!(leg.poll_data(cx)) {
            Some(Ok(data)) => splicer.push(data),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            // What follows the last whole event, if anything does, is passed on as it is.
            None => return Poll::Ready(splicer.finish().map(|rest| Ok(rest.into()))),
        }
    }
}

/// Reads the rest of a late prefill response in a task of its own. SGLang aborts a request whose connection
/// closes before it has responded, though the transfer to decode may still be on its books. Without the task
/// the client would have to wait for prefill. It is the only task that the data path spawns.
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "it outlives the request, as said above"))]
fn drain_in_background(prefill: PrefillRun) {
    // Outside of a runtime a relay is only dropped by a worker thread that ends with requests left.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    let backend = Arc::clone(prefill.backend());
    runtime.spawn(async move {
        match tokio::time::timeout(LATE_PREFILL_TIMEOUT, prefill).await {
            Ok(end) => log_late_end(&backend, end),
            Err(_) if !log_limit::allow("late_prefill") => {}
            Err(_) => warn!(
                "prefill server {} did not finish its response within {LATE_PREFILL_TIMEOUT:?} of decode's, \
                 closing its connection; the client has decode's whole response",
                backend.url()
            ),
        }
    });
}

/// How long a prefill response may end after decode's. SGLang itself gives up on a pair after 300 s
/// (`SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT` and `SGLANG_DISAGGREGATION_WAITING_TIMEOUT`).
const LATE_PREFILL_TIMEOUT: Duration = Duration::from_secs(300);

/// Logs a failure of prefill that the client does not notice, because decode's response has started.
fn log_late_end(backend: &Backend, end: Result<PrefillEnd, Error>) {
    match end {
        Ok(PrefillEnd::Completed(_)) => {}
        _ if !log_limit::allow("late_prefill") => {}
        Ok(PrefillEnd::ErrorResponse { response, .. }) => {
            let status = response.head.status().as_u16();
            warn!(
                status,
                "prefill server {} responded {status} after decode had started to respond; the client gets \
                 decode's response",
                backend.url()
            );
        }
        // The error names the server.
        Err(error) => warn!(
            code = error.code(),
            "{error}, after decode had started to respond; the client gets decode's response"
        ),
    }
}

impl Body for Relay {
    type Data = SegmentedBytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<SegmentedBytes>, Error>>> {
        // Prefill first: if it has failed, that explains why decode is silent, and is the better error.
        if self.failure.is_none()
            && let Some(error) = self.poll_prefill(cx)
        {
            self.fail_response(error);
        }
        if let Some(failure) = &mut self.failure {
            return failure.poll(cx);
        }
        let error = match self.poll_source(cx) {
            Poll::Ready(Some(Ok(data))) => {
                self.record_chunk(&data);
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            Poll::Ready(None) => {
                self.finish();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => error,
            Poll::Pending => ready!(self.poll_time_limit(cx)),
        };
        self.fail_response(error);
        self.failure.as_mut().expect("the response has just failed").poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        if self.failure.is_some() {
            return false;
        }
        match &self.source {
            Source::PassThrough(leg) => leg.is_ended(),
            // The splicer may still hold the start of an event.
            Source::Merging(_) => false,
            Source::Buffered(body) => body.is_empty(),
            Source::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::PassThrough(leg) => leg.remaining().map_or_else(SizeHint::default, SizeHint::with_exact),
            Source::Merging(_) => SizeHint::default(),
            Source::Buffered(body) => SizeHint::with_exact(body.len() as u64),
            Source::Ended => SizeHint::default(),
        }
    }
}

impl Drop for Relay {
    /// hyper does not poll a body with a `Content-Length` for its end: it drops it after the last byte.
    fn drop(&mut self) {
        if self.is_end_stream() {
            self.finish();
        }
    }
}

//! The body of a response: the bytes of one leg, passed on as soon as they arrive.
//!
//! What is left of the prefill leg is drained here too, in the same task. Dropping a relay early closes both
//! connections. Retries are over before there is a relay; how the bytes are framed for the client is for
//! [`transport`](crate::transport).

use std::collections::VecDeque;
use std::future::poll_fn;
use std::mem::offset_of;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tracing::warn;

use super::decision::{Action, LegEvent};
use super::leg::Leg;
use super::leg_pair::{Deadline, LegPair, log_late_failure};
use crate::admission::Reservation;
use crate::error::{Cause, Error, ErrorFormat};
use crate::http1::MalformedMessage;
use crate::observe::report::log_limit;
use crate::timer::Timer;
use crate::upstream::Role;
use crate::wire::headers;
use crate::wire::logprobs::StreamSplicer;
use crate::wire::segments::SegmentedBytes;

/// Longest pause in the body of an error response: a server that refuses has all of it at hand. The client
/// has the status by then, and waits for the end.
pub(super) const MAX_REFUSAL_PAUSE: Duration = Duration::from_secs(1);

/// The body of a response on its way to the client. In this order, so that a token needs three cache lines.
#[repr(C)]
pub(crate) struct Relay {
    source: Source,
    /// Boxed, because few responses have one.
    failure: Option<Box<Failure>>,
    time_limit: Option<TimeLimit>,
    /// The client reads server-sent events, so an error can be reported as one.
    is_event_stream: bool,
    /// How errors are written in events.
    error_format: ErrorFormat,
    /// The body has a `Content-Length`.
    has_length: bool,
    /// Some of the body has been passed on.
    started: bool,
    /// The last bytes that were passed on end an event.
    at_event_end: bool,
    /// The last frame was a comment of the router's.
    is_keep_alive: bool,
    /// Of a merged body that is held as a whole.
    memory: Option<Reservation>,
}

/// Where the bytes come from.
enum Source {
    Legs(Relayed),
    /// The client has the head of a stream, and nothing is decided yet.
    Undecided(Undecided),
    /// A body that is held in memory as a whole.
    Buffered(SegmentedBytes),
    /// Several responses that become one stream.
    Merged(Box<dyn MergedStream>),
    Ended,
}

/// A stream of events that is made of several responses, each with time limits of its own.
pub(super) trait MergedStream: Send {
    /// The next whole events; `None` is the clean end.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>>;

    /// Whether all has been returned.
    fn is_ended(&self) -> bool;
}

/// The legs of a response, and what is done with their bytes.
struct Relayed {
    pair: Box<LegPair>,
    /// The leg whose bytes the client gets.
    source: Role,
    /// What was read before the response started.
    held: VecDeque<Bytes>,
    /// Inserts what is prefill's into decode's events.
    splicer: Option<Box<StreamSplicer>>,
}

/// A stream whose head was sent before the legs were decided.
struct Undecided {
    pair: Box<LegPair>,
    /// Largest event of a merge, in bytes.
    max_event: usize,
}

/// How long a body may take, or how long a stream may pause.
pub(super) struct TimeLimit {
    deadline: Deadline,
    /// Longest pause in a stream. The first chunk has until the deadline.
    idle: Option<Duration>,
    keep_alive: Option<KeepAlive>,
    timer: Timer,
}

/// Comments in a stream that is silent (WHATWG HTML, section 9.2.5: a client ignores them).
struct KeepAlive {
    interval: Duration,
    next: Instant,
}

const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

impl TimeLimit {
    /// At the deadline the body must be complete or, with `idle`, have started.
    pub(super) fn new(deadline: Deadline, idle: Option<Duration>) -> Self {
        Self { deadline, idle, keep_alive: None, timer: Timer::default() }
    }

    /// Sends a comment whenever a stream has been silent for this long.
    pub(super) fn with_keep_alive(mut self, interval: Option<Duration>) -> Self {
        self.keep_alive = interval.map(|interval| KeepAlive { interval, next: Instant::now() + interval });
        self
    }

    /// Moves the deadline after a chunk. The timer is not reset, which would cost more than the chunk.
    fn restart_idle(&mut self) {
        let Some(idle) = self.idle else { return };
        let now = Instant::now();
        self.deadline = Deadline::since(now, idle);
        if let Some(keep_alive) = &mut self.keep_alive {
            keep_alive.next = now + keep_alive.interval;
        }
    }

    /// Ready when a comment is due.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(keep_alive) = &mut self.keep_alive else { return Poll::Pending };
        ready!(self.timer.poll_until(keep_alive.next, cx));
        keep_alive.next = Instant::now() + keep_alive.interval;
        Poll::Ready(())
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

const _: () = assert!(offset_of!(Relay, memory) <= 192, "three cache lines");

impl Relay {
    fn new(source: Source, time_limit: Option<TimeLimit>) -> Self {
        let has_length = source.size_hint().exact().is_some();
        Self {
            source,
            failure: None,
            time_limit,
            is_event_stream: false,
            error_format: ErrorFormat::OpenAi,
            has_length,
            started: false,
            at_event_end: true,
            is_keep_alive: false,
            memory: None,
        }
    }

    /// Passes on the body of one leg, behind what was held of it. Beside decode's body prefill's is
    /// drained, or with `late` read for late events.
    pub(super) fn pass_through(
        pair: Box<LegPair>,
        source: Role,
        held: Vec<Bytes>,
        late: Option<StreamSplicer>,
        time_limit: TimeLimit,
    ) -> Self {
        let relayed = Relayed { pair, source, held: held.into(), splicer: late.map(Box::new) };
        Self::new(Source::Legs(relayed), Some(time_limit))
    }

    /// Merges prefill's logprobs into each of decode's events.
    pub(super) fn merging(
        pair: Box<LegPair>,
        held: Vec<Bytes>,
        splicer: StreamSplicer,
        time_limit: TimeLimit,
    ) -> Self {
        let (held, splicer) = (held.into(), Some(Box::new(splicer)));
        let relayed = Relayed { pair, source: Role::Decode, held, splicer };
        Self::new(Source::Legs(relayed), Some(time_limit))
    }

    /// Waits for the decision on a stream whose head has been sent. `max_event` bounds the events of a merge.
    pub(super) fn undecided(pair: Box<LegPair>, max_event: usize, mut time_limit: TimeLimit) -> Self {
        // The time is over now, so the first comment goes out with the head.
        if let Some(keep_alive) = &mut time_limit.keep_alive {
            keep_alive.next = Instant::now();
        }
        Self::new(Source::Undecided(Undecided { pair, max_event }), Some(time_limit))
    }

    /// Merges several responses. `time_limit` is there for its comments. With `is_early` the first of them is
    /// due now, and goes out with the head.
    pub(super) fn merged(stream: Box<dyn MergedStream>, mut time_limit: TimeLimit, is_early: bool) -> Self {
        if is_early && let Some(keep_alive) = &mut time_limit.keep_alive {
            keep_alive.next = Instant::now();
        }
        Self::new(Source::Merged(stream), Some(time_limit))
    }

    /// Makes it a part of a merged response, which has the comments, and the event of an error, instead.
    pub(super) fn into_part(mut self: Box<Self>) -> Box<Self> {
        self.is_event_stream = false;
        self
    }

    /// Fails a response that has started, for a reason that was found in it. Without legs the reason comes
    /// back.
    pub(super) fn fail(&mut self, cause: Cause) -> Result<Error, Cause> {
        match &mut self.source {
            Source::Legs(relayed) => Ok(relayed.pair.fail(relayed.source, cause)),
            _ => Err(cause),
        }
    }

    /// Sends a body that is held in memory as a whole.
    pub(super) fn buffered(body: impl Into<SegmentedBytes>) -> Self {
        Self::new(Source::Buffered(body.into()), None)
    }

    /// Keeps the memory of the body reserved.
    pub(super) fn with_memory(mut self, memory: Option<Reservation>) -> Self {
        self.memory = memory;
        self
    }

    /// Sets whether the client reads server-sent events, and how errors are written in them.
    pub(super) fn with_event_stream(mut self, is_event_stream: bool, format: ErrorFormat) -> Self {
        (self.is_event_stream, self.error_format) = (is_event_stream, format);
        self
    }

    /// Why the response cannot be completed, until this error has been returned from `poll_frame`.
    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failure.as_ref().and_then(|failure| failure.error.as_ref())
    }

    /// Whether the last frame was a comment of the router's. Returned once.
    pub(crate) fn take_keep_alive(&mut self) -> bool {
        std::mem::take(&mut self.is_keep_alive)
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<SegmentedBytes, Error>>> {
        match &mut self.source {
            Source::Legs(relayed) => relayed.poll_data(cx),
            Source::Undecided(_) => Poll::Pending,
            Source::Merged(stream) => stream.poll_data(cx).map_ok(SegmentedBytes::One),
            Source::Buffered(body) if body.is_empty() => Poll::Ready(None),
            Source::Buffered(body) => Poll::Ready(Some(Ok(std::mem::take(body)))),
            Source::Ended => Poll::Ready(None),
        }
    }

    /// Drains the prefill leg beside decode's response. Its failure fails the response only while decode is
    /// silent.
    fn poll_prefill(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        match &mut self.source {
            Source::Legs(relayed) => relayed.pair.poll_beside(cx),
            Source::Undecided(_) | Source::Buffered(_) | Source::Merged(_) | Source::Ended => None,
        }
    }

    /// Waits for the decision, if the head was sent before it. Afterwards the source is the legs.
    fn poll_decision(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let (Source::Undecided(undecided), Some(limit)) = (&mut self.source, &mut self.time_limit) else {
            return Poll::Ready(Ok(()));
        };
        let action = ready!(undecided.pair.poll_action(limit.deadline, &mut limit.timer, cx));
        let Source::Undecided(undecided) = std::mem::replace(&mut self.source, Source::Ended) else {
            return Poll::Ready(Ok(()));
        };
        self.source = Source::Legs(undecided.decided(action)?);
        Poll::Ready(Ok(()))
    }

    /// A comment that is due. Only between two events.
    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        match &mut self.time_limit {
            Some(limit) if self.is_event_stream && self.at_event_end && !self.has_length => {
                ready!(limit.poll_keep_alive(cx));
                Poll::Ready(KEEP_ALIVE)
            }
            _ => Poll::Pending,
        }
    }

    fn poll_time_limit(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        // No server is waited for by the other sources.
        let Source::Legs(relayed) = &mut self.source else { return Poll::Pending };
        let Some(limit) = &mut self.time_limit else { return Poll::Pending };
        ready!(limit.poll(cx));
        Poll::Ready(relayed.pair.fail(relayed.awaited(), Cause::Timeout(limit.deadline.timeout)))
    }

    fn record_chunk(&mut self, data: &SegmentedBytes) {
        if !self.started
            && let Source::Legs(relayed) = &mut self.source
        {
            relayed.pair.record_first_data(relayed.source);
        }
        self.started = true;
        self.at_event_end = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
        if let Some(limit) = &mut self.time_limit {
            limit.restart_idle();
        }
    }

    /// Ends a response that is complete: parks its connection, and leaves a prefill leg that is still in
    /// flight to a task of its own.
    fn finish(&mut self) {
        if let Source::Legs(relayed) = std::mem::replace(&mut self.source, Source::Ended)
            && let Some(prefill) = relayed.pair.finish(relayed.source)
        {
            drain_in_background(prefill);
        }
    }

    /// Fails the response: closes both connections, and prepares what the client is still to be sent.
    fn fail_response(&mut self, error: Error) {
        // With a Content-Length the event would count as decode's bytes, and could
        // make a cut body look complete.
        let sends_event = self.is_event_stream && !self.has_length;
        self.source = Source::Ended;
        // A blank line first if decode stopped inside an event, which would otherwise run into this one.
        let separator = if self.at_event_end { "" } else { "\n\n" };
        let event = sends_event.then(|| format!("{separator}{}", error.to_event(self.error_format)).into());
        self.failure = Some(Box::new(Failure { event, flushed: false, error: Some(error) }));
    }
}

impl Undecided {
    /// The legs whose bytes the client gets. What would have had an error status is an error.
    fn decided(mut self, action: Action) -> Result<Relayed, Error> {
        let role = match action {
            Action::Relay(source) => source,
            Action::RelayMerged => Role::Decode,
            Action::RespondHiddenError => Role::Prefill,
            Action::Fail(role) => return Err(self.pair.take_error(role)),
            other => {
                debug_assert!(false, "{other:?} after the request was sent");
                return Err(Error::Internal);
            }
        };
        if action == Action::RespondHiddenError || !self.pair.leg(role).is_accepted() {
            return Err(self.pair.take_error(role));
        }
        let (head, held) = self.pair.take_response(role);
        if !head.is_event_stream || headers::unreadable_encoding(&head.headers).is_some() {
            let cause = Cause::BadResponse(MalformedMessage("it is no stream of events"));
            return Err(self.pair.fail(role, cause));
        }
        let splicer = if action == Action::RelayMerged {
            self.pair.take_lists().map(|lists| lists.into_splicer(self.max_event))
        } else {
            self.pair.has_late_merge().then(|| StreamSplicer::late(self.max_event))
        };
        Ok(Relayed { pair: self.pair, source: role, held: held.into(), splicer: splicer.map(Box::new) })
    }
}

impl Source {
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Legs(relayed) => relayed.size_hint(),
            Self::Buffered(body) => SizeHint::with_exact(body.len() as u64),
            Self::Undecided(_) | Self::Merged(_) | Self::Ended => SizeHint::default(),
        }
    }
}

impl Relayed {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<SegmentedBytes, Error>>> {
        if self.splicer.is_none() {
            return self.poll_piece(cx).map_ok(SegmentedBytes::One);
        }
        loop {
            if let Some(splicer) = &mut self.splicer {
                if let Some(events) = splicer.next() {
                    let mut too_large = |limit| self.pair.fail(Role::Decode, Cause::TooLarge { limit });
                    return Poll::Ready(Some(events.map_err(|error| too_large(error.limit))));
                }
                if splicer.needs_lists() {
                    // Prefill is polled before decode, and wakes this task.
                    return match self.pair.take_late_lists() {
                        Some(lists) => Poll::Ready(Some(lists.map(|lists| splicer.supply(lists)))),
                        None => Poll::Pending,
                    };
                }
            }
            let piece = ready!(self.poll_piece(cx));
            let Some(splicer) = &mut self.splicer else { return Poll::Ready(None) };
            match piece {
                Some(Ok(data)) => splicer.push(data),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                // What follows the last whole event, if anything does, is passed on as it is.
                None => return Poll::Ready(splicer.finish().map(|rest| Ok(rest.into()))),
            }
        }
    }

    /// The leg that the response waits for.
    fn awaited(&self) -> Role {
        let is_prefill = self.splicer.as_ref().is_some_and(|splicer| splicer.needs_lists());
        if is_prefill { Role::Prefill } else { self.source }
    }

    /// The next bytes of the leg.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        if let Some(held) = self.held.pop_front() {
            return Poll::Ready(Some(Ok(held)));
        }
        self.pair.poll_data(self.source, cx)
    }

    fn is_ended(&self) -> bool {
        // The splicer may still hold the start of an event.
        self.splicer.is_none() && self.held.is_empty() && self.pair.leg(self.source).is_ended()
    }

    fn size_hint(&self) -> SizeHint {
        let held = self.held.iter().map(Bytes::len).sum::<usize>() as u64;
        match self.pair.leg(self.source).remaining() {
            // The events grow by prefill's logprobs, by how much is not known before the last one.
            Some(rest) if self.splicer.is_none() => SizeHint::with_exact(rest + held),
            _ => SizeHint::default(),
        }
    }
}

/// Reads the rest of a late prefill response in a task of its own. SGLang aborts a request whose connection
/// closes before it has responded, though the transfer to decode may still be on its books. Without the task
/// the client would have to wait for prefill. It is the only task that the data path spawns.
#[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "it outlives the request, as said above"))]
fn drain_in_background(mut prefill: Leg) {
    // Outside of a runtime a relay is only dropped by a worker thread that ends with requests left.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    runtime.spawn(async move {
        let drained = tokio::time::timeout(LATE_PREFILL_TIMEOUT, drain(&mut prefill)).await;
        if drained.is_err() && log_limit::allow("late_prefill") {
            warn!(
                request_id = prefill.request_id().unwrap_or("-"),
                "prefill server {} did not finish its response within {LATE_PREFILL_TIMEOUT:?} of decode's, \
                 closing its connection; the client has decode's whole response",
                prefill.backend().url()
            );
        }
    });
}

/// Reads prefill's response to its end, or until it has failed.
async fn drain(prefill: &mut Leg) {
    loop {
        match poll_fn(|cx| prefill.poll_event(cx)).await {
            LegEvent::Connected | LegEvent::Accepted { .. } | LegEvent::Data => {}
            LegEvent::Ended => return prefill.park(),
            LegEvent::ConnectFailed
            | LegEvent::Stale
            | LegEvent::Refused
            | LegEvent::ErrorEvent
            | LegEvent::Broken => return log_late_failure(prefill),
        }
    }
}

/// How long a prefill response may end after decode's. SGLang itself gives up on a pair after 300 s
/// (`SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT` and `SGLANG_DISAGGREGATION_WAITING_TIMEOUT`).
const LATE_PREFILL_TIMEOUT: Duration = Duration::from_secs(300);

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
        let source = match self.poll_decision(cx) {
            Poll::Ready(Ok(())) => self.poll_source(cx),
            Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
            Poll::Pending => Poll::Pending,
        };
        let error = match source {
            Poll::Ready(Some(Ok(data))) => {
                self.record_chunk(&data);
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            Poll::Ready(None) => {
                self.finish();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => error,
            Poll::Pending => {
                if let Poll::Ready(comment) = self.poll_keep_alive(cx) {
                    self.is_keep_alive = true;
                    return Poll::Ready(Some(Ok(Frame::data(comment.into()))));
                }
                ready!(self.poll_time_limit(cx))
            }
        };
        self.fail_response(error);
        self.failure.as_mut().expect("the response has just failed").poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        if self.failure.is_some() {
            return false;
        }
        match &self.source {
            Source::Legs(relayed) => relayed.is_ended(),
            Source::Undecided(_) => false,
            Source::Buffered(body) => body.is_empty(),
            Source::Merged(stream) => stream.is_ended(),
            Source::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.source.size_hint()
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

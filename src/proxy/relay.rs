//! The body of an answer: decode's bytes, as soon as they come.
//!
//! What is left of the prefill leg is drained here too, in the same task. Dropping
//! a relay early closes both connections.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tracing::warn;

use super::leg::{Deadline, Leg, PrefillEnd, PrefillRun};
use crate::error::{Cause, Error};
use crate::observe::report::log_limit;
use crate::timer::Timer;
use crate::wire::logprobs::StreamSplicer;
use crate::wire::segments::SegmentedBytes;

/// An answer's body on its way to the client.
pub(crate) struct Relay {
    source: Source,
    /// What is left of the prefill leg.
    prefill: Option<PrefillRun>,
    time_limit: Option<TimeLimit>,
    /// The body is a stream of events: an error can be told in it.
    events: bool,
    /// Something of decode's body is on its way to the client.
    begun: bool,
    /// What is on its way ends with a whole event.
    at_event_end: bool,
    failing: Option<Failing>,
}

/// Where the bytes come from.
enum Source {
    /// Decode's body as it is.
    Piped(Leg),
    /// Decode's events with prefill's logprobs in them.
    Spliced(Box<(Leg, StreamSplicer)>),
    /// Bytes that are all here.
    Whole(SegmentedBytes),
    /// Nothing more comes.
    Ended,
}

/// How long a body may take, or may be silent.
pub(super) struct TimeLimit {
    deadline: Deadline,
    /// How far apart the pieces of a stream may be. Its first one has until the deadline.
    idle: Option<Duration>,
    timer: Timer,
}

impl TimeLimit {
    /// The body must be complete, or with `idle` must have begun, at the deadline.
    pub(super) fn new(deadline: Deadline, idle: Option<Duration>) -> Self {
        Self { deadline, idle, timer: Timer::default() }
    }

    /// A piece has come. The timer is not touched, which would cost more than the piece.
    fn note_chunk(&mut self) {
        if let Some(idle) = self.idle {
            self.deadline = Deadline::after(idle);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // The first piece of a stream brings the deadline forward, the others put it off.
        self.timer.poll_until(self.deadline.at, cx)
    }
}

/// The end of an answer that cannot be completed: an event that says why, if events are what the client reads,
/// and then an error, upon which hyper cuts the connection off.
struct Failing {
    event: Option<Bytes>,
    /// hyper writes out what it has when it is told to wait, but not when it is told of an error.
    flushed: bool,
    error: Option<Error>,
}

impl Failing {
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
        Self { source, prefill, time_limit, events: false, begun: false, at_event_end: true, failing: None }
    }

    /// Decode's body as it comes.
    pub(super) fn piped(leg: Leg, prefill: Option<PrefillRun>, time_limit: TimeLimit) -> Self {
        let begun = leg.has_begun();
        let mut relay = Self::new(Source::Piped(leg), prefill, Some(time_limit));
        relay.begun = begun;
        relay
    }

    /// Decode's events, spliced one by one.
    pub(super) fn spliced(leg: Leg, splicer: StreamSplicer, time_limit: TimeLimit) -> Self {
        Self::new(Source::Spliced(Box::new((leg, splicer))), None, Some(time_limit))
    }

    /// Bytes that are all here.
    pub(super) fn whole(bytes: impl Into<SegmentedBytes>) -> Self {
        Self::new(Source::Whole(bytes.into()), None, None)
    }

    /// Whether the client reads events, so that an error can be told as one.
    pub(super) fn with_events(mut self, events: bool) -> Self {
        self.events = events;
        self
    }

    /// Why the answer will not be completed, if the client has not been told yet.
    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failing.as_ref().and_then(|failing| failing.error.as_ref())
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<SegmentedBytes, Error>>> {
        match &mut self.source {
            Source::Piped(leg) => leg.poll_data(cx).map_ok(SegmentedBytes::One),
            Source::Spliced(spliced) => {
                let (leg, splicer) = &mut **spliced;
                poll_spliced(leg, splicer, cx)
            }
            Source::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Source::Whole(bytes) => Poll::Ready(Some(Ok(std::mem::take(bytes)))),
            Source::Ended => Poll::Ready(None),
        }
    }

    /// Moves the prefill leg on. Its failure is the request's as long as decode is silent; from decode's first byte
    /// on it changes nothing for the client.
    fn poll_prefill(&mut self, cx: &mut Context<'_>) -> Option<Error> {
        let end = match self.prefill.as_mut()?.as_mut().poll(cx) {
            Poll::Ready(end) => end,
            Poll::Pending => return None,
        };
        self.prefill = None;
        if self.begun {
            note_late_end(end);
            return None;
        }
        let Source::Piped(_) = &self.source else { return None };
        match end {
            Ok(PrefillEnd::Answered(_)) => None,
            Ok(PrefillEnd::Refused { server, refusal, .. }) => {
                Some(Error::upstream(&server, Cause::LateRefusal(refusal.head.status().as_u16())))
            }
            Err(error) => Some(error),
        }
    }

    fn poll_time_limit(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let leg = match &mut self.source {
            Source::Piped(leg) => leg,
            Source::Spliced(spliced) => &mut spliced.0,
            Source::Whole(_) | Source::Ended => return Poll::Pending,
        };
        let Some(limit) = &mut self.time_limit else { return Poll::Pending };
        ready!(limit.poll(cx));
        Poll::Ready(leg.fail(Cause::Timeout(limit.deadline.after)))
    }

    /// A piece of the body is on its way.
    fn note_chunk(&mut self, data: &SegmentedBytes) {
        self.begun = true;
        self.at_event_end = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
        if let Some(limit) = &mut self.time_limit {
            limit.note_chunk();
        }
    }

    /// Decode has ended cleanly: its connection goes back, and a prefill leg that still runs goes on by itself.
    fn ended(&mut self) {
        match std::mem::replace(&mut self.source, Source::Ended) {
            Source::Piped(leg) => leg.park(),
            Source::Spliced(spliced) => spliced.0.park(),
            Source::Whole(_) | Source::Ended => {}
        }
        if let Some(prefill) = self.prefill.take() {
            finish_by_itself(prefill);
        }
    }

    /// Both connections are closed, and the client is told why.
    fn fail(&mut self, error: Error) {
        // Within an announced length an event would be taken for decode's bytes, and could make the body complete.
        let tells = self.events && self.size_hint().exact().is_none();
        self.source = Source::Ended;
        self.prefill = None;
        // An event that was cut off must not swallow the next.
        let separator = if self.at_event_end { "" } else { "\n\n" };
        let event = tells.then(|| format!("{separator}data: {}\n\n", error.to_json()).into());
        self.failing = Some(Failing { event, flushed: false, error: Some(error) });
    }
}

fn poll_spliced(
    leg: &mut Leg,
    splicer: &mut StreamSplicer,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<SegmentedBytes, Error>>> {
    loop {
        if let Some(events) = splicer.next() {
            let events = events.map_err(|error| leg.fail(Cause::TooLarge { limit: error.limit }));
            return Poll::Ready(Some(events));
        }
        match ready!(leg.poll_data(cx)) {
            Some(Ok(data)) => splicer.push(data),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(splicer.finish().map(|rest| Ok(rest.into()))),
        }
    }
}

/// A server whose connection is closed before it has answered takes that as an abort, which is not what a finished
/// request wants (the transfer to decode may still be booked). So the rest of a late prefill answer is read by a
/// task of its own; the alternative is a client that waits for it.
fn finish_by_itself(prefill: PrefillRun) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move {
            match tokio::time::timeout(LATE_PREFILL_TIMEOUT, prefill).await {
                Ok(end) => note_late_end(end),
                Err(_) if !log_limit::allow("late_prefill") => {}
                Err(_) => {
                    warn!("prefill did not finish its answer after decode had; its connection is closed")
                }
            }
        });
    }
}

/// How long a prefill answer may come after decode's end. SGLang's own limits for a pair that lost each other are
/// 300 s.
const LATE_PREFILL_TIMEOUT: Duration = Duration::from_secs(300);

fn note_late_end(end: Result<PrefillEnd, Error>) {
    match end {
        Ok(PrefillEnd::Answered(_)) => {}
        _ if !log_limit::allow("late_prefill") => {}
        Ok(PrefillEnd::Refused { refusal, .. }) => {
            warn!(
                status = refusal.head.status().as_u16(),
                "prefill refused after decode had begun to answer"
            );
        }
        Err(error) => warn!(code = error.code(), "after decode had begun to answer: {error}"),
    }
}

impl Body for Relay {
    type Data = SegmentedBytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<SegmentedBytes>, Error>>> {
        if self.failing.is_none()
            && let Some(error) = self.poll_prefill(cx)
        {
            self.fail(error);
        }
        if let Some(failing) = &mut self.failing {
            return failing.poll(cx);
        }
        let error = match self.poll_source(cx) {
            Poll::Ready(Some(Ok(data))) => {
                self.note_chunk(&data);
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            Poll::Ready(None) => {
                self.ended();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => error,
            Poll::Pending => ready!(self.poll_time_limit(cx)),
        };
        self.fail(error);
        self.failing.as_mut().expect("it has just failed").poll(cx)
    }

    fn is_end_stream(&self) -> bool {
        if self.failing.is_some() {
            return false;
        }
        match &self.source {
            Source::Piped(leg) => leg.is_ended(),
            Source::Spliced(_) => false,
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Piped(leg) => leg.remaining().map_or_else(SizeHint::default, SizeHint::with_exact),
            Source::Spliced(_) => SizeHint::default(),
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Ended => SizeHint::default(),
        }
    }
}

impl Drop for Relay {
    /// hyper does not ask a body of announced length for its end: it drops it after the last byte.
    fn drop(&mut self) {
        if self.is_end_stream() {
            self.ended();
        }
    }
}

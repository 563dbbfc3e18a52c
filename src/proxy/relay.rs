//! The body of an answer: decode's bytes, as soon as they come.
//!
//! What is left of the prefill leg is drained here too, in the same task. Dropping
//! a relay early closes both connections.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::warn;

use super::leg::{Leg, PrefillEnd, PrefillRun};
use crate::error::{Cause, Error};
use crate::wire::logprobs::StreamSplicer;

/// An answer's body on its way to the client.
pub(crate) struct Relay {
    source: Source,
    /// What is left of the prefill leg.
    prefill: Option<PrefillRun>,
    time_limit: Option<TimeLimit>,
}

/// Where the bytes come from.
#[expect(
    clippy::large_enum_variant,
    reason = "the large variant is the usual one, and a box is an allocation"
)]
enum Source {
    /// Decode's body as it is.
    Piped(Leg),
    /// Decode's events with prefill's logprobs in them.
    Spliced(Box<(Leg, StreamSplicer)>),
    /// Bytes that are all here.
    Whole(Bytes),
    /// Nothing more comes.
    Ended,
}

/// When a body must be complete. The timer is made only if it has to wait at all.
struct TimeLimit {
    deadline: Instant,
    /// What the error says.
    after: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Relay {
    /// Decode's body as it comes. With a time limit, it is cut off at the instant given.
    pub(super) fn piped(
        leg: Leg,
        prefill: Option<PrefillRun>,
        time_limit: Option<(Instant, Duration)>,
    ) -> Self {
        let time_limit = time_limit.map(|(deadline, after)| TimeLimit { deadline, after, timer: None });
        Self { source: Source::Piped(leg), prefill, time_limit }
    }

    /// Decode's events, spliced one by one.
    pub(super) fn spliced(leg: Leg, splicer: StreamSplicer) -> Self {
        Self { source: Source::Spliced(Box::new((leg, splicer))), prefill: None, time_limit: None }
    }

    /// Bytes that are all here.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { source: Source::Whole(bytes), prefill: None, time_limit: None }
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        match &mut self.source {
            Source::Piped(leg) => leg.poll_data(cx),
            Source::Spliced(spliced) => {
                let (leg, splicer) = &mut **spliced;
                poll_spliced(leg, splicer, cx)
            }
            Source::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Source::Whole(bytes) => Poll::Ready(Some(Ok(std::mem::take(bytes)))),
            Source::Ended => Poll::Ready(None),
        }
    }

    /// Moves the prefill leg on. From decode's head on its outcome changes nothing for the client.
    fn poll_prefill(&mut self, cx: &mut Context<'_>) {
        let Some(prefill) = &mut self.prefill else { return };
        if let Poll::Ready(end) = prefill.as_mut().poll(cx) {
            self.prefill = None;
            note_late_end(end);
        }
    }

    fn poll_time_limit(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let (Some(limit), Source::Piped(leg)) = (&mut self.time_limit, &self.source) else {
            return Poll::Pending;
        };
        let deadline = limit.deadline;
        ready!(limit.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline))).as_mut().poll(cx));
        Poll::Ready(Error::upstream(leg.server().backend(), Cause::Timeout(limit.after)))
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

    /// Both connections are closed.
    fn failed(&mut self) {
        self.source = Source::Ended;
        self.prefill = None;
    }
}

fn poll_spliced(
    leg: &mut Leg,
    splicer: &mut StreamSplicer,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Bytes, Error>>> {
    loop {
        if let Some(event) = splicer.next() {
            let too_large = |limit| Error::upstream(leg.server().backend(), Cause::TooLarge { limit });
            return Poll::Ready(Some(event.map_err(|error| too_large(error.limit))));
        }
        match ready!(leg.poll_data(cx)) {
            Some(Ok(data)) => splicer.push(data),
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(splicer.finish().map(Ok)),
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
        Ok(PrefillEnd::Refused(answer)) => {
            warn!(status = answer.status().as_u16(), "prefill refused after decode had begun to answer");
        }
        Err(error) => warn!(code = error.code(), "after decode had begun to answer: {error}"),
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        self.poll_prefill(cx);
        let frame = match self.poll_source(cx) {
            Poll::Ready(Some(Ok(data))) => Some(Ok(Frame::data(data))),
            Poll::Ready(Some(Err(error))) => Some(Err(error)),
            Poll::Ready(None) => None,
            Poll::Pending => Some(Err(ready!(self.poll_time_limit(cx)))),
        };
        match &frame {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                warn!(code = error.code(), "in the middle of an answer: {error}");
                self.failed();
            }
            None => self.ended(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Piped(leg) => leg.is_ended(),
            Source::Spliced(_) => false,
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Piped(leg) => leg.size_hint(),
            Source::Spliced(_) => SizeHint::default(),
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Ended => SizeHint::with_exact(0),
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

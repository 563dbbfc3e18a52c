//! Requests for several samples (`n` > 1): one ordinary request for each, and one response made of all.
//!
//! SGLang cannot generate several samples on a pair: it runs them in one bootstrap room, and decode hangs
//! (sglang #24223, #26486). A copy of the request is one without `n`, with a pair and a bootstrap room of its
//! own; it is sent, retried and timed out as any other, in [`exchange`](super::exchange). All copies run in
//! the request's own task, so that dropping the task closes all legs of all of them. When copies are sent is
//! decided in `copies`, what their events mean for the request in `decision`, and how their bytes are merged
//! in `wire::samples`.

mod copies;
mod decision;
mod rid;
mod stream;
mod whole;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use hyper::header::CONTENT_LENGTH;
use tokio::time::Instant;

use super::exchange::{AdmittedPair, UpstreamResponse, early_head};
use super::relay::{Relay, TimeLimit};
use super::request::{Proxy, ReadRequest};
use crate::error::Error;
use crate::http1::RawHeaders;
use crate::observe::record::Record;
use crate::timer::Timer;
use copies::{Copies, CopyEvent};
use decision::{SampleAction, SampleDecision};
use rid::rids_of_copies;
use stream::SampleStream;
use whole::WholeResponses;

impl Proxy {
    /// Sends the copies of a request for several samples. `admitted` is the pair of the first one, as in
    /// [`dispatch`](Self::dispatch).
    pub(crate) async fn fan_out(
        &self,
        mut request: ReadRequest,
        admitted: Option<AdmittedPair>,
        headers: &RawHeaders,
        record: &mut Record,
    ) -> Result<UpstreamResponse, Error> {
        if request.shape.prompt.is_none() {
            // A load trace keeps it, and the copies must outlive the borrow of the record.
            request.shape.prompt = record.prompt().cloned();
        }
        let rids = rids_of_copies(&request);
        let records = record.begin_copies(request.samples());
        let request = Arc::new(request);
        let copies = Copies::new(self, &request, admitted, records, rids, headers);
        if request.shape.stream {
            start_stream(&request, copies).await
        } else {
            WholeResponses::new(&request, copies, &self.admission).collect().await
        }
    }
}

/// Starts the stream when the first copy's has, or at the latest when a comment is due.
async fn start_stream(request: &Arc<ReadRequest>, mut copies: Copies) -> Result<UpstreamResponse, Error> {
    let keep_alive = request.limits.stream_keepalive;
    // As of one request, though one that has not been written to its servers yet may still fail: its client
    // reads an event then, and not a status.
    let early_head_at = keep_alive.map(|after| Instant::now() + after);
    let mut decision = SampleDecision::new(copies.count(), true);
    let mut timer = Timer::default();
    let first = poll_fn(|cx| {
        if let Poll::Ready((copy, event)) = copies.poll_event(cx) {
            return Poll::Ready(Some((copy, event)));
        }
        match early_head_at {
            Some(at) => timer.poll_until(at, cx).map(|()| None),
            None => Poll::Pending,
        }
    });
    let (head, is_early) = match first.await {
        Some((copy, event)) => match (decision.on(copy, event.kind()), event) {
            (SampleAction::Start, CopyEvent::Responded(response)) => {
                let accepted = copies.accept_stream(copy, response);
                let mut head = accepted.inspect_err(|_| copies.set_decisive(copy))?;
                // Of one copy's body, if anything.
                head.remove(&CONTENT_LENGTH);
                (head, false)
            }
            (SampleAction::PassOn, CopyEvent::Responded(response)) => {
                copies.set_decisive(copy);
                return Ok(response);
            }
            (_, CopyEvent::Failed(error)) => {
                copies.set_decisive(copy);
                return Err(error);
            }
            (other, _) => {
                debug_assert!(false, "{other:?} is no start of a stream");
                return Err(Error::Internal);
            }
        },
        None => {
            decision.start_early();
            (early_head(), true)
        }
    };
    let limits = &request.limits;
    // Each copy has its own limit, so that one that is silent is not hidden by the others.
    let time_limit = TimeLimit::new(request.deadline, Some(limits.stream_idle_timeout));
    let time_limit = time_limit.with_keep_alive(keep_alive);
    let stream = SampleStream::new(request, copies, decision);
    let relay = Relay::merged(Box::new(stream), time_limit, is_early);
    let body = relay.with_event_stream(true, request.dialect.into()).into();
    Ok(UpstreamResponse { head, body })
}

//! One request of a client, from its head to the end of its response: what was asked for,
//! when it reached which phase, on which backends, and how it ended.
//!
//! A [`Record`] is made when a head has been read and travels with the request. When it is
//! dropped, which happens whatever becomes of the request, each [`Observer`] is called
//! once with a [`CompletedRequest`]. Nothing is counted and nothing is logged here.

mod completed;
mod endpoint;
mod leg;
mod request_id;
mod retry_reason;
mod sample;
mod timeline;
#[cfg(feature = "otel")]
mod trace;
mod traced;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::http::uri::PathAndQuery;

use crate::error::Error;
use crate::upstream::{InFlight, Role, ServerPair};
use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::Prompt;

pub(crate) use completed::{CompletedRequest, RequestEnd, Severity, StatusClass, truncate};
pub(crate) use endpoint::Endpoint;
pub(crate) use leg::LegRecord;
#[cfg(test)]
pub(crate) use request_id::MAX_REQUEST_ID;
pub(crate) use request_id::{RequestId, RequestIdentity};
pub(crate) use retry_reason::{RetryCause, RetryReason};
pub(crate) use sample::{CopiesRecord, CopyRecord, CopyWatch, SampleRecord};
pub(crate) use timeline::Phase;
use timeline::{SinceHead, Timeline};
#[cfg(feature = "otel")]
pub(crate) use trace::{LegSpan, Trace};
pub(crate) use traced::{ResponseTail, TracedRequest};

/// Reads the event of a completed request. Called by the worker that had the request, between two requests of
/// others: it must not wait.
pub(crate) trait Observer: Send + Sync {
    /// A request, or a retry of it, is about to be sent to these backends.
    fn pair_selected(&self, pair: &ServerPair) {
        let _ = pair;
    }

    fn request_completed(&self, request: &CompletedRequest<'_>);

    /// Whether it wants [`CompletedRequest::traced`] of generation requests.
    fn wants_prompts(&self) -> bool {
        false
    }

    /// A generation request whose prompt it gets has arrived.
    fn generation_arrived(&self, at: Instant) {
        let _ = at;
    }
}

/// Makes the records of one worker.
pub(crate) struct Recorder {
    observers: Vec<Arc<dyn Observer>>,
    /// An observer wants the prompts of generation requests.
    wants_prompts: bool,
    is_grace_period_over: AtomicBool,
}

impl Recorder {
    pub(crate) fn new(observers: Vec<Arc<dyn Observer>>) -> Arc<Self> {
        let wants_prompts = observers.iter().any(|observer| observer.wants_prompts());
        Arc::new(Self { observers, wants_prompts, is_grace_period_over: AtomicBool::new(false) })
    }

    /// Starts the record of a request whose head has been read. Boxed: the record is moved from one future to
    /// the next several times, and has several hundred bytes.
    pub(crate) fn begin(self: &Arc<Self>) -> Box<Record> {
        Box::new(Record {
            sample: SampleRecord::new(Arc::clone(self), Instant::now()),
            method: None,
            target: None,
            endpoint: Endpoint::Other,
            streaming: false,
            status: None,
            // What it is if nothing else is recorded before the drop: a client that disconnects drops the
            // future.
            end: RequestEnd::ClientDisconnected,
            error: String::new(),
            bytes_in: 0,
            bytes_out: 0,
            duration: None,
            proxied_for: None,
            traced: None,
            copies: None,
        })
    }

    /// Records a request that was answered with this error because its head could not be parsed, or did not
    /// arrive in time. Returns the id that the response gets.
    pub(crate) fn reject_before_parse(self: &Arc<Self>, error: &Error) -> RequestId {
        let id = RequestId::generate();
        let mut record = self.begin();
        record.set_identity(RequestIdentity { id: id.clone(), method: None, target: None });
        record.set_error(error);
        record.set_status(error.status().as_u16());
        // Times are counted from the end of the head, which it does not have.
        record.duration = Some(Duration::ZERO);
        id
    }

    /// Requests that end early from now on are recorded as ended by the router: its grace period is over.
    pub(crate) fn set_grace_period_over(&self) {
        self.is_grace_period_over.store(true, Relaxed);
    }
}

/// A request in progress. It is completed when this is dropped.
pub(crate) struct Record {
    /// Its attempts; while it has several samples, none.
    sample: SampleRecord,
    method: Option<Method>,
    target: Option<PathAndQuery>,
    endpoint: Endpoint,
    streaming: bool,
    status: Option<u16>,
    end: RequestEnd,
    /// The error that it ended with, as a sentence.
    error: String,
    bytes_in: u64,
    bytes_out: u64,
    /// Set if the request ended with its first chunk, so that the clock is not read a second time.
    duration: Option<Duration>,
    /// The client for whom a load balancer has connected. Boxed, because few requests have one.
    proxied_for: Option<Box<SocketAddr>>,
    /// Only while a load trace is written.
    traced: Option<Box<TracedRequest>>,
    /// Only with several samples.
    copies: Option<Arc<CopiesRecord>>,
}

impl Record {
    /// Sets what its head says.
    pub(crate) fn set_identity(&mut self, identity: RequestIdentity) {
        // Always there: no leg shares the timeline before the request is sent.
        if let Some(timeline) = Arc::get_mut(&mut self.sample.timeline) {
            timeline.request_id = Some(identity.id);
        }
        (self.method, self.target) = (identity.method, identity.target);
    }

    pub(crate) fn request_id(&self) -> Option<&RequestId> {
        self.sample.timeline.request_id.as_ref()
    }

    /// Makes it a part of a trace.
    #[cfg(feature = "otel")]
    pub(crate) fn set_trace(&mut self, trace: Trace) {
        self.sample.trace = Some(Box::new(trace));
    }

    /// Sets the client for whom a load balancer has connected.
    pub(crate) fn set_proxied_for(&mut self, address: SocketAddr) {
        self.proxied_for = Some(Box::new(address));
    }

    /// When its head was read.
    pub(crate) fn started_at(&self) -> Instant {
        self.sample.timeline.started_at
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    pub(crate) fn set_endpoint(&mut self, endpoint: Endpoint) {
        self.endpoint = endpoint;
    }

    /// Records that the body of a generation request was read: at this time, or together with its head.
    /// `streaming`: the body asks for a stream.
    pub(crate) fn body_read(&mut self, bytes: usize, streaming: bool, at: Option<Instant>) {
        self.bytes_in = bytes as u64;
        self.streaming = streaming;
        let at = at.map_or(SinceHead::HEAD, |at| self.sample.timeline.since_head(at));
        self.sample.timeline.mark_at(Phase::BodyRead, at);
    }

    /// Whether the prompt is wanted at the end of this generation request, whose body is about to be read.
    pub(crate) fn wants_prompt(&self) -> bool {
        if self.sample.recorder.wants_prompts {
            self.sample
                .recorder
                .observers
                .iter()
                .for_each(|observer| observer.generation_arrived(self.started_at()));
        }
        self.sample.recorder.wants_prompts
    }

    /// Keeps the prompt, which is [wanted](Self::wants_prompt), to the end of the request.
    pub(crate) fn set_prompt(&mut self, prompt: Prompt) {
        self.traced = Some(Box::new(TracedRequest::new(prompt)));
    }

    /// The prompt, if it is kept.
    pub(crate) fn prompt(&self) -> Option<&Prompt> {
        self.traced.as_ref().map(|traced| &traced.prompt)
    }

    /// The record of its one sample, and the prompt, if it is kept here.
    pub(crate) fn sample_and_prompt(&mut self) -> (&mut SampleRecord, Option<&Prompt>) {
        (&mut self.sample, self.traced.as_ref().map(|traced| &traced.prompt))
    }

    /// Records that it has so many samples, with records of their own.
    pub(crate) fn begin_copies(&mut self, count: u32) -> (Arc<CopiesRecord>, Vec<CopyRecord>) {
        let all = CopiesRecord::new(count);
        self.copies = Some(Arc::clone(&all));
        let copies = (0..count as usize).map(|number| CopyRecord::new(&self.sample, number, &all)).collect();
        (all, copies)
    }

    /// The records of its copies, if it has several samples.
    pub(crate) fn copies(&self) -> Option<&Arc<CopiesRecord>> {
        self.copies.as_ref()
    }

    /// Records the status of the response to the client.
    pub(crate) fn set_status(&mut self, status: u16) {
        self.status = Some(status);
    }

    /// Records that it ends with an error of the router's. The first one counts: those after it are its
    /// consequences.
    pub(crate) fn set_error(&mut self, error: &Error) {
        if !matches!(self.end, RequestEnd::Failed(_)) {
            self.end = RequestEnd::Failed(error.code());
            self.error = error.to_string();
        }
    }

    /// Records that the first chunk of the response body goes out, which may be the last. Of a response that
    /// is not merged, returns when decode's first byte arrived: the time from then on is the router's own.
    pub(crate) fn first_chunk_sent(&mut self, is_last: bool) -> Option<Instant> {
        self.sample.timeline.mark(Phase::FirstByteToClient);
        if is_last {
            self.duration = self.sample.timeline.time_to(Phase::FirstByteToClient);
        }
        // A merged response has waited for prefill, which is no time of the router's.
        self.sample.timeline.instant_of(Phase::DecodeByte).filter(|_| !self.sample.timeline.is_merged())
    }

    /// Records how many bytes of the body went out.
    pub(crate) fn set_bytes_out(&mut self, bytes: u64) {
        self.bytes_out = bytes;
    }

    /// Whether the end of the response is wanted, for a load trace.
    pub(crate) fn keeps_tail(&self) -> bool {
        self.traced.is_some()
    }

    /// Keeps the end of the response, of which this is the next part, if it is [wanted](Self::keeps_tail).
    pub(crate) fn keep_tail(&mut self, data: &SegmentedBytes) {
        if let Some(traced) = &mut self.traced {
            traced.tail.push(data);
        }
    }

    /// Records that the whole response was handed to the client's connection.
    pub(crate) fn set_complete(&mut self) {
        // A response that is an error of the router's is complete, and still a failure.
        if self.end == RequestEnd::ClientDisconnected {
            self.end = RequestEnd::Complete;
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(copies) = self.copies.clone() {
            self.sample.absorb(&copies);
        }
        // Both drop the request's future. After the grace period it was the router.
        let is_shutdown = self.end == RequestEnd::ClientDisconnected
            && self.sample.recorder.is_grace_period_over.load(Relaxed);
        let end = if is_shutdown { RequestEnd::Shutdown } else { self.end };
        let duration = self.duration.unwrap_or_else(|| self.sample.timeline.started_at.elapsed());
        let completed = CompletedRequest::new(self, end, duration);
        for observer in &self.sample.recorder.observers {
            observer.request_completed(&completed);
        }
    }
}

/// One time that a request is sent to a pair.
pub(crate) struct Attempt<'a> {
    pub(crate) pair: &'a ServerPair,
    timeline: &'a Arc<Timeline>,
    /// By leg.
    #[cfg(feature = "otel")]
    trace_headers: [Vec<u8>; 2],
}

impl Attempt<'_> {
    /// Starts the leg on one of the two backends.
    pub(crate) fn begin_leg(&self, in_flight: InFlight) -> LegRecord {
        LegRecord::new(in_flight, Arc::clone(self.timeline))
    }

    /// Header lines, each with its CRLF, that only the leg of this role gets: each has a span of its own.
    pub(crate) fn trace_headers(&self, role: Role) -> &[u8] {
        #[cfg(feature = "otel")]
        let headers = &self.trace_headers[role.leg()];
        #[cfg(not(feature = "otel"))]
        let (_, headers) = (role, b"");
        headers
    }

    /// Records that the response is merged: decode's bytes have waited for prefill's response.
    pub(crate) fn set_merged(&self) {
        self.timeline.set_merged();
    }
}

#[cfg(test)]
mod tests;

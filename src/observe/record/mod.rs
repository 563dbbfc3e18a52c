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
use crate::upstream::{Backend, InFlight, Role, ServerPair};
use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::Prompt;

pub(crate) use completed::{CompletedRequest, RequestEnd, Severity, StatusClass, truncate};
pub(crate) use endpoint::Endpoint;
pub(crate) use leg::LegRecord;
#[cfg(test)]
pub(crate) use request_id::MAX_REQUEST_ID;
pub(crate) use request_id::{RequestId, RequestIdentity};
pub(crate) use retry_reason::{RetryCause, RetryReason};
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
            recorder: Arc::clone(self),
            timeline: Arc::new(Timeline::new(Instant::now())),
            method: None,
            target: None,
            endpoint: Endpoint::Other,
            streaming: false,
            status: None,
            // What it is if nothing else is recorded before the drop: a client that disconnects drops the
            // future.
            end: RequestEnd::ClientDisconnected,
            error: String::new(),
            pair: None,
            attempts: 0,
            retries: Vec::new(),
            bytes_in: 0,
            bytes_out: 0,
            has_sent_chunk: false,
            duration: None,
            proxied_for: None,
            traced: None,
            #[cfg(feature = "otel")]
            trace: None,
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
    recorder: Arc<Recorder>,
    /// Shared with the legs, which reach phases.
    timeline: Arc<Timeline>,
    method: Option<Method>,
    target: Option<PathAndQuery>,
    endpoint: Endpoint,
    streaming: bool,
    status: Option<u16>,
    end: RequestEnd,
    /// The error that it ended with, as a sentence.
    error: String,
    pair: Option<ServerPair>,
    attempts: u32,
    retries: Vec<RetryReason>,
    bytes_in: u64,
    bytes_out: u64,
    /// A chunk of the response body has been handed to the client's connection.
    has_sent_chunk: bool,
    /// Set if the request ended with its first chunk, so that the clock is not read a second time.
    duration: Option<Duration>,
    /// The client for whom a load balancer has connected. Boxed, because few requests have one.
    proxied_for: Option<Box<SocketAddr>>,
    /// Only while a load trace is written.
    traced: Option<Box<TracedRequest>>,
    #[cfg(feature = "otel")]
    trace: Option<Box<Trace>>,
}

impl Record {
    /// Sets what its head says.
    pub(crate) fn set_identity(&mut self, identity: RequestIdentity) {
        // Always there: no leg shares the timeline before the request is sent.
        if let Some(timeline) = Arc::get_mut(&mut self.timeline) {
            timeline.request_id = Some(identity.id);
        }
        (self.method, self.target) = (identity.method, identity.target);
    }

    pub(crate) fn request_id(&self) -> Option<&RequestId> {
        self.timeline.request_id.as_ref()
    }

    /// Makes it a part of a trace.
    #[cfg(feature = "otel")]
    pub(crate) fn set_trace(&mut self, trace: Trace) {
        self.trace = Some(Box::new(trace));
    }

    /// Sets the client for whom a load balancer has connected.
    pub(crate) fn set_proxied_for(&mut self, address: SocketAddr) {
        self.proxied_for = Some(Box::new(address));
    }

    /// When its head was read.
    pub(crate) fn started_at(&self) -> Instant {
        self.timeline.started_at
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
        let at = at.map_or(SinceHead::HEAD, |at| self.timeline.since_head(at));
        self.timeline.mark_at(Phase::BodyRead, at);
    }

    /// Whether the prompt is wanted at the end of this generation request, whose body is about to be read.
    pub(crate) fn wants_prompt(&self) -> bool {
        if self.recorder.wants_prompts {
            self.recorder
                .observers
                .iter()
                .for_each(|observer| observer.generation_arrived(self.started_at()));
        }
        self.recorder.wants_prompts
    }

    /// Keeps the prompt, which is [wanted](Self::wants_prompt), to the end of the request.
    pub(crate) fn set_prompt(&mut self, prompt: Prompt) {
        self.traced = Some(Box::new(TracedRequest::new(prompt)));
    }

    /// The prompt, if it is kept.
    pub(crate) fn prompt(&self) -> Option<&Prompt> {
        self.traced.as_ref().map(|traced| &traced.prompt)
    }

    /// Records that it is sent to a pair, for the first time or again.
    pub(crate) fn begin_attempt<'a>(&'a mut self, pair: &'a ServerPair) -> Attempt<'a> {
        self.attempts += 1;
        self.pair = Some(pair.clone());
        self.recorder.observers.iter().for_each(|observer| observer.pair_selected(pair));
        self.timeline.begin_attempt();
        #[cfg(feature = "otel")]
        let trace_headers = match &mut self.trace {
            Some(trace) => trace.begin_attempt(pair, self.timeline.started_at.elapsed()),
            None => Default::default(),
        };
        Attempt {
            pair,
            timeline: &self.timeline,
            #[cfg(feature = "otel")]
            trace_headers,
        }
    }

    /// Records that a backend got it again, on a new connection in place of a stale one.
    pub(crate) fn add_resend(&mut self, backend: &Arc<Backend>) {
        self.retries.push(RetryReason::stale(backend));
    }

    /// Records that it will be sent to another pair because of this backend: of an error, or else of its
    /// status.
    pub(crate) fn add_retry(&mut self, backend: &Arc<Backend>, error: Option<&Error>) {
        self.retries.push(RetryReason::new(backend, error));
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

    /// Records a chunk of the response body. On the first chunk of a response that is not merged, returns
    /// when decode's first byte arrived: the time from then on is the router's own.
    pub(crate) fn record_chunk(&mut self, bytes: usize, is_last: bool) -> Option<Instant> {
        self.bytes_out += bytes as u64;
        if self.has_sent_chunk {
            return None;
        }
        self.has_sent_chunk = true;
        self.timeline.mark(Phase::FirstByteToClient);
        if is_last {
            self.duration = self.timeline.time_to(Phase::FirstByteToClient);
        }
        // A merged response has waited for prefill, which is no time of the router's.
        self.timeline.instant_of(Phase::DecodeByte).filter(|_| !self.timeline.is_merged())
    }

    /// Keeps the end of the response, of which this is the next part, for a load trace.
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
        // Both drop the request's future. After the grace period it was the router.
        let is_shutdown =
            self.end == RequestEnd::ClientDisconnected && self.recorder.is_grace_period_over.load(Relaxed);
        let end = if is_shutdown { RequestEnd::Shutdown } else { self.end };
        let duration = self.duration.unwrap_or_else(|| self.timeline.started_at.elapsed());
        let completed = CompletedRequest::new(self, end, duration);
        for observer in &self.recorder.observers {
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

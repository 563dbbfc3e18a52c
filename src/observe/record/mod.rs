//! One request of a client's, from its head to the end of its answer: what it was,
//! when which phase was reached, on which servers, and how it ended.
//!
//! A [`Record`] is made when a head has been read, travels with the request, and is
//! finished when it is dropped, which happens whatever becomes of the request. What
//! has been recorded is then shown, once, as a [`CompletedRequest`], to all [`Observer`]s.
//! Nothing is counted and nothing is written here.

mod leg;
mod request_id;
mod timeline;
#[cfg(feature = "otel")]
mod trace;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::error::{Cause, Error};
use crate::upstream::{Backend, InFlight, Role, ServerPair};
use crate::wire::shape::Dialect;

pub(crate) use leg::LegRecord;
#[cfg(test)]
pub(crate) use request_id::MAX_REQUEST_ID;
pub(crate) use request_id::{RequestId, RequestIdentity};
pub(crate) use timeline::Phase;
use timeline::{Moment, Timeline};
#[cfg(feature = "otel")]
pub(crate) use trace::{LegSpan, Trace};

/// What a client asked for: a fixed set, whatever paths are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Generate,
    Chat,
    Completions,
    Health,
    Ready,
    HealthGenerate,
    FlushCache,
    ServerInfo,
    ModelInfo,
    /// What operators ask of servers.
    Workers,
    /// Anything else, mostly refused.
    Other,
}

impl Endpoint {
    /// All of them, in the order of their definition; those that generate come first.
    pub(crate) const ALL: [Self; 11] = [
        Self::Generate,
        Self::Chat,
        Self::Completions,
        Self::Health,
        Self::Ready,
        Self::HealthGenerate,
        Self::FlushCache,
        Self::ServerInfo,
        Self::ModelInfo,
        Self::Workers,
        Self::Other,
    ];

    /// How many of [`ALL`](Self::ALL) generate.
    pub(crate) const GENERATING: usize = 3;

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Chat => "chat_completions",
            Self::Completions => "completions",
            Self::Health => "health",
            Self::Ready => "ready",
            Self::HealthGenerate => "health_generate",
            Self::FlushCache => "flush_cache",
            Self::ServerInfo => "server_info",
            Self::ModelInfo => "model_info",
            Self::Workers => "workers",
            Self::Other => "other",
        }
    }

    pub(crate) fn generates(self) -> bool {
        (self as usize) < Self::GENERATING
    }
}

impl From<Dialect> for Endpoint {
    fn from(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Generate => Self::Generate,
            Dialect::Chat => Self::Chat,
            Dialect::Completions => Self::Completions,
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestEnd {
    /// All of an answer, a server's whatever its status, was given to the client's connection.
    Complete,
    /// With an error of the router's, of this code: as the answer, or in the middle of one.
    Failed(&'static str),
    /// The client left before the end.
    ClientLeft,
    /// The router ended first: the grace period of its shutdown was over.
    CutOff,
}

/// Something of a server's for which a request was sent again.
#[derive(Debug, Clone)]
pub(crate) struct RetryReason {
    pub(crate) server: Arc<Backend>,
    /// The error's code; `None`: the server answered with a status that is tried again elsewhere.
    pub(crate) code: Option<&'static str>,
    pub(crate) cause: RetryCause,
}

/// Why a request was sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryCause {
    Connect,
    ConnectTimeout,
    /// A kept connection had been closed.
    Closed,
    /// `--retry-on-status`.
    Status,
}

impl RetryCause {
    /// All of them, in the order of their definition.
    pub(crate) const ALL: [Self; 4] = [Self::Connect, Self::ConnectTimeout, Self::Closed, Self::Status];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect_timeout",
            Self::Closed => "closed",
            Self::Status => "status",
        }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::Upstream { cause: Cause::Connect(_), .. } => Self::Connect,
            Error::Upstream { cause: Cause::ConnectTimeout(_), .. } => Self::ConnectTimeout,
            _ => Self::Closed,
        }
    }
}

/// Who is shown what was recorded. Called on the request's own thread: to be quick.
pub(crate) trait Observer: Send + Sync {
    /// A request has come to its end.
    fn finished(&self, request: &CompletedRequest<'_>);
}

/// Makes the records of one worker.
pub(crate) struct Recorder {
    observers: Vec<Arc<dyn Observer>>,
    cut_off: AtomicBool,
}

impl Recorder {
    pub(crate) fn new(observers: Vec<Arc<dyn Observer>>) -> Arc<Self> {
        Arc::new(Self { observers, cut_off: AtomicBool::new(false) })
    }

    /// A request's head has been read. Its record is boxed: it is handed on several times.
    pub(crate) fn begin(self: &Arc<Self>) -> Box<Record> {
        Box::new(Record {
            recorder: Arc::clone(self),
            timeline: Arc::new(Timeline::new(Instant::now())),
            name: None,
            kind: Endpoint::Other,
            streaming: false,
            status: None,
            ending: RequestEnd::ClientLeft,
            cause: String::new(),
            pair: None,
            attempts: 0,
            faults: Vec::new(),
            bytes_in: 0,
            bytes_out: 0,
            given: false,
            took: None,
            #[cfg(feature = "otel")]
            trace: None,
        })
    }

    /// From now on a request that ends early was ended by the router.
    pub(crate) fn cut_off(&self) {
        self.cut_off.store(true, Relaxed);
    }
}

/// One request, as long as it is under way. Finished when dropped.
pub(crate) struct Record {
    recorder: Arc<Recorder>,
    /// Shared with the legs, which reach the phases.
    timeline: Arc<Timeline>,
    name: Option<RequestIdentity>,
    kind: Endpoint,
    streaming: bool,
    status: Option<u16>,
    ending: RequestEnd,
    /// The error that it ends with, as a sentence.
    cause: String,
    pair: Option<ServerPair>,
    attempts: u32,
    faults: Vec<RetryReason>,
    bytes_in: u64,
    bytes_out: u64,
    /// Something of the answer's body has been given to the client's connection.
    given: bool,
    /// If it ended with the first of it: the clock is not read again.
    took: Option<Duration>,
    #[cfg(feature = "otel")]
    trace: Option<Box<Trace>>,
}

impl Record {
    /// What its head says.
    pub(crate) fn named(&mut self, name: RequestIdentity) {
        self.name = Some(name);
    }

    /// What it is called.
    pub(crate) fn id(&self) -> Option<&RequestId> {
        self.name.as_ref().map(|name| &name.id)
    }

    /// It is a part of a trace.
    #[cfg(feature = "otel")]
    pub(crate) fn traced(&mut self, trace: Trace) {
        self.trace = Some(Box::new(trace));
    }

    /// When its head was read.
    pub(crate) fn begun(&self) -> Instant {
        self.timeline.begun
    }

    /// What the request is.
    pub(crate) fn is(&mut self, kind: Endpoint) {
        self.kind = kind;
    }

    /// All of a generation request's body has come: at that time, or with its head. `streaming`: it asks for a stream.
    pub(crate) fn body_read(&mut self, bytes: usize, streaming: bool, at: Option<Instant>) {
        self.bytes_in = bytes as u64;
        self.streaming = streaming;
        let moment = at.map_or(Moment::FIRST, |at| self.timeline.at(at));
        self.timeline.reach_at(Phase::BodyRead, moment);
    }

    /// It is sent to a pair, for the first time or again.
    pub(crate) fn sent_to<'a>(&'a mut self, pair: &'a ServerPair) -> Attempt<'a> {
        self.attempts += 1;
        self.pair = Some(pair.clone());
        self.timeline.begin_attempt();
        #[cfg(feature = "otel")]
        let lines = match &mut self.trace {
            Some(trace) => trace.attempt(pair, self.timeline.begun.elapsed()),
            None => Default::default(),
        };
        Attempt {
            pair,
            timeline: &self.timeline,
            #[cfg(feature = "otel")]
            lines,
        }
    }

    /// It will be sent again, because of what a server did: an error, or else a status.
    pub(crate) fn tried_again(&mut self, server: &Arc<Backend>, error: Option<&Error>) {
        let cause = error.map_or(RetryCause::Status, RetryCause::of);
        self.faults.push(RetryReason { server: Arc::clone(server), code: error.map(Error::code), cause });
    }

    /// The head of its answer is there.
    pub(crate) fn answered(&mut self, status: u16) {
        self.status = Some(status);
    }

    /// It ends with an error of the router's: the first of which this is said.
    pub(crate) fn failed(&mut self, error: &Error) {
        if !matches!(self.ending, RequestEnd::Failed(_)) {
            self.ending = RequestEnd::Failed(error.code());
            self.cause = error.to_string();
        }
    }

    /// A piece of the answer's body goes to the client's connection, and may be the last. Returns when decode's first byte
    /// came, if this is the first piece and nothing but the router stood between the two.
    pub(crate) fn gives(&mut self, bytes: usize, is_last: bool) -> Option<Instant> {
        self.bytes_out += bytes as u64;
        if self.given {
            return None;
        }
        self.given = true;
        self.timeline.reach(Phase::ConnectionHandler);
        if is_last {
            self.took = self.timeline.reached(Phase::ConnectionHandler);
        }
        self.timeline.instant(Phase::DecodeByte).filter(|_| !self.timeline.is_merged())
    }

    /// All of the answer has been given to the client's connection.
    pub(crate) fn completed(&mut self) {
        if self.ending == RequestEnd::ClientLeft {
            self.ending = RequestEnd::Complete;
        }
    }

    /// What there is to be seen of it.
    fn finished(&self) -> CompletedRequest<'_> {
        let left = self.ending == RequestEnd::ClientLeft && self.recorder.cut_off.load(Relaxed);
        let ending = if left { RequestEnd::CutOff } else { self.ending };
        CompletedRequest {
            record: self,
            ending,
            took: self.took.unwrap_or_else(|| self.timeline.begun.elapsed()),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let finished = self.finished();
        for observer in &self.recorder.observers {
            observer.finished(&finished);
        }
    }
}

/// One time that a request is sent to a pair.
pub(crate) struct Attempt<'a> {
    pub(crate) pair: &'a ServerPair,
    timeline: &'a Arc<Timeline>,
    /// By role.
    #[cfg(feature = "otel")]
    lines: [Vec<u8>; 2],
}

impl Attempt<'_> {
    /// The leg on one of the two begins.
    pub(crate) fn leg(&self, server: InFlight) -> LegRecord {
        LegRecord::new(server, Arc::clone(self.timeline))
    }

    /// Header lines, each with its end, that only the leg of this role has.
    pub(crate) fn lines(&self, role: Role) -> &[u8] {
        #[cfg(feature = "otel")]
        let lines = &self.lines[role as usize];
        #[cfg(not(feature = "otel"))]
        let (_, lines) = (role, b"");
        lines
    }

    /// Decode's bytes have waited for prefill's answer.
    pub(crate) fn merges(&self) {
        self.timeline.merge();
    }
}

/// A request that has ended, to be looked at.
pub(crate) struct CompletedRequest<'a> {
    record: &'a Record,
    ending: RequestEnd,
    took: Duration,
}

impl CompletedRequest<'_> {
    /// `None`: it was refused before its name was settled.
    pub(crate) fn name(&self) -> Option<&RequestIdentity> {
        self.record.name.as_ref()
    }

    pub(crate) fn kind(&self) -> Endpoint {
        self.record.kind
    }

    /// Whether a stream was asked for.
    pub(crate) fn streaming(&self) -> bool {
        self.record.streaming
    }

    /// The status that the client was sent. `None`: it left before that, or was cut off.
    pub(crate) fn status(&self) -> Option<u16> {
        self.record.status
    }

    pub(crate) fn ending(&self) -> RequestEnd {
        self.ending
    }

    /// What an ending with an error is told with; otherwise nothing.
    pub(crate) fn cause(&self) -> &str {
        &self.record.cause
    }

    /// The trace that it is a part of.
    #[cfg(feature = "otel")]
    pub(crate) fn trace(&self) -> Option<&Trace> {
        self.record.trace.as_deref()
    }

    /// From the request's head to its end.
    pub(crate) fn took(&self) -> Duration {
        self.took
    }

    /// The servers of the last attempt; `None`: there was none.
    pub(crate) fn pair(&self) -> Option<&ServerPair> {
        self.record.pair.as_ref()
    }

    /// How often it was sent to a pair.
    pub(crate) fn attempts(&self) -> u32 {
        self.record.attempts
    }

    /// Why it was sent again, each time.
    pub(crate) fn faults(&self) -> &[RetryReason] {
        &self.record.faults
    }

    /// Which leg failed first in the last attempt, before decode's answer had begun or, of decode, at any time.
    pub(crate) fn failed_leg(&self) -> Option<Role> {
        self.record.timeline.failed_leg()
    }

    /// Of the request's body.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.record.bytes_in
    }

    /// Of the answer's body.
    pub(crate) fn bytes_out(&self) -> u64 {
        self.record.bytes_out
    }

    /// From the request's head to a phase of the last attempt; `None`: it was not reached.
    pub(crate) fn reached(&self, phase: Phase) -> Option<Duration> {
        self.record.timeline.reached(phase)
    }

    /// From one phase to another in nanoseconds; `None`: one was not reached. Zero if the other came first.
    pub(crate) fn nanos_between(&self, from: Phase, to: Phase) -> Option<u64> {
        let timeline = &self.record.timeline;
        Some(timeline.nanos(to)?.saturating_sub(timeline.nanos(from)?))
    }

    /// Whether a leg of the last attempt opened a connection, instead of using a kept one.
    pub(crate) fn has_dialled(&self) -> bool {
        self.record.timeline.has_dialled()
    }

    /// How long a leg ran on after its partner had failed, in any attempt; the last one counts.
    pub(crate) fn ran_on(&self, role: Role) -> Option<Duration> {
        self.record.timeline.ran_on(role)
    }
}

#[cfg(test)]
mod tests;

//! What is told of a request when it is over: its line in the log, and its spans.
//!
//! A [`RequestLogger`] is shown what was recorded of each request ([`CompletedRequest`]), and notes
//! nothing itself but the request's name. A request that failed has one line, one that
//! went well has one if an access log is wanted. No body, no query and no header is told, except for the request's name.

pub(crate) mod log_limit;
mod request_ids;
mod request_line;
mod servers;
#[cfg(feature = "otel")]
pub(crate) mod traces;

use std::time::Duration;

use crate::error::Error;
use crate::http1::RequestHead;
use crate::observe::record::{
    CompletedRequest, Observer, Phase, Record, RequestEnd, RequestId, RequestIdentity,
};
use crate::upstream::Role;
use request_line::{CUT_OFF, End};

pub(crate) use request_line::RequestLog;
pub use request_line::{RequestFailure, RequestLine, RequestTimes};

pub(crate) use request_ids::{DEFAULT_HEADERS, check_header};
pub(crate) use servers::tell_changes;

/// How often counts of lines that were not written are looked at.
const TICK: Duration = Duration::from_secs(1);

/// What is told, as configured.
#[derive(Clone)]
pub(crate) struct ReportOptions {
    /// A line for every request.
    pub(crate) access_log: bool,
    /// Who writes lines; `None`: they are events.
    pub(crate) log: Option<RequestLog>,
    /// The headers in which a client may name its request.
    pub(crate) request_id_headers: Vec<String>,
    /// Where spans are sent.
    #[cfg(feature = "otel")]
    pub(crate) traces: Option<String>,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self {
            access_log: false,
            log: None,
            request_id_headers: DEFAULT_HEADERS.map(str::to_owned).into(),
            #[cfg(feature = "otel")]
            traces: None,
        }
    }
}

/// Tells of requests; one for all workers.
pub(crate) struct RequestLogger {
    access_log: bool,
    log: Option<RequestLog>,
    ids: request_ids::RequestIds,
    #[cfg(feature = "otel")]
    traces: Option<traces::Exporter>,
}

impl RequestLogger {
    pub(crate) fn new(options: &ReportOptions) -> Self {
        Self {
            access_log: options.access_log,
            log: options.log.clone(),
            ids: request_ids::RequestIds::new(&options.request_id_headers),
            #[cfg(feature = "otel")]
            traces: options
                .traces
                .as_deref()
                .and_then(|endpoint| traces::CollectorEndpoint::parse(endpoint).ok())
                .map(traces::Exporter::new),
        }
    }

    /// A request has come: from now on it has a name, which is its only `x-request-id`.
    pub(crate) fn name(&self, head: &mut RequestHead, record: &mut Record) {
        let id = self.ids.settle(&mut head.fields);
        record.named(RequestIdentity { id, method: head.method.clone(), target: head.target.clone() });
    }

    /// It is a generation request: it may be a part of a trace, which its legs' servers hear of.
    #[cfg(feature = "otel")]
    pub(crate) fn trace(&self, head: &mut RequestHead, record: &mut Record) {
        if self.traces.is_some() {
            let begun = std::time::SystemTime::now() - record.begun().elapsed();
            if let Some(trace) = crate::observe::record::Trace::begin(&mut head.fields, begun) {
                record.traced(trace);
            }
        }
    }

    /// Nothing, in a build without traces.
    #[cfg(not(feature = "otel"))]
    pub(crate) fn trace(&self, _: &mut RequestHead, _: &mut Record) {}

    /// Tells of a request of which not even the head came, and gives its answer a name.
    pub(crate) fn log_rejected_before_parse(&self, error: &Error) -> RequestId {
        let id = RequestId::make();
        let cause = error.to_string();
        let line = RequestLine {
            request_id: id.as_str(),
            method: "",
            path: "",
            status: Some(error.status().as_u16()),
            streaming: false,
            prefill: None,
            decode: None,
            phase: "head",
            failure: Some(RequestFailure { code: error.code(), cause: &cause }),
            attempts: 0,
            retried: None,
            bytes_in: 0,
            bytes_out: 0,
            times: RequestTimes::default(),
            end: End::Complete,
            access_log: self.access_log,
        };
        line.log(self.log.as_ref());
        id
    }

    /// Whether somebody wants to be told of requests that go well.
    fn wants_all(&self) -> bool {
        #[cfg(feature = "otel")]
        if self.traces.is_some() {
            return true;
        }
        self.access_log
    }

    /// Works for as long as it is polled: counts what was not written, and sends spans.
    pub(crate) async fn run(&self) {
        let count = async {
            loop {
                tokio::time::sleep(TICK).await;
                log_limit::sum_up(false);
            }
        };
        #[cfg(feature = "otel")]
        if let Some(traces) = &self.traces {
            tokio::select! {
                () = count => {}
                () = traces.run() => {}
            }
            return;
        }
        count.await;
    }

    /// Says and sends what is left, when no request is under way any more.
    pub(crate) async fn finish(&self) {
        log_limit::sum_up(true);
        #[cfg(feature = "otel")]
        if let Some(traces) = &self.traces {
            traces.finish().await;
        }
    }
}

impl Observer for RequestLogger {
    fn finished(&self, request: &CompletedRequest<'_>) {
        let refusal = refusal(request);
        let failure = match (request.ending(), &refusal) {
            (RequestEnd::Failed(code), _) => Some(RequestFailure { code, cause: request.cause() }),
            (RequestEnd::CutOff, _) => Some(RequestFailure {
                code: CUT_OFF,
                cause: "the router ended before the answer was complete",
            }),
            (_, Some((code, cause))) => Some(RequestFailure { code, cause }),
            _ => None,
        };
        if failure.is_none() && request.ending() == RequestEnd::Complete && !self.wants_all() {
            return;
        }
        let line = RequestLine { access_log: self.access_log, ..line(request, failure) };
        line.log(self.log.as_ref());
        #[cfg(feature = "otel")]
        if let (Some(traces), Some(trace)) = (&self.traces, request.trace()) {
            traces.take(trace, &line, request);
        }
    }
}

fn line<'a>(request: &'a CompletedRequest<'_>, failure: Option<RequestFailure<'a>>) -> RequestLine<'a> {
    let (name, pair) = (request.name(), request.pair());
    let sent = || Some(request.reached(Phase::PrefillWritten)?.max(request.reached(Phase::DecodeWritten)?));
    RequestLine {
        request_id: name.map_or("-", |name| name.id.as_str()),
        method: name.map_or("", |name| name.method.as_str()),
        path: name.map_or("", |name| request_line::shown(name.target.path())),
        status: request.status(),
        streaming: request.streaming(),
        prefill: pair.map(|pair| pair.prefill().url()),
        decode: pair.map(|pair| pair.decode().url()),
        phase: phase(request),
        failure,
        attempts: request.attempts(),
        retried: retried(request),
        bytes_in: request.bytes_in(),
        bytes_out: request.bytes_out(),
        times: RequestTimes {
            request: request.reached(Phase::BodyRead),
            sent: sent(),
            prefill_head: request.reached(Phase::PrefillHead),
            decode_head: request.reached(Phase::DecodeHead),
            first_byte: request.reached(Phase::ConnectionHandler),
            end: request.took(),
        },
        end: match request.ending() {
            RequestEnd::ClientLeft | RequestEnd::CutOff => End::Cancelled,
            RequestEnd::Complete | RequestEnd::Failed(_) => End::Complete,
        },
        access_log: false,
    }
}

/// Whether the answer is a server's own, and says no.
fn is_refusal(request: &CompletedRequest<'_>) -> bool {
    let says_no = request.status().is_some_and(|status| status >= 400);
    says_no && request.attempts() > 0 && !matches!(request.ending(), RequestEnd::Failed(_))
}

/// A server's own refusal is told like an error of the router's.
fn refusal(request: &CompletedRequest<'_>) -> Option<(&'static str, String)> {
    let (status, pair) = (request.status()?, request.pair()?);
    if !is_refusal(request) {
        return None;
    }
    let server = match request.failed_leg() {
        Some(Role::Prefill) => pair.prefill(),
        _ => pair.decode(),
    };
    // Two names, so that a flood of the one never hides the other.
    let code = if status >= 500 { "server_error" } else { "server_refused" };
    Some((code, format!("{} server {} answered {status}", server.role(), server.url())))
}

/// How far it came.
fn phase(request: &CompletedRequest<'_>) -> &'static str {
    let is_success = request.status().is_some_and(|status| (200..300).contains(&status));
    match request.attempts() {
        _ if is_success && request.bytes_out() > 0 => "answer_body",
        _ if is_success || is_refusal(request) => "answer_head",
        1.. => "legs",
        0 if request.reached(Phase::BodyRead).is_some() => "choice",
        0 => "request",
    }
}

/// Why it was sent again, each time.
fn retried(request: &CompletedRequest<'_>) -> Option<String> {
    let codes: Vec<_> = request.faults().iter().map(|fault| fault.code.unwrap_or("status")).collect();
    (!codes.is_empty()).then(|| codes.join(","))
}

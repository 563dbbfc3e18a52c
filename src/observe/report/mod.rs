//! What is logged and exported of a request when it has ended: its log line, and its spans.
//!
//! A [`RequestLogger`] reads the event of each completed request ([`CompletedRequest`]). A
//! request that failed has a log line; one that succeeded has one if an access log is wanted.
//! A load trace has a line of each generation request. Bodies, queries and headers are
//! never logged, except for the request's id.

mod backend_changes;
pub(crate) mod log_limit;
mod request_ids;
mod request_line;
mod trace_line;
#[cfg(feature = "otel")]
pub(crate) mod traces;

use std::time::{Duration, Instant};

use crate::http1::RequestHead;
use crate::observe::record::{CompletedRequest, Observer, Record, RequestEnd, RequestIdentity};

pub(crate) use backend_changes::log_backend_changes;
pub(crate) use request_ids::{DEFAULT_HEADERS, check_header};
pub(crate) use request_line::RequestLog;
pub use request_line::{LineFieldName, RequestFailure, RequestLine, RequestLineVisitor, RequestTimes};
pub use trace_line::TraceLine;
pub(crate) use trace_line::TraceLog;

/// How often the counts of suppressed log lines are logged, if there are any.
const SUPPRESSED_INTERVAL: Duration = Duration::from_secs(1);

/// What is logged and exported, as configured.
#[derive(Clone)]
pub(crate) struct ReportOptions {
    /// Logs a line for every request.
    pub(crate) access_log: bool,
    /// Receives the lines. `None`: they become tracing events.
    pub(crate) log: Option<RequestLog>,
    /// Receives a line for each generation request.
    pub(crate) trace_log: Option<TraceLog>,
    /// The headers in which a client may send an id.
    pub(crate) request_id_headers: Vec<String>,
    /// The URL of the OpenTelemetry collector.
    #[cfg(feature = "otel")]
    pub(crate) traces: Option<String>,
}

impl Default for ReportOptions {
    fn default() -> Self {
        Self {
            access_log: false,
            log: None,
            trace_log: None,
            request_id_headers: DEFAULT_HEADERS.map(str::to_owned).into(),
            #[cfg(feature = "otel")]
            traces: None,
        }
    }
}

/// Logs requests and exports their spans. One for all workers.
pub(crate) struct RequestLogger {
    access_log: bool,
    log: Option<RequestLog>,
    trace_log: Option<TraceLog>,
    id_headers: request_ids::RequestIdHeaders,
    #[cfg(feature = "otel")]
    traces: Option<traces::Exporter>,
}

impl RequestLogger {
    pub(crate) fn new(options: &ReportOptions) -> Self {
        Self {
            access_log: options.access_log,
            log: options.log.clone(),
            trace_log: options.trace_log.clone(),
            id_headers: request_ids::RequestIdHeaders::new(&options.request_id_headers),
            #[cfg(feature = "otel")]
            traces: options
                .traces
                .as_deref()
                // Checked with the rest of the configuration.
                .and_then(|endpoint| traces::CollectorEndpoint::parse(endpoint).ok())
                .map(traces::Exporter::new),
        }
    }

    /// Gives a request its id, which becomes its only `x-request-id` header.
    pub(crate) fn assign_request_id(&self, head: &mut RequestHead, record: &mut Record) {
        let id = self.id_headers.assign(&mut head.headers);
        let (method, target) = (Some(head.method.clone()), Some(head.target.clone()));
        record.set_identity(RequestIdentity { id, method, target });
    }

    /// Makes a generation request a part of a trace, if spans are exported: the client's trace, or a new one.
    #[cfg(feature = "otel")]
    pub(crate) fn start_trace(&self, head: &mut RequestHead, record: &mut Record) {
        if self.traces.is_some() {
            // Spans have wall-clock times, the record has a monotonic one.
            let started_at = std::time::SystemTime::now() - record.started_at().elapsed();
            if let Some(trace) = crate::observe::record::Trace::start(&mut head.headers, started_at) {
                record.set_trace(trace);
            }
        }
    }

    /// Does nothing in a build without the feature `otel`: a client's `traceparent` is forwarded unchanged.
    #[cfg(not(feature = "otel"))]
    pub(crate) fn start_trace(&self, _: &mut RequestHead, _: &mut Record) {}

    /// Whether requests that succeeded are of interest. If not, nothing is put together for them.
    fn wants_successes(&self) -> bool {
        #[cfg(feature = "otel")]
        if self.traces.is_some() {
            return true;
        }
        self.access_log
    }

    /// Logs counts of suppressed lines and sends spans, for as long as it is polled.
    pub(crate) async fn run(&self) {
        let log_suppressed = async {
            loop {
                tokio::time::sleep(SUPPRESSED_INTERVAL).await;
                log_limit::log_suppressed(false);
            }
        };
        // In one task: a collector that is slow delays neither, as both only wait most of the time.
        #[cfg(feature = "otel")]
        if let Some(traces) = &self.traces {
            tokio::select! {
                () = log_suppressed => {}
                () = traces.run() => {}
            }
            return;
        }
        log_suppressed.await;
    }

    /// Logs and sends what is left. Called when no request is in progress any more.
    pub(crate) async fn finish(&self) {
        log_limit::log_suppressed(true);
        #[cfg(feature = "otel")]
        if let Some(traces) = &self.traces {
            traces.finish().await;
        }
    }

    /// Logs a request that has ended, and exports its spans.
    fn log(&self, request: &CompletedRequest<'_>) {
        let is_success = request.failure.is_none() && request.end == RequestEnd::Complete;
        // The common case of a router without access log and traces: nothing is put together.
        if is_success && !self.wants_successes() {
            return;
        }
        RequestLine::new(request, self.access_log).log(self.log.as_ref());
        // Only generation requests have a trace, and only those that the client samples.
        #[cfg(feature = "otel")]
        if let (Some(traces), Some(trace)) = (&self.traces, request.trace()) {
            traces.export(trace, request);
        }
    }
}

impl Observer for RequestLogger {
    fn request_completed(&self, request: &CompletedRequest<'_>) {
        self.log(request);
        if let Some(trace_log) = &self.trace_log {
            trace_log.log(request);
        }
    }

    fn wants_prompts(&self) -> bool {
        self.trace_log.is_some()
    }

    fn generation_arrived(&self, at: Instant) {
        if let Some(trace_log) = &self.trace_log {
            trace_log.request_arrived(at);
        }
    }
}

//! Spans of generation requests, exported to an OpenTelemetry collector.
//!
//! A request has a span, and below it one for each leg, whose id the leg's backend gets as the
//! parent of its own spans. OTLP over HTTP has a stable JSON mapping that needs no more code
//! than this; OpenTelemetry's crates would bring an HTTP client, threads and a context of
//! their own. Workers write the JSON, one task sends it in batches.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hyper::Uri;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tracing::warn;

use super::log_limit;
use crate::observe::record::{CompletedRequest, LegSpan, Phase, Severity, Trace};
use crate::upstream::Role;

/// Requests whose spans wait to be sent: some seconds of a busy router. Spans of further requests are dropped
/// and counted, because a collector that is slow must not slow down requests.
const MAX_QUEUED: usize = 8_192;
/// Requests whose spans are sent in one message: about 1 MB of JSON.
const MAX_BATCH: usize = 512;
/// How long spans wait for others to be sent with.
const BATCH_DELAY: Duration = Duration::from_millis(200);
/// How long the collector may take for a batch: OTLP's default timeout.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of the program waits for spans to be sent.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Numbers of OTLP: `SPAN_KIND_SERVER`, `SPAN_KIND_CLIENT` and `STATUS_CODE_ERROR`.
const SERVER: u32 = 2;
const CLIENT: u32 = 3;
const STATUS_ERROR: u32 = 2;

/// The collector that spans are sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CollectorEndpoint {
    authority: String,
    path: String,
}

impl CollectorEndpoint {
    /// Parses a URL. The error says what is wrong with it.
    pub(crate) fn parse(url: &str) -> Result<Self, &'static str> {
        const NOT_A_URL: &str = "not a URL such as http://localhost:4318";
        // sglang-router takes `host:port`, without a scheme.
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = url.parse().map_err(|_| NOT_A_URL)?;
        if uri.scheme_str() != Some("http") {
            return Err(
                "the collector's URL must begin with http://; put a collector beside the router for https",
            );
        }
        let authority = uri.authority().ok_or(NOT_A_URL)?;
        // They would be sent in clear text, and logged with the URL.
        if authority.as_str().contains('@') {
            return Err("user names and passwords in a URL are not supported");
        }
        let host = authority.host();
        // The port that is registered for OTLP over HTTP.
        let authority = format!("{host}:{}", authority.port_u16().unwrap_or(4318));
        let path = if uri.path() == "/" { "/v1/traces" } else { uri.path() };
        Ok(Self { authority, path: path.to_owned() })
    }
}

/// The spans of one request.
struct RequestSpans<'a> {
    trace: &'a Trace,
    request: &'a CompletedRequest<'a>,
}

/// The events of a leg's span, by role. Its beginning and its end are the span's own.
const LEG_EVENTS: [&[(&str, Phase)]; 2] = [
    &[("request written", Phase::PrefillWritten), ("answer head", Phase::PrefillHead)],
    &[
        ("request written", Phase::DecodeWritten),
        ("answer head", Phase::DecodeHead),
        ("first byte", Phase::DecodeByte),
    ],
];

impl RequestSpans<'_> {
    /// The spans, as a part of a JSON list.
    fn to_json(&self) -> String {
        let Self { trace, request } = self;
        let mut span = self.span(trace.span, trace.parent, SERVER, Duration::ZERO, request.duration);
        // OpenTelemetry's conventions want method and route. Only generation requests have spans, and their
        // path is their route.
        span["name"] = format!("{} {}", request.method(), request.path()).into();
        span["attributes"] = attributes(request);
        if let Some(state) = &trace.state {
            span["traceState"] = state.as_str().into();
        }
        // OpenTelemetry's HTTP conventions: a 4xx is no error of a server's span.
        if let Some(failure) = request.failure.as_ref().filter(|_| request.severity.is_failure()) {
            span["status"] = json!({ "code": STATUS_ERROR, "message": failure.cause });
        }
        let mut text = span.to_string();
        for leg in &trace.legs {
            // Writing into a string does not fail.
            let _ = write!(text, ",{}", self.leg(leg));
        }
        text
    }

    fn leg(&self, leg: &LegSpan) -> Value {
        let role = leg.backend.role();
        let mut span = self.span(leg.span, Some(self.trace.span), CLIENT, leg.started, self.leg_end(leg));
        span["name"] = role.as_str().into();
        let mut attributes =
            vec![text("server.address", leg.backend.url()), text("mini_lb.role", role.as_str())];
        // The timeline is that of the last attempt, so legs of earlier ones have no events.
        if leg.retried.is_some() {
            attributes.push(text("error.type", "sent_again"));
        } else {
            span["events"] = self.leg_events(role);
            let failed = self.request.failed_leg == Some(role);
            if let Some(failure) = self.request.failure.as_ref().filter(|_| failed) {
                attributes.push(text("error.type", failure.code));
                span["status"] = json!({ "code": STATUS_ERROR, "message": failure.cause });
            }
        }
        span["attributes"] = attributes.into();
        span
    }

    /// When a leg ended, counted from the request's head. Decode's ends with the request.
    fn leg_end(&self, leg: &LegSpan) -> Duration {
        let prefill_end = match leg.backend.role() {
            Role::Prefill => self.request.time_to(Phase::PrefillEnd),
            Role::Decode | Role::Regular => None,
        };
        leg.retried.or(prefill_end).unwrap_or(self.request.duration)
    }

    /// The events of the last attempt's leg of this role.
    fn leg_events(&self, role: Role) -> Value {
        let reached = LEG_EVENTS[role.leg()].iter().filter_map(|(name, phase)| {
            let at = unix_nanos(self.trace.started_at + self.request.time_to(*phase)?);
            Some(json!({ "name": name, "timeUnixNano": at }))
        });
        reached.collect()
    }

    /// A span. `start` and `end` are counted from the request's head.
    fn span(&self, id: u64, parent: Option<u64>, kind: u32, start: Duration, end: Duration) -> Value {
        let mut span = json!({
            "traceId": format!("{:032x}", self.trace.id),
            "spanId": format!("{id:016x}"),
            "kind": kind,
            "startTimeUnixNano": unix_nanos(self.trace.started_at + start),
            "endTimeUnixNano": unix_nanos(self.trace.started_at + end),
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = format!("{parent:016x}").into();
        }
        span
    }
}

/// The attributes of a request's span. Where OpenTelemetry's semantic conventions have a name, it is theirs.
fn attributes(request: &CompletedRequest<'_>) -> Value {
    let mut attributes = vec![
        text("http.request.method", request.method()),
        text("url.path", request.path()),
        text("mini_lb.request_id", request.request_id()),
        text("mini_lb.phase", request.progress.as_str()),
        number("mini_lb.attempts", request.attempts().into()),
        number("http.request.body.size", request.bytes_in()),
        number("http.response.body.size", request.bytes_out()),
        json!({ "key": "mini_lb.streaming", "value": { "boolValue": request.streaming() } }),
    ];
    attributes.extend(request.status().map(|status| number("http.response.status_code", status.into())));
    match &request.failure {
        Some(failure) => attributes.push(text("error.type", failure.code)),
        None if request.severity == Severity::Cancelled => attributes.push(text("error.type", "cancelled")),
        None => {}
    }
    attributes.into()
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

/// Protobuf's JSON mapping writes 64-bit numbers as strings.
fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

fn unix_nanos(time: SystemTime) -> String {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
}

/// Sends spans in the background.
pub(crate) struct Exporter {
    endpoint: CollectorEndpoint,
    queue: mpsc::Sender<String>,
    unsent: Mutex<UnsentSpans>,
    /// Requests whose spans were dropped since that was last logged.
    dropped: AtomicU64,
}

/// Spans on their way to the collector. The batch is here, and not in the future that sends it: that future
/// is dropped when the router shuts down, and [`Exporter::finish`] sends the batch then.
struct UnsentSpans {
    queued: mpsc::Receiver<String>,
    batch: Vec<String>,
}

impl UnsentSpans {
    /// Moves what is queued into the batch, up to its bound.
    fn fill_batch(&mut self) {
        // A batch that was not sent when the router shut down is here already.
        while self.batch.len() < MAX_BATCH
            && let Ok(spans) = self.queued.try_recv()
        {
            self.batch.push(spans);
        }
    }
}

impl Exporter {
    pub(super) fn new(endpoint: CollectorEndpoint) -> Self {
        let (queue, queued) = mpsc::channel(MAX_QUEUED);
        Self {
            endpoint,
            queue,
            unsent: Mutex::new(UnsentSpans { queued, batch: Vec::new() }),
            dropped: AtomicU64::new(0),
        }
    }

    /// Queues the spans of a request that has ended, or drops them if the queue is full.
    pub(super) fn export(&self, trace: &Trace, request: &CompletedRequest<'_>) {
        // A place is reserved first: spans that will be dropped are not written.
        match self.queue.try_reserve() {
            Ok(place) => place.send(RequestSpans { trace, request }.to_json()),
            Err(_) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Sends spans for as long as it is polled.
    pub(super) async fn run(&self) {
        let mut unsent = self.unsent.lock().await;
        loop {
            // From here on the message is in the batch whenever this future is dropped.
            let Some(first) = unsent.queued.recv().await else { return };
            unsent.batch.push(first);
            unsent.fill_batch();
            if unsent.batch.len() < MAX_BATCH {
                tokio::time::sleep(BATCH_DELAY).await;
                unsent.fill_batch();
            }
            self.send(&mut unsent.batch).await;
        }
    }

    /// Sends what is left.
    pub(super) async fn finish(&self) {
        let rest = async {
            // Free: `run` holds the lock for as long as it is polled, and has been dropped.
            let mut unsent = self.unsent.lock().await;
            loop {
                unsent.fill_batch();
                if unsent.batch.is_empty() {
                    return;
                }
                self.send(&mut unsent.batch).await;
            }
        };
        if tokio::time::timeout(FINISH_TIMEOUT, rest).await.is_err() {
            let collector = &self.endpoint.authority;
            warn!(
                "the last spans were not exported: the collector {collector} took longer than {FINISH_TIMEOUT:?}"
            );
        }
    }

    /// Sends a batch. If that fails, the batch is dropped: to send it again would delay those after it, and
    /// fill the queue.
    async fn send(&self, batch: &mut Vec<String>) {
        let sent = tokio::time::timeout(SEND_TIMEOUT, post(&self.endpoint, batch)).await;
        let collector = &self.endpoint.authority;
        let error = match sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("collector {error}")),
            Err(_) => Some(format!("collector {collector} did not respond within {SEND_TIMEOUT:?}")),
        };
        if error.is_some() {
            self.dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
        batch.clear();
        if self.dropped.load(Ordering::Relaxed) > 0 && log_limit::allow("traces") {
            let requests = self.dropped.swap(0, Ordering::Relaxed);
            let error = error.unwrap_or_else(|| {
                format!("collector {collector} is too slow: the spans of {MAX_QUEUED} requests were queued")
            });
            warn!(requests, "spans were dropped: {error}");
        }
    }
}

/// Sends spans in a request on a new connection: at five a second, keep-alive would save nothing.
async fn post(endpoint: &CollectorEndpoint, spans: &[String]) -> Result<(), String> {
    let resource = json!({ "attributes": [text("service.name", "mini-lb")] });
    let scope = json!({ "name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION") });
    let body = format!(
        "{{\"resourceSpans\":[{{\"resource\":{resource},\"scopeSpans\":[{{\"scope\":{scope},\"spans\":[{}]}}]}}]}}",
        spans.join(","),
    );
    let CollectorEndpoint { authority, path } = endpoint;
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len(),
    );
    let named = |error: std::io::Error| format!("{authority}: {error}");
    let socket = TcpStream::connect(authority).await.map_err(named)?;
    write_all(&socket, request.as_bytes()).await.map_err(named)?;
    match read_status(&socket).await.map_err(named)? {
        Some(200..=299) => Ok(()),
        Some(status) => Err(format!("{authority} responded with status {status}")),
        None => Err(format!(
            "{authority} did not respond in HTTP/1.1; is it the port for OTLP over HTTP (4318), not for gRPC (4317)?"
        )),
    }
}

async fn write_all(socket: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        socket.writable().await?;
        match socket.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads the status of the response. The rest of it is not read: `connection: close` ends the connection.
async fn read_status(socket: &TcpStream) -> std::io::Result<Option<u16>> {
    const LENGTH: usize = "HTTP/1.1 200".len();
    let (mut line, mut length) = ([0; LENGTH], 0);
    while length < LENGTH {
        socket.readable().await?;
        match socket.try_read(&mut line[length..]) {
            Ok(0) => return Ok(None),
            Ok(count) => length += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let line = std::str::from_utf8(&line).ok();
    Ok(line.and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..)?.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_an_address_and_a_path() {
        let parsed = |url| {
            CollectorEndpoint::parse(url)
                .map(|CollectorEndpoint { authority, path }| format!("{authority} {path}"))
        };
        assert_eq!(parsed("http://c:1").as_deref(), Ok("c:1 /v1/traces"));
        assert_eq!(parsed("c:1").as_deref(), Ok("c:1 /v1/traces"));
        assert_eq!(parsed("http://[::1]/x/y").as_deref(), Ok("[::1]:4318 /x/y"));
        for bad in ["https://c:1", "http://u:p@c:1", "http://", "", "a b"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}

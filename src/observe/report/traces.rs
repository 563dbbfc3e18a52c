//! Spans of generation requests, sent to an OpenTelemetry collector.
//!
//! A span of the request, and one for each leg below it, whose id the leg's server
//! gets as the parent of its own. OTLP over HTTP has a JSON mapping that is stable
//! and needs no code but this; OpenTelemetry's crates would bring a client, threads
//! and ids of their own. Workers write the JSON, one task sends it in batches.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hyper::Uri;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tracing::warn;

use super::{End, RequestLine, log_limit};
use crate::observe::record::{CompletedRequest, LegSpan, Phase, Trace};
use crate::upstream::Role;

/// Requests whose spans wait to be sent; those of others are dropped, and counted.
const MAX_QUEUED: usize = 8_192;
/// Requests whose spans are sent at once.
const MAX_BATCH: usize = 512;
/// How long spans wait for others to go with.
const BATCH_DELAY: Duration = Duration::from_millis(200);
/// How long the collector may take for a batch.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of the program waits for what is queued.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// The numbers that OTLP gives to kinds of spans, and to a status.
const SERVER: u32 = 2;
const CLIENT: u32 = 3;
const STATUS_ERROR: u32 = 2;

/// Where spans are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CollectorEndpoint {
    authority: String,
    path: String,
}

impl CollectorEndpoint {
    /// Reads a URL. The error says what is wrong with it.
    pub(crate) fn parse(url: &str) -> Result<Self, &'static str> {
        const NO_URL: &str = "not a URL such as http://localhost:4318";
        // `host:port` is how sglang-router writes it.
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = url.parse().map_err(|_| NO_URL)?;
        if uri.scheme_str() != Some("http") {
            return Err(
                "the collector's URL must begin with http://; put a collector beside the router for https",
            );
        }
        let authority = uri.authority().ok_or(NO_URL)?;
        if authority.as_str().contains('@') {
            return Err("user names and passwords in a URL are not supported");
        }
        let host = authority.host();
        let authority = format!("{host}:{}", authority.port_u16().unwrap_or(4318));
        let path = if uri.path() == "/" { "/v1/traces" } else { uri.path() };
        Ok(Self { authority, path: path.to_owned() })
    }
}

/// A trace, and the request that it is told of.
struct SpanItem<'a> {
    trace: &'a Trace,
    line: &'a RequestLine<'a>,
    request: &'a CompletedRequest<'a>,
}

/// What is told of a leg besides its beginning and its end.
const MOMENTS: [&[(&str, Phase)]; 2] = [
    &[("request written", Phase::PrefillWritten), ("answer head", Phase::PrefillHead)],
    &[
        ("request written", Phase::DecodeWritten),
        ("answer head", Phase::DecodeHead),
        ("first byte", Phase::DecodeByte),
    ],
];

impl SpanItem<'_> {
    /// The spans, as a part of a JSON list.
    fn to_json(&self) -> String {
        let Self { trace, line, .. } = self;
        let mut span = self.span(trace.span, trace.parent, SERVER, Duration::ZERO, line.times.end);
        span["name"] = format!("{} {}", line.method, line.path).into();
        span["attributes"] = attributes(line);
        if let Some(state) = &trace.state {
            span["traceState"] = state.as_str().into();
        }
        if let Some(failure) = line.failure.filter(|_| line.severity().is_failure()) {
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
        let role = leg.server.role();
        let mut span = self.span(leg.span, Some(self.trace.span), CLIENT, leg.begun, self.end_of(leg));
        span["name"] = role.as_str().into();
        let mut known = vec![text("server.address", leg.server.url()), text("mini_lb.role", role.as_str())];
        if leg.given_up.is_some() {
            known.push(text("error.type", "sent_again"));
        } else {
            span["events"] = self.moments(role);
            if let Some(failure) = self.line.failure.filter(|_| self.request.failed_leg() == Some(role)) {
                known.push(text("error.type", failure.code));
                span["status"] = json!({ "code": STATUS_ERROR, "message": failure.cause });
            }
        }
        span["attributes"] = known.into();
        span
    }

    /// When a leg ended, counted from the request's head. Decode's ends with the request.
    fn end_of(&self, leg: &LegSpan) -> Duration {
        let prefill_end = match leg.server.role() {
            Role::Prefill => self.request.reached(Phase::PrefillEnd),
            Role::Decode => None,
        };
        leg.given_up.or(prefill_end).unwrap_or(self.line.times.end)
    }

    /// What the last attempt's leg of this role came to.
    fn moments(&self, role: Role) -> Value {
        let reached = MOMENTS[role as usize].iter().filter_map(|(name, phase)| {
            let at = nanoseconds(self.trace.begun + self.request.reached(*phase)?);
            Some(json!({ "name": name, "timeUnixNano": at }))
        });
        reached.collect()
    }

    /// RequestTimes are counted from the request's head.
    fn span(&self, id: u64, parent: Option<u64>, kind: u32, begun: Duration, end: Duration) -> Value {
        let mut span = json!({
            "traceId": format!("{:032x}", self.trace.id),
            "spanId": format!("{id:016x}"),
            "kind": kind,
            "startTimeUnixNano": nanoseconds(self.trace.begun + begun),
            "endTimeUnixNano": nanoseconds(self.trace.begun + end),
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = format!("{parent:016x}").into();
        }
        span
    }
}

fn attributes(request: &RequestLine<'_>) -> Value {
    let mut known = vec![
        text("http.request.method", request.method),
        text("url.path", request.path),
        text("mini_lb.request_id", request.request_id),
        text("mini_lb.phase", request.phase),
        number("mini_lb.attempts", request.attempts.into()),
        number("http.request.body.size", request.bytes_in),
        number("http.response.body.size", request.bytes_out),
        json!({ "key": "mini_lb.streaming", "value": { "boolValue": request.streaming } }),
    ];
    known.extend(request.status.map(|status| number("http.response.status_code", status.into())));
    match request.failure {
        Some(failure) => known.push(text("error.type", failure.code)),
        None if request.end == End::Cancelled => known.push(text("error.type", "cancelled")),
        None => {}
    }
    known.into()
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

/// 64-bit numbers are strings in protobuf's JSON.
fn number(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

fn nanoseconds(time: SystemTime) -> String {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
}

/// Sends spans in the background.
pub(crate) struct Exporter {
    endpoint: CollectorEndpoint,
    queue: mpsc::Sender<String>,
    unsent: Mutex<PendingWrite>,
    dropped: AtomicU64,
}

/// What was not sent. A batch stays here until it was, so that nothing is lost with a future that is dropped.
struct PendingWrite {
    queued: mpsc::Receiver<String>,
    batch: Vec<String>,
}

impl PendingWrite {
    /// Takes what there is into the batch, up to its bound.
    fn fill(&mut self) {
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
            unsent: Mutex::new(PendingWrite { queued, batch: Vec::new() }),
            dropped: AtomicU64::new(0),
        }
    }

    /// A request is over.
    pub(super) fn take(&self, trace: &Trace, line: &RequestLine<'_>, request: &CompletedRequest<'_>) {
        match self.queue.try_reserve() {
            Ok(place) => place.send(SpanItem { trace, line, request }.to_json()),
            Err(_) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Sends for as long as it is polled.
    pub(super) async fn run(&self) {
        let mut unsent = self.unsent.lock().await;
        loop {
            let Some(first) = unsent.queued.recv().await else { return };
            unsent.batch.push(first);
            unsent.fill();
            if unsent.batch.len() < MAX_BATCH {
                tokio::time::sleep(BATCH_DELAY).await;
                unsent.fill();
            }
            self.send(&mut unsent.batch).await;
        }
    }

    /// Sends what is left.
    pub(super) async fn finish(&self) {
        let rest = async {
            let mut unsent = self.unsent.lock().await;
            loop {
                unsent.fill();
                if unsent.batch.is_empty() {
                    return;
                }
                self.send(&mut unsent.batch).await;
            }
        };
        if tokio::time::timeout(FINISH_TIMEOUT, rest).await.is_err() {
            warn!("spans of the last requests were not sent in time");
        }
    }

    /// Sends a batch, or drops and counts it.
    async fn send(&self, batch: &mut Vec<String>) {
        let sent = tokio::time::timeout(SEND_TIMEOUT, post(&self.endpoint, batch)).await;
        let why = match sent {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some(format!("no answer within {SEND_TIMEOUT:?}")),
        };
        if why.is_some() {
            self.dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
        batch.clear();
        if self.dropped.load(Ordering::Relaxed) > 0 && log_limit::admit("traces") {
            let requests = self.dropped.swap(0, Ordering::Relaxed);
            let why = why.unwrap_or_else(|| "there were more than could be sent".into());
            warn!(requests, "spans were dropped, those of so many requests: {why}");
        }
    }
}

/// Sends spans on a connection of their own: a few a second are nothing.
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
    let cannot = |error: std::io::Error| format!("{authority}: {error}");
    let socket = TcpStream::connect(authority).await.map_err(cannot)?;
    write_all(&socket, request.as_bytes()).await.map_err(cannot)?;
    match status(&socket).await.map_err(cannot)? {
        Some(200..=299) => Ok(()),
        Some(status) => Err(format!("{authority} answered {status}")),
        None => Err(format!("{authority} did not answer in HTTP/1.1; is it the port for OTLP over HTTP?")),
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

/// The status of the answer; the rest of it is of no interest.
async fn status(socket: &TcpStream) -> std::io::Result<Option<u16>> {
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

//! The event of a completed request, with everything that is derived from what was recorded.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hyper::Method;

#[cfg(feature = "otel")]
use super::Trace;
use super::{Endpoint, Phase, Record, RequestId, RetryReason, TracedRequest};
use crate::upstream::{Backend, Role, ServerPair};

/// Longest path in a log line or a span, in bytes: clients choose it.
const MAX_PATH: usize = 256;

/// The code of a request that the router ended because its grace period was over.
const SHUTDOWN: &str = "shutdown";

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestEnd {
    /// A whole response, of a backend's with whatever status or of the router's own, was handed to the
    /// client's connection.
    Complete,
    /// With an error of the router's, of this code: as the response, or in the middle of one.
    Failed(&'static str),
    /// The client disconnected before the end.
    ClientDisconnected,
    /// The router closed the connection, because the grace period of its shutdown was over.
    Shutdown,
}

/// How far a request had come when it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its head could not be parsed.
    Head,
    /// Its head was read, its body was not.
    Request,
    /// It was read, and sent to no pair.
    PairSelection,
    /// It was sent to a pair, and the client was sent no response of it.
    Legs,
    /// The client was sent the head of a backend's response.
    ResponseHead,
    /// The client was sent a part of the body of a successful response.
    ResponseBody,
}

impl Progress {
    /// The value of the log field `phase`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Request => "request",
            Self::PairSelection => "choice",
            Self::Legs => "legs",
            Self::ResponseHead => "answer_head",
            Self::ResponseBody => "answer_body",
        }
    }
}

/// The class of the status that the client was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StatusClass {
    /// 2xx.
    Success,
    /// 4xx.
    ClientError,
    /// 5xx. A number beyond that is no status, and an error too.
    ServerError,
    /// 1xx and 3xx, or none.
    Other,
}

impl StatusClass {
    pub(super) fn new(status: Option<u16>) -> Self {
        match status {
            Some(200..300) => Self::Success,
            Some(400..500) => Self::ClientError,
            Some(500..) => Self::ServerError,
            _ => Self::Other,
        }
    }
}

/// Who has to know of a request, and so the level of its log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Severity {
    /// A defect of the router.
    InternalError,
    /// The request failed although the client did nothing wrong.
    Failed,
    /// The client did something wrong.
    Rejected,
    /// The client disconnected.
    Cancelled,
    /// It succeeded, or its failure is expected.
    Ok,
}

impl Severity {
    fn new(status_class: StatusClass, end: RequestEnd, code: Option<&str>) -> Self {
        match code {
            Some("internal") => Self::InternalError,
            // A load balancer polls /ready until it succeeds: it has the response, and needs no log line.
            Some("not_ready") => Self::Ok,
            Some(_) if status_class == StatusClass::ClientError => Self::Rejected,
            Some(_) => Self::Failed,
            None if end == RequestEnd::ClientDisconnected => Self::Cancelled,
            None => Self::Ok,
        }
    }

    /// Whether the router or a backend is at fault.
    #[cfg(feature = "otel")]
    pub(crate) fn is_failure(self) -> bool {
        matches!(self, Self::InternalError | Self::Failed)
    }
}

/// What went wrong with a request.
#[derive(Debug)]
pub(crate) struct Failure<'a> {
    pub(crate) code: &'static str,
    /// A sentence.
    pub(crate) cause: Cow<'a, str>,
}

/// A request that has ended: the event from which its log line, its metrics and its spans are made. What more
/// than one of them needs is derived once, here.
pub(crate) struct CompletedRequest<'a> {
    record: &'a Record,
    pub(crate) end: RequestEnd,
    pub(crate) status_class: StatusClass,
    pub(crate) progress: Progress,
    /// `None` if nothing failed, and if the client disconnected.
    pub(crate) failure: Option<Failure<'a>>,
    pub(crate) severity: Severity,
    /// The leg that failed first in the last attempt; prefill's only if it failed before decode's first byte.
    pub(crate) failed_leg: Option<Role>,
    /// From the request's head to its end.
    pub(crate) duration: Duration,
}

impl<'a> CompletedRequest<'a> {
    pub(super) fn new(record: &'a Record, end: RequestEnd, duration: Duration) -> Self {
        let status_class = StatusClass::new(record.status);
        let failed_leg = record.sample.timeline.failed_leg();
        let refused_by = refused_by(record, end, status_class, failed_leg);
        // The router's own error comes first: if it broke off a relayed response, it is why the request
        // failed.
        let failure = match (end, refused_by) {
            (RequestEnd::Failed(code), _) => Some(Failure { code, cause: record.error.as_str().into() }),
            (RequestEnd::Shutdown, _) => Some(Failure {
                code: SHUTDOWN,
                cause: "the shutdown's grace period was over before the response was complete".into(),
            }),
            (_, Some(backend)) => Some(refusal(backend, record.status, status_class)),
            (RequestEnd::Complete | RequestEnd::ClientDisconnected, None) => None,
        };
        Self {
            record,
            end,
            status_class,
            progress: progress(record, status_class, refused_by.is_some()),
            severity: Severity::new(status_class, end, failure.as_ref().map(|failure| failure.code)),
            failure,
            failed_leg,
            duration,
        }
    }

    /// `-` if it was given none.
    pub(crate) fn request_id(&self) -> &'a str {
        self.record.request_id().map_or("-", RequestId::as_str)
    }

    /// Empty if the head was not parsed.
    pub(crate) fn method(&self) -> &'a str {
        let method = self.record.method.as_ref();
        method.map_or("", Method::as_str)
    }

    /// The path without its query, which may hold a key, and at most [`MAX_PATH`] bytes of it. Empty if the
    /// head was not parsed.
    pub(crate) fn path(&self) -> &'a str {
        let target = self.record.target.as_ref();
        target.map_or("", |target| truncate(target.path(), MAX_PATH))
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.record.endpoint
    }

    /// The client for whom a load balancer has connected.
    pub(crate) fn proxied_for(&self) -> Option<SocketAddr> {
        self.record.proxied_for.as_deref().copied()
    }

    /// Whether the client asked for a stream.
    pub(crate) fn streaming(&self) -> bool {
        self.record.streaming
    }

    /// The status that the client was sent. `None`: it disconnected, or the router shut down, before that.
    pub(crate) fn status(&self) -> Option<u16> {
        self.record.status
    }

    /// The trace that it belongs to.
    #[cfg(feature = "otel")]
    pub(crate) fn trace(&self) -> Option<&'a Trace> {
        self.record.sample.trace.as_deref()
    }

    /// The backends of the last attempt. `None`: it was sent to none.
    pub(crate) fn pair(&self) -> Option<&'a ServerPair> {
        self.record.sample.pair.as_ref()
    }

    /// How many samples it has, if servers were to generate several.
    pub(crate) fn samples(&self) -> Option<u32> {
        self.record.copies().map(|copies| copies.count)
    }

    /// How many pairs it was sent to, one after the other; with several samples, for all of them.
    pub(crate) fn attempts(&self) -> u32 {
        self.record.sample.attempts
    }

    /// Why it was retried: one reason for each attempt after the first.
    pub(crate) fn retries(&self) -> &'a [RetryReason] {
        &self.record.sample.retries
    }

    /// Bytes of the request's body.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.record.bytes_in
    }

    /// Bytes of the response's body, without framing.
    pub(crate) fn bytes_out(&self) -> u64 {
        self.record.bytes_out
    }

    /// What a load trace says of it, if an observer wants it and its body was read.
    pub(crate) fn traced(&self) -> Option<&'a TracedRequest> {
        self.record.traced.as_deref()
    }

    /// When its head was read.
    pub(crate) fn started_at(&self) -> Instant {
        self.record.started_at()
    }

    /// Time from the request's head to a phase of the last attempt. `None`: it was not reached.
    pub(crate) fn time_to(&self, phase: Phase) -> Option<Duration> {
        self.record.sample.timeline.time_to(phase)
    }

    /// Nanoseconds from one phase to another, and 0 if the other came first. `None`: one of them was not
    /// reached.
    pub(crate) fn nanos_between(&self, from: Phase, to: Phase) -> Option<u64> {
        let timeline = &self.record.sample.timeline;
        Some(timeline.nanos_to(to)?.saturating_sub(timeline.nanos_to(from)?))
    }

    /// Whether a leg of the last attempt opened a connection, instead of reusing one.
    pub(crate) fn has_opened_connection(&self) -> bool {
        self.record.sample.timeline.has_opened_connection()
    }

    /// How long the leg of this role ran after its partner had failed. If that happened in several attempts,
    /// in the last of them.
    pub(crate) fn after_partner_failure(&self, role: Role) -> Option<Duration> {
        self.record.sample.timeline.after_partner_failure(role)
    }
}

/// The backend whose 4xx or 5xx the client was sent.
fn refused_by(
    record: &Record,
    end: RequestEnd,
    status_class: StatusClass,
    failed_leg: Option<Role>,
) -> Option<&Backend> {
    // An error of the router's own has a status too.
    let is_relayed = !matches!(end, RequestEnd::Failed(_));
    let is_error = matches!(status_class, StatusClass::ClientError | StatusClass::ServerError);
    let pair = record.sample.pair.as_ref().filter(|_| is_relayed && is_error)?;
    Some(match failed_leg {
        Some(Role::Prefill) => pair.prefill(),
        // Decode's response is relayed unless prefill's was chosen.
        _ => pair.decode(),
    })
}

fn refusal(backend: &Backend, status: Option<u16>, status_class: StatusClass) -> Failure<'static> {
    // Two codes, because lines are limited by code: many 4xx must not suppress the lines of a few 5xx.
    let code = match status_class {
        StatusClass::ServerError => "server_error",
        _ => "server_refused",
    };
    let status = status.unwrap_or_default();
    Failure { code, cause: format!("{} server {} answered {status}", backend.role(), backend.url()).into() }
}

fn progress(record: &Record, status_class: StatusClass, is_refused: bool) -> Progress {
    let is_success = status_class == StatusClass::Success;
    let has_head = record.request_id().is_none() || record.target.is_some();
    match record.sample.attempts {
        // The body of an error counts as its head: that the request was refused is known from there on.
        _ if is_success && record.bytes_out > 0 => Progress::ResponseBody,
        _ if is_success || is_refused => Progress::ResponseHead,
        1.. => Progress::Legs,
        0 if record.sample.timeline.has_reached(Phase::BodyRead) => Progress::PairSelection,
        0 if has_head => Progress::Request,
        0 => Progress::Head,
    }
}

/// The beginning of a text: at most so many bytes of whole characters.
pub(crate) fn truncate(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn severity_depends_on_whose_fault_it_is() {
        use RequestEnd::{ClientDisconnected, Complete, Failed, Shutdown};
        for (status, end, code, expected) in [
            (Some(500), Failed("internal"), Some("internal"), Severity::InternalError),
            (Some(502), Failed("decode_closed"), Some("decode_closed"), Severity::Failed),
            (Some(200), Failed("decode_closed"), Some("decode_closed"), Severity::Failed),
            (Some(200), Shutdown, Some(SHUTDOWN), Severity::Failed),
            (Some(503), Failed("not_ready"), Some("not_ready"), Severity::Ok),
            (Some(400), Failed("invalid_json"), Some("invalid_json"), Severity::Rejected),
            (Some(200), ClientDisconnected, None, Severity::Cancelled),
            (None, ClientDisconnected, None, Severity::Cancelled),
            (Some(200), Complete, None, Severity::Ok),
        ] {
            assert_eq!(Severity::new(StatusClass::new(status), end, code), expected, "{status:?} {code:?}");
        }
    }

    #[test]
    fn a_text_is_truncated_between_characters() {
        assert_eq!(truncate("aäb", 2), "a");
        assert_eq!(truncate("aäb", 3), "aä");
        assert_eq!(truncate("ab", 9), "ab");
    }
}

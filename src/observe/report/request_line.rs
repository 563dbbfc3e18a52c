//! The log line of a completed request: its fields, its level, and whether it is written.
//!
//! The names and the order of the fields stand once, in `fields!`. Tracing events and
//! [`RequestLine::visit`], from which the program writes its lines, both come from there.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Level, debug, enabled, error, info, warn};

use super::log_limit;
use crate::observe::record::{CompletedRequest, Phase, Severity, truncate};
use crate::upstream::{SelectionSummary, ServerPair};

/// The target of the events, and the module that the program's lines name.
const TARGET: &str = "mini_lb::request";
/// Longest cause in a line, in bytes: backends and clients choose parts of it.
const MAX_CAUSE: usize = 1_024;

/// The log line of one request, written when the request has ended.
///
/// It contains no body, no query and no header except for the request's id. `path` and the failure's cause
/// may contain what a client or a server has sent: truncated, but not escaped. All other text is printable
/// ASCII without quotes and backslashes.
#[derive(Debug)]
#[non_exhaustive]
pub struct RequestLine<'a> {
    /// The id that the client and both servers got as `x-request-id`; `-` if the request has none.
    pub request_id: &'a str,
    /// The method, for example `POST`. Empty if the request's head could not be parsed.
    pub method: &'a str,
    /// The path without the query, at most 256 bytes of it. Empty if the request's head could not be parsed.
    pub path: &'a str,
    /// The client's address and port as a load balancer has told them in a PROXY header. `None` without one.
    pub client: Option<String>,
    /// The status that the client was sent. `None` if it disconnected, or the router shut down, before that.
    pub status: Option<u16>,
    /// Whether the client asked for a stream.
    pub streaming: bool,
    /// The URL of the prefill server of the last attempt. `None` if the request was sent to no pair.
    pub prefill: Option<&'a str>,
    /// The URL of the decode server of the last attempt. `None` if the request was sent to no pair.
    pub decode: Option<&'a str>,
    /// The URL of the plain server of the last attempt (`--worker-urls`). `None` if it was sent to none.
    pub server: Option<&'a str>,
    /// Why the servers of the last attempt were selected. `None` if the request was sent to no pair.
    pub selection: Option<SelectionSummary>,
    /// How far the request had come when it ended: `head` (it was not parsed), `request` (its body was not
    /// read), `choice` (it was read, and sent to no pair), `legs` (it was sent, and no response of it reached
    /// the client), `answer_head` or `answer_body` (the client was sent so much of a server's response).
    pub phase: &'static str,
    /// What went wrong. `None` if nothing did, and if the client disconnected.
    pub failure: Option<RequestFailure<'a>>,
    /// How many samples of each prompt it asked for. `None` if it was one.
    pub samples: Option<u32>,
    /// The number of pairs that the request was sent to, one after the other; with several samples, for all
    /// of them.
    pub attempts: u32,
    /// Why the request was retried: for each attempt after the first the code of the error before it, or
    /// `status`, separated by commas. `None` if it was not.
    pub retried: Option<String>,
    /// The length of the request's body in bytes.
    pub bytes_in: u64,
    /// The length of the response's body in bytes, without framing, as far as it was sent.
    pub bytes_out: u64,
    /// When the request reached which point.
    pub times: RequestTimes,
    severity: Severity,
    access_log: bool,
}

/// What went wrong with a request.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct RequestFailure<'a> {
    /// The error code that the client was sent. For a server's own response, `server_refused` (4xx) or
    /// `server_error` (5xx); `shutdown` if the router's grace period was over first.
    pub code: &'static str,
    /// The error message that the client was sent, or a sentence of the same kind.
    pub cause: &'a str,
}

/// The times of a request, counted from the end of its head; those of servers are of the last attempt. `None`
/// if the request ended before that point, or passed it while nothing of it was read.
#[derive(Debug, Default, Clone, Copy)]
#[non_exhaustive]
pub struct RequestTimes {
    /// Until the last byte of the request's body was read.
    pub request: Option<Duration>,
    /// Until the request was written to its servers.
    pub sent: Option<Duration>,
    /// Until the head of prefill's response arrived.
    pub prefill_head: Option<Duration>,
    /// Until the head of decode's response arrived, or of a plain server's.
    pub decode_head: Option<Duration>,
    /// Until the first byte of the response's body was handed to the client's connection.
    pub first_byte: Option<Duration>,
    /// Until the request ended. Zero if its head could not be parsed.
    pub end: Duration,
}

/// Receives the fields of a [`RequestLine`], in the order of a log line: see [`RequestLine::visit`].
pub trait RequestLineVisitor {
    /// A text that may contain anything: it has to be escaped.
    fn text(&mut self, name: LineFieldName, value: &str);

    /// A text of printable ASCII without quotes and backslashes, which JSON takes as it is.
    #[inline]
    fn plain(&mut self, name: LineFieldName, value: &str) {
        self.text(name, value);
    }

    /// A number: a status, a count, or a length in bytes.
    fn number(&mut self, name: LineFieldName, value: u64);

    /// A truth value.
    fn flag(&mut self, name: LineFieldName, value: bool);

    /// A time. The name says that it is written in milliseconds.
    fn time(&mut self, name: LineFieldName, value: Duration);
}

/// The name of a field of a [`RequestLine`], alone and as two formats of logs need it. Those are constants,
/// because to put a name together for each of twenty fields costs more than to format their values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineFieldName {
    as_key: &'static str,
    as_json_key: &'static str,
}

impl LineFieldName {
    /// The name, for example `status`.
    pub fn as_str(self) -> &'static str {
        &self.as_key[1..self.as_key.len() - 1]
    }

    /// What stands before a value in a line of text, for example ` status=`.
    #[inline(always)]
    pub fn as_key(self) -> &'static str {
        self.as_key
    }

    /// What stands before a value in a JSON object that has a member already, for example `,"status":`.
    #[inline(always)]
    pub fn as_json_key(self) -> &'static str {
        self.as_json_key
    }
}

/// Receives log lines instead of tracing: see
/// [`MiniLbConfig::request_log`](crate::MiniLbConfig::request_log).
#[derive(Clone)]
pub(crate) struct RequestLog {
    /// Less severe lines are not passed on.
    pub(crate) level: LevelFilter,
    pub(crate) write: Arc<dyn Fn(&RequestLine<'_>) + Send + Sync>,
}

/// The fields of a line: kind, name and value, in the order in which they are written. A kind is a method of
/// [`RequestLineVisitor`]; a value is an `Option`, of which `None` is left out. Calls the macro `$use` with
/// the list.
macro_rules! fields {
    ($use:ident!($($args:tt)*) of $line:ident) => {
        $use! { $($args)*;
            plain request_id = Some($line.request_id),
            plain method = Some($line.method),
            text path = Some($line.path),
            plain client = $line.client.as_deref(),
            number status = $line.status.map(u64::from),
            plain code = $line.failure.map(|failure| failure.code),
            plain phase = Some($line.phase),
            plain prefill = $line.prefill,
            plain decode = $line.decode,
            plain server = $line.server,
            plain selection = $line.selection.as_ref().map(SelectionSummary::as_str),
            number samples = $line.samples.map(u64::from),
            number attempts = Some(u64::from($line.attempts)),
            plain retried = $line.retried.as_deref(),
            flag streaming = Some($line.streaming),
            number bytes_in = Some($line.bytes_in),
            number bytes_out = Some($line.bytes_out),
            time request_ms = $line.times.request,
            time sent_ms = $line.times.sent,
            time prefill_head_ms = $line.times.prefill_head,
            time decode_head_ms = $line.times.decode_head,
            time first_byte_ms = $line.times.first_byte,
            time total_ms = Some($line.times.end),
        }
    };
}

/// Emits the fields as a tracing event. The level is a macro, because it is a constant of the event's call
/// site.
macro_rules! emit {
    ($level:ident, $message:expr; $($kind:ident $name:ident = $value:expr,)*) => {
        $level!(target: TARGET, $($name = event_value!($kind $value),)* "{}", $message)
    };
}

macro_rules! event_value {
    // To the microsecond, as the program writes times: an f64 of nanoseconds would have digits that mean
    // nothing.
    (time $value:expr) => {
        $value.map(|time| time.as_micros() as u64 as f64 / 1_000.0)
    };
    ($kind:ident $value:expr) => {
        $value
    };
}

/// Calls a visitor for each field that has a value.
macro_rules! visit_each {
    ($visitor:ident; $($kind:ident $name:ident = $value:expr,)*) => {$(
        if let Some(value) = $value {
            const NAME: LineFieldName = LineFieldName {
                as_key: concat!(" ", stringify!($name), "="),
                as_json_key: concat!(",\"", stringify!($name), "\":"),
            };
            $visitor.$kind(NAME, value);
        }
    )*};
}

impl<'a> RequestLine<'a> {
    /// `access_log`: a line is wanted for each request.
    pub(super) fn new(request: &'a CompletedRequest<'_>, access_log: bool) -> Self {
        let pair = request.pair();
        let is_single = pair.is_some_and(ServerPair::is_single);
        let of_two = pair.filter(|_| !is_single);
        // A request is sent when its second leg is.
        let written = || {
            let decode = request.time_to(Phase::DecodeWritten)?;
            let prefill = if is_single { decode } else { request.time_to(Phase::PrefillWritten)? };
            Some(prefill.max(decode))
        };
        Self {
            request_id: request.request_id(),
            method: request.method(),
            path: request.path(),
            client: request.proxied_for().map(|address| address.to_string()),
            status: request.status(),
            streaming: request.streaming(),
            prefill: of_two.map(|pair| pair.prefill().url()),
            decode: of_two.map(|pair| pair.decode().url()),
            server: pair.filter(|_| is_single).map(|server| server.decode().url()),
            selection: pair.map(ServerPair::summary),
            phase: request.progress.as_str(),
            failure: request.failure.as_ref().map(|failure| {
                let (code, cause) = (failure.code, failure.cause.as_ref());
                RequestFailure { code, cause }
            }),
            samples: request.samples(),
            attempts: request.attempts(),
            retried: retried(request),
            bytes_in: request.bytes_in(),
            bytes_out: request.bytes_out(),
            times: RequestTimes {
                request: request.time_to(Phase::BodyRead),
                sent: written(),
                prefill_head: request.time_to(Phase::PrefillHead),
                decode_head: request.time_to(Phase::DecodeHead),
                first_byte: request.time_to(Phase::FirstByteToClient),
                end: request.duration,
            },
            severity: request.severity,
            access_log,
        }
    }
}

impl RequestLine<'_> {
    /// The level of the line: error for a defect of the router, warn for a request that failed, info for one
    /// that was rejected or succeeded. A request that its client cancelled has debug, or info in an access
    /// log.
    pub fn level(&self) -> Level {
        match self.severity {
            Severity::InternalError => Level::ERROR,
            Severity::Failed => Level::WARN,
            Severity::Cancelled if !self.access_log => Level::DEBUG,
            Severity::Rejected | Severity::Cancelled | Severity::Ok => Level::INFO,
        }
    }

    /// The message of the line: how the request ended and, if it failed, the cause, at most 1,024 bytes of
    /// it.
    pub fn message(&self) -> Cow<'static, str> {
        let how = match self.severity {
            Severity::InternalError | Severity::Failed => "request failed",
            Severity::Rejected => "request refused",
            Severity::Cancelled => "request cancelled",
            Severity::Ok => return "request".into(),
        };
        match self.failure {
            Some(failure) => format!("{how}: {}", truncate(failure.cause, MAX_CAUSE)).into(),
            None => how.into(),
        }
    }

    /// Calls the visitor for each field that has a value, in the order of a log line: those of a tracing
    /// event of the target `mini_lb::request`, without the message.
    // Inlined into the program, where names and their lengths become constants.
    #[inline]
    pub fn visit(&self, visitor: &mut impl RequestLineVisitor) {
        let line = self;
        fields!(visit_each!(visitor) of line);
    }

    /// Writes the line, if one is wanted of this request.
    pub(super) fn log(&self, log: Option<&RequestLog>) {
        let (line, level) = (self, self.level());
        // A line that is not shown for its level must not count as suppressed either.
        let is_shown = match log {
            Some(log) => level <= log.level,
            None => level != Level::INFO || enabled!(target: TARGET, Level::INFO),
        };
        if !is_shown || !self.is_allowed() {
            return;
        }
        // The level is a constant of an event's call site, so each level has one.
        match (log, level) {
            (Some(log), _) => (log.write)(self),
            (None, Level::ERROR) => fields!(emit!(error, self.message()) of line),
            (None, Level::WARN) => fields!(emit!(warn, self.message()) of line),
            (None, Level::INFO) => fields!(emit!(info, self.message()) of line),
            (None, _) => fields!(emit!(debug, self.message()) of line),
        }
    }

    fn is_allowed(&self) -> bool {
        match self.failure {
            // An access log has each request, whatever that costs.
            _ if self.access_log => true,
            // Here without an access log if spans are exported, and for a failed /ready.
            _ if self.severity == Severity::Ok => false,
            Some(failure) => log_limit::allow(failure.code),
            // Cancelled by the client: at debug, whose reader wants all lines.
            None => true,
        }
    }
}

fn retried(request: &CompletedRequest<'_>) -> Option<String> {
    let codes: Vec<_> = request.retries().iter().map(|reason| reason.code.unwrap_or("status")).collect();
    (!codes.is_empty()).then(|| codes.join(","))
}

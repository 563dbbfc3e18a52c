//! A request that is over, and the line about it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Level, debug, enabled, error, info, warn};

use super::log_limit;

/// Longest piece of a client's text in a line: a path, or a header that is quoted in a cause.
const MAX_TEXT: usize = 256;
/// Longest cause in a line.
const MAX_CAUSE: usize = 1_024;

/// What is told of a request when it is over: a line in the log.
///
/// No body, no query and no header is in it, except for the request's id. What clients and servers sent may be in `path`
/// and in the failure's cause: cut, but not escaped. `request_id`, `method` and URLs are printable ASCII without quotes and
/// backslashes.
#[derive(Debug)]
#[non_exhaustive]
pub struct RequestLine<'a> {
    /// `-` if it has none.
    pub request_id: &'a str,
    /// Empty if no head came.
    pub method: &'a str,
    /// Without the query, which may hold a key.
    pub path: &'a str,
    /// What the client was answered with, if it was answered.
    pub status: Option<u16>,
    /// A stream was asked for.
    pub streaming: bool,
    /// The URL of the prefill server, if a pair was chosen: of the last one, if there was more than one.
    pub prefill: Option<&'a str>,
    /// The URL of the decode server, likewise.
    pub decode: Option<&'a str>,
    /// How far the request had come when it ended: `head`, `request`, `choice`, `legs`, `answer_head` or `answer_body`.
    pub phase: &'static str,
    /// What went wrong, if anything did.
    pub failure: Option<RequestFailure<'a>>,
    /// How many pairs it was sent to.
    pub attempts: u32,
    /// Why it was sent again, each time: codes, with commas between them.
    pub retried: Option<String>,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body, without framing.
    pub bytes_out: u64,
    /// When what happened.
    pub times: RequestTimes,
    pub(crate) end: End,
    /// Each request has its line, whatever it costs.
    pub(crate) access_log: bool,
}

/// The code of a request that the end of the router has ended.
pub(super) const CUT_OFF: &str = "shutdown";

/// What went wrong with a request.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct RequestFailure<'a> {
    /// As the client was told; `server_refused` and `server_error` for a 4xx and a 5xx of a server's, and `shutdown` when
    /// the router ended first.
    pub code: &'static str,
    /// The sentence that the client was told.
    pub cause: &'a str,
}

/// When things happened to a request in its last attempt, counted from the end of its head. `None`: it did not happen, or
/// nobody saw it.
#[derive(Debug, Default, Clone, Copy)]
#[non_exhaustive]
pub struct RequestTimes {
    /// The last byte of the request's body was here.
    pub request: Option<Duration>,
    /// Both legs were written.
    pub sent: Option<Duration>,
    /// The head of prefill's answer came.
    pub prefill_head: Option<Duration>,
    /// The head of decode's answer came.
    pub decode_head: Option<Duration>,
    /// The first byte of the answer's body was on its way.
    pub first_byte: Option<Duration>,
    /// All was over.
    pub end: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The whole answer is on its way, or all there will be of it.
    Complete,
    /// The client left, or the router was told to end, before that.
    Cancelled,
}

/// How a line about a request is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Severity {
    /// The router's own fault.
    RetryReason,
    /// The request failed although the client did nothing wrong.
    Failed,
    /// The client did something wrong.
    Refused,
    Cancelled,
    /// It went well, or nobody need be told that it did not.
    Well,
}

impl Severity {
    #[cfg(feature = "otel")]
    pub(super) fn is_failure(self) -> bool {
        matches!(self, Self::RetryReason | Self::Failed)
    }
}

/// Where lines go instead of becoming events: see [`MiniLbConfig::request_log`](crate::MiniLbConfig::request_log).
#[derive(Clone)]
pub(crate) struct RequestLog {
    /// Of the least severe lines that are wanted.
    pub(crate) level: LevelFilter,
    pub(crate) write: Arc<dyn Fn(&RequestLine<'_>) + Send + Sync>,
}

/// One line as an event, in the order in which it is read.
macro_rules! event {
    ($level:ident, $request:expr) => {{
        let RequestLine { times, failure, .. } = $request;
        $level!(
            target: "mini_lb::request",
            request_id = $request.request_id,
            method = $request.method,
            path = $request.path,
            status = $request.status,
            code = failure.map(|failure| failure.code),
            phase = $request.phase,
            prefill = $request.prefill,
            decode = $request.decode,
            attempts = $request.attempts,
            retried = $request.retried.as_deref(),
            streaming = $request.streaming,
            bytes_in = $request.bytes_in,
            bytes_out = $request.bytes_out,
            request_ms = milliseconds(times.request),
            sent_ms = milliseconds(times.sent),
            prefill_head_ms = milliseconds(times.prefill_head),
            decode_head_ms = milliseconds(times.decode_head),
            first_byte_ms = milliseconds(times.first_byte),
            total_ms = milliseconds(Some(times.end)),
            "{}", $request.message()
        )
    }};
}

impl RequestLine<'_> {
    /// How severe it is.
    pub fn level(&self) -> Level {
        match self.severity() {
            Severity::RetryReason => Level::ERROR,
            Severity::Failed => Level::WARN,
            Severity::Cancelled if !self.access_log => Level::DEBUG,
            Severity::Refused | Severity::Cancelled | Severity::Well => Level::INFO,
        }
    }

    /// How it went, and what went wrong.
    pub fn message(&self) -> Cow<'static, str> {
        let how = match self.severity() {
            Severity::RetryReason | Severity::Failed => "request failed",
            Severity::Refused => "request refused",
            Severity::Cancelled => "request cancelled",
            Severity::Well => return "request".into(),
        };
        match self.failure {
            Some(failure) => format!("{how}: {}", cut(failure.cause, MAX_CAUSE)).into(),
            None => how.into(),
        }
    }

    pub(super) fn severity(&self) -> Severity {
        let status = self.status.unwrap_or_default();
        match self.failure {
            Some(failure) if failure.code == "internal" => Severity::RetryReason,
            // Whoever asks for /ready is told; it is not a request that failed.
            Some(failure) if failure.code == "not_ready" => Severity::Well,
            Some(_) if (400..500).contains(&status) => Severity::Refused,
            Some(_) => Severity::Failed,
            None if self.end == End::Cancelled => Severity::Cancelled,
            None => Severity::Well,
        }
    }

    /// Writes the line, if there is to be one: one a request at most.
    pub(super) fn log(&self, log: Option<&RequestLog>) {
        match (log, self.level()) {
            // What nobody would see is not counted either.
            (Some(log), level) if level > log.level => {}
            (None, Level::INFO) if !enabled!(target: "mini_lb::request", Level::INFO) => {}
            _ if !self.is_admitted() => {}
            (Some(log), _) => (log.write)(self),
            (None, Level::ERROR) => event!(error, self),
            (None, Level::WARN) => event!(warn, self),
            (None, Level::INFO) => event!(info, self),
            (None, _) => event!(debug, self),
        }
    }

    fn is_admitted(&self) -> bool {
        match (self.severity(), self.failure) {
            _ if self.access_log => true,
            (Severity::Well, _) => false,
            (_, Some(failure)) => log_limit::admit(failure.code),
            (_, None) => true,
        }
    }
}

/// A client's text as a line has it.
pub(super) fn shown(text: &str) -> &str {
    cut(text, MAX_TEXT)
}

fn milliseconds(time: Option<Duration>) -> Option<f64> {
    // Nobody wants more digits than microseconds.
    time.map(|time| time.as_micros() as u64 as f64 / 1_000.0)
}

/// The beginning of a text.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(status: Option<u16>, code: Option<&'static str>, end: End) -> RequestLine<'static> {
        RequestLine {
            request_id: "r",
            method: "POST",
            path: "/generate",
            status,
            streaming: false,
            prefill: None,
            decode: None,
            phase: "answer",
            failure: code.map(|code| RequestFailure { code, cause: "" }),
            attempts: 1,
            retried: None,
            bytes_in: 0,
            bytes_out: 0,
            times: RequestTimes::default(),
            end,
            access_log: false,
        }
    }

    #[test]
    fn how_bad_it_is_depends_on_whose_fault_it_is() {
        use Severity::*;
        for (status, code, end, expected) in [
            (Some(500), Some("internal"), End::Complete, RetryReason),
            (Some(502), Some("decode_closed"), End::Complete, Failed),
            (Some(200), Some("decode_closed"), End::Cancelled, Failed),
            (Some(503), Some("not_ready"), End::Complete, Well),
            (Some(400), Some("invalid_json"), End::Complete, Refused),
            (Some(200), None, End::Cancelled, Cancelled),
            (None, None, End::Cancelled, Cancelled),
            (Some(200), None, End::Complete, Well),
        ] {
            assert_eq!(finished(status, code, end).severity(), expected, "{status:?} {code:?}");
        }
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("aäb", 2), "a");
        assert_eq!(cut("aäb", 3), "aä");
        assert_eq!(cut("ab", 9), "ab");
    }
}

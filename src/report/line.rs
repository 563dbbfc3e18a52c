//! A request that is over, and the line about it.

use std::time::Duration;

use tracing::{Level, debug, enabled, error, info, warn};

use super::limit;

/// Longest piece of a client's text in a line: a path, or a header that is quoted in a cause.
const MAX_TEXT: usize = 256;
/// Longest cause in a line.
const MAX_CAUSE: usize = 1_024;

/// What is told of a request when it is over.
pub(crate) struct Line<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) method: &'a str,
    /// Without the query, which may hold a key.
    pub(crate) path: &'a str,
    /// What the client was answered with, if it was answered.
    pub(crate) status: Option<u16>,
    /// A stream was asked for.
    pub(crate) streaming: bool,
    /// The URLs of the pair, as far as one was chosen: the last one, if there was more than one.
    pub(crate) prefill: Option<&'a str>,
    pub(crate) decode: Option<&'a str>,
    /// How far the request had come when it ended.
    pub(crate) phase: &'static str,
    /// What went wrong, if anything did.
    pub(crate) failure: Option<Failure<'a>>,
    /// How many pairs it was sent to.
    pub(crate) attempts: u32,
    /// Why it was sent again, each time: codes, with commas between them.
    pub(crate) retried: Option<String>,
    /// Bytes of the request's body.
    pub(crate) bytes_in: u64,
    /// Bytes of the answer's body, without framing.
    pub(crate) bytes_out: u64,
    pub(crate) times: Times,
    pub(crate) end: End,
}

/// The code of a request that the end of the router has ended.
pub(super) const CUT_OFF: &str = "shutdown";

/// What went wrong with a request.
#[derive(Clone, Copy)]
pub(crate) struct Failure<'a> {
    /// As the client was told; `server_refused` and `server_error` for a 4xx and a 5xx of a server's, [`CUT_OFF`].
    pub(crate) code: &'static str,
    /// The sentence that the client was told.
    pub(crate) cause: &'a str,
}

/// When things happened in the last attempt, counted from the end of the request's head. `None`: it did not happen, or
/// nobody saw it.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Times {
    /// The last byte of the request's body was here.
    pub(crate) request: Option<Duration>,
    /// Both legs were written.
    pub(crate) sent: Option<Duration>,
    pub(crate) prefill_head: Option<Duration>,
    pub(crate) decode_head: Option<Duration>,
    /// The first byte of the answer's body was on its way.
    pub(crate) first_byte: Option<Duration>,
    pub(crate) end: Duration,
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
    Fault,
    /// The request failed although the client did nothing wrong.
    Failed,
    /// The client did something wrong.
    Refused,
    Cancelled,
    /// It went well, or nobody need be told that it did not.
    Well,
}

/// One line, in the order in which it is read.
macro_rules! line {
    ($level:ident, $request:expr, $($message:tt)+) => {{
        let Line { times, failure, .. } = $request;
        $level!(
            target: "mini_lb::request",
            request_id = $request.request_id,
            method = $request.method,
            path = cut($request.path, MAX_TEXT),
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
            $($message)+
        )
    }};
}

impl Severity {
    #[cfg(feature = "otel")]
    pub(super) fn is_failure(self) -> bool {
        matches!(self, Self::Fault | Self::Failed)
    }
}

impl Line<'_> {
    pub(super) fn severity(&self) -> Severity {
        let status = self.status.unwrap_or_default();
        match self.failure {
            Some(failure) if failure.code == "internal" => Severity::Fault,
            // Whoever asks for /ready is told; it is not a request that failed.
            Some(failure) if failure.code == "not_ready" => Severity::Well,
            Some(_) if (400..500).contains(&status) => Severity::Refused,
            Some(_) => Severity::Failed,
            None if self.end == End::Cancelled => Severity::Cancelled,
            None => Severity::Well,
        }
    }

    /// Writes the line, if there is to be one: one a request at most.
    pub(super) fn log(&self, access_log: bool) {
        let code = self.failure.map_or("", |failure| failure.code);
        let cause = self.failure.map_or("", |failure| cut(failure.cause, MAX_CAUSE));
        match self.severity() {
            // With an access log each request has its line, whatever it costs.
            Severity::Fault if access_log || limit::admit(code) => {
                line!(error, self, "request failed: {cause}")
            }
            Severity::Failed if access_log || limit::admit(code) => {
                line!(warn, self, "request failed: {cause}")
            }
            Severity::Refused if enabled!(Level::INFO) && (access_log || limit::admit(code)) => {
                line!(info, self, "request refused: {cause}");
            }
            Severity::Cancelled if access_log => line!(info, self, "request cancelled"),
            Severity::Cancelled => line!(debug, self, "request cancelled"),
            Severity::Well if access_log => line!(info, self, "request"),
            _ => {}
        }
    }
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

    fn finished(status: Option<u16>, code: Option<&'static str>, end: End) -> Line<'static> {
        Line {
            request_id: "r",
            method: "POST",
            path: "/generate",
            status,
            streaming: false,
            prefill: None,
            decode: None,
            phase: "answer",
            failure: code.map(|code| Failure { code, cause: "" }),
            attempts: 1,
            retried: None,
            bytes_in: 0,
            bytes_out: 0,
            times: Times::default(),
            end,
        }
    }

    #[test]
    fn how_bad_it_is_depends_on_whose_fault_it_is() {
        use Severity::*;
        for (status, code, end, expected) in [
            (Some(500), Some("internal"), End::Complete, Fault),
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

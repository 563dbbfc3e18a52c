//! The servers that failed a query, and the response that names them.

use hyper::StatusCode;
use serde_json::json;
use tracing::warn;

use super::query::QueryResponse;
use crate::error::{OwnResponse, json_response};
use crate::observe::report::log_limit;
use crate::upstream::Backend;

/// How much of a server's response is quoted, in bytes: enough for SGLang's error messages, and too little to
/// fill logs.
const MAX_QUOTED: usize = 512;

/// A server that did not answer with success.
pub(super) struct BackendFailure<'a> {
    server: &'a Backend,
    /// Its status, if it answered.
    pub(super) status: Option<StatusCode>,
    message: String,
}

impl<'a> BackendFailure<'a> {
    /// `None` if the server answered with success.
    pub(super) fn of(response: &'a QueryResponse) -> Option<Self> {
        let (status, message) = match &response.result {
            Ok((head, _)) if head.status.is_success() => return None,
            Ok((head, body)) => {
                // Lossy: the cut may split a character, and the body may be binary.
                let quoted = String::from_utf8_lossy(&body[..body.len().min(MAX_QUOTED)]);
                (Some(head.status), format!("answered {}: {}", head.status.as_u16(), quoted.trim()))
            }
            Err(error) => (None, error.to_string()),
        };
        Some(Self { server: &response.server, status, message })
    }

    /// A server whose response has a status of success, but is none for this reason.
    pub(super) fn in_success(response: &'a QueryResponse, reason: impl Into<String>) -> Self {
        Self { server: &response.server, status: Some(StatusCode::OK), message: reason.into() }
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        json!({
            "url": self.server.url(),
            "role": self.server.role().as_str(),
            "status": self.status.map(|status| status.as_u16()),
            "message": self.message,
        })
    }
}

/// All failures among these responses.
pub(super) fn failures(responses: &[QueryResponse]) -> Vec<BackendFailure<'_>> {
    responses.iter().filter_map(BackendFailure::of).collect()
}

/// The status of a response about these failures. A server's own status, such as 400 while it is busy, says
/// more than 502; of several, the highest is the worst. 502 if one did not answer, or says its failure in a
/// 200.
pub(super) fn worst_status(failures: &[BackendFailure<'_>]) -> StatusCode {
    let statuses = failures.iter().map(|failure| failure.status.filter(|status| !status.is_success()));
    let worst = statuses.collect::<Option<Vec<StatusCode>>>().and_then(|statuses| statuses.into_iter().max());
    worst.unwrap_or(StatusCode::BAD_GATEWAY)
}

/// An error response that names each server that failed, and the log line of it.
pub(super) fn failure_response(
    status: StatusCode,
    code: &'static str,
    message: &str,
    failures: &[BackendFailure<'_>],
) -> OwnResponse {
    // All of them in one message: with many servers down, one line says so instead of hundreds.
    let named: Vec<String> = failures
        .iter()
        .map(|failure| format!("{} {}", failure.server.role(), failure.server.url()))
        .collect();
    let servers: Vec<serde_json::Value> = failures.iter().map(BackendFailure::to_json).collect();
    let message = format!("{message}: {}", named.join(", "));
    // Monitoring repeats such requests every few seconds.
    if log_limit::allow(code) {
        warn!(code, "{message}");
    }
    let error = json!({ "message": message, "type": "server_error", "param": null, "code": code });
    json_response(status, json!({ "error": error, "servers": servers }).to_string())
}

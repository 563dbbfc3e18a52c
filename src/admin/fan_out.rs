//! One response of what all servers have answered to the same request.
//!
//! A success has every server's answer, a failure names the servers that failed.

use std::borrow::Cow;

use hyper::StatusCode;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::failures::{BackendFailure, failure_response, worst_status};
use super::query::QueryResponse;
use super::server_info::list;
use crate::error::{Error, OwnResponse, json_response};
use crate::upstream::Role;

/// Joins the servers' responses: 200 only if all of them answered with success.
pub(super) fn joined(responses: &[QueryResponse]) -> Result<OwnResponse, Error> {
    if responses.is_empty() {
        return Err(Error::NoServer(Role::Prefill));
    }
    let failed: Vec<_> = responses.iter().filter_map(failure).collect();
    if !failed.is_empty() {
        let message = "not every server answered with success";
        return Ok(failure_response(worst_status(&failed), "fan_out_failed", message, &failed));
    }
    // `success` is what clients of SGLang's own routes look at.
    let entries = list(responses.iter().map(entry));
    let text = r#"{"success":true,"message":"Every server answered with success.","servers":"#;
    Ok(json_response(StatusCode::OK, format!("{text}{entries}}}")))
}

/// A server's failure; also one that it reports in a 200, as SGLang does where a change was not made.
fn failure(response: &QueryResponse) -> Option<BackendFailure<'_>> {
    BackendFailure::of(response).or_else(|| {
        let (_, body) = response.result.as_ref().ok()?;
        let fields: Value = serde_json::from_slice(body).ok()?;
        let is_failure = fields.get("success") == Some(&Value::Bool(false));
        let message = fields.get("message").and_then(Value::as_str).unwrap_or("success is false");
        is_failure.then(|| BackendFailure::in_success(response, message))
    })
}

/// A server with its answer. JSON is copied as the server wrote it: a parse and a second serialization would
/// change numbers such as 1e3 or 1.0.
fn entry(response: &QueryResponse) -> String {
    let (status, answer) = match &response.result {
        Ok((head, body)) => (head.status.as_u16(), answer(body)),
        Err(_) => (0, "null".into()),
    };
    let (url, role) = (json!(response.server.url()), response.server.role());
    format!(r#"{{"url":{url},"role":"{role}","status":{status},"response":{answer}}}"#)
}

/// JSON, or a text as a JSON string, or null.
fn answer(body: &[u8]) -> Cow<'_, str> {
    match serde_json::from_slice::<&RawValue>(body) {
        Ok(json) => json.get().into(),
        Err(_) if body.is_empty() => "null".into(),
        Err(_) => json!(String::from_utf8_lossy(body)).to_string().into(),
    }
}

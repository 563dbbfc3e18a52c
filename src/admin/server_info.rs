//! The response of `/server_info`: all servers' descriptions in one document.
//!
//! Descriptions are copied as the servers wrote them. The shape is that of Python's
//! mini_lb, which SGLang's own benchmark tools read.

use std::borrow::Cow;
use std::collections::HashMap;

use hyper::StatusCode;
use serde_json::json;
use serde_json::value::RawValue;

use super::failures::BackendFailure;
use super::query::QueryResponse;
use crate::error::{OwnResponse, json_response};

/// Why a response of a server is of no use.
pub(super) const NOT_JSON: &str = "the response is not JSON";

/// Merges the servers' responses. 502 only if no server described itself: a tool that reads one of them must
/// work while another is down.
pub(super) fn merged(prefill: &[QueryResponse], decode: &[QueryResponse]) -> OwnResponse {
    // Put together as text: a parse and a second serialization would change numbers such as 1e3 or 1.0.
    let body = format!(
        r#"{{"internal_states":{},"prefill":{},"decode":{}}}"#,
        list(decode.iter().flat_map(internal_states)),
        list(prefill.iter().map(entry)),
        list(decode.iter().map(entry)),
    );
    let has_none = prefill.iter().chain(decode).all(|response| description(response).is_none());
    json_response(if has_none { StatusCode::BAD_GATEWAY } else { StatusCode::OK }, body)
}

/// The same of plain servers: the states and the descriptions of all of them.
pub(super) fn merged_plain(responses: &[QueryResponse]) -> OwnResponse {
    let body = format!(
        r#"{{"internal_states":{},"regular":{}}}"#,
        list(responses.iter().flat_map(internal_states)),
        list(responses.iter().map(entry)),
    );
    let has_none = responses.iter().all(|response| description(response).is_none());
    json_response(if has_none { StatusCode::BAD_GATEWAY } else { StatusCode::OK }, body)
}

/// A server's description, if it answered with success and JSON.
pub(super) fn description(response: &QueryResponse) -> Option<&RawValue> {
    let (head, body) = response.result.as_ref().ok()?;
    head.status.is_success().then(|| serde_json::from_slice(body).ok()).flatten()
}

/// A JSON list of JSON texts.
pub(super) fn list<T: AsRef<str>>(texts: impl Iterator<Item = T>) -> String {
    let texts: Vec<T> = texts.collect();
    let texts: Vec<&str> = texts.iter().map(T::as_ref).collect();
    format!("[{}]", texts.join(","))
}

/// A server's description, or the reason why there is none.
fn entry(response: &QueryResponse) -> Cow<'_, str> {
    if let Some(description) = description(response) {
        return description.get().into();
    }
    let failure =
        BackendFailure::of(response).unwrap_or_else(|| BackendFailure::in_success(response, NOT_JSON));
    json!({ "error": failure.to_json() }).to_string().into()
}

/// The elements of a description's `internal_states`.
fn internal_states(response: &QueryResponse) -> Vec<&str> {
    // Keys are `Cow`, as a key with escapes cannot be borrowed.
    let fields = description(response)
        .and_then(|info| serde_json::from_str::<HashMap<Cow<'_, str>, &RawValue>>(info.get()).ok());
    let states = fields.and_then(|fields| fields.get("internal_states").copied());
    let states = states.and_then(|states| serde_json::from_str::<Vec<&RawValue>>(states.get()).ok());
    states.unwrap_or_default().into_iter().map(RawValue::get).collect()
}

//! A server's "no" that hides in a 200.
//!
//! SGLang answers a `/generate` stream with 200 before it has done any work, so
//! that what goes wrong later is an event: an error object, or a last chunk whose
//! finish reason is an abort. What is done about it is not known here.

use std::ops::Range;

use memchr::memmem;

use super::json::Value;
use super::sse::only_data;

/// What an event that refuses says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamError {
    /// The status that the server would have answered with, 400 to 599.
    pub(crate) status: u16,
    /// Where in the event its JSON is.
    pub(crate) json: Range<usize>,
}

/// What a refusal counts as that names no status.
const DEFAULT_STATUS: u16 = 500;

/// Whether an event of a stream is a refusal.
pub(crate) fn in_event(event: &[u8]) -> Option<StreamError> {
    let json = only_data(event)?;
    let text = &event[json.clone()];
    // One search spares nearly every event the walk: only refusals, and texts about them, have these names.
    let names = [&b"\"error\""[..], b"\"abort\""];
    if !names.iter().any(|name| memmem::find(text, name).is_some()) {
        return None;
    }
    let answer = Value::root(text).ok()?;
    let status = error_status(answer).or_else(|| abort_status(answer))?;
    Some(StreamError { status, json })
}

/// `{"error":{"message":…,"code":400}}`, also with the error as a text.
fn error_status(answer: Value<'_>) -> Option<u16> {
    let error = answer.member("error").ok()??;
    if error.raw() == b"null" {
        return None;
    }
    Some(status(error, "code"))
}

/// `{"meta_info":{"finish_reason":{"type":"abort","status_code":500,…}}}`
fn abort_status(answer: Value<'_>) -> Option<u16> {
    let reason = answer.member("meta_info").ok()??.member("finish_reason").ok()??;
    let kind = reason.member("type").ok()??;
    (kind.raw() == b"\"abort\"").then(|| status(reason, "status_code"))
}

fn status(object: Value<'_>, name: &str) -> u16 {
    let named = object.member(name).ok().flatten().and_then(Value::as_u64);
    let status = named.and_then(|status| u16::try_from(status).ok());
    status.filter(|status| (400..600).contains(status)).unwrap_or(DEFAULT_STATUS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(event: &str) -> Option<(u16, &str)> {
        in_event(event.as_bytes()).map(|refusal| (refusal.status, &event[refusal.json]))
    }

    #[test]
    fn errors_and_aborts_are_refusals_with_their_status() {
        for (json, status) in [
            (r#"{"error":{"message":"too long","type":"invalid_request_error","code":400}}"#, 400),
            (r#"{"error":{"object":"error","code":503}}"#, 503),
            (r#"{"error":"unknown field"}"#, 500),
            (r#"{"error":{"code":200}}"#, 500),
            (r#"{"text":"","meta_info":{"id":"a","finish_reason":{"type":"abort","status_code":500}}}"#, 500),
            (r#"{"meta_info":{"finish_reason":{"type":"abort","status_code":null}}}"#, 500),
            (r#"{"meta_info":{"finish_reason":{"type":"abort","status_code":400}},"index":1}"#, 400),
        ] {
            assert_eq!(refused(&format!("data: {json}\n\n")), Some((status, json)));
        }
    }

    #[test]
    fn what_a_model_writes_is_no_refusal() {
        for event in [
            "data: [DONE]\n\n",
            ": ping\n\n",
            "data: {\"text\":\"\\\"error\\\" \\\"abort\\\"\",\"meta_info\":{\"finish_reason\":null}}\n\n",
            "data: {\"text\":\"a\",\"meta_info\":{\"finish_reason\":{\"type\":\"stop\",\"matched\":\"abort\"}}}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"error\":\"in a choice\"}]}\n\n",
            "data: {\"error\":null,\"choices\":[]}\n\n",
            "data: {\"meta_info\":{\"error\":\"nested\",\"finish_reason\":{\"type\":\"length\"}}}\n\n",
            "data: {\"error\"\n\n",
        ] {
            assert_eq!(refused(event), None, "{event}");
        }
    }
}

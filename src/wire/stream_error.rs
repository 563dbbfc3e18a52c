//! Errors within a response that has status 200.
//!
//! SGLang sends the head of a `/generate` stream, with status 200, before it does any work, and so those of
//! `/v1/responses` and `/v1/messages`. What fails after that is an event: an error object, a response that
//! has failed, or a last chunk whose finish reason is an abort, such as a failed KV transfer. What follows
//! from an error is decided in `proxy`.

use std::ops::Range;

use memchr::memmem;

use super::json::JsonValue;
use super::sse::data_line_of_type;

/// An error that a server reports in an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamError {
    /// The status that the server would have sent without a stream, 400 to 599.
    pub(crate) status: u16,
    /// The position of the error's JSON in the event.
    pub(crate) json: Range<usize>,
}

/// The status of an error that names none.
const DEFAULT_STATUS: u16 = 500;

/// The error that an event reports, if it reports one.
pub(crate) fn in_event(event: &[u8]) -> Option<StreamError> {
    let json = data_line_of_type(event)?;
    let text = &event[json.clone()];
    // Nearly every event skips the walk below by these searches: only errors have these names, and text
    // that was generated about them, whose quotes are escaped.
    let names = [&b"\"error\""[..], b"\"abort\""];
    if !names.iter().any(|name| memmem::find(text, name).is_some()) {
        return None;
    }
    let root = JsonValue::root(text).ok()?;
    if let Some(status) = error_status(root).or_else(|| abort_status(root)) {
        return Some(StreamError { status, json });
    }
    let failed = failed_response(root)?;
    let span = failed.span();
    let json = json.start + span.start..json.start + span.end;
    Some(StreamError { status: error_status(failed)?, json })
}

/// `{"type":"response.failed","response":{"error":{"code":"server_error","message":…}}}`, of
/// `/v1/responses`: the response, whose `error` is null unless it has failed.
fn failed_response(root: JsonValue<'_>) -> Option<JsonValue<'_>> {
    let response = root.member("response").ok()??;
    error_status(response).is_some().then_some(response)
}

/// `{"error":{"message":…,"code":400}}`, or the error as a string. Anthropic's API has a `type` and no code.
fn error_status(root: JsonValue<'_>) -> Option<u16> {
    let error = root.member("error").ok()??;
    if error.raw() == b"null" {
        return None;
    }
    let kind = error.member("type").ok().flatten().map(JsonValue::raw);
    if error.member("code").ok().flatten().is_none() && kind == Some(b"\"invalid_request_error\"") {
        return Some(400);
    }
    Some(status(error, "code"))
}

/// `{"meta_info":{"finish_reason":{"type":"abort","status_code":500,…}}}`
fn abort_status(root: JsonValue<'_>) -> Option<u16> {
    let reason = root.member("meta_info").ok()??.member("finish_reason").ok()??;
    let kind = reason.member("type").ok()??;
    (kind.raw() == b"\"abort\"").then(|| status(reason, "status_code"))
}

fn status(object: JsonValue<'_>, name: &str) -> u16 {
    let named = object.member(name).ok().flatten().and_then(JsonValue::as_u64);
    let status = named.and_then(|status| u16::try_from(status).ok());
    status.filter(|status| (400..600).contains(status)).unwrap_or(DEFAULT_STATUS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(event: &str) -> Option<(u16, &str)> {
        in_event(event.as_bytes()).map(|error| (error.status, &event[error.json]))
    }

    #[test]
    fn errors_and_aborts_are_found_with_their_status() {
        for (json, status) in [
            (r#"{"error":{"message":"too long","type":"invalid_request_error","code":400}}"#, 400),
            (r#"{"error":{"object":"error","code":503}}"#, 503),
            (r#"{"error":"unknown field"}"#, 500),
            (r#"{"error":{"code":200}}"#, 500),
            (r#"{"text":"","meta_info":{"id":"a","finish_reason":{"type":"abort","status_code":500}}}"#, 500),
            (r#"{"meta_info":{"finish_reason":{"type":"abort","status_code":null}}}"#, 500),
            (r#"{"meta_info":{"finish_reason":{"type":"abort","status_code":400}},"index":1}"#, 400),
        ] {
            assert_eq!(found(&format!("data: {json}\n\n")), Some((status, json)));
        }
    }

    #[test]
    fn errors_of_responses_and_messages_are_found() {
        let failed = r#"{"id":"resp_1","status":"failed","error":{"code":"server_error","message":"long"}}"#;
        let event = format!(
            "event: response.failed\ndata: {{\"type\":\"response.failed\",\"response\":{failed},\"sequence_number\":2}}\n\n"
        );
        assert_eq!(found(&event), Some((500, failed)));
        for (kind, status) in [("invalid_request_error", 400), ("api_error", 500)] {
            let error = format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"long"}}}}"#);
            assert_eq!(found(&format!("event: error\ndata: {error}\n\n")), Some((status, &*error)));
        }
        for event in [
            r#"event: response.created"#.to_owned() + "\ndata: {\"response\":{\"error\":null}}\n\n",
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n".to_owned(),
        ] {
            assert_eq!(found(&event), None);
        }
    }

    #[test]
    fn generated_text_is_not_an_error() {
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
            assert_eq!(found(event), None, "{event}");
        }
    }
}

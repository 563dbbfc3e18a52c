//! The fields of an admin request, of its JSON body or of its query, and the `timeout` of a query.

use std::borrow::Cow;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::upstream::{Address, Role, checked_host};

/// The fields of an admin request.
pub(super) struct AdminRequest(Map<String, Value>);

/// An error that is answered with 400 and this message.
pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::BadAdminRequest(message.into())
}

/// Longest `timeout` of a query, in seconds.
const MAX_QUERY_TIMEOUT: f64 = 3_600.0;

/// `timeout` of a query, in seconds, if it is there.
pub(super) fn query_timeout(query: Option<&str>) -> Result<Option<Duration>, Error> {
    let fields = query.unwrap_or_default().split('&').filter_map(|field| field.split_once('='));
    let Some((_, value)) = fields.into_iter().find(|(name, _)| *name == "timeout") else { return Ok(None) };
    // The range excludes NaN and infinity, which `from_secs_f64` panics at.
    let seconds = value.parse().ok().filter(|seconds| (0.0..=MAX_QUERY_TIMEOUT).contains(seconds));
    let seconds = seconds
        .ok_or_else(|| invalid(format!("timeout must be seconds between 0 and {MAX_QUERY_TIMEOUT}")))?;
    Ok(Some(Duration::from_secs_f64(seconds)))
}

/// Whether a query has this parameter with this value.
pub(super) fn has_parameter(query: Option<&str>, name: &str, value: &str) -> bool {
    query.unwrap_or_default().split('&').any(|field| field.split_once('=') == Some((name, value)))
}

/// What a request to `/abort_request` aborts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Abort {
    /// The request with this `rid`.
    One(String),
    /// All requests of all clients.
    All,
}

impl Abort {
    pub(super) fn parse(body: &[u8]) -> Result<Self, Error> {
        let request = AdminRequest::parse(body)?;
        // Pydantic, with which SGLang reads it, takes 1, "true" or "yes" for true as well: what is not
        // plainly false is an operator's.
        if request.get("abort_all").is_some_and(|all| *all != Value::Bool(false)) {
            return Ok(Self::All);
        }
        // An empty one is the beginning of every other: SGLang's scheduler compares beginnings.
        let rid = request.get("rid").and_then(Value::as_str).filter(|rid| !rid.is_empty());
        let rid = rid.ok_or_else(|| invalid("rid must be the text that names the request"))?;
        Ok(Self::One(rid.to_owned()))
    }
}

impl AdminRequest {
    pub(super) fn parse(body: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            // Valid JSON, such as a list or a string.
            Ok(_) => Err(invalid("the body is not a JSON object")),
            Err(error) => Err(invalid(format!("the body is not JSON: {error}"))),
        }
    }

    /// The parameters of a query as fields: `bootstrap_port` as a number, all others as texts.
    pub(super) fn from_query(query: Option<&str>) -> Result<Self, Error> {
        let decoded = |text: &str| {
            let text = percent_decode_str(text).decode_utf8();
            text.map(Cow::into_owned).map_err(|_| invalid("the query is not UTF-8"))
        };
        let fields = query.unwrap_or_default().split('&').filter_map(|field| field.split_once('='));
        let fields = fields.map(|(name, value)| {
            let (name, value) = (decoded(name)?, decoded(value)?);
            let number = value.parse::<u64>().ok().filter(|_| name == "bootstrap_port");
            Ok((name, number.map_or(Value::String(value), Value::from)))
        });
        fields.collect::<Result<_, _>>().map(Self)
    }

    /// The names of the fields that are not among `known`.
    pub(super) fn unknown_fields(&self, known: &[&str]) -> Vec<&String> {
        self.0.keys().filter(|name| !known.contains(&name.as_str())).collect()
    }

    /// A field that is there; `null` counts as missing, as clients of Python send it for `None`.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Rejects a session without an id: each server would choose one of its own.
    pub(super) fn check_session(&self) -> Result<(), Error> {
        let id = self.get("session_id").and_then(Value::as_str).filter(|id| !id.is_empty());
        let missing = "session_id is missing: each server would choose another one";
        id.map(|_| ()).ok_or_else(|| invalid(missing))
    }

    pub(super) fn role(&self, name: &str) -> Result<Role, Error> {
        match self.get(name).and_then(Value::as_str) {
            Some("prefill") => Ok(Role::Prefill),
            Some("decode") => Ok(Role::Decode),
            _ => Err(invalid(format!(r#"{name} must be "prefill" or "decode""#))),
        }
    }

    /// A server's URL.
    pub(super) fn address(&self, name: &str) -> Result<Address, Error> {
        let url = self.get(name).and_then(Value::as_str);
        let url = url.ok_or_else(|| invalid(format!("{name} is missing")))?;
        // Escaped, as the text comes from the client and ends up in a terminal.
        Address::parse(url).map_err(|reason| invalid(format!("{name} {}: {reason}", url.escape_debug())))
    }

    pub(super) fn bootstrap_port(&self) -> Result<Option<u16>, Error> {
        let Some(value) = self.get("bootstrap_port") else { return Ok(None) };
        // Port 0 is not a port to connect to.
        let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        port.map(Some).ok_or_else(|| invalid("bootstrap_port must be a number between 1 and 65535, or null"))
    }

    pub(super) fn bootstrap_host(&self) -> Result<Option<String>, Error> {
        let Some(value) = self.get("bootstrap_host") else { return Ok(None) };
        let host = value.as_str().and_then(checked_host);
        host.map(Some).ok_or_else(|| invalid("bootstrap_host is not a name or an address"))
    }

    pub(super) fn bool_or(&self, name: &str, default: bool) -> Result<bool, Error> {
        // `null` is an error: whether a server keeps its traffic must not be a guess.
        let Some(value) = self.0.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(format!("{name} must be true or false")))
    }

    /// Whole seconds, at most `max`.
    pub(super) fn seconds_or(&self, name: &str, max: u64, default: Duration) -> Result<Duration, Error> {
        let Some(value) = self.0.get(name) else { return Ok(default) };
        let seconds = value.as_u64().filter(|seconds| *seconds <= max);
        let seconds = seconds.ok_or_else(|| invalid(format!("{name} must be between 0 and {max}")))?;
        Ok(Duration::from_secs(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_names_one_request_or_is_of_all() {
        let abort = |body: &str| Abort::parse(body.as_bytes()).ok();
        let one = Some(Abort::One("r1".into()));
        for body in
            [r#"{"rid":"r1"}"#, r#"{"rid":"r1","abort_all":false}"#, r#"{"rid":"r1","abort_all":null}"#]
        {
            assert_eq!(abort(body), one, "{body}");
        }
        // The last of two keys counts, as for the servers.
        assert_eq!(abort(r#"{"rid":"r1","abort_all":true,"abort_all":false}"#), one);
        for all in ["true", "1", r#""true""#, r#""no""#, "0", "[]"] {
            assert_eq!(abort(&format!(r#"{{"rid":"r1","abort_all":{all}}}"#)), Some(Abort::All), "{all}");
        }
        assert_eq!(abort(r#"{"rid":"r1","abort\u005fall":true}"#), Some(Abort::All));
        for body in ["", "{}", "[]", r#"{"rid":""}"#, r#"{"rid":7}"#, r#"{"rid":["r1"]}"#] {
            assert_eq!(abort(body), None, "{body}");
        }
    }

    #[test]
    fn parameters_of_a_query_are_fields() {
        let request = |query| AdminRequest::from_query(Some(query)).ok().unwrap();
        for query in [
            "url=http://h:1&worker_type=prefill&bootstrap_port=8998",
            "x&worker_type=prefill&api_key=&url=http%3A%2F%2Fh%3a1&bootstrap_port=8998",
        ] {
            let request = request(query);
            assert_eq!(request.address("url").ok().unwrap().url, "http://h:1");
            assert_eq!(request.role("worker_type").ok(), Some(Role::Prefill));
            assert_eq!(request.bootstrap_port().ok(), Some(Some(8998)));
        }
        for query in ["", "url", "URL=http://h:1", "url=h:1"] {
            assert!(request(query).address("url").is_err(), "{query}");
        }
        assert!(request("bootstrap_port=x").bootstrap_port().is_err());
        assert!(AdminRequest::from_query(Some("url=%ff")).is_err());
        assert!(AdminRequest::from_query(None).is_ok());
    }

    #[test]
    fn a_timeout_is_a_number_of_seconds_within_bounds() {
        let timeout = |query| {
            query_timeout(query).ok().map(|timeout| timeout.map(|timeout: Duration| timeout.as_secs_f64()))
        };
        assert_eq!(timeout(None), Some(None));
        assert_eq!(timeout(Some("a=b&timeouts=2")), Some(None));
        assert_eq!(timeout(Some("a=b&timeout=1.5")), Some(Some(1.5)));
        for invalid in ["timeout=", "timeout=-1", "timeout=3601", "timeout=NaN", "timeout=inf"] {
            assert_eq!(timeout(Some(invalid)), None, "{invalid}");
        }
    }
}

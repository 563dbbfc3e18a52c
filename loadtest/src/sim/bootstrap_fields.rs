//! Parses the bootstrap fields, which name the prefill server and the room of a request. A scalar room counts
//! up over a batch, a list has one for each item, and a list on a single prompt crashes a real server. No
//! connection is opened here.

use serde_json::Value;

use super::request::{Fields, Reject};

/// The host name with which SGLang skips the transfer (FAKE_BOOTSTRAP_HOST).
pub(crate) const FAKE_HOST: &str = "2.2.2.2";

/// Where the two legs of one item meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BootstrapTarget {
    /// The request has no room.
    Missing,
    /// A bootstrap server, and a room on it.
    At { host: String, port: Option<u16>, room: i64 },
}

/// The bootstrap targets of a request's items.
pub(crate) fn targets(fields: &Fields, count: usize, batch: bool) -> Result<Vec<BootstrapTarget>, Reject> {
    let names = ["bootstrap_host", "bootstrap_port", "bootstrap_room"];
    if !batch && names.iter().any(|name| fields.get(*name).is_some_and(Value::is_array)) {
        return Err(Reject::Crash);
    }
    let [host, port, room] = names.map(|name| fields.get(name));
    (0..count).map(|at| one(entry(host, at)?, entry(port, at)?, room, at)).collect()
}

fn entry(value: Option<&Value>, at: usize) -> Result<Option<&Value>, Reject> {
    match value {
        Some(Value::Array(list)) => list.get(at).map(Some).ok_or(Reject::Internal),
        other => Ok(other),
    }
}

fn one(
    host: Option<&Value>,
    port: Option<&Value>,
    room: Option<&Value>,
    at: usize,
) -> Result<BootstrapTarget, Reject> {
    let own = entry(room, at)?;
    let Some(number) = own.filter(|value| !value.is_null()) else { return Ok(BootstrapTarget::Missing) };
    let number = number.as_i64().ok_or_else(|| not_an_integer("bootstrap_room", number))?;
    let offset = if room.is_some_and(Value::is_array) { 0 } else { at as i64 };
    Ok(BootstrapTarget::At {
        // Python formats an absent host as `None`, and connects to that.
        host: host.and_then(Value::as_str).unwrap_or("None").to_owned(),
        port: match port {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_u64()
                    .and_then(|port| u16::try_from(port).ok())
                    .ok_or_else(|| not_an_integer("bootstrap_port", value))?,
            ),
        },
        room: number.wrapping_add(offset),
    })
}

fn not_an_integer(field: &str, value: &Value) -> Reject {
    Reject::Validation(format!(
        "{{'type': 'int_type', 'loc': ('body', '{field}', 'int'), 'msg': 'Input should be a valid integer', \
         'input': {value}}}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(json: &str, count: usize, batch: bool) -> Result<Vec<Option<i64>>, Reject> {
        let fields: Fields = serde_json::from_str(json).unwrap();
        let room = |place: &BootstrapTarget| match place {
            BootstrapTarget::Missing => None,
            BootstrapTarget::At { room, .. } => Some(*room),
        };
        Ok(targets(&fields, count, batch)?.iter().map(room).collect())
    }

    #[test]
    fn a_scalar_room_counts_up_and_a_list_does_not() {
        assert_eq!(places(r#"{"bootstrap_room":7}"#, 3, true).unwrap(), [Some(7), Some(8), Some(9)]);
        assert_eq!(places(r#"{"bootstrap_room":[7,9]}"#, 2, true).unwrap(), [Some(7), Some(9)]);
    }

    #[test]
    fn a_list_on_a_single_prompt_is_a_crash_and_a_short_list_an_internal_error() {
        assert!(matches!(places(r#"{"bootstrap_room":[7]}"#, 1, false), Err(Reject::Crash)));
        assert!(matches!(
            places(r#"{"bootstrap_host":["a"],"bootstrap_room":7}"#, 1, false),
            Err(Reject::Crash)
        ));
        assert!(matches!(places(r#"{"bootstrap_room":[7]}"#, 2, true), Err(Reject::Internal)));
    }

    #[test]
    fn a_missing_room_has_no_target_and_a_null_port_is_not_resolved() {
        assert_eq!(places(r#"{"bootstrap_host":"a"}"#, 1, false).unwrap(), [None]);
        let fields: Fields = serde_json::from_str(r#"{"bootstrap_port":null,"bootstrap_room":1}"#).unwrap();
        assert!(matches!(targets(&fields, 1, false).unwrap()[0], BootstrapTarget::At { port: None, .. }));
    }
}

//! The bootstrap fields: where a request's two legs meet. Scalars count up over a batch, lists give each item
//! its own, and a list on a single prompt is what kills a real server. Dialling is not done here.

use serde_json::Value;

use super::request::{Fields, Reject};

/// The host name that stands for "no transfer at all".
pub(crate) const FAKE_HOST: &str = "2.2.2.2";

/// Where one item's legs meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The request names no room.
    Missing,
    /// A bootstrap server and a room in it.
    At { host: String, port: Option<u16>, room: i64 },
}

/// The places of a request's items.
pub(crate) fn all(fields: &Fields, count: usize, batch: bool) -> Result<Vec<Place>, Reject> {
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

fn one(host: Option<&Value>, port: Option<&Value>, room: Option<&Value>, at: usize) -> Result<Place, Reject> {
    let own = entry(room, at)?;
    let Some(number) = own.filter(|value| !value.is_null()) else { return Ok(Place::Missing) };
    let number = number.as_i64().ok_or_else(|| wrong("bootstrap_room", number))?;
    let offset = if room.is_some_and(Value::is_array) { 0 } else { at as i64 };
    Ok(Place::At {
        // Python prints an absent host as `None`, and dials that.
        host: host.and_then(Value::as_str).unwrap_or("None").to_owned(),
        port: match port {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_u64()
                    .and_then(|port| u16::try_from(port).ok())
                    .ok_or_else(|| wrong("bootstrap_port", value))?,
            ),
        },
        room: number.wrapping_add(offset),
    })
}

fn wrong(field: &str, value: &Value) -> Reject {
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
        let room = |place: &Place| match place {
            Place::Missing => None,
            Place::At { room, .. } => Some(*room),
        };
        Ok(all(&fields, count, batch)?.iter().map(room).collect())
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
    fn no_room_is_missing_and_a_null_port_is_left_open() {
        assert_eq!(places(r#"{"bootstrap_host":"a"}"#, 1, false).unwrap(), [None]);
        let fields: Fields = serde_json::from_str(r#"{"bootstrap_port":null,"bootstrap_room":1}"#).unwrap();
        assert!(matches!(all(&fields, 1, false).unwrap()[0], Place::At { port: None, .. }));
    }
}

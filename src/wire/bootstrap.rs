//! The three fields that let a prefill and a decode server find each other.
//!
//! BodyBuffer numbers come from outside: there is no randomness here.

use bytes::{BufMut, Bytes, BytesMut};

/// Rooms are drawn from `1..=MAX_BOOTSTRAP_ROOM`. SGLang takes 0 for "not arrived yet", and expands the room of a batch to
/// `room + i`, which must stay below 2^63.
pub(crate) const MAX_BOOTSTRAP_ROOM: u64 = 1 << 62;

/// What is the same for every request to one prefill server, written once.
#[derive(Debug)]
pub(crate) struct BootstrapFields {
    host: String,
    port: Option<u16>,
    /// `,"bootstrap_host":"…","bootstrap_port":…,"bootstrap_room":`
    rendered: Bytes,
}

impl BootstrapFields {
    /// `host` must need no JSON escapes; the configuration sees to that.
    pub(crate) fn new(host: String, port: Option<u16>) -> Self {
        let number = port.map_or_else(|| "null".to_owned(), |port| port.to_string());
        let rendered = format!(r#","bootstrap_host":"{host}","bootstrap_port":{number},"bootstrap_room":"#);
        Self { host, port, rendered: rendered.into() }
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn port(&self) -> Option<u16> {
        self.port
    }

    /// Appends the three fields, with a comma before them when other fields come first.
    pub(crate) fn put(&self, out: &mut BytesMut, room: u64, after_others: bool) {
        out.put_slice(&self.rendered[usize::from(!after_others)..]);
        out.put_slice(itoa::Buffer::new().format(room).as_bytes());
    }

    /// BodyBuffer for what [`put`](Self::put) appends: the largest room has 19 digits.
    pub(crate) fn max_len(&self) -> usize {
        self.rendered.len() + 19
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(host: &str, port: Option<u16>, room: u64, after_others: bool) -> String {
        let mut out = BytesMut::new();
        let fields = BootstrapFields::new(host.to_owned(), port);
        fields.put(&mut out, room, after_others);
        assert!(out.len() <= fields.max_len());
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn fields_are_scalars_and_an_unknown_port_is_null() {
        assert_eq!(
            written("10.0.0.1", Some(8998), 7, true),
            r#","bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":7"#
        );
        assert_eq!(
            written("[::1]", None, 1, false),
            r#""bootstrap_host":"[::1]","bootstrap_port":null,"bootstrap_room":1"#
        );
    }

    #[test]
    fn the_largest_room_fits_a_signed_64_bit_integer_with_headroom() {
        assert!(written("h", None, MAX_BOOTSTRAP_ROOM, true).ends_with(":4611686018427387904"));
        assert!(MAX_BOOTSTRAP_ROOM + u64::from(u32::MAX) < i64::MAX as u64);
    }
}

//! The three fields that let a prefill and a decode server find each other.
//!
//! The caller draws `bootstrap_room`: there is no randomness here.

use std::num::NonZeroU16;

use bytes::{BufMut, Bytes, BytesMut};

/// Rooms are drawn from `1..=MAX_BOOTSTRAP_ROOM`. SGLang's decode side takes room 0 for "not arrived yet"
/// and never completes such a request. For item `i` of a batch SGLang uses `room + i`, which must stay
/// below 2^63, the limit of its signed 64-bit schema type.
pub(crate) const MAX_BOOTSTRAP_ROOM: u64 = 1 << 62;

/// Decimal digits of the largest room.
const MAX_ROOM_DIGITS: usize = 19;

/// A room that leads a prefill server with `size` data-parallel ranks to this one: SGLang takes the
/// remainder. It is near `random`, and not larger than the largest.
pub(crate) fn room_of_rank(random: u64, rank: u16, size: NonZeroU16) -> u64 {
    let size = u64::from(size.get());
    let room = random - random % size + u64::from(rank);
    let room = if room > random { room.checked_sub(size).unwrap_or(room) } else { room };
    // 0 is none.
    if room == 0 { size } else { room }
}

/// The part of the fields that is the same for every request to one prefill server, rendered once.
#[derive(Debug)]
pub(crate) struct BootstrapFields {
    host: String,
    port: Option<u16>,
    /// `,"bootstrap_host":"…","bootstrap_port":…,"bootstrap_room":`
    rendered: Bytes,
}

impl BootstrapFields {
    /// `host` must not need JSON escapes, which the configuration guarantees. Without a port decode uses its
    /// own `--disaggregation-bootstrap-port`, by default 8998.
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

    /// Appends the three fields, with a comma before them if `needs_comma`.
    ///
    /// `room` is a scalar even for a batch: sglang 0.5.3 and newer expand it on both servers alike, so the
    /// router does not have to know the batch's size.
    pub(crate) fn write(&self, out: &mut BytesMut, room: u64, needs_comma: bool) {
        out.put_slice(&self.rendered[usize::from(!needs_comma)..]);
        out.put_slice(itoa::Buffer::new().format(room).as_bytes());
    }

    /// The most bytes that [`write`](Self::write) appends.
    pub(crate) fn max_len(&self) -> usize {
        self.rendered.len() + MAX_ROOM_DIGITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(host: &str, port: Option<u16>, room: u64, needs_comma: bool) -> String {
        let mut out = BytesMut::new();
        let fields = BootstrapFields::new(host.to_owned(), port);
        fields.write(&mut out, room, needs_comma);
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
    fn a_room_has_the_rank_as_its_remainder_and_is_never_0_or_too_large() {
        for size in [1, 2, 3, 8, 512, u16::MAX] {
            for random in [1, 2, 7, 511, 512, 1_000_003, MAX_BOOTSTRAP_ROOM] {
                for rank in [0, 1, size / 2, size - 1].into_iter().filter(|rank| *rank < size) {
                    let room = room_of_rank(random, rank, NonZeroU16::new(size).unwrap());
                    assert_eq!(room % u64::from(size), u64::from(rank), "{size} {random}");
                    assert!((1..=MAX_BOOTSTRAP_ROOM).contains(&room), "{size} {random} {room}");
                }
            }
        }
    }

    #[test]
    fn rooms_of_a_batch_fit_a_signed_64_bit_integer() {
        assert!(written("h", None, MAX_BOOTSTRAP_ROOM, true).ends_with(":4611686018427387904"));
        assert!(MAX_BOOTSTRAP_ROOM + u64::from(u32::MAX) < i64::MAX as u64);
    }
}

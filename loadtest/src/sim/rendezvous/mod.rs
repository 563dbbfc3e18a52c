//! How the two legs of a request meet: a decode server connects to a prefill server's bootstrap port,
//! identifies itself, and claims rooms over that one connection. This protocol of the simulator replaces the
//! KV transfer. Frames are defined here, the prefill side is in `rooms` and `bootstrap`, the decode side in
//! `peers`.

pub(crate) mod bootstrap;
pub(crate) mod peers;
pub(crate) mod rooms;

use bytes::{Buf as _, BufMut as _, BytesMut};

/// The route of the bootstrap server that upgrades to a rendezvous connection.
pub(crate) const ROUTE: &str = "/sim/rendezvous";
/// The protocol's name in the `upgrade` header.
pub(crate) const PROTOCOL: &str = "sglang-sim";
/// Bound on frames that wait to be written to one connection.
pub(crate) const QUEUE: usize = 1024;

const FRAME_BYTES: usize = 25;
/// The rank of a frame that names none.
const ANY_RANK: u64 = u64::MAX;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Op {
    /// Decode claims a room; the value is the room.
    Claim = 1,
    /// Decode no longer wants the room.
    Abandon = 2,
    /// Prefill transfers the prompt; the value is its hash.
    Delivered = 3,
    /// The prefill leg failed.
    Failed = 4,
}

/// A message about one decode leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub op: Op,
    pub leg: u64,
    pub value: u64,
    /// Of a claim: the rank of prefill on which decode expects the prompt, if it was told.
    pub rank: Option<u64>,
}

impl Frame {
    pub(crate) fn write(self, out: &mut BytesMut) {
        out.put_u8(self.op as u8);
        out.put_u64(self.leg);
        out.put_u64(self.value);
        out.put_u64(self.rank.unwrap_or(ANY_RANK));
    }

    /// Takes the next complete frame; `Err` is an unknown kind.
    pub(crate) fn read(buffer: &mut BytesMut) -> Result<Option<Self>, u8> {
        if buffer.len() < FRAME_BYTES {
            return Ok(None);
        }
        let op = match buffer.get_u8() {
            1 => Op::Claim,
            2 => Op::Abandon,
            3 => Op::Delivered,
            4 => Op::Failed,
            other => return Err(other),
        };
        let (leg, value, rank) = (buffer.get_u64(), buffer.get_u64(), buffer.get_u64());
        Ok(Some(Self { op, leg, value, rank: (rank != ANY_RANK).then_some(rank) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_parsed_only_when_it_is_complete() {
        let frame = Frame { op: Op::Delivered, leg: 7, value: u64::MAX, rank: Some(3) };
        let mut whole = BytesMut::new();
        frame.write(&mut whole);
        let mut part = BytesMut::from(&whole[..FRAME_BYTES - 1]);
        assert_eq!(Frame::read(&mut part), Ok(None));
        part.extend_from_slice(&whole[FRAME_BYTES - 1..]);
        assert_eq!(Frame::read(&mut part), Ok(Some(frame)));
        assert_eq!(Frame::read(&mut BytesMut::from(&[9_u8; FRAME_BYTES][..])), Err(9));
    }
}

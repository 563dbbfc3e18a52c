//! Bootstrap rooms that prefill has read: decode of a pair waits for them.
//!
//! A real decode server needs the KV cache that prefill computes from the whole prompt. Nothing else of a
//! room is simulated here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memchr::memmem;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The longest that decode waits for prefill; then it responds anyway, so that a broken router shows as slow
/// instead of hanging the run.
const PREFILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Bound on rooms that only one of the servers has seen. With more, all are forgotten and their waiters go
/// on.
const MAX_ROOMS: usize = 4096;
/// What precedes the room in a body.
const ROOM_FIELD: &[u8] = b"\"bootstrap_room\":";

/// The room in the last bytes of a body, if they have one.
pub(super) fn room_in(tail: &[u8]) -> Option<u64> {
    let value = tail[memmem::rfind(tail, ROOM_FIELD)? + ROOM_FIELD.len()..].trim_ascii_start();
    let digits = value.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

/// Shared by the two servers of one process.
#[derive(Default)]
pub(super) struct Rooms(Mutex<Table>);

type Table = HashMap<u64, Room>;

enum Room {
    /// Prefill has read it; decode has not asked.
    Read,
    /// Decode waits for it.
    Awaited(oneshot::Sender<()>),
}

impl Rooms {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prefill has read the whole body of `room`.
    pub(super) fn read(&self, room: u64) {
        let mut table = self.table();
        match table.remove(&room) {
            // The waiter may have been cancelled: its client left.
            Some(Room::Awaited(waiting)) => drop(waiting.send(())),
            _ => insert(&mut table, room, Room::Read),
        }
    }

    /// Waits until prefill has read `room`, or until the timeout.
    pub(super) async fn wait(&self, room: u64) {
        let waiting = {
            let mut table = self.table();
            if let Some(Room::Read) = table.remove(&room) {
                return;
            }
            let (sender, waiting) = oneshot::channel();
            insert(&mut table, room, Room::Awaited(sender));
            waiting
        };
        // An error is a room that was forgotten: it is not waited for either.
        let _ = timeout(PREFILL_TIMEOUT, waiting).await;
    }
}

fn insert(table: &mut Table, room: u64, state: Room) {
    if table.len() >= MAX_ROOMS {
        table.clear();
    }
    table.insert(room, state);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_found_at_the_end_of_a_body_only() {
        let room = |tail: &str| room_in(tail.as_bytes());
        assert_eq!(room(r#"…","bootstrap_port":8998,"bootstrap_room":1234}"#), Some(1234));
        assert_eq!(room(r#""bootstrap_room": 7 }"#), Some(7));
        assert_eq!(room(r#""bootstrap_room":[7,8]}"#), None);
        assert_eq!(room(r#""bootstrap_room":12"#), None, "it may go on");
        assert_eq!(room(r#""max_tokens":64}"#), None);
    }

    #[test]
    fn rooms_that_decode_never_asks_for_are_bounded() {
        let rooms = Rooms::default();
        (0..=MAX_ROOMS as u64).for_each(|room| rooms.read(room));
        assert_eq!(rooms.table().len(), 1);
    }
}

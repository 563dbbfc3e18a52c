//! Which rooms prefill has read: a pair's decode server answers none that prefill has not.
//!
//! A real decode server needs what prefill has computed from the whole prompt. Nothing else of a room is played here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memchr::memmem;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longest time that decode waits; then it answers all the same.
const PATIENCE: Duration = Duration::from_secs(30);
/// Rooms that only one of both has seen; with more, all are forgotten, and nobody waits for them any longer.
const MAX_ROOMS: usize = 4096;
/// What a body has in front of its room.
const FIELD: &[u8] = b"\"bootstrap_room\":";

/// The room in the last bytes of a body, if they have one.
pub(super) fn room_in(tail: &[u8]) -> Option<u64> {
    let value = tail[memmem::rfind(tail, FIELD)? + FIELD.len()..].trim_ascii_start();
    let digits = value.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

/// What two servers of one process share.
#[derive(Default)]
pub(super) struct Rooms(Mutex<Table>);

type Table = HashMap<u64, Room>;

enum Room {
    /// By prefill; decode has not asked.
    Read,
    /// Decode waits.
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
            // Who waited may have left.
            Some(Room::Awaited(waiting)) => drop(waiting.send(())),
            _ => insert(&mut table, room, Room::Read),
        }
    }

    /// Ends when prefill has read `room`, or when it has taken too long.
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
        // A room that was forgotten is not waited for either.
        let _ = timeout(PATIENCE, waiting).await;
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
    fn room_is_found_at_the_end_only() {
        let room = |tail: &str| room_in(tail.as_bytes());
        assert_eq!(room(r#"…","bootstrap_port":8998,"bootstrap_room":1234}"#), Some(1234));
        assert_eq!(room(r#""bootstrap_room": 7 }"#), Some(7));
        assert_eq!(room(r#""bootstrap_room":[7,8]}"#), None);
        assert_eq!(room(r#""bootstrap_room":12"#), None, "it may go on");
        assert_eq!(room(r#""max_tokens":64}"#), None);
    }

    #[test]
    fn rooms_that_nobody_asks_for_are_forgotten() {
        let rooms = Rooms::default();
        (0..=MAX_ROOMS as u64).for_each(|room| rooms.read(room));
        assert_eq!(rooms.table().len(), 1);
    }
}

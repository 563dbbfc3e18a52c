//! The prefill side's rooms: which legs wait in which room, and which legs meet. Timeouts are up to the legs.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{Frame, Op};

/// A decode leg that has claimed a room.
#[derive(Debug)]
pub(crate) struct Partner {
    pub leg: u64,
    /// The rank on which it expects the prompt, if it was told.
    pub rank: Option<u64>,
    /// The connection to its server; closed when that disconnects.
    pub out: mpsc::Sender<Frame>,
    /// Set to true when the decode side abandons the room.
    pub abandoned: watch::Receiver<bool>,
}

impl Partner {
    pub(crate) async fn send(&self, op: Op, value: u64) {
        // A lost connection is noticed by the decode side itself.
        let _ = self.out.send(Frame { op, leg: self.leg, value, rank: None }).await;
    }

    /// Completes when the decode leg is gone.
    pub(crate) async fn gone(&self) {
        let mut abandoned = self.abandoned.clone();
        tokio::select! {
            () = self.out.closed() => {}
            Ok(_) = abandoned.wait_for(|gone| *gone) => {}
        }
    }
}

/// Where a prefill leg waits in its room.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub rank: u64,
    /// A decode leg that was told no rank finds it.
    pub is_found: bool,
}

impl Place {
    fn is_for(self, partner: &Partner) -> bool {
        partner.rank.map_or(self.is_found, |rank| rank == self.rank)
    }
}

/// How a wait in a room ended.
#[derive(Debug)]
pub(crate) enum Meeting {
    Partner(Partner),
    /// Another leg in the same room met the partner. A real server lets this one respond, too.
    Alongside,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    place: Place,
    met: oneshot::Sender<Meeting>,
}

#[derive(Debug, Default)]
struct Room {
    legs: Vec<Waiting>,
    partners: Vec<Partner>,
}

/// All rooms of one prefill server.
#[derive(Debug, Default)]
pub(crate) struct Rooms {
    map: Mutex<HashMap<u64, Room>>,
}

/// A prefill leg's registration in a room, until dropped.
pub(crate) struct RoomGuard<'a> {
    rooms: &'a Rooms,
    room: u64,
    id: u64,
    /// Whether another leg was in the room before.
    pub duplicate: bool,
    met: oneshot::Receiver<Meeting>,
}

impl RoomGuard<'_> {
    pub(crate) async fn met(&mut self) -> Option<Meeting> {
        (&mut self.met).await.ok()
    }
}

impl Drop for RoomGuard<'_> {
    fn drop(&mut self) {
        let mut map = self.rooms.lock();
        let Some(room) = map.get_mut(&self.room) else { return };
        room.legs.retain(|leg| leg.id != self.id);
        if room.legs.is_empty() && room.partners.is_empty() {
            map.remove(&self.room);
        }
    }
}

impl Rooms {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Room>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a prefill leg.
    pub(crate) fn enter(&self, room: u64, place: Place) -> RoomGuard<'_> {
        let (send, met) = oneshot::channel();
        let id = fastrand::u64(..);
        let mut map = self.lock();
        let entry = map.entry(room).or_default();
        let duplicate = !entry.legs.is_empty();
        // Drop partners whose server is gone, so that no leg meets one of those.
        entry.partners.retain(|partner| !partner.out.is_closed() && !*partner.abandoned.borrow());
        match entry.partners.iter().position(|partner| place.is_for(partner)) {
            None => entry.legs.push(Waiting { id, place, met: send }),
            Some(first) => {
                let partner = entry.partners.remove(first);
                let _ = send.send(Meeting::Partner(partner));
                if entry.partners.is_empty() && entry.legs.is_empty() {
                    map.remove(&room);
                }
            }
        }
        drop(map);
        RoomGuard { rooms: self, room, id, duplicate, met }
    }

    /// Registers a decode leg; all prefill legs in the room go on.
    pub(crate) fn claim(&self, room: u64, partner: Partner) {
        let mut map = self.lock();
        let entry = map.entry(room).or_default();
        let (legs, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut entry.legs).into_iter().partition(|leg| leg.place.is_for(&partner));
        entry.legs = others;
        let mut met = Meeting::Partner(partner);
        for leg in legs {
            match leg.met.send(met) {
                Ok(()) => met = Meeting::Alongside,
                Err(back) => met = back,
            }
        }
        match met {
            Meeting::Partner(partner) => entry.partners.push(partner),
            Meeting::Alongside if entry.legs.is_empty() && entry.partners.is_empty() => {
                map.remove(&room);
            }
            Meeting::Alongside => {}
        }
    }

    /// Removes a decode leg, or all legs of a connection.
    pub(crate) fn forget(&self, leaves: impl Fn(&Partner) -> bool) {
        self.lock().retain(|_, room| {
            room.partners.retain(|partner| !leaves(partner));
            !room.legs.is_empty() || !room.partners.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANYWHERE: Place = Place { rank: 0, is_found: true };

    fn partner(leg: u64) -> (Partner, mpsc::Receiver<Frame>) {
        let (out, frames) = mpsc::channel(1);
        (Partner { leg, rank: None, out, abandoned: watch::channel(false).1 }, frames)
    }

    #[tokio::test]
    async fn two_legs_meet_in_either_order() {
        let rooms = Rooms::default();
        let mut early = rooms.enter(1, ANYWHERE);
        let (late, _frames) = partner(5);
        rooms.claim(1, late);
        assert!(matches!(early.met().await, Some(Meeting::Partner(partner)) if partner.leg == 5));
        let (first, _frames) = partner(6);
        rooms.claim(2, first);
        assert!(
            matches!(rooms.enter(2, ANYWHERE).met().await, Some(Meeting::Partner(partner)) if partner.leg == 6)
        );
    }

    #[tokio::test]
    async fn a_second_leg_in_a_room_is_a_duplicate_and_completes_too() {
        let rooms = Rooms::default();
        let (mut first, mut second) = (rooms.enter(1, ANYWHERE), rooms.enter(1, ANYWHERE));
        assert!(!first.duplicate && second.duplicate);
        let (late, _frames) = partner(5);
        rooms.claim(1, late);
        assert!(matches!(first.met().await, Some(Meeting::Partner(_))));
        assert!(matches!(second.met().await, Some(Meeting::Alongside)));
    }

    #[test]
    fn a_room_is_removed_when_all_its_legs_are_gone() {
        let rooms = Rooms::default();
        drop(rooms.enter(1, ANYWHERE));
        let (waiting, _frames) = partner(5);
        rooms.claim(2, waiting);
        rooms.forget(|partner| partner.leg == 5);
        assert!(rooms.lock().is_empty());
    }

    #[test]
    fn a_leg_that_was_told_a_rank_meets_only_that_one() {
        let rooms = Rooms::default();
        let mut second = rooms.enter(1, Place { rank: 2, is_found: false });
        let claim = |leg, rank| {
            let (partner, frames) = partner(leg);
            rooms.claim(1, Partner { rank, ..partner });
            frames
        };
        let _open = [claim(5, Some(1)), claim(6, None)];
        assert!(second.met.try_recv().is_err());
        let _met = claim(7, Some(2));
        assert!(matches!(second.met.try_recv(), Ok(Meeting::Partner(partner)) if partner.leg == 7));
        let mut first = rooms.enter(1, Place { rank: 1, is_found: true });
        assert!(matches!(first.met.try_recv(), Ok(Meeting::Partner(partner)) if partner.leg == 5));
        let mut other = rooms.enter(1, Place { rank: 1, is_found: true });
        assert!(matches!(other.met.try_recv(), Ok(Meeting::Partner(partner)) if partner.leg == 6));
    }
}

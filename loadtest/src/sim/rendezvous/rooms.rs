//! The prefill side's rooms: who waits in which, and who meets whom. Timeouts belong to the legs themselves.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{Frame, Op};

/// A decode leg that asked for a room.
#[derive(Debug)]
pub(crate) struct Partner {
    pub leg: u64,
    /// The connection to its server; closed when that is lost.
    pub out: mpsc::Sender<Frame>,
    /// Turned true when the decode side gives the room up.
    pub abandoned: watch::Receiver<bool>,
}

impl Partner {
    pub(crate) async fn tell(&self, op: Op, value: u64) {
        // A lost connection tells the decode side on its own.
        let _ = self.out.send(Frame { op, leg: self.leg, value }).await;
    }

    /// Ends when there is nobody left to hand over to.
    pub(crate) async fn gone(&self) {
        let mut abandoned = self.abandoned.clone();
        tokio::select! {
            () = self.out.closed() => {}
            Ok(_) = abandoned.wait_for(|gone| *gone) => {}
        }
    }
}

/// How a wait in a room ended.
#[derive(Debug)]
pub(crate) enum Met {
    Partner(Partner),
    /// Another leg in the same room met the partner; a real server lets this one answer too.
    Alongside,
}

#[derive(Debug, Default)]
struct Room {
    legs: Vec<(u64, oneshot::Sender<Met>)>,
    partners: Vec<Partner>,
}

/// All rooms of one prefill server.
#[derive(Debug, Default)]
pub(crate) struct Rooms {
    map: Mutex<HashMap<u64, Room>>,
}

/// A prefill leg's stay in a room; dropping it leaves the room.
pub(crate) struct Stay<'a> {
    rooms: &'a Rooms,
    room: u64,
    id: u64,
    /// Whether another leg was in the room already.
    pub duplicate: bool,
    met: oneshot::Receiver<Met>,
}

impl Stay<'_> {
    pub(crate) async fn met(&mut self) -> Option<Met> {
        (&mut self.met).await.ok()
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let mut map = self.rooms.lock();
        let Some(room) = map.get_mut(&self.room) else { return };
        room.legs.retain(|(id, _)| *id != self.id);
        if room.legs.is_empty() && room.partners.is_empty() {
            map.remove(&self.room);
        }
    }
}

impl Rooms {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Room>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A prefill leg enters.
    pub(crate) fn enter(&self, room: u64) -> Stay<'_> {
        let (send, met) = oneshot::channel();
        let id = fastrand::u64(..);
        let mut map = self.lock();
        let entry = map.entry(room).or_default();
        let duplicate = !entry.legs.is_empty();
        // A partner whose server is gone by now would be a meeting with nobody.
        entry.partners.retain(|partner| !partner.out.is_closed() && !*partner.abandoned.borrow());
        if entry.partners.is_empty() {
            entry.legs.push((id, send));
        } else {
            let partner = entry.partners.remove(0);
            let _ = send.send(Met::Partner(partner));
            if entry.partners.is_empty() {
                map.remove(&room);
            }
        }
        drop(map);
        Stay { rooms: self, room, id, duplicate, met }
    }

    /// A decode leg asks; every prefill leg in the room goes on.
    pub(crate) fn claim(&self, room: u64, partner: Partner) {
        let mut map = self.lock();
        let entry = map.entry(room).or_default();
        if entry.legs.is_empty() {
            entry.partners.push(partner);
            return;
        }
        let mut legs = std::mem::take(&mut entry.legs).into_iter();
        let mut met = Met::Partner(partner);
        for (_, leg) in legs.by_ref() {
            match leg.send(met) {
                Ok(()) => met = Met::Alongside,
                Err(back) => met = back,
            }
        }
        match met {
            Met::Partner(partner) => entry.partners.push(partner),
            Met::Alongside => {
                map.remove(&room);
            }
        }
    }

    /// A decode leg, or all legs of a connection, no longer wait.
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

    fn partner(leg: u64) -> (Partner, mpsc::Receiver<Frame>) {
        let (out, frames) = mpsc::channel(1);
        (Partner { leg, out, abandoned: watch::channel(false).1 }, frames)
    }

    #[tokio::test]
    async fn legs_meet_in_either_order() {
        let rooms = Rooms::default();
        let mut early = rooms.enter(1);
        let (late, _frames) = partner(5);
        rooms.claim(1, late);
        assert!(matches!(early.met().await, Some(Met::Partner(partner)) if partner.leg == 5));
        let (first, _frames) = partner(6);
        rooms.claim(2, first);
        assert!(matches!(rooms.enter(2).met().await, Some(Met::Partner(partner)) if partner.leg == 6));
    }

    #[tokio::test]
    async fn a_second_leg_in_a_room_is_a_duplicate_that_goes_along() {
        let rooms = Rooms::default();
        let (mut first, mut second) = (rooms.enter(1), rooms.enter(1));
        assert!(!first.duplicate && second.duplicate);
        let (late, _frames) = partner(5);
        rooms.claim(1, late);
        assert!(matches!(first.met().await, Some(Met::Partner(_))));
        assert!(matches!(second.met().await, Some(Met::Alongside)));
    }

    #[test]
    fn rooms_are_forgotten_when_everybody_left() {
        let rooms = Rooms::default();
        drop(rooms.enter(1));
        let (waiting, _frames) = partner(5);
        rooms.claim(2, waiting);
        rooms.forget(|partner| partner.leg == 5);
        assert!(rooms.lock().is_empty());
    }
}

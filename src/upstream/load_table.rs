//! The load of each server of a role, and of each rank of one: requests under way, and the bytes of prompt
//! that are still to compute.
//!
//! Both are one number, so that a policy compares a thousand servers by reading a few kilobytes, and none of
//! their [`Backend`](super::Backend)s. Who counts, and for how long, is for `in_flight`.

use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;

use super::speed::{EVEN, Samples, slowness};
use super::{CompletedPrefill, Policy};

/// Most servers and ranks of one role that have a load of their own: four times as many as there may be
/// servers, since one that was removed keeps its place until its last request has ended. Beyond that servers
/// share the last place, and ranks are not told apart.
pub(crate) const MAX_SLOTS: usize = 4_096;

/// Places that ranks leave to servers: one for each that a role may have.
const KEPT_FOR_SERVERS: usize = 1_024;

/// The lowest bit of the number of requests. Below are the bytes.
const REQUEST: u64 = 1 << 44;

/// Most bytes that one request counts for: as many as can be summed over 1,000 requests.
const MAX_WORK: u64 = 1 << 34;

/// Most bytes of others that a server counts for: 16 TiB, as many as its own work may have.
const MAX_FOREIGN_WORK: u64 = REQUEST - 1;

/// Places in one 64-byte line of a CPU's cache.
const PER_LINE: usize = 8;
/// Lines that are used before a second place is taken in one.
const LINES: usize = 64;

/// The load of one server at one moment. Ordered by requests, then by bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Load(u64);

impl Load {
    pub(crate) fn requests(self) -> usize {
        (self.0 / REQUEST) as usize
    }

    pub(crate) fn work(self) -> u64 {
        self.0 % REQUEST
    }

    /// A number that is smaller with fewer requests, and among as many with less work.
    pub(crate) fn by_requests(self) -> u64 {
        self.0
    }
}

/// The loads of one role's servers, by slot.
#[derive(Debug)]
pub(crate) struct LoadTable {
    loads: Box<[AtomicU64; MAX_SLOTS]>,
    /// How much slower than the mean each server is, in 256ths.
    slowness: Box<[AtomicU16; MAX_SLOTS]>,
    /// How many are not [`EVEN`]: while it is 0, nobody reads the others.
    uneven: AtomicUsize,
    /// How many servers have foreign work: while it is 0, nobody reads of which.
    with_foreign: AtomicUsize,
    /// The bytes of prompt that each server has been given by others than this router.
    foreign: Box<[AtomicU64; MAX_SLOTS]>,
    samples: Samples,
    /// Whose turn it is among equal ranks.
    turn: AtomicUsize,
    /// Who compares the loads, and learns from the legs that have ended.
    policy: ArcSwapOption<Arc<dyn Policy>>,
    slots: Mutex<SlotAllocator>,
}

#[derive(Debug, Default)]
struct SlotAllocator {
    /// How many were ever taken.
    taken: usize,
    returned: Vec<u16>,
}

impl SlotAllocator {
    fn take(&mut self) -> Option<u16> {
        self.returned.pop().or_else(|| {
            let number = self.taken;
            self.taken += usize::from(number < MAX_SLOTS - 1);
            (number < MAX_SLOTS - 1).then(|| place(number) as u16)
        })
    }
}

impl Default for LoadTable {
    fn default() -> Self {
        let loads = Box::new([const { AtomicU64::new(0) }; MAX_SLOTS]);
        Self {
            loads,
            slowness: Box::new([const { AtomicU16::new(EVEN) }; MAX_SLOTS]),
            uneven: AtomicUsize::new(0),
            with_foreign: AtomicUsize::new(0),
            foreign: Box::new([const { AtomicU64::new(0) }; MAX_SLOTS]),
            samples: Samples::default(),
            turn: AtomicUsize::new(0),
            policy: ArcSwapOption::empty(),
            slots: Mutex::default(),
        }
    }
}

impl LoadTable {
    /// Relaxed: a policy may act on a load that is a moment old.
    pub(crate) fn get(&self, slot: u16) -> Load {
        // The remainder, which changes nothing, tells the compiler that it need not check the index.
        Load(self.loads[usize::from(slot) % MAX_SLOTS].load(Ordering::Relaxed))
    }

    /// Whether servers differ in speed.
    pub(super) fn is_uneven(&self) -> bool {
        self.uneven.load(Ordering::Relaxed) != 0
    }

    /// Whether a server has work that this router has not given to it.
    pub(super) fn has_foreign_work(&self) -> bool {
        self.with_foreign.load(Ordering::Relaxed) != 0
    }

    /// How much of it the server of this slot has.
    pub(super) fn foreign_work(&self, slot: u16) -> u64 {
        if self.has_foreign_work() {
            self.foreign[usize::from(slot) % MAX_SLOTS].load(Ordering::Relaxed)
        } else {
            0
        }
    }

    fn set_foreign_work(&self, slot: u16, bytes: u64) {
        let before = self.foreign[usize::from(slot)].swap(bytes, Ordering::Relaxed);
        match (before == 0, bytes == 0) {
            (true, false) => _ = self.with_foreign.fetch_add(1, Ordering::Relaxed),
            (false, true) => _ = self.with_foreign.fetch_sub(1, Ordering::Relaxed),
            _ => {}
        }
    }

    /// This many bytes, as many more as the server is slower than the mean.
    pub(super) fn weighted(&self, slot: u16, bytes: u64) -> u64 {
        let slowness = self.slowness[usize::from(slot) % MAX_SLOTS].load(Ordering::Relaxed);
        bytes.saturating_mul(u64::from(slowness)) / u64::from(EVEN)
    }

    fn set_slowness(&self, slot: u16, slowness: u16) {
        let before = self.slowness[usize::from(slot)].swap(slowness, Ordering::Relaxed);
        match (before == EVEN, slowness == EVEN) {
            (true, false) => _ = self.uneven.fetch_add(1, Ordering::Relaxed),
            (false, true) => _ = self.uneven.fetch_sub(1, Ordering::Relaxed),
            _ => {}
        }
    }

    pub(super) fn set_policy(&self, policy: &Arc<dyn Policy>) {
        self.policy.store(Some(Arc::new(Arc::clone(policy))));
    }

    /// Counts up. Relaxed: it orders nothing but itself.
    pub(super) fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Gives a server its place.
    pub(super) fn take_slot(self: &Arc<Self>) -> Slot {
        let index = self.allocator().take();
        self.slot_at(index)
    }

    /// Gives the ranks of a server their places: all, or none if servers might be left without.
    pub(super) fn take_slots(self: &Arc<Self>, count: usize) -> Option<Vec<Slot>> {
        let mut slots = self.allocator();
        let free = slots.returned.len() + MAX_SLOTS - 1 - slots.taken;
        if free < count + KEPT_FOR_SERVERS {
            return None;
        }
        let taken: Vec<_> = (0..count).map(|_| slots.take()).collect();
        drop(slots);
        Some(taken.into_iter().map(|index| self.slot_at(index)).collect())
    }

    fn allocator(&self) -> MutexGuard<'_, SlotAllocator> {
        // Poisoning is ignored: no step in between can panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_at(self: &Arc<Self>, index: Option<u16>) -> Slot {
        Slot {
            table: Arc::clone(self),
            index: index.unwrap_or(SHARED),
            is_shared: index.is_none(),
            samples: Samples::default(),
        }
    }
}

/// The last place, for servers that have none of their own.
const SHARED: u16 = (MAX_SLOTS - 1) as u16;

/// Where the server with this number is. The first 64 have a cache line each, as all worker threads write to
/// all of them; of more servers each is written to less often, and eight share a line.
fn place(number: usize) -> usize {
    let page = LINES * PER_LINE;
    let (page_start, within) = (number / page * page, number % page);
    page_start + within % LINES * PER_LINE + within / LINES
}

/// A server's place in the table, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    table: Arc<LoadTable>,
    index: u16,
    is_shared: bool,
    /// Of its server's speed.
    samples: Samples,
}

impl Slot {
    pub(super) fn index(&self) -> u16 {
        self.index
    }

    #[cfg(test)]
    pub(super) fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// It has computed the `new` bytes of a request, after others, in this time.
    pub(super) fn add_sample(&self, before: u64, new: u64, time: Duration) {
        let slowness = slowness(&self.samples, &self.table.samples, (before, new), time);
        if let Some(slowness) = slowness.filter(|_| !self.is_shared) {
            self.table.set_slowness(self.index, slowness);
        }
    }

    /// Tells the policy of the server's role.
    pub(super) fn tell_policy(&self, completed: &CompletedPrefill<'_>) {
        if let Some(policy) = &*self.table.policy.load() {
            policy.prefill_completed(completed);
        }
    }

    /// The work that others have given to the server.
    pub(super) fn foreign_work(&self) -> u64 {
        self.table.foreign_work(self.index)
    }

    pub(super) fn set_foreign_work(&self, bytes: u64) {
        // Those that share a place would overwrite each other's.
        if !self.is_shared {
            self.table.set_foreign_work(self.index, bytes.min(MAX_FOREIGN_WORK));
        }
    }

    fn cell(&self) -> &AtomicU64 {
        &self.table.loads[usize::from(self.index)]
    }

    /// Pairs with the release in [`leave`](Self::leave): a reader that sees no request sees the outcomes,
    /// too.
    pub(super) fn load(&self) -> Load {
        Load(self.cell().load(Ordering::Acquire))
    }

    /// Counts one more request.
    pub(super) fn enter(&self) {
        self.cell().fetch_add(REQUEST, Ordering::Relaxed);
    }

    /// Counts one more request unless there are `cap`.
    pub(super) fn try_enter(&self, cap: usize) -> bool {
        let below_cap = |load: u64| (Load(load).requests() < cap).then_some(load + REQUEST);
        self.cell().fetch_update(Ordering::Acquire, Ordering::Acquire, below_cap).is_ok()
    }

    /// Adds to the work of a request. Returns how much it is, for [`leave`](Self::leave).
    pub(super) fn add_work(&self, bytes: u64) -> u64 {
        let bytes = bytes.min(MAX_WORK);
        self.cell().fetch_add(bytes, Ordering::Relaxed);
        bytes
    }

    /// Takes a request and its work back.
    pub(super) fn leave(&self, work: u64) {
        self.cell().fetch_sub(REQUEST + work, Ordering::Release);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.is_shared {
            return;
        }
        self.table.set_slowness(self.index, EVEN);
        self.table.set_foreign_work(self.index, 0);
        self.table.allocator().returned.push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_server_has_its_own_place_and_the_first_their_own_cache_line() {
        let places: Vec<_> = (0..MAX_SLOTS).map(place).collect();
        assert_eq!(places.iter().collect::<HashSet<_>>().len(), MAX_SLOTS);
        assert!(places.iter().all(|place| *place < MAX_SLOTS));
        let lines: HashSet<_> = places[..LINES].iter().map(|place| place / PER_LINE).collect();
        assert_eq!(lines.len(), LINES);
        let lines: HashSet<_> = places[..1_024].iter().map(|place| place / PER_LINE).collect();
        assert_eq!(lines.len(), 128, "1,024 servers are in 8 KiB");
    }

    #[test]
    fn places_are_used_again_and_the_last_one_is_shared() {
        let table = Arc::new(LoadTable::default());
        let first = table.take_slot();
        let index = first.index();
        drop(first);
        assert_eq!(table.take_slot().index(), index);
        let all: Vec<_> = (0..MAX_SLOTS + 5).map(|_| table.take_slot()).collect();
        assert_eq!(all.iter().map(Slot::index).collect::<HashSet<_>>().len(), MAX_SLOTS);
        assert!(all[MAX_SLOTS - 1..].iter().all(|slot| slot.index() == SHARED));
        drop(all);
        assert_eq!(table.slots.lock().unwrap().returned.len(), MAX_SLOTS - 1);
    }

    #[test]
    fn foreign_work_is_that_of_one_server_until_it_goes() {
        let table = Arc::new(LoadTable::default());
        let (one, two) = (table.take_slot(), table.take_slot());
        assert!(!table.has_foreign_work());
        one.set_foreign_work(7);
        one.set_foreign_work(u64::MAX);
        two.set_foreign_work(5);
        assert_eq!((one.foreign_work(), two.foreign_work()), (MAX_FOREIGN_WORK, 5));
        two.set_foreign_work(0);
        assert!(table.has_foreign_work());
        drop(one);
        assert!(!table.has_foreign_work());
        assert_eq!(table.take_slot().foreign_work(), 0, "of another server");
    }

    #[test]
    fn requests_come_before_bytes() {
        let table = Arc::new(LoadTable::default());
        let (one, two) = (table.take_slot(), table.take_slot());
        one.enter();
        let work = one.add_work(u64::MAX);
        two.enter();
        two.enter();
        assert!(one.load() < two.load());
        assert_eq!((one.load().requests(), one.load().work()), (1, MAX_WORK));
        assert!(two.try_enter(3) && !two.try_enter(3));
        one.leave(work);
        assert_eq!(one.load(), Load(0));
    }
}

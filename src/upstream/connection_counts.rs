//! How many connections to one server were opened, used again, and are idle.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Workers count in so many places in turn: those of a smaller machine write to no line of another's.
const SHARDS: usize = 8;

/// Where the next one that counts does so.
static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

/// One worker's place among the counts of every server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shard(usize);

impl Shard {
    pub(super) fn next() -> Self {
        Self(NEXT_SHARD.fetch_add(1, Relaxed) % SHARDS)
    }
}

/// One server's connections, of all workers.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connections {
    /// Since the server is known.
    pub(crate) opened: u64,
    /// Requests that were sent on a kept one.
    pub(crate) reused: u64,
    /// Kept, and used by nobody now.
    pub(crate) idle: u64,
}

#[derive(Debug, Default)]
pub(super) struct ConnectionCounts([Counts; SHARDS]);

/// In a cache line of its own, or two that are fetched together.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counts {
    opened: AtomicU64,
    reused: AtomicU64,
    /// Less those that were taken out, by whoever put them in: never below 0.
    idle: AtomicU64,
}

impl ConnectionCounts {
    pub(super) fn opened(&self, shard: Shard) {
        self.0[shard.0].opened.fetch_add(1, Relaxed);
    }

    pub(super) fn reused(&self, shard: Shard) {
        self.0[shard.0].reused.fetch_add(1, Relaxed);
    }

    pub(super) fn parked(&self, shard: Shard) {
        self.0[shard.0].idle.fetch_add(1, Relaxed);
    }

    /// So many idle ones were taken, or closed.
    pub(super) fn unparked(&self, shard: Shard, count: usize) {
        self.0[shard.0].idle.fetch_sub(count as u64, Relaxed);
    }

    pub(super) fn sum(&self) -> Connections {
        let sum = |of: fn(&Counts) -> &AtomicU64| self.0.iter().map(|counts| of(counts).load(Relaxed)).sum();
        Connections { opened: sum(|c| &c.opened), reused: sum(|c| &c.reused), idle: sum(|c| &c.idle) }
    }
}

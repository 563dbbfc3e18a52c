//! Counts of the connections to one backend: opened, reused and idle.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Counters are sharded so that, up to 8 workers, no two share a cache line. More workers share shards in
/// turn.
const SHARDS: usize = 8;

/// The next worker's shard.
static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

/// Where one worker counts, for every backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shard(usize);

impl Shard {
    pub(super) fn next() -> Self {
        Self(NEXT_SHARD.fetch_add(1, Relaxed) % SHARDS)
    }
}

/// One backend's connections, summed over all workers.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connections {
    /// Connections opened since the backend was added.
    pub(crate) opened: u64,
    /// Requests sent on a pooled connection.
    pub(crate) reused: u64,
    /// Connections in the pools now.
    pub(crate) idle: u64,
}

#[derive(Debug, Default)]
pub(super) struct ConnectionCounts([ShardCounts; SHARDS]);

/// Aligned to two cache lines: x86 prefetches lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct ShardCounts {
    opened: AtomicU64,
    reused: AtomicU64,
    /// Never below 0: a connection is counted out in the shard that counted it in, as pools belong to one
    /// worker.
    idle: AtomicU64,
}

impl ConnectionCounts {
    pub(super) fn opened(&self, shard: Shard) {
        // Relaxed here and below: statistics order nothing.
        self.0[shard.0].opened.fetch_add(1, Relaxed);
    }

    pub(super) fn reused(&self, shard: Shard) {
        self.0[shard.0].reused.fetch_add(1, Relaxed);
    }

    /// A connection was put into a pool.
    pub(super) fn parked(&self, shard: Shard) {
        self.0[shard.0].idle.fetch_add(1, Relaxed);
    }

    /// `count` connections were taken from a pool, or closed in it.
    pub(super) fn unparked(&self, shard: Shard, count: usize) {
        self.0[shard.0].idle.fetch_sub(count as u64, Relaxed);
    }

    pub(super) fn sum(&self) -> Connections {
        let sum =
            |of: fn(&ShardCounts) -> &AtomicU64| self.0.iter().map(|shard| of(shard).load(Relaxed)).sum();
        Connections { opened: sum(|c| &c.opened), reused: sum(|c| &c.reused), idle: sum(|c| &c.idle) }
    }
}

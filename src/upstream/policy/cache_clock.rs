//! How much a server's cache holds, in bytes of prompts, and how old what is in it can be.
//!
//! A cache gives up what was used longest ago, so a note's age is counted in bytes that went into the cache
//! since. Two things are learned from what servers say of their prompts: how many bytes a token has, and,
//! where a server had other blocks cached than was believed, that its cache is smaller or larger than it was
//! taken for. Which server has which block is for [`prefix_index`](super::prefix_index).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::upstream::{Backend, CompletedPrefill};
use crate::wire::shape::Prompt;

/// Bytes for which a server's clock advances by one.
pub(super) const CLOCK_UNIT: u64 = 16 << 10;
/// The largest cache, 512 MiB of JSON: half of what a clock of 16 bits can count.
pub(super) const MAX_CAPACITY: u64 = CLOCK_UNIT << 15;

/// The cache of a server that has not told its size, in bytes of JSON: 4 million tokens. Rather too much than
/// too little: where a server is believed to have nothing, nobody looks.
const UNKNOWN_CAPACITY: u64 = 16 << 20;
/// For which the table is made as long as a server has not told it.
const UNKNOWN_CAPACITY_OF_TABLE: u64 = 4 << 20;

/// The number 1 as a correction.
const ONE: u32 = 1 << 16;
/// How far a size that was told is corrected, and how far one that was not: down to 256 KiB of JSON.
const MIN_CORRECTION: u32 = ONE / 4;
const MIN_CORRECTION_OF_UNKNOWN: u32 = ONE / 64;
const MAX_CORRECTION: u32 = ONE * 4;
/// A block that should have been cached, or should not, moves the size by this part of the difference.
const STEP: i64 = 10;

/// By how much what a server says may differ from what was believed: a block, and this part of it. SGLang
/// caches whole pages and always computes the last token; templates and tools are tokens without bytes of the
/// prompt; and not each part of a prompt has as many bytes a token.
const SLACK_BYTES: u64 = Prompt::BLOCK_BYTES as u64;
const SLACK_PART: u64 = 8;

/// Bytes of JSON a token, in 256ths: English text has about 4. Escaped text of other scripts has more, images
/// much more.
const BYTES_PER_TOKEN: u32 = 4 << 8;
const MIN_BYTES_PER_TOKEN: u64 = 1 << 8;
const MAX_BYTES_PER_TOKEN: u64 = 64 << 8;
/// From how many tokens on their own mean is used.
const ENOUGH_TOKENS: u64 = 100_000;
/// After how many tokens all of them count half: a mean of the last hours and not of months.
const MANY_TOKENS: u64 = 1_000_000_000;

/// Counts the bytes that went into one server's cache, which is what pushes others out.
#[derive(Debug)]
pub(super) struct CacheClock {
    filled: AtomicU64,
    /// How many units the cache holds; 0 before the first request.
    capacity: AtomicU32,
    /// By how much it holds more than the server has told, in 65,536ths.
    correction: AtomicU32,
    /// The [`Backend::cache_epoch`] that the notes are from.
    epoch: AtomicU64,
}

impl Default for CacheClock {
    fn default() -> Self {
        Self {
            filled: AtomicU64::new(0),
            capacity: AtomicU32::new(0),
            correction: AtomicU32::new(ONE),
            epoch: AtomicU64::new(0),
        }
    }
}

impl CacheClock {
    pub(super) fn now(&self) -> u16 {
        (self.filled.load(Relaxed) / CLOCK_UNIT) as u16
    }

    /// This many bytes more have gone into the cache.
    pub(super) fn fill(&self, bytes: u64) {
        self.filled.fetch_add(bytes, Relaxed);
    }

    /// How much of its cache the server has filled since a note, in 256ths. From 256 on the note is dead.
    pub(super) fn age(&self, stamp: u16) -> u32 {
        let capacity = self.capacity.load(Relaxed);
        if capacity == 0 {
            return u32::MAX;
        }
        (u32::from(self.now().wrapping_sub(stamp)) << 8) / capacity
    }

    pub(super) fn is_live(&self, stamp: u16) -> bool {
        u32::from(self.now().wrapping_sub(stamp)) < self.capacity.load(Relaxed)
    }

    /// Takes over what is known of a server now. Returns whether its notes are still good: if it has an empty
    /// cache, they all are too old from now on.
    pub(super) fn is_current(&self, server: &Backend, bytes_per_token: &BytesPerToken) -> bool {
        let told = bytes_per_token.capacity(server).unwrap_or(UNKNOWN_CAPACITY);
        let corrected = told * u64::from(self.correction.load(Relaxed)) / u64::from(ONE);
        let units = corrected.min(MAX_CAPACITY).div_ceil(CLOCK_UNIT) as u32;
        if self.capacity.load(Relaxed) != units {
            self.capacity.store(units, Relaxed);
        }
        let epoch = server.cache_epoch();
        if self.epoch.load(Relaxed) == epoch {
            return true;
        }
        // By one thread only, or the clock would come round to old notes sooner.
        if self.epoch.swap(epoch, Relaxed) != epoch {
            self.fill((u64::from(units) + 1) * CLOCK_UNIT);
            // It may be another server.
            self.correction.store(ONE, Relaxed);
        }
        false
    }

    /// Learns from what a server had cached of a prompt, of which these were the notes.
    pub(super) fn correct(&self, completed: &CompletedPrefill<'_>, cached: u64, noted: Ages) {
        let believed = completed.believed_cached_bytes();
        let slack = SLACK_BYTES + believed / SLACK_PART;
        let age = if cached + slack < believed {
            // It has computed them after all.
            self.fill(believed - cached);
            // What was noted by requests that it had not computed yet need not be in its cache.
            let age = noted.of_byte(cached + slack);
            age.filter(|age| u64::from(*age) * CLOCK_UNIT > completed.work_before() + CLOCK_UNIT)
        } else if cached > believed + slack {
            noted.of_byte(cached - slack)
        } else {
            None
        };
        let capacity = i64::from(self.capacity.load(Relaxed));
        let Some(age) = age.map(i64::from).filter(|_| capacity > 0) else { return };
        // A note that was taken for dead and is younger, or the other way round, was judged by another size.
        if (cached < believed) != (age < capacity) {
            return;
        }
        let is_told = completed.server().cache_tokens().is_some();
        let min = if is_told { MIN_CORRECTION } else { MIN_CORRECTION_OF_UNKNOWN };
        let now = i64::from(self.correction.load(Relaxed));
        // One more than the age of what was there: a note as old as the cache is dead.
        let target = if age < capacity { age } else { age + 1 };
        let next = now + now * (target - capacity) / (capacity * STEP);
        // A correction that is lost to another thread comes again.
        self.correction.store(next.clamp(min.into(), MAX_CORRECTION.into()) as u32, Relaxed);
    }
}

/// How old a server's notes of a prompt were when it was chosen, in units of its clock: up to four steps,
/// from the first block on. What a conversation begins with is used more often than its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Ages([Step; 4]);

/// The age of the blocks before `end` that are not in the step before. `end` is 0 if there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Step {
    end: u16,
    age: u16,
}

impl Ages {
    pub(super) fn is_empty(&self) -> bool {
        self.0[0].end == 0
    }

    /// The next block that is noted, by its number, is this old.
    pub(super) fn add(&mut self, block: usize, age: u16) {
        let end = block as u16 + 1;
        let free = self.0.iter().position(|step| step.end == 0).unwrap_or(self.0.len());
        if let Some(last) = free.checked_sub(1)
            && (free == self.0.len() || self.0[last].age == age)
        {
            // More than four steps: the last one is as old as its end.
            self.0[last] = Step { end, age };
        } else {
            self.0[free] = Step { end, age };
        }
    }

    /// How old the note of the block with this byte was.
    fn of_byte(self, byte: u64) -> Option<u16> {
        let block = byte / Prompt::BLOCK_BYTES as u64;
        self.0.iter().find(|step| block < u64::from(step.end)).map(|step| step.age)
    }

    /// As a number that a leg carries.
    pub(super) fn to_memo(self) -> u128 {
        let word = |step: &Step| u128::from(step.end) << 16 | u128::from(step.age);
        self.0.iter().rev().fold(0, |memo, step| memo << 32 | word(step))
    }

    pub(super) fn from_memo(memo: u128) -> Self {
        Self([0, 1, 2, 3].map(|number| {
            let word = (memo >> (32 * number)) as u32;
            Step { end: (word >> 16) as u16, age: word as u16 }
        }))
    }
}

/// How many bytes of JSON a token has, of all prompts whose servers have said it.
#[derive(Debug)]
pub(super) struct BytesPerToken {
    bytes: AtomicU64,
    tokens: AtomicU64,
    /// In 256ths.
    mean: AtomicU32,
}

impl Default for BytesPerToken {
    fn default() -> Self {
        Self { bytes: AtomicU64::new(0), tokens: AtomicU64::new(0), mean: AtomicU32::new(BYTES_PER_TOKEN) }
    }
}

impl BytesPerToken {
    /// How much the cache of a server holds, if it has told its size.
    pub(super) fn capacity(&self, server: &Backend) -> Option<u64> {
        let mean = u64::from(self.mean.load(Relaxed));
        server.cache_tokens().map(|tokens| (tokens.saturating_mul(mean) >> 8).min(MAX_CAPACITY))
    }

    /// The capacity that the table of notes is made for.
    pub(super) fn capacity_of_table(&self, server: &Backend) -> u64 {
        self.capacity(server).unwrap_or(UNKNOWN_CAPACITY_OF_TABLE)
    }

    /// Learns from a prompt. In a short one, and in one with fewer bytes than tokens, most tokens are of the
    /// template or of tools.
    pub(super) fn learn(&self, bytes: u64, tokens: u64) {
        if bytes < Prompt::BLOCK_BYTES as u64 || tokens > bytes {
            return;
        }
        let bytes = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        let tokens = self.tokens.fetch_add(tokens, Relaxed) + tokens;
        if tokens < ENOUGH_TOKENS {
            return;
        }
        let mean = (bytes.saturating_mul(1 << 8) / tokens).clamp(MIN_BYTES_PER_TOKEN, MAX_BYTES_PER_TOKEN);
        self.mean.store(mean as u32, Relaxed);
        if tokens > MANY_TOKENS {
            // What other threads add meanwhile may be lost, and does not change a mean.
            self.bytes.store(bytes / 2, Relaxed);
            self.tokens.store(tokens / 2, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_carried_in_a_number() {
        let mut ages = Ages::default();
        assert!(ages.is_empty() && Ages::from_memo(0).is_empty());
        (0..10).for_each(|block| ages.add(block, 3));
        (10..1_024).for_each(|block| ages.add(block, u16::MAX));
        let same = Ages::from_memo(ages.to_memo());
        assert_eq!(same, ages);
        let of_block = |block: u64| same.of_byte(block * Prompt::BLOCK_BYTES as u64 + 7);
        assert_eq!(
            [0, 9, 10, 1_023, 1_024].map(of_block),
            [Some(3), Some(3), Some(u16::MAX), Some(u16::MAX), None]
        );
    }

    #[test]
    fn of_more_than_four_steps_the_last_is_as_old_as_its_end() {
        let mut ages = Ages::default();
        (0..8).for_each(|block| ages.add(block, 10 * block as u16));
        let of_block = |block: u64| ages.of_byte(block * Prompt::BLOCK_BYTES as u64);
        assert_eq!([0, 1, 2, 3, 7].map(of_block), [0, 10, 20, 70, 70].map(Some));
    }

    #[test]
    fn bytes_per_token_are_a_mean_within_bounds() {
        let learned = |bytes: u64, tokens: u64| {
            let mean = BytesPerToken::default();
            mean.learn(bytes, tokens);
            f64::from(mean.mean.load(Relaxed)) / 256.0
        };
        assert_eq!(learned(300_000, 99_999), 4.0, "not enough yet");
        assert_eq!(learned(300_000, 100_000), 3.0);
        assert_eq!(learned(100_000_000, 100_000), 64.0);
        assert_eq!(learned(100_000, 200_000), 4.0, "tokens without bytes");
        let mean = BytesPerToken::default();
        (0..1_000).for_each(|_| mean.learn(1_000, 900));
        assert_eq!(mean.tokens.load(Relaxed), 0, "short prompts are mostly template");
        (0..30).for_each(|_| mean.learn(500_000_000, 100_000_000));
        assert!(mean.tokens.load(Relaxed) <= MANY_TOKENS && mean.mean.load(Relaxed) == 5 << 8);
    }
}

//! Which servers are believed to have which beginnings of prompts in their caches: one table of fixed size.
//!
//! Notes are written and read with relaxed atomics. There is no lock, no list and no task that evicts: a lost
//! race is a lost note, and a bucket that is full gives its oldest entry up. When a note is too old to be
//! true is for [`cache_aware`](super::cache_aware) to say.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Entries of a bucket, which is one line of a CPU's cache.
const ENTRIES: usize = 3;
/// Servers that are noted for one block. With more holders than four nothing is gained.
pub(super) const HOLDERS: usize = 4;
/// Bytes of a bucket.
const BUCKET_BYTES: usize = 64;

/// Bits of a hash that number the buckets of the smallest table, which has 64 KiB, and of the largest, with 1
/// GiB.
const MIN_BITS: u32 = 10;
const MAX_BITS: u32 = 24;
/// The first hash bit of a tag. It is the same in tables of all sizes, so that entries can move to a larger
/// one.
const TAG_START: u32 = MIN_BITS;

/// A server that is noted for a block, and when that was, in units of its own clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) slot: u16,
    pub(super) stamp: u16,
}

impl Note {
    /// 0 is for no note.
    fn to_word(self) -> u32 {
        (u32::from(self.slot) + 1) << 16 | u32::from(self.stamp)
    }

    fn from_word(word: u32) -> Option<Self> {
        let slot = (word >> 16).checked_sub(1)?;
        Some(Self { slot: slot as u16, stamp: word as u16 })
    }
}

/// A tag for each entry, a byte of fan-out for each, and the notes of each: 64 bytes.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    tags: [AtomicU32; ENTRIES],
    fan_outs: AtomicU32,
    notes: [[AtomicU32; HOLDERS]; ENTRIES],
}

/// The table.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    buckets: Box<[Bucket]>,
    bits: u32,
}

/// Most buckets that a measurement looks at: 256 KiB.
const SAMPLED_BUCKETS: usize = 4_096;

/// How full an index is, and how old what is in it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct IndexUsage {
    /// Entries with a note that is live.
    pub(crate) live_entries: u64,
    pub(crate) capacity: u64,
    /// The mean age of live entries, by their youngest note, as a share of what a cache holds; 0 without any.
    pub(crate) mean_age: f64,
}

/// What is noted for one block.
pub(super) struct Entry<'a> {
    bucket: &'a Bucket,
    number: usize,
}

impl PrefixIndex {
    /// The number of bits of a table for this many blocks: with twice as many entries, so that what is live
    /// is hardly ever given up. At most `max_bytes`, and not less than the smallest table.
    pub(super) fn bits_for(blocks: u64, max_bytes: usize) -> u32 {
        let wanted = (blocks * 2).div_ceil(ENTRIES as u64).max(1).next_power_of_two().trailing_zeros();
        let most = (max_bytes / BUCKET_BYTES).max(1).ilog2();
        wanted.min(most).clamp(MIN_BITS, MAX_BITS)
    }

    pub(super) fn new(bits: u32) -> Self {
        Self { buckets: (0..1_usize << bits).map(|_| Bucket::default()).collect(), bits }
    }

    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    /// What is noted for the block with this hash.
    pub(super) fn find(&self, hash: u64) -> Option<Entry<'_>> {
        let (bucket, tag) = self.place(hash);
        Some(Entry { bucket, number: bucket.number_of(tag)? })
    }

    /// Notes a server for a block, and returns the stamp of its note before. Where something must give way,
    /// that which is oldest by `age` does.
    pub(super) fn note(&self, hash: u64, note: Note, age: impl Fn(Note) -> u32) -> Option<u16> {
        let (bucket, tag) = self.place(hash);
        let number = bucket.number_of(tag).unwrap_or_else(|| bucket.give_up_entry(tag, &age));
        bucket.note(number, note, age)
    }

    fn place(&self, hash: u64) -> (&Bucket, u32) {
        let tag = (hash << TAG_START >> 32) as u32;
        // 0 is for no entry.
        (&self.buckets[(hash >> (u64::BITS - self.bits)) as usize], tag.max(1))
    }

    /// Measures a part of the table that is spread over all of it. An `age` of 1 is dead.
    pub(super) fn usage(&self, age: impl Fn(Note) -> f64) -> IndexUsage {
        let step = (self.buckets.len() / SAMPLED_BUCKETS).max(1);
        let entries = self
            .buckets
            .iter()
            .step_by(step)
            .flat_map(|bucket| (0..ENTRIES).map(move |number| Entry { bucket, number }));
        let youngest = entries.filter_map(|entry| entry.notes().map(&age).min_by(f64::total_cmp));
        let (live, ages) =
            youngest.filter(|age| *age < 1.0).fold((0_u64, 0.0), |(live, ages), age| (live + 1, ages + age));
        IndexUsage {
            live_entries: live * step as u64,
            capacity: (self.buckets.len() * ENTRIES) as u64,
            mean_age: if live == 0 { 0.0 } else { ages / live as f64 },
        }
    }

    /// A table of another size with the same notes, as far as there is room.
    pub(super) fn resized(&self, bits: u32, age: impl Fn(Note) -> u32) -> Self {
        let new = Self::new(bits);
        for (place, bucket) in self.buckets.iter().enumerate() {
            for number in 0..ENTRIES {
                let tag = bucket.tags[number].load(Relaxed);
                // The part of the hash that is known: a bucket's number and the tag overlap.
                let hash = (place as u64) << (u64::BITS - self.bits) | u64::from(tag) << 32 >> TAG_START;
                for word in bucket.notes[number].iter().filter(|_| tag != 0) {
                    if let Some(note) = Note::from_word(word.load(Relaxed)) {
                        new.note(hash, note, &age);
                    }
                }
            }
        }
        new
    }
}

impl Bucket {
    /// The entry with this tag.
    fn number_of(&self, tag: u32) -> Option<usize> {
        // All three are compared: a branch for each would be mispredicted at every second block.
        let is_equal = |number: usize| u32::from(self.tags[number].load(Relaxed) == tag) << number;
        let equal = is_equal(0) | is_equal(1) | is_equal(2);
        (equal != 0).then(|| equal.trailing_zeros() as usize)
    }

    /// Makes room for an entry with this tag: in place of an empty one, or of the one whose youngest note is
    /// the oldest.
    fn give_up_entry(&self, tag: u32, age: impl Fn(Note) -> u32) -> usize {
        let youngest = |number: &usize| {
            if self.tags[*number].load(Relaxed) == 0 {
                return u32::MAX;
            }
            let notes = self.notes[*number].iter().filter_map(|word| Note::from_word(word.load(Relaxed)));
            notes.map(&age).min().unwrap_or(u32::MAX)
        };
        let number = (0..ENTRIES).max_by_key(youngest).unwrap_or(0);
        self.notes[number].iter().for_each(|word| word.store(0, Relaxed));
        self.set_fan_out(number, 0);
        self.tags[number].store(tag, Relaxed);
        number
    }

    fn note(&self, number: usize, note: Note, age: impl Fn(Note) -> u32) -> Option<u16> {
        let words = &self.notes[number];
        let of_server = |word: &u32| Note::from_word(*word).is_some_and(|other| other.slot == note.slot);
        let now = [0, 1, 2, 3].map(|place: usize| words[place].load(Relaxed));
        let own = now.iter().position(of_server);
        let place = own.or_else(|| now.iter().position(|word| *word == 0));
        let oldest = || (0..HOLDERS).max_by_key(|place| Note::from_word(now[*place]).map(&age)).unwrap_or(0);
        let place = place.unwrap_or_else(oldest);
        // A line that is not written stays in the caches of all cores.
        if now[place] != note.to_word() {
            words[place].store(note.to_word(), Relaxed);
        }
        own.and_then(|own| Note::from_word(now[own])).map(|note| note.stamp)
    }

    fn set_fan_out(&self, number: usize, value: u8) {
        let shift = 8 * number;
        let others = self.fan_outs.load(Relaxed) & !(0xff << shift);
        self.fan_outs.store(others | u32::from(value) << shift, Relaxed);
    }
}

impl Entry<'_> {
    pub(super) fn notes(&self) -> impl Iterator<Item = Note> {
        self.bucket.notes[self.number].iter().filter_map(|word| Note::from_word(word.load(Relaxed)))
    }

    /// How often a prompt continued from the end of this block, up to 255.
    pub(super) fn fan_out(&self) -> u8 {
        (self.bucket.fan_outs.load(Relaxed) >> (8 * self.number)) as u8
    }

    /// One more prompt continues from the end of this block.
    pub(super) fn continued(&self) {
        let fan_out = self.fan_out();
        if fan_out < u8::MAX {
            self.bucket.set_fan_out(self.number, fan_out + 1);
        }
    }
}

#[cfg(test)]
mod tests;

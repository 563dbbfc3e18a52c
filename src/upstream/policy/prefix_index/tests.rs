//! What is noted is found, nothing else is, and what gives way is the oldest.

use super::*;

/// A hash of any number, for tests.
fn hash(number: u64) -> u64 {
    let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn age(note: Note) -> u32 {
    u32::from(u16::MAX - note.stamp)
}

fn note(slot: u16, stamp: u16) -> Note {
    Note { slot, stamp }
}

fn notes(index: &PrefixIndex, hash: u64) -> Vec<Note> {
    index.find(hash).map(|entry| entry.notes().collect()).unwrap_or_default()
}

#[test]
fn what_is_noted_is_found_and_nothing_else() {
    let index = PrefixIndex::new(MIN_BITS);
    // A third of what there is room for: hardly any bucket is full.
    let count = 1_000;
    (0..count).for_each(|number| _ = index.note(hash(number), note(number as u16, 7), age));
    let found = (0..count).filter(|number| notes(&index, hash(*number)) == [note(*number as u16, 7)]).count();
    assert!(found > 950, "{found} of {count}");
    let strangers = (count..100 * count).filter(|number| index.find(hash(*number)).is_some()).count();
    assert_eq!(strangers, 0);
}

#[test]
fn a_server_has_one_note_of_a_block_and_four_servers_have_theirs() {
    let index = PrefixIndex::new(MIN_BITS);
    for slot in 0..4 {
        index.note(hash(1), note(slot, 10 + slot), age);
    }
    index.note(hash(1), note(0, 20), age);
    assert_eq!(notes(&index, hash(1)), [note(0, 20), note(1, 11), note(2, 12), note(3, 13)]);
    // A fifth takes the place of the oldest.
    index.note(hash(1), note(9, 21), age);
    assert_eq!(notes(&index, hash(1)), [note(0, 20), note(9, 21), note(2, 12), note(3, 13)]);
}

#[test]
fn a_full_bucket_gives_up_the_block_that_was_noted_longest_ago() {
    let index = PrefixIndex::new(MIN_BITS);
    let same_bucket = |number: u64| hash(1) ^ number << 30;
    for number in 0..3 {
        index.note(same_bucket(number), note(1, number as u16), age);
    }
    index.note(same_bucket(0), note(2, 9), age);
    index.find(same_bucket(1)).unwrap().continued();
    index.note(same_bucket(3), note(1, 10), age);
    assert_eq!(notes(&index, same_bucket(0)).len(), 2);
    assert_eq!(notes(&index, same_bucket(1)), []);
    assert_eq!(notes(&index, same_bucket(3)), [note(1, 10)]);
    assert_eq!(index.find(same_bucket(3)).unwrap().fan_out(), 0, "it is not inherited");
}

#[test]
fn continuations_are_counted_for_each_block_up_to_255() {
    let index = PrefixIndex::new(MIN_BITS);
    let same_bucket = |number: u64| hash(1) ^ number << 30;
    (0..3).for_each(|number| _ = index.note(same_bucket(number), note(1, 1), age));
    (0..300).for_each(|_| index.find(same_bucket(1)).unwrap().continued());
    index.find(same_bucket(2)).unwrap().continued();
    let fan_outs = [0, 1, 2].map(|number| index.find(same_bucket(number)).unwrap().fan_out());
    assert_eq!(fan_outs, [0, 255, 1]);
}

#[test]
fn a_table_of_another_size_has_the_same_notes() {
    for (from, to) in [(MIN_BITS, MIN_BITS + 5), (14, 15), (14, 12)] {
        let small = PrefixIndex::new(from);
        (0..500).for_each(|number| _ = small.note(hash(number), note(number as u16, 7), age));
        let large = small.resized(to, age);
        let kept = |number: &u64| notes(&small, hash(*number)) == notes(&large, hash(*number));
        let kept = (0..500).filter(kept).count();
        assert!(kept > 480, "{from} to {to} bits: {kept}");
    }
}

#[test]
fn the_size_follows_the_blocks_within_its_bounds() {
    let bytes = |bits: u32| (1_usize << bits) * BUCKET_BYTES;
    assert_eq!(size_of::<Bucket>(), BUCKET_BYTES);
    let none = PrefixIndex::bits_for(0, 64 << 20);
    assert_eq!(bytes(none), 64 << 10);
    // 8 servers with a million tokens each.
    let eight = PrefixIndex::bits_for(8 * 4_000_000 / 2_048, 64 << 20);
    assert_eq!(bytes(eight), 1 << 20);
    let thousand = PrefixIndex::bits_for(1_000 * 4_000_000 / 2_048, 64 << 20);
    assert_eq!(bytes(thousand), 64 << 20);
    assert_eq!(bytes(PrefixIndex::bits_for(u64::MAX / 2, 3 << 20)), 2 << 20);
}

#[test]
fn threads_note_at_the_same_time() {
    let index = PrefixIndex::new(12);
    std::thread::scope(|scope| {
        for slot in 0..4 {
            let index = &index;
            scope.spawn(move || {
                (0..3_000).for_each(|number| _ = index.note(hash(number), note(slot, 1), age))
            });
        }
    });
    // A lost race is a lost note, and there are few of them; a note of nobody there is none.
    let all = (0..3_000).map(|number| notes(&index, hash(number)).len()).sum::<usize>();
    assert!(all > 9_000, "{all} of 12,000");
    assert!((0..3_000).flat_map(|number| notes(&index, hash(number))).all(|note| note.slot < 4));
}

#[test]
fn usage_counts_entries_with_a_live_note_and_their_youngest_age() {
    let index = PrefixIndex::new(MIN_BITS);
    let share = |note: Note| f64::from(note.stamp) / 100.0;
    assert_eq!(index.usage(share), IndexUsage { live_entries: 0, capacity: 3_072, mean_age: 0.0 });
    // Two live ones, of which the first has an older note, too, and one that is dead.
    for (number, of) in [(1, note(1, 10)), (1, note(2, 90)), (2, note(1, 50)), (3, note(1, 100))] {
        index.note(hash(number), of, |note| u32::from(note.stamp));
    }
    assert_eq!(index.usage(share), IndexUsage { live_entries: 2, capacity: 3_072, mean_age: 0.3 });
}

#[test]
fn usage_of_a_large_index_is_estimated_from_a_part_of_it() {
    let index = PrefixIndex::new(18);
    let count = 300_000;
    for number in 0..count {
        index.note(hash(number), note(1, 10), |_| 0);
    }
    let usage = index.usage(|_| 0.5);
    assert_eq!((usage.capacity, usage.mean_age), (3 << 18, 0.5));
    // Of 300,000 notes 4,096 of 262,144 buckets have 4,700, with a standard deviation of 1 %.
    assert!((270_000..310_000).contains(&usage.live_entries), "{}", usage.live_entries);
}

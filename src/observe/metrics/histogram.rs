//! Histograms of durations with fixed bounds.
//!
//! BucketBounds are at least a factor of two apart. So the number of leading zeros of a duration
//! leaves one bound to compare with, and finding a bucket needs no search.

use std::time::Duration;

/// The upper bounds of a histogram's buckets, in nanoseconds, ascending.
pub(super) struct BucketBounds<const N: usize> {
    pub(super) nanos: [u64; N],
    /// By the count of significant bits of a duration: the first bucket that it may belong to.
    first: [u8; 65],
}

impl<const N: usize> BucketBounds<N> {
    /// BucketBounds given in microseconds.
    pub(super) const fn micros(micros: [u64; N]) -> Self {
        let mut nanos = [0; N];
        let mut index = 0;
        while index < N {
            nanos[index] = micros[index] * 1_000;
            index += 1;
        }
        Self::nanos(nanos)
    }

    /// BucketBounds given in nanoseconds. Evaluated by the compiler, so that wrong ones do not compile.
    pub(super) const fn nanos(nanos: [u64; N]) -> Self {
        let mut index = 0;
        while index < N {
            assert!(nanos[index] > 0 && (index == 0 || nanos[index] >= 2 * nanos[index - 1]));
            index += 1;
        }
        let mut first = [0; 65];
        // Index 0 is for 0 ns, which has no significant bit, and belongs to the first bucket.
        let mut bits = 1;
        while bits <= 64 {
            let least = 1 << (bits - 1);
            let mut index = 0;
            while index < N && nanos[index] < least {
                index += 1;
            }
            first[bits] = index as u8;
            bits += 1;
        }
        Self { nanos, first }
    }

    /// The index of the bucket that a duration belongs to; N if it is above all bounds.
    fn bucket(&self, nanos: u64) -> usize {
        let bits = u64::BITS - nanos.leading_zeros();
        let first = usize::from(self.first[bits as usize]);
        // Numbers of the same count of bits differ by less than a factor of two: one bound at most is among
        // them.
        if self.nanos.get(first).is_some_and(|bound| nanos > *bound) { first + 1 } else { first }
    }
}

/// Counts of durations by bucket.
#[derive(Debug, Clone)]
pub(super) struct Histogram<const N: usize> {
    /// Not cumulative, unlike in Prometheus' text: one number is written per observation.
    pub(super) buckets: [u64; N],
    /// Durations above all bounds.
    pub(super) overflow: u64,
    /// The sum of all durations, in nanoseconds.
    pub(super) sum: u64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self { buckets: [0; N], overflow: 0, sum: 0 }
    }
}

impl<const N: usize> Histogram<N> {
    pub(super) fn observe(&mut self, bounds: &BucketBounds<N>, duration: Duration) {
        self.observe_nanos(bounds, u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(super) fn observe_nanos(&mut self, bounds: &BucketBounds<N>, nanos: u64) {
        *self.buckets.get_mut(bounds.bucket(nanos)).unwrap_or(&mut self.overflow) += 1;
        self.sum = self.sum.saturating_add(nanos);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(sum, more)| *sum += more);
        self.overflow += other.overflow;
        self.sum = self.sum.saturating_add(other.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static BOUNDS: BucketBounds<5> = BucketBounds::micros([1, 2, 5, 1_000, 60_000_000]);

    #[test]
    fn a_duration_belongs_to_the_first_bound_that_is_not_less() {
        let near = BOUNDS.nanos.iter().flat_map(|bound| [bound - 1, *bound, bound + 1]);
        let powers = (0..64).flat_map(|bits| [(1_u64 << bits) - 1, 1 << bits]);
        for nanos in near.chain(powers).chain([u64::MAX]) {
            let searched = BOUNDS.nanos.iter().position(|bound| nanos <= *bound).unwrap_or(5);
            assert_eq!(BOUNDS.bucket(nanos), searched, "{nanos} ns");
        }
    }

    #[test]
    fn durations_above_all_bounds_are_counted_too() {
        let (mut some, mut more) = (Histogram::default(), Histogram::default());
        some.observe(&BOUNDS, Duration::from_micros(2));
        more.observe(&BOUNDS, Duration::from_secs(61));
        more.observe(&BOUNDS, Duration::from_nanos(2_001));
        some.add(&more);
        assert_eq!((some.buckets, some.overflow), ([0, 1, 1, 0, 0], 1));
        assert_eq!(some.sum, 61_000_000_000 + 2_000 + 2_001);
    }

    #[test]
    fn a_huge_duration_does_not_overflow_the_sum() {
        let mut histogram = Histogram::default();
        histogram.observe(&BOUNDS, Duration::MAX);
        histogram.observe(&BOUNDS, Duration::MAX);
        assert_eq!((histogram.overflow, histogram.sum), (2, u64::MAX));
    }
}

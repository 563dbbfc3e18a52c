//! Histograms of times with fixed bounds.
//!
//! Bounds are at least a factor of two apart, so the number of leading zeros of a
//! time leaves one bound to compare with: nothing is searched.

use std::time::Duration;

/// The bounds of a histogram, in nanoseconds, ascending.
pub(super) struct Scale<const N: usize> {
    pub(super) bounds: [u64; N],
    /// For each count of significant bits, the first bound that a time of as many may be within.
    first: [u8; 65],
}

impl<const N: usize> Scale<N> {
    /// Bounds in microseconds.
    pub(super) const fn micros(micros: [u64; N]) -> Self {
        let mut bounds = [0; N];
        let mut place = 0;
        while place < N {
            bounds[place] = micros[place] * 1_000;
            assert!(bounds[place] > 0 && (place == 0 || bounds[place] >= 2 * bounds[place - 1]));
            place += 1;
        }
        let mut first = [0; 65];
        let mut bits = 1;
        while bits <= 64 {
            let least = 1 << (bits - 1);
            let mut place = 0;
            while place < N && bounds[place] < least {
                place += 1;
            }
            first[bits] = place as u8;
            bits += 1;
        }
        Self { bounds, first }
    }

    /// Which bucket a time belongs to; N is beyond all bounds.
    fn place(&self, nanos: u64) -> usize {
        let bits = u64::BITS - nanos.leading_zeros();
        let first = usize::from(self.first[bits as usize]);
        // Within one count of bits there is one bound at most.
        if self.bounds.get(first).is_some_and(|bound| nanos > *bound) { first + 1 } else { first }
    }
}

/// How many times were within which bounds.
#[derive(Debug, Clone)]
pub(super) struct Histogram<const N: usize> {
    /// Each bucket by itself.
    pub(super) within: [u64; N],
    /// Beyond all bounds.
    pub(super) beyond: u64,
    /// Of all times, in nanoseconds.
    pub(super) sum: u64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self { within: [0; N], beyond: 0, sum: 0 }
    }
}

impl<const N: usize> Histogram<N> {
    pub(super) fn observe(&mut self, scale: &Scale<N>, time: Duration) {
        self.observe_nanos(scale, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A time in nanoseconds.
    pub(super) fn observe_nanos(&mut self, scale: &Scale<N>, nanos: u64) {
        *self.within.get_mut(scale.place(nanos)).unwrap_or(&mut self.beyond) += 1;
        self.sum = self.sum.saturating_add(nanos);
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.within.iter_mut().zip(other.within).for_each(|(sum, more)| *sum += more);
        self.beyond += other.beyond;
        self.sum = self.sum.saturating_add(other.sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static SCALE: Scale<5> = Scale::micros([1, 2, 5, 1_000, 60_000_000]);

    #[test]
    fn a_time_is_within_the_first_bound_that_is_not_less() {
        let near = SCALE.bounds.iter().flat_map(|bound| [bound - 1, *bound, bound + 1]);
        let powers = (0..64).flat_map(|bits| [(1_u64 << bits) - 1, 1 << bits]);
        for nanos in near.chain(powers).chain([u64::MAX]) {
            let searched = SCALE.bounds.iter().position(|bound| nanos <= *bound).unwrap_or(5);
            assert_eq!(SCALE.place(nanos), searched, "{nanos} ns");
        }
    }

    #[test]
    fn what_is_beyond_all_bounds_is_counted_too() {
        let (mut some, mut more) = (Histogram::default(), Histogram::default());
        some.observe(&SCALE, Duration::from_micros(2));
        more.observe(&SCALE, Duration::from_secs(61));
        more.observe(&SCALE, Duration::from_nanos(2_001));
        some.add(&more);
        assert_eq!((some.within, some.beyond), ([0, 1, 1, 0, 0], 1));
        assert_eq!(some.sum, 61_000_000_000 + 2_000 + 2_001);
    }

    #[test]
    fn a_time_of_ages_does_not_overflow() {
        let mut histogram = Histogram::default();
        histogram.observe(&SCALE, Duration::MAX);
        histogram.observe(&SCALE, Duration::MAX);
        assert_eq!((histogram.beyond, histogram.sum), (2, u64::MAX));
    }
}

//! How fast prefill servers are beside each other, learned from how long they take.
//!
//! A sample is the bytes that a server had to compute until it responded, those of the requests before
//! included, and the time that it took. Servers that are about as fast as the mean count as equal: then
//! nothing differs from a router that learns no speeds. What is done with a speed is for the policies.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A server's samples count half after about 44 others of it, those of the fleet after 710.
const SERVER_WINDOW: u64 = 64;
const FLEET_WINDOW: u64 = 1_024;
/// From how many samples on a server has a speed.
const ENOUGH_SAMPLES: u64 = 32;
/// A request with fewer new bytes is no sample: most of its time is not that of computing.
const MIN_NEW_BYTES: u64 = 8 << 10;

/// The slowness of a server of mean speed.
pub(super) const EVEN: u16 = 1 << 8;
/// Four times as fast as the mean, and a quarter of it.
const FASTEST: f64 = 0.25;
const SLOWEST: f64 = 4.0;
/// Servers in between count as equal. Prompts of one length take twice as long behind a long cached
/// beginning, and which server gets those is chance.
const EVEN_FROM: f64 = 0.75;
const EVEN_TO: f64 = 1.33;

/// Bytes and the time for them, of which the older ones count less and less.
#[derive(Debug, Default)]
pub(super) struct Samples {
    bytes: AtomicU64,
    micros: AtomicU64,
    count: AtomicU64,
}

impl Samples {
    /// A sample that another thread adds in the same moment may be lost.
    fn add(&self, bytes: u64, micros: u64, window: u64) {
        for (sum, more) in [(&self.bytes, bytes), (&self.micros, micros)] {
            let before = sum.load(Relaxed);
            sum.store(before - before / window + more, Relaxed);
        }
        self.count.fetch_add(1, Relaxed);
    }

    fn micros_per_byte(&self) -> f64 {
        self.micros.load(Relaxed) as f64 / self.bytes.load(Relaxed).max(1) as f64
    }
}

/// Adds a sample of a server to its own and to those of its fleet. Returns how much slower than the mean it
/// is, in 256ths, if that is known.
pub(super) fn slowness(
    server: &Samples,
    fleet: &Samples,
    (before, new): (u64, u64),
    time: Duration,
) -> Option<u16> {
    if new < MIN_NEW_BYTES {
        return None;
    }
    let micros = u64::try_from(time.as_micros()).ok()?.max(1);
    server.add(before.saturating_add(new), micros, SERVER_WINDOW);
    fleet.add(before.saturating_add(new), micros, FLEET_WINDOW);
    if server.count.load(Relaxed) < ENOUGH_SAMPLES {
        return None;
    }
    let ratio = server.micros_per_byte() / fleet.micros_per_byte();
    if (EVEN_FROM..EVEN_TO).contains(&ratio) {
        return Some(EVEN);
    }
    Some((ratio.clamp(FASTEST, SLOWEST) * f64::from(EVEN)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The slowness of a server after samples beside one that takes a second for 64 KiB.
    fn learned(seconds: f64, new: u64) -> Option<u16> {
        let [one, other, fleet] = [(); 3].map(|()| Samples::default());
        let mut last = None;
        for _ in 0..100 {
            // Three of four requests.
            (0..3).for_each(|_| _ = slowness(&other, &fleet, (0, 64 << 10), SECOND));
            last = slowness(&one, &fleet, (0, new), SECOND.mul_f64(seconds));
        }
        last
    }

    #[test]
    fn a_server_is_as_slow_as_its_time_for_a_byte_beside_that_of_all() {
        assert_eq!(learned(1.0, 64 << 10), Some(EVEN));
        assert_eq!(learned(1.3, 64 << 10), Some(EVEN), "about as fast");
        // The mean of all is 1.25 seconds.
        let twice = f64::from(learned(2.0, 64 << 10).unwrap()) / f64::from(EVEN);
        assert!((1.55..1.65).contains(&twice), "{twice}");
        assert_eq!(learned(0.01, 64 << 10), Some(EVEN / 4));
        assert_eq!(learned(9.0, MIN_NEW_BYTES - 1), None, "too small a prompt");
    }

    #[test]
    fn little_is_no_speed() {
        let [server, fleet] = [(); 2].map(|()| Samples::default());
        for _ in 1..ENOUGH_SAMPLES {
            assert_eq!(slowness(&server, &fleet, (0, 1 << 20), SECOND), None);
        }
        assert_eq!(slowness(&server, &fleet, (u64::MAX, 1 << 20), Duration::MAX), None, "no time at all");
        assert_eq!(slowness(&server, &fleet, (0, 1 << 20), SECOND), Some(EVEN));
    }
}

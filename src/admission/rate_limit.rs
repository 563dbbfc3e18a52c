//! Rate limit of requests per second: a token bucket, kept as the one time at which it
//! will be full again (the generic cell rate algorithm, ITU-T I.371). One atomic, no timer.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::Rejection;

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// A bucket of one second's tokens: after an idle second, that many requests are admitted at once.
pub(super) struct RateLimiter {
    /// Requests per second; 0 means no limit.
    rate: AtomicU32,
    start: Instant,
    /// The theoretical arrival time of the next request at a steady rate, in ns since `start`.
    due: AtomicU64,
}

impl RateLimiter {
    pub(super) fn new() -> Self {
        Self { rate: AtomicU32::new(0), start: Instant::now(), due: AtomicU64::new(0) }
    }

    pub(super) fn set(&self, rate: Option<u32>) {
        self.rate.store(rate.unwrap_or(0), Relaxed);
    }

    /// Takes a token for a request that arrived at `now`.
    pub(super) fn acquire(&self, now: Instant) -> Result<(), Rejection> {
        let rate = self.rate.load(Relaxed);
        if rate == 0 {
            return Ok(());
        }
        // 64 bits of nanoseconds last for 584 years.
        self.acquire_at(rate, now.saturating_duration_since(self.start).as_nanos() as u64)
    }

    fn acquire_at(&self, rate: u32, now: u64) -> Result<(), Rejection> {
        let interval = SECOND / u64::from(rate);
        // How far `due` may run ahead of the clock: a full bucket, less the token of this request.
        let burst = interval * u64::from(rate - 1);
        let acquired = self.due.fetch_update(Relaxed, Relaxed, |due| {
            // Tokens of idle time beyond one second are lost: the bucket is full.
            let due = due.max(now);
            (due - now <= burst).then_some(due + interval)
        });
        match acquired {
            Ok(_) => Ok(()),
            Err(due) => {
                let after = Duration::from_nanos(due.saturating_sub(now + burst).max(1));
                Err(Rejection::RateLimited { rate, after })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 1,000 requests are admitted at one instant.
    fn admitted(limiter: &RateLimiter, per_second: u32, now: u64) -> usize {
        (0..1_000).filter(|_| limiter.acquire_at(per_second, now).is_ok()).count()
    }

    #[test]
    fn one_second_of_requests_is_admitted_at_once_and_then_one_per_interval() {
        let limiter = RateLimiter::new();
        assert_eq!(admitted(&limiter, 10, 0), 10);
        assert_eq!(admitted(&limiter, 10, SECOND / 10 - 1), 0);
        assert_eq!(admitted(&limiter, 10, SECOND / 10), 1);
        assert_eq!(admitted(&limiter, 10, SECOND / 2), 4);
        // A longer idle time saves no more than one second's tokens.
        assert_eq!(admitted(&limiter, 10, 60 * SECOND), 10);
    }

    #[test]
    fn a_rejection_carries_the_time_until_the_next_token() {
        let limiter = RateLimiter::new();
        assert!(limiter.acquire_at(1, 0).is_ok());
        let rejected = limiter.acquire_at(1, SECOND / 4);
        let after = Duration::from_millis(750);
        assert_eq!(rejected, Err(Rejection::RateLimited { rate: 1, after }));
        assert_eq!(rejected.unwrap_err().retry_after(), 1);
        assert!(limiter.acquire_at(1, SECOND).is_ok());
    }

    #[test]
    fn a_lowered_rate_applies_at_once() {
        let limiter = RateLimiter::new();
        assert_eq!(admitted(&limiter, 100, 0), 100);
        assert_eq!(admitted(&limiter, 2, 0), 0);
        assert_eq!(admitted(&limiter, 2, SECOND), 2);
    }
}

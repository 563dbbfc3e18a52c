//! How many requests may begin in a second: a token bucket, as the one time at
//! which it would be full (the generic cell rate algorithm). One atomic, no timer.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::Rejection;

const SECOND: u64 = 1_000_000_000;

/// Holds a second's worth, so that so many may begin at once after a rest.
pub(super) struct RateLimiter {
    /// 0 is none.
    rate: AtomicU32,
    start: Instant,
    /// When all that was admitted would have been due at a steady pace, in ns since `start`.
    due: AtomicU64,
}

impl RateLimiter {
    pub(super) fn new() -> Self {
        Self { rate: AtomicU32::new(0), start: Instant::now(), due: AtomicU64::new(0) }
    }

    pub(super) fn set(&self, rate: Option<u32>) {
        self.rate.store(rate.unwrap_or(0), Relaxed);
    }

    /// Takes a token for a request of this moment.
    pub(super) fn admit(&self, now: Instant) -> Result<(), Rejection> {
        let rate = self.rate.load(Relaxed);
        if rate == 0 {
            return Ok(());
        }
        // 584 years.
        self.admit_at(rate, now.saturating_duration_since(self.start).as_nanos() as u64)
    }

    fn admit_at(&self, rate: u32, now: u64) -> Result<(), Rejection> {
        let interval = SECOND / u64::from(rate);
        let most = interval * u64::from(rate - 1);
        let admitted = self.due.fetch_update(Relaxed, Relaxed, |due| {
            let due = due.max(now);
            (due - now <= most).then_some(due + interval)
        });
        match admitted {
            Ok(_) => Ok(()),
            Err(due) => {
                let after = Duration::from_nanos(due.saturating_sub(now + most).max(1));
                Err(Rejection::RateLimited { rate, after })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 1,000 are admitted at one time.
    fn admitted(rate: &RateLimiter, per_second: u32, now: u64) -> usize {
        (0..1_000).filter(|_| rate.admit_at(per_second, now).is_ok()).count()
    }

    #[test]
    fn a_seconds_worth_may_begin_at_once_and_then_one_each_interval() {
        let rate = RateLimiter::new();
        assert_eq!(admitted(&rate, 10, 0), 10);
        assert_eq!(admitted(&rate, 10, SECOND / 10 - 1), 0);
        assert_eq!(admitted(&rate, 10, SECOND / 10), 1);
        assert_eq!(admitted(&rate, 10, SECOND / 2), 4);
        // A longer rest saves no more than a second's worth.
        assert_eq!(admitted(&rate, 10, 60 * SECOND), 10);
    }

    #[test]
    fn a_refusal_says_when_the_next_token_is_there() {
        let rate = RateLimiter::new();
        assert!(rate.admit_at(1, 0).is_ok());
        let refused = rate.admit_at(1, SECOND / 4);
        let after = Duration::from_millis(750);
        assert_eq!(refused, Err(Rejection::RateLimited { rate: 1, after }));
        assert_eq!(refused.unwrap_err().retry_after(), 1);
        assert!(rate.admit_at(1, SECOND).is_ok());
    }

    #[test]
    fn a_lower_rate_holds_at_once() {
        let rate = RateLimiter::new();
        assert_eq!(admitted(&rate, 100, 0), 100);
        assert_eq!(admitted(&rate, 2, 0), 0);
        assert_eq!(admitted(&rate, 2, SECOND), 2);
    }
}

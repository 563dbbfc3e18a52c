//! The pauses between attempts to reach the API server.

use std::time::Duration;

/// The first pause, as in Kubernetes' own clients.
const FIRST_PAUSE: Duration = Duration::from_millis(800);
/// The longest pause, so that a router sees the cluster at most this long after the API server is back.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Pauses that double, with jitter: when an API server comes back, its clients must not all come at once.
#[derive(Default)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next pause: half of it at least, the rest by chance.
    pub(super) fn next_pause(&mut self) -> Duration {
        // 2^6 times the first pause is over the longest; a larger power could overflow.
        let pause = (FIRST_PAUSE * 2_u32.pow(self.attempts.min(6))).min(LONGEST_PAUSE);
        self.attempts = self.attempts.saturating_add(1);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_vary() {
        let mut backoff = Backoff::default();
        let mut longest = FIRST_PAUSE;
        for _ in 0..40 {
            let pause = backoff.next_pause();
            assert!(pause >= longest / 2 && pause <= longest, "{pause:?} of {longest:?}");
            longest = (longest * 2).min(LONGEST_PAUSE);
        }
        backoff.reset();
        assert!(backoff.next_pause() <= FIRST_PAUSE);
        let pauses: std::collections::HashSet<_> = (0..20)
            .map(|_| {
                backoff.reset();
                backoff.next_pause()
            })
            .collect();
        assert!(pauses.len() > 10, "{pauses:?}");
    }
}

//! How many lines one cause may write.
//!
//! When every request fails, a line for each would cost more than the requests did,
//! and fill the disk. The first ones say what is wrong; the others are counted.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Lines that one cause may write in a [`WINDOW`]; the others are counted, and the count is logged at its end.
pub(crate) const MAX_LINES: u32 = 20;
/// See [`MAX_LINES`].
pub(crate) const WINDOW: Duration = Duration::from_secs(10);

/// One for the process: the log is one, too.
static LIMITS: LogLimiter = LogLimiter::new();

/// Whether a line about this cause may be written now. If not, it has been counted.
pub(crate) fn admit(cause: &'static str) -> bool {
    LIMITS.admit(cause, Instant::now())
}

/// Says how many lines were not written in the windows that are over; with `all`, in those that are not over too.
pub(crate) fn sum_up(all: bool) {
    let now = (!all).then(Instant::now);
    for (cause, count) in LIMITS.take_counts(now) {
        warn!(code = cause, suppressed = count, "more lines like this were not written, one by one");
    }
}

/// Causes are names in the source, so there are few.
struct LogLimiter(Mutex<Vec<(&'static str, Window)>>);

struct Window {
    since: Instant,
    written: u32,
    suppressed: u64,
}

impl LogLimiter {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn admit(&self, cause: &'static str, now: Instant) -> bool {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = windows.iter().position(|(known, _)| *known == cause);
        let place = known.unwrap_or_else(|| {
            windows.push((cause, Window { since: now, written: 0, suppressed: 0 }));
            windows.len() - 1
        });
        let window = &mut windows[place].1;
        if now.saturating_duration_since(window.since) >= WINDOW {
            // What was not written stays to be said.
            window.since = now;
            window.written = 0;
        }
        let admitted = window.written < MAX_LINES;
        if admitted {
            window.written += 1;
        } else {
            window.suppressed += 1;
        }
        admitted
    }

    /// What was suppressed in windows that are over at `now`, or in all. It is said once.
    fn take_counts(&self, now: Option<Instant>) -> Vec<(&'static str, u64)> {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |window: &Window| {
            now.is_none_or(|now| now.saturating_duration_since(window.since) >= WINDOW || window.written == 0)
        };
        let counted = windows.iter_mut().filter(|(_, window)| window.suppressed > 0 && is_over(window));
        counted.map(|(cause, window)| (*cause, std::mem::take(&mut window.suppressed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_writes_so_many_lines_in_a_window_and_counts_the_others() {
        let (limits, start) = (LogLimiter::new(), Instant::now());
        let admitted = |cause, now, count| (0..count).filter(|_| limits.admit(cause, now)).count();
        assert_eq!(admitted("a", start, 100), MAX_LINES as usize);
        assert_eq!(admitted("b", start, 1), 1, "another cause has a window of its own");
        assert!(limits.take_counts(Some(start)).is_empty(), "the window is not over");
        let later = start + WINDOW;
        assert_eq!(limits.take_counts(Some(later)), [("a", 80)]);
        assert!(limits.take_counts(None).is_empty(), "said once");
        assert_eq!(admitted("a", later, 25), MAX_LINES as usize);
        assert_eq!(limits.take_counts(None), [("a", 5)]);
    }
}

//! Limits log lines by cause, so that a failure of every request does not flood the log.
//!
//! A line for each failed request would cost more than the requests did, and fill the disk.
//! The first lines show what is wrong; the others are counted, and the count is logged.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// Lines of one cause that are written in a [`WINDOW`]: 2 a second on average.
pub(crate) const MAX_LINES: u32 = 20;
/// See [`MAX_LINES`]. At its end the count of suppressed lines is logged.
pub(crate) const WINDOW: Duration = Duration::from_secs(10);

/// One for all workers, because they write to one log.
static LIMITER: LogLimiter = LogLimiter::new();

/// Whether a line of this cause may be written now. If not, it has been counted as suppressed.
pub(crate) fn allow(cause: &'static str) -> bool {
    LIMITER.allow(cause, Instant::now())
}

/// Logs how many lines were suppressed in windows that are over, or with `all` in every window: at the end of
/// the program.
pub(crate) fn log_suppressed(all: bool) {
    let now = (!all).then(Instant::now);
    for (cause, count) in LIMITER.take_counts(now) {
        warn!(code = cause, suppressed = count, "log lines suppressed");
    }
}

/// A list, because causes are string literals of the source, of which few occur at a time.
struct LogLimiter(Mutex<Vec<(&'static str, Window)>>);

struct Window {
    started_at: Instant,
    written: u32,
    suppressed: u64,
}

impl LogLimiter {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn allow(&self, cause: &'static str, now: Instant) -> bool {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken only for requests that fail, so workers seldom wait for each other here.
        let known = windows.iter().position(|(known, _)| *known == cause);
        let index = known.unwrap_or_else(|| {
            windows.push((cause, Window { started_at: now, written: 0, suppressed: 0 }));
            windows.len() - 1
        });
        let window = &mut windows[index].1;
        if now.saturating_duration_since(window.started_at) >= WINDOW {
            // `suppressed` stays until it has been logged.
            window.started_at = now;
            window.written = 0;
        }
        let is_allowed = window.written < MAX_LINES;
        if is_allowed {
            window.written += 1;
        } else {
            window.suppressed += 1;
        }
        is_allowed
    }

    /// Takes the counts of windows that are over at `now`, or of all windows. Each line is counted once.
    fn take_counts(&self, now: Option<Instant>) -> Vec<(&'static str, u64)> {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A window without a written line has been restarted, and its count is of the one before.
        let is_over = |window: &Window| {
            now.is_none_or(|now| {
                now.saturating_duration_since(window.started_at) >= WINDOW || window.written == 0
            })
        };
        let counted = windows.iter_mut().filter(|(_, window)| window.suppressed > 0 && is_over(window));
        counted.map(|(cause, window)| (*cause, std::mem::take(&mut window.suppressed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_writes_some_lines_in_a_window_and_counts_the_others() {
        let (limiter, start) = (LogLimiter::new(), Instant::now());
        let allowed = |cause, now, count| (0..count).filter(|_| limiter.allow(cause, now)).count();
        assert_eq!(allowed("a", start, 100), MAX_LINES as usize);
        assert_eq!(allowed("b", start, 1), 1, "another cause has a window of its own");
        assert!(limiter.take_counts(Some(start)).is_empty(), "the window is not over");
        let later = start + WINDOW;
        assert_eq!(limiter.take_counts(Some(later)), [("a", 80)]);
        assert!(limiter.take_counts(None).is_empty(), "each line is counted once");
        assert_eq!(allowed("a", later, 25), MAX_LINES as usize);
        assert_eq!(limiter.take_counts(None), [("a", 5)]);
    }
}

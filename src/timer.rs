//! A timer for deadlines that move with nearly every frame.
//!
//! To reset a tokio timer costs more than to pass on a frame, so this one is reset only when it
//! has fired too early or would fire too late. It is created at the first wait, and serves all
//! waits that follow one another.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

/// A lazily created and lazily reset timer. See the module.
#[derive(Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Waits for `deadline`, which may differ from the last one in either direction.
    pub(crate) fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        // Only an earlier deadline must reset it at once. A later one is checked when the timer fires.
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                return Poll::Ready(());
            }
            // It fired for an earlier deadline. The loop polls it again, which registers the waker.
            timer.as_mut().reset(deadline);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_deadline_whatever_the_timer_was_set_to() {
        let test_start = Instant::now();
        for set_to in [1, 5, 9] {
            let start = Instant::now();
            let mut timer = Timer(Some(Box::pin(sleep_until(start + Duration::from_secs(set_to)))));
            let deadline = start + Duration::from_secs(5);
            std::future::poll_fn(|cx| timer.poll_until(deadline, cx)).await;
            assert_eq!(start.elapsed(), Duration::from_secs(5), "set to {set_to} s");
        }
        assert_eq!(test_start.elapsed(), Duration::from_secs(15));
    }

    #[tokio::test(start_paused = true)]
    async fn one_timer_serves_waits_of_any_length() {
        let mut timer = Timer::default();
        for seconds in [5, 60, 1, 1, 30] {
            let start = Instant::now();
            let deadline = start + Duration::from_secs(seconds);
            std::future::poll_fn(|cx| timer.poll_until(deadline, cx)).await;
            assert_eq!(start.elapsed().as_secs(), seconds);
        }
    }
}

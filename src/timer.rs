//! A timer whose end moves all the time.
//!
//! To set a timer anew costs more than a frame that passes, so the one here is set again only when it has gone off
//! too early, or would go off too late.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep};

/// Waits for `deadline`, wherever the timer stands.
pub(crate) fn poll_until(mut timer: Pin<&mut Sleep>, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
    if timer.deadline() > deadline {
        timer.as_mut().reset(deadline);
    }
    loop {
        ready!(timer.as_mut().poll(cx));
        if timer.deadline() >= deadline {
            return Poll::Ready(());
        }
        timer.as_mut().reset(deadline);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use tokio::time::sleep_until;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_is_the_deadline_wherever_the_timer_was_set() {
        let start = Instant::now();
        for set in [1, 5, 9] {
            let begun = Instant::now();
            let mut timer = pin!(sleep_until(begun + Duration::from_secs(set)));
            let deadline = begun + Duration::from_secs(5);
            std::future::poll_fn(|cx| poll_until(timer.as_mut(), deadline, cx)).await;
            assert_eq!(begun.elapsed(), Duration::from_secs(5), "set to {set} s");
        }
        assert_eq!(start.elapsed(), Duration::from_secs(15));
    }
}

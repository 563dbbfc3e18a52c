//! A timer whose end moves all the time.
//!
//! To set a timer anew costs more than a frame that passes, so this one is set again only when it has gone off
//! too early, or would go off too late. It is made when it is first waited for, and one serves all waits that come
//! one after the other.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

/// See the module.
#[derive(Default)]
pub(crate) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Waits for `deadline`, wherever the timer stands.
    pub(crate) fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
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

    /// Waits for something until `deadline`. `None`: it took too long. What is waited for is pinned by the caller: taken
    /// by value it would have a second place in each future that holds this one.
    pub(crate) async fn before<T>(
        &mut self,
        deadline: Instant,
        mut wait: Pin<&mut impl Future<Output = T>>,
    ) -> Option<T> {
        std::future::poll_fn(|cx| {
            if let Poll::Ready(come) = wait.as_mut().poll(cx) {
                return Poll::Ready(Some(come));
            }
            self.poll_until(deadline, cx).map(|()| None)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_is_the_deadline_wherever_the_timer_was_set() {
        let start = Instant::now();
        for set in [1, 5, 9] {
            let begun = Instant::now();
            let mut timer = Timer(Some(Box::pin(sleep_until(begun + Duration::from_secs(set)))));
            let deadline = begun + Duration::from_secs(5);
            std::future::poll_fn(|cx| timer.poll_until(deadline, cx)).await;
            assert_eq!(begun.elapsed(), Duration::from_secs(5), "set to {set} s");
        }
        assert_eq!(start.elapsed(), Duration::from_secs(15));
    }

    #[tokio::test(start_paused = true)]
    async fn one_timer_serves_waits_of_any_length() {
        let mut timer = Timer::default();
        for seconds in [5, 60, 1, 1, 30] {
            let begun = Instant::now();
            let deadline = begun + Duration::from_secs(seconds);
            assert_eq!(timer.before(deadline, pin!(std::future::pending::<()>())).await, None);
            assert_eq!(begun.elapsed().as_secs(), seconds);
            assert_eq!(timer.before(deadline, pin!(std::future::ready(1))).await, Some(1));
        }
    }
}

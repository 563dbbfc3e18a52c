//! The requests of one connection that hyper serves: how many are open, and for how long there was
//! none. hyper tells neither.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;

use crate::http1::ClientTimeouts;
use crate::timer::Timer;

/// The requests of one connection.
pub(super) struct OpenRequests(Mutex<Requests>);

struct Requests {
    open: usize,
    /// When the last one ended, or the first byte of the next one's head came.
    since: Instant,
    /// A head has begun, and none is open.
    head_begun: bool,
    /// There are to be no more.
    is_ending: bool,
    /// The last response came before its request's body did as a whole.
    is_cut_short: bool,
}

impl Default for OpenRequests {
    fn default() -> Self {
        let since = Instant::now();
        let (head_begun, is_ending, is_cut_short) = (false, false, false);
        Self(Mutex::new(Requests { open: 0, since, head_begun, is_ending, is_cut_short }))
    }
}

impl OpenRequests {
    /// Only the worker's thread takes this lock, a few times a request.
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self) {
        self.lock().is_ending = true;
    }

    pub(super) fn is_ending(&self) -> bool {
        self.lock().is_ending
    }

    pub(super) fn is_cut_short(&self) -> bool {
        self.lock().is_cut_short
    }

    /// The first bytes after a request begin the next one's head.
    pub(super) fn note_read(&self, bytes: &[u8]) {
        let mut now = self.lock();
        if !bytes.is_empty() && now.open == 0 && !now.head_begun {
            (now.head_begun, now.since) = (true, Instant::now());
        }
    }
}

/// A request that is open until this is dropped.
pub(super) struct OpenRequest {
    requests: Arc<OpenRequests>,
}

impl OpenRequest {
    pub(super) fn begin(requests: &Arc<OpenRequests>) -> Self {
        let mut now = requests.lock();
        (now.open, now.head_begun) = (now.open + 1, false);
        Self { requests: Arc::clone(requests) }
    }

    /// The connection is to have no more requests.
    pub(super) fn end_connection(&self) {
        self.requests.end();
    }

    /// The response comes before all of the request's body did.
    pub(super) fn cut_short(&self) {
        self.requests.lock().is_cut_short = true;
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut now = self.requests.lock();
        now.open -= 1;
        now.since = Instant::now();
    }
}

/// Waits until there has been no request for too long.
pub(super) struct IdleWait<'a> {
    requests: &'a OpenRequests,
    timeouts: ClientTimeouts,
    since: Instant,
    timer: Timer,
}

/// What did not come in time.
pub(super) enum IdleEnd {
    NoRequest,
    /// The rest of a head.
    NoHead(Duration),
}

impl<'a> IdleWait<'a> {
    pub(super) fn new(requests: &'a OpenRequests, timeouts: ClientTimeouts) -> Self {
        Self { requests, timeouts, since: Instant::now(), timer: Timer::default() }
    }

    pub(super) fn restart(&mut self, limit: Duration) {
        (self.since, self.timeouts.idle) = (Instant::now(), limit);
    }

    /// Nobody tells of a request's end, so the timer runs while there are any, too.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<IdleEnd> {
        let (since, head_begun) = {
            let now = self.requests.lock();
            let since = if now.open > 0 { Instant::now() } else { now.since.max(self.since) };
            (since, now.head_begun && now.open == 0)
        };
        let limit = if head_begun { self.timeouts.head } else { self.timeouts.idle };
        ready!(self.timer.poll_until(since + limit, cx));
        Poll::Ready(if head_begun { IdleEnd::NoHead(limit) } else { IdleEnd::NoRequest })
    }
}

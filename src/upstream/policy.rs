//! Load-balancing policies: which server of a role gets a request.
//!
//! A policy sees the eligible servers of one role and nothing else: it opens no
//! connection, tracks no health and is not told how the request ended.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Backend;

/// A load-balancing policy: selects one of several servers.
///
/// [`pick`](Self::pick) is called once per role and request, by all worker threads concurrently, so it must
/// not block and keeps its state in atomics.
///
/// ```
/// use std::sync::Arc;
///
/// use mini_lb::{Backend, Choice, Policy};
///
/// /// The server with the fewest requests in flight.
/// struct LeastBusy;
///
/// impl Policy for LeastBusy {
///     fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
///         let servers = choice.servers().iter();
///         servers.min_by_key(|server| server.in_flight()).unwrap_or(&choice.servers()[0])
///     }
/// }
/// ```
pub trait Policy: Send + Sync + 'static {
    /// Picks one of [`Choice::servers`], which is never empty.
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend>;
}

/// The candidates that a [`Policy`] selects from.
#[derive(Debug)]
pub struct Choice<'a> {
    servers: &'a [Arc<Backend>],
}

impl<'a> Choice<'a> {
    pub(crate) fn new(servers: &'a [Arc<Backend>]) -> Self {
        Self { servers }
    }

    /// The eligible servers of one role, in the order of the configuration. Never empty.
    pub fn servers(&self) -> &'a [Arc<Backend>] {
        self.servers
    }
}

/// Selects each server with the same probability.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random;

impl Policy for Random {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[fastrand::usize(..choice.servers().len())]
    }
}

/// Selects one server after the other, in the order of the configuration.
#[derive(Debug, Default)]
pub struct RoundRobin {
    next: AtomicUsize,
}

impl Policy for RoundRobin {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        // Relaxed: the counter orders nothing but itself. It wraps after 2^64 requests, where at most one
        // round is uneven.
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &choice.servers()[turn % choice.servers().len()]
    }
}

impl fmt::Debug for dyn Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Policy")
    }
}

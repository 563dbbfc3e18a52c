//! Which server gets a request.
//!
//! A policy sees the servers of one role and nothing else: it opens no
//! connection, keeps no health and never learns how the request went.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Backend;

/// Chooses one of several servers.
///
/// A policy is asked once for each role of each request, by all workers at the same time, so it must be quick and
/// keep its state in atomics.
///
/// ```
/// use std::sync::Arc;
///
/// use mini_lb::{Backend, Choice, Policy};
///
/// /// The server with the fewest requests under way.
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

/// What a [`Policy`] chooses from.
#[derive(Debug)]
pub struct Choice<'a> {
    servers: &'a [Arc<Backend>],
}

impl<'a> Choice<'a> {
    pub(crate) fn new(servers: &'a [Arc<Backend>]) -> Self {
        Self { servers }
    }

    /// The servers of the role that is wanted, in the order of the configuration. Never empty.
    pub fn servers(&self) -> &'a [Arc<Backend>] {
        self.servers
    }
}

/// Every server with the same probability.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random;

impl Policy for Random {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[fastrand::usize(..choice.servers().len())]
    }
}

/// One server after the other, in the order of the configuration.
#[derive(Debug, Default)]
pub struct RoundRobin {
    next: AtomicUsize,
}

impl Policy for RoundRobin {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        // Relaxed: the counter orders nothing but itself. It wraps after 2^64 requests, which skips no more
        // than a few turns.
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &choice.servers()[turn % choice.servers().len()]
    }
}

impl fmt::Debug for dyn Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Policy")
    }
}

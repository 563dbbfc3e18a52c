//! Policies: the choice of one server of a role for a request.
//!
//! A policy sees the eligible servers of one role and nothing else: it opens no
//! connection, tracks no health and does not learn how the request ended.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Backend;

/// Chooses one of several servers.
///
/// The router calls a policy once for each role of each attempt, from all worker threads at the same time. It should
/// return within microseconds, must not block, and should keep its state in atomics.
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
    ///
    /// A panic here ends the request with status 500 and code `internal`; other requests continue.
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

    /// The eligible servers of one role, in the order of the configuration. Never empty.
    ///
    /// Unhealthy servers, and servers at their limit of requests in flight, are left out. If all servers of the role are
    /// unhealthy, all are here.
    pub fn servers(&self) -> &'a [Arc<Backend>] {
        self.servers
    }
}

/// Chooses each server with the same probability.
#[derive(Debug, Clone, Copy, Default)]
pub struct Random;

impl Policy for Random {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[fastrand::usize(..choice.servers().len())]
    }
}

/// Chooses one server after the other, in the order of the configuration.
///
/// The turn is shared by all worker threads of a router, and not between routers.
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

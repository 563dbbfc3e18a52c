//! How a leg ended on its server, and how often.
//!
//! Each leg ends in exactly one [`Outcome`], whatever happened to the other leg and to the client. `health` decides
//! what an outcome means for the server's health.

use std::sync::atomic::{AtomicU64, Ordering};

/// How one leg of a request ended on its server. Each leg ends in exactly one outcome.
///
/// [`Backend::ended`](crate::Backend::ended) counts them; the metric `mini_lb_backend_legs_total` has the same counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The response is complete.
    Completed,
    /// The server rejected the request: 4xx, 503, or an error inside a 200.
    Refused,
    /// The server answered with a 5xx other than 503.
    ServerError,
    /// The connection could not be opened.
    Connect,
    /// The connection was not opened within the connect timeout.
    ConnectTimeout,
    /// The router had no file descriptor, local port or memory left for a connection. Not a failure of the server.
    Exhausted,
    /// An idle connection turned out to be closed before the server saw the request. The request is retried; not a failure of
    /// the server.
    Stale,
    /// The connection closed before the response was complete.
    Closed,
    /// The response was malformed HTTP.
    BadResponse,
    /// The response, or its next part, did not arrive in time.
    Timeout,
    /// A response that must be held in memory for a merge exceeds the limit.
    TooLarge,
    /// The router closed the connection first: the client disconnected, or the other leg failed.
    Cancelled,
}

impl Outcome {
    /// All outcomes, in the order of their definition.
    pub const ALL: [Self; 12] = [
        Self::Completed,
        Self::Refused,
        Self::ServerError,
        Self::Connect,
        Self::ConnectTimeout,
        Self::Exhausted,
        Self::Stale,
        Self::Closed,
        Self::BadResponse,
        Self::Timeout,
        Self::TooLarge,
        Self::Cancelled,
    ];

    /// The name in `snake_case`, as in the label `outcome` of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Refused => "refused",
            Self::ServerError => "server_error",
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect_timeout",
            Self::Exhausted => "exhausted",
            Self::Stale => "stale",
            Self::Closed => "closed",
            Self::BadResponse => "bad_response",
            Self::Timeout => "timeout",
            Self::TooLarge => "too_large",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Counters of one server's outcomes.
#[derive(Debug, Default)]
pub(super) struct Outcomes([AtomicU64; Outcome::ALL.len()]);

impl Outcomes {
    pub(super) fn count(&self, outcome: Outcome) {
        // Relaxed: a counter for scrapes orders no other memory.
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn of(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_a_place_and_a_name_of_its_own() {
        let outcomes = Outcomes::default();
        for (place, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, place);
            outcomes.count(outcome);
            assert_eq!(outcomes.of(outcome), 1, "{outcome:?}");
        }
        let names: std::collections::HashSet<&str> = Outcome::ALL.iter().map(|o| o.as_str()).collect();
        assert_eq!(names.len(), Outcome::ALL.len());
    }
}

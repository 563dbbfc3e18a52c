//! How a request ended on one backend, and how often each way.
//!
//! Each leg ends in exactly one [`Outcome`], independent of the other leg and of the
//! client. What an outcome means for the backend's health is decided in `health`.

use std::sync::atomic::{AtomicU64, Ordering};

/// How one leg of a request ended on its server. Every leg ends in exactly one of these, besides `Stale`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The response was complete.
    Completed,
    /// The server answered 4xx or 503, or reported an error within a 200 response.
    Refused,
    /// The server answered with another 5xx.
    ServerError,
    /// No connection could be opened.
    Connect,
    /// No connection was opened within the connect timeout.
    ConnectTimeout,
    /// The router had no file descriptor, port or memory left for a connection.
    Exhausted,
    /// A pooled connection was closed by the server before it read the request. The server gets the request
    /// on a new connection, and the leg ends in another outcome, too.
    Stale,
    /// The connection was closed before the response was complete.
    Closed,
    /// The response is not valid HTTP.
    BadResponse,
    /// The response, or the next part of it, did not arrive in time.
    Timeout,
    /// A response that must be held in memory is over the limit.
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

    /// The outcome's name in `snake_case`, as in metrics and logs.
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

/// One backend's outcomes, counted.
#[derive(Debug, Default)]
pub(super) struct OutcomeCounts([AtomicU64; Outcome::ALL.len()]);

impl OutcomeCounts {
    pub(super) fn count(&self, outcome: Outcome) {
        // Relaxed: metrics read it now and then, and it orders nothing.
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_counter_and_name() {
        let outcomes = OutcomeCounts::default();
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
            outcomes.count(outcome);
            assert_eq!(outcomes.get(outcome), 1, "{outcome:?}");
        }
        let names: std::collections::HashSet<&str> = Outcome::ALL.iter().map(|o| o.as_str()).collect();
        assert_eq!(names.len(), Outcome::ALL.len());
    }
}

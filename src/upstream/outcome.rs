//! How a request ended on one server, and how often that was.
//!
//! Each leg ends in exactly one [`Outcome`], whatever became of the other leg and of the client. What follows
//! from it for the server's health is for `health` to know.

use std::sync::atomic::{AtomicU64, Ordering};

/// How one leg of a request ended on its server. Every leg ends in exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The answer came to its end.
    Completed,
    /// The server answered 4xx or 503, or refused within a 200.
    Refused,
    /// The server answered with another 5xx.
    ServerError,
    /// No connection could be opened.
    Connect,
    /// No connection was opened in time.
    ConnectTimeout,
    /// The router had no descriptor, port or memory left for a connection.
    Exhausted,
    /// A kept connection had been closed before the request came: it is sent again, and nobody is to blame.
    Stale,
    /// The connection ended before the answer did.
    Closed,
    /// What came is not HTTP.
    BadResponse,
    /// No answer, or no more of it, in time.
    Timeout,
    /// An answer that must be held in memory is over the limit.
    TooLarge,
    /// The router closed the connection first: the client had left, or the other leg had failed.
    Cancelled,
}

impl Outcome {
    /// All of them, in the order of their definition.
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

    /// Its name in `snake_case`.
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

/// One server's outcomes, counted.
#[derive(Debug, Default)]
pub(super) struct Outcomes([AtomicU64; Outcome::ALL.len()]);

impl Outcomes {
    pub(super) fn count(&self, outcome: Outcome) {
        // Relaxed: a number that somebody reads now and then orders nothing.
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

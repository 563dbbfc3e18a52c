//! Why a request was sent to another pair.

use std::sync::Arc;

use crate::error::{Cause, Error};
use crate::upstream::{Backend, Role};

/// Why an attempt was retried, and which backend was the reason.
#[derive(Debug, Clone)]
pub(crate) struct RetryReason {
    pub(crate) backend: Arc<Backend>,
    /// The code of the error that the attempt ended with. `None`: the backend responded with a status of
    /// `--retry-on-status`.
    pub(crate) code: Option<&'static str>,
    pub(crate) cause: RetryCause,
}

impl RetryReason {
    pub(super) fn new(backend: &Arc<Backend>, error: Option<&Error>) -> Self {
        Self {
            backend: Arc::clone(backend),
            code: error.map(Error::code),
            cause: error.map_or(RetryCause::Status, RetryCause::from_error),
        }
    }

    /// The backend had closed the kept-alive connection, and gets the request on a new one.
    pub(super) fn stale(backend: &Arc<Backend>) -> Self {
        let code = match backend.role() {
            Role::Prefill => "prefill_closed",
            Role::Decode => "decode_closed",
            Role::Regular => "regular_closed",
        };
        Self { backend: Arc::clone(backend), code: Some(code), cause: RetryCause::Closed }
    }
}

/// The label `cause` of a retry: only what can be retried, which is less than there are errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryCause {
    Connect,
    ConnectTimeout,
    /// The backend had closed an idle keep-alive connection.
    Closed,
    /// A status of `--retry-on-status`.
    Status,
}

impl RetryCause {
    /// All of them, in the order of their definition, which is the index of their counters.
    pub(crate) const ALL: [Self; 4] = [Self::Connect, Self::ConnectTimeout, Self::Closed, Self::Status];

    /// The value of the label `cause`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect_timeout",
            Self::Closed => "closed",
            Self::Status => "status",
        }
    }

    fn from_error(error: &Error) -> Self {
        match error {
            Error::Upstream { cause: Cause::ConnectTimeout(_), .. } => Self::ConnectTimeout,
            // No other error is retried.
            _ => Self::Connect,
        }
    }
}

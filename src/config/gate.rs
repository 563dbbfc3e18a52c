//! How many requests may be under way, and who waits.

use std::time::Duration;

use super::{LONGEST_TIMEOUT, MiniLbConfig};
use crate::admission::{AdmissionOptions, BackendCaps};

/// Requests that wait by default where requests are limited, as in `sglang_router`.
pub const DEFAULT_QUEUE_SIZE: usize = 100;
/// How long a request waits by default, as in `sglang_router`.
pub const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn no_limits() -> AdmissionOptions {
    AdmissionOptions {
        max_concurrent: None,
        queue_size: DEFAULT_QUEUE_SIZE,
        queue_timeout: DEFAULT_QUEUE_TIMEOUT,
        rate: None,
        caps: BackendCaps::NONE,
    }
}

impl MiniLbConfig {
    /// Has at most this many generation requests under way, from the end of a request's head to the end of its answer;
    /// others wait in a queue. Default: no limit.
    #[must_use]
    pub fn max_concurrent_requests(mut self, requests: u32) -> Self {
        self.options.gate.max_concurrent = Some(requests);
        self
    }

    /// Lets at most this many requests wait, and refuses more with 429; 0 lets none wait. Default:
    /// [`DEFAULT_QUEUE_SIZE`].
    #[must_use]
    pub fn queue_size(mut self, requests: usize) -> Self {
        self.options.gate.queue_size = requests;
        self
    }

    /// Refuses a request with 503 that has waited for this long. Default: [`DEFAULT_QUEUE_TIMEOUT`].
    #[must_use]
    pub fn queue_timeout(mut self, timeout: Duration) -> Self {
        self.options.gate.queue_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Lets this many generation requests begin in a second, all of them at once after a rest, and refuses more with 429.
    /// Default: no limit.
    #[must_use]
    pub fn rate_limit(mut self, requests_per_second: u32) -> Self {
        self.options.gate.rate = Some(requests_per_second);
        self
    }

    /// Gives each prefill server at most this many requests at a time. One that is full is not chosen; if all are,
    /// requests wait in the queue. Only a request that is sent again may go over it. Default: no limit.
    #[must_use]
    pub fn max_in_flight_per_prefill(mut self, requests: usize) -> Self {
        self.options.gate.caps.prefill = requests;
        self
    }

    /// As [`max_in_flight_per_prefill`](Self::max_in_flight_per_prefill), for decode servers.
    #[must_use]
    pub fn max_in_flight_per_decode(mut self, requests: usize) -> Self {
        self.options.gate.caps.decode = requests;
        self
    }
}

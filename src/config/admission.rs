//! Concurrency limits, the queue, the rate limit, and the bound of memory.

use std::time::Duration;

use super::{LONGEST_TIMEOUT, MiniLbConfig};

impl MiniLbConfig {
    /// Processes at most this many generation requests concurrently, each from the end of its head to the end
    /// of its response; others wait in a queue. Default: no limit.
    #[must_use]
    pub fn max_concurrent_requests(mut self, requests: u32) -> Self {
        self.options.admission.max_concurrent = Some(requests);
        self
    }

    /// Lets at most this many requests wait in the queue, and rejects more with 429; 0 lets none wait.
    /// Default: [`DEFAULT_QUEUE_SIZE`](super::DEFAULT_QUEUE_SIZE).
    #[must_use]
    pub fn queue_size(mut self, requests: usize) -> Self {
        self.options.admission.queue_size = requests;
        self
    }

    /// Holds at most this many bytes of request bodies, over all requests. At the bound further ones wait, at
    /// most for the [queue's time limit](Self::queue_timeout), and are then rejected with 503. A larger body
    /// is rejected with 413. Default: a quarter of the memory of the control group or of the machine.
    #[must_use]
    pub fn max_buffered_bytes(mut self, bytes: usize) -> Self {
        self.options.admission.max_buffered = bytes;
        self
    }

    /// Rejects a request with 503 that has waited in the queue for this long. Default:
    /// [`DEFAULT_QUEUE_TIMEOUT`](super::DEFAULT_QUEUE_TIMEOUT).
    #[must_use]
    pub fn queue_timeout(mut self, timeout: Duration) -> Self {
        self.options.admission.queue_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Accepts this many generation requests per second, with bursts of as many, and rejects more with 429.
    /// Default: no limit.
    #[must_use]
    pub fn rate_limit(mut self, requests_per_second: u32) -> Self {
        self.options.admission.rate = Some(requests_per_second);
        self
    }

    /// Gives each prefill server at most this many concurrent requests. A full server is not chosen; if all
    /// are full, requests wait in the queue. Only a retry may exceed the limit. Default: no limit.
    #[must_use]
    pub fn max_in_flight_per_prefill(mut self, requests: usize) -> Self {
        self.options.admission.caps.prefill = requests;
        self
    }

    /// As [`max_in_flight_per_prefill`](Self::max_in_flight_per_prefill), for decode servers.
    #[must_use]
    pub fn max_in_flight_per_decode(mut self, requests: usize) -> Self {
        self.options.admission.caps.decode = requests;
        self
    }

    /// As [`max_in_flight_per_prefill`](Self::max_in_flight_per_prefill), for servers of
    /// [`worker_urls`](Self::worker_urls).
    #[must_use]
    pub fn max_in_flight_per_worker(mut self, requests: usize) -> Self {
        self.options.admission.caps.regular = requests;
        self
    }
}

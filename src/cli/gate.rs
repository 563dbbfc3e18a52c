//! How many requests may be under way, as typed.

use std::time::Duration;

use clap::{Args, value_parser};
use mini_lb::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUE_TIMEOUT, MiniLbConfig};

#[derive(Debug, Args)]
pub(super) struct Gate {
    /// Generation requests under way at a time; others wait in a queue. -1 is no limit
    #[arg(long, value_name = "COUNT", default_value_t = -1, allow_negative_numbers = true,
          value_parser = value_parser!(i64).range(-1..=i64::from(u32::MAX)))]
    max_concurrent_requests: i64,
    /// Requests that may wait; more are refused with 429
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_QUEUE_SIZE)]
    queue_size: usize,
    /// Longest time a request may wait; then it is refused with 503
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_QUEUE_TIMEOUT.as_secs() as u32)]
    queue_timeout_secs: u32,
    /// Generation requests that may begin in a second, all of them at once after a rest; more are refused with 429. A
    /// token is one request [default: no limit]
    #[arg(long, value_name = "COUNT")]
    rate_limit_tokens_per_second: Option<u32>,
    /// Requests that one prefill server has at a time; if all are full, requests wait in the queue [default: no limit]
    #[arg(long, value_name = "COUNT")]
    max_in_flight_per_prefill: Option<usize>,
    /// The same for one decode server [default: no limit]
    #[arg(long, value_name = "COUNT")]
    max_in_flight_per_decode: Option<usize>,
}

impl Gate {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let mut config = config
            .queue_size(self.queue_size)
            .queue_timeout(Duration::from_secs(self.queue_timeout_secs.into()));
        // Out of range is -1.
        if let Ok(requests) = u32::try_from(self.max_concurrent_requests) {
            config = config.max_concurrent_requests(requests);
        }
        if let Some(rate) = self.rate_limit_tokens_per_second {
            config = config.rate_limit(rate);
        }
        if let Some(requests) = self.max_in_flight_per_prefill {
            config = config.max_in_flight_per_prefill(requests);
        }
        if let Some(requests) = self.max_in_flight_per_decode {
            config = config.max_in_flight_per_decode(requests);
        }
        config
    }
}

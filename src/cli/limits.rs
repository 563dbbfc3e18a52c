//! What a request may take, what makes a server unhealthy, and what sockets and threads there are, as typed.

use std::time::Duration;

use clap::{Args, value_parser};
use mini_lb::{
    DEFAULT_BACKEND_IDLE_TIMEOUT, DEFAULT_CLIENT_IDLE_TIMEOUT, DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_HEALTH_CHECK_INTERVAL, DEFAULT_HEALTH_CHECK_TIMEOUT, DEFAULT_HEALTH_FAILURE_THRESHOLD,
    DEFAULT_HEALTH_SUCCESS_THRESHOLD, DEFAULT_MAX_IDLE_PER_BACKEND, DEFAULT_MAX_MERGE_SIZE,
    DEFAULT_MAX_PAYLOAD_SIZE, DEFAULT_MAX_RETRIES, DEFAULT_REQUEST_BODY_IDLE_TIMEOUT,
    DEFAULT_REQUEST_HEAD_TIMEOUT, DEFAULT_REQUEST_TIMEOUT, DEFAULT_SHUTDOWN_GRACE_PERIOD,
    DEFAULT_SHUTDOWN_LAME_DUCK, DEFAULT_STREAM_IDLE_TIMEOUT, MiniLbConfig,
};

/// Seconds are `u32`, 136 years at most, so that no deadline overflows the clock.
#[derive(Debug, Args)]
pub(super) struct Limits {
    /// Longest time a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_TIMEOUT))]
    pub(super) request_timeout_secs: u32,
    /// Longest time a stream may be silent once it has begun
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_STREAM_IDLE_TIMEOUT))]
    stream_idle_timeout_secs: u32,
    /// How often a request is sent again that no server can have seen: a connection could not be opened, or a kept
    /// one had been closed
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_MAX_RETRIES)]
    retry_max_retries: u32,
    /// Send a request again, as often, if a server refuses it with one of these, such as 429,503; each attempt may cost
    /// a server work
    #[arg(long, value_name = "STATUS", value_delimiter = ',', value_parser = value_parser!(u16).range(400..600))]
    retry_on_status: Vec<u16>,
    /// Never send a request again
    #[arg(long)]
    disable_retries: bool,
    /// Longest time a client may take to send a request's head
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_HEAD_TIMEOUT))]
    request_head_timeout_secs: u32,
    /// Longest pause within a request's body
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_BODY_IDLE_TIMEOUT))]
    request_body_idle_timeout_secs: u32,
    /// Longest time a client's connection may stay without a request, or a client may take none of its answer
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_CLIENT_IDLE_TIMEOUT))]
    client_idle_timeout_secs: u32,
    /// Longest time a connection to a server may take to open
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_CONNECT_TIMEOUT))]
    connect_timeout_secs: u32,
    /// Time in which a router that got SIGTERM or SIGINT goes on taking connections, while /ready says 503
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_SHUTDOWN_LAME_DUCK))]
    shutdown_lame_duck_secs: u32,
    /// Time that open requests have to finish after that; a second signal ends them at once
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_SHUTDOWN_GRACE_PERIOD))]
    shutdown_grace_period_secs: u32,
    /// Largest request body; a larger one is refused with 413
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_PAYLOAD_SIZE)]
    max_payload_size: usize,
    /// Largest answer, or event of a stream, that is held to merge logprobs; a larger one fails with 502
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_MERGE_SIZE)]
    max_merge_size: usize,
}

impl Limits {
    /// All but the request timeout, which every configuration is made with.
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        config
            .stream_idle_timeout(Duration::from_secs(self.stream_idle_timeout_secs.into()))
            .max_retries(if self.disable_retries { 0 } else { self.retry_max_retries })
            .retry_on_status(self.retry_on_status.iter().copied())
            .request_head_timeout(Duration::from_secs(self.request_head_timeout_secs.into()))
            .request_body_idle_timeout(Duration::from_secs(self.request_body_idle_timeout_secs.into()))
            .client_idle_timeout(Duration::from_secs(self.client_idle_timeout_secs.into()))
            .connect_timeout(Duration::from_secs(self.connect_timeout_secs.into()))
            .shutdown_lame_duck(Duration::from_secs(self.shutdown_lame_duck_secs.into()))
            .shutdown_grace_period(Duration::from_secs(self.shutdown_grace_period_secs.into()))
            .max_payload_size(self.max_payload_size)
            .max_merge_size(self.max_merge_size)
    }
}

#[derive(Debug, Args)]
pub(super) struct Health {
    /// Time from one probe of a healthy server (GET /ready, or /health where that is 404) to the next; one that has
    /// failed is asked once a second
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_HEALTH_CHECK_INTERVAL))]
    health_check_interval_secs: u32,
    /// Longest time a server may take to answer a probe
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_HEALTH_CHECK_TIMEOUT))]
    health_check_timeout_secs: u32,
    /// Failures in a row, of probes and requests, after which a server gets no requests
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_HEALTH_FAILURE_THRESHOLD)]
    health_failure_threshold: u32,
    /// Successes in a row after which it gets requests again
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_HEALTH_SUCCESS_THRESHOLD)]
    health_success_threshold: u32,
    /// Probe no server, and take every one for healthy
    #[arg(long)]
    disable_health_check: bool,
}

impl Health {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        config
            .health_checks(!self.disable_health_check)
            .health_check_interval(Duration::from_secs(self.health_check_interval_secs.into()))
            .health_check_timeout(Duration::from_secs(self.health_check_timeout_secs.into()))
            .health_failure_threshold(self.health_failure_threshold)
            .health_success_threshold(self.health_success_threshold)
    }
}

#[derive(Debug, Args)]
pub(super) struct Sockets {
    /// Threads that serve, each with connections of its own [default: one a core]
    #[arg(long, value_name = "COUNT")]
    worker_threads: Option<usize>,
    /// Longest time a connection to a server may stay idle; keep it below the server's own keep-alive (5 s in SGLang)
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_BACKEND_IDLE_TIMEOUT))]
    backend_idle_timeout_secs: u32,
    /// Idle connections that each thread keeps to one server
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_MAX_IDLE_PER_BACKEND)]
    max_idle_per_backend: usize,
    /// Send and receive buffer of every socket [default: tuned by the kernel]
    #[arg(long, value_name = "BYTES")]
    socket_buffer_size: Option<usize>,
}

impl Sockets {
    pub(super) fn workers(&self) -> usize {
        self.worker_threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// All but the threads: [`Sockets::workers`] counts them once, for the log too.
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let config = config
            .backend_idle_timeout(Duration::from_secs(self.backend_idle_timeout_secs.into()))
            .max_idle_per_backend(self.max_idle_per_backend);
        match self.socket_buffer_size {
            Some(bytes) => config.socket_buffer_size(bytes),
            None => config,
        }
    }
}

/// A default of the library, for the help text.
fn seconds(default: Duration) -> u32 {
    u32::try_from(default.as_secs()).unwrap_or(u32::MAX)
}

//! What holds where nothing was asked for.

use std::time::Duration;

/// Largest request body by default: 512 MiB, as in `sglang_router`.
pub const DEFAULT_MAX_PAYLOAD_SIZE: usize = 512 << 20;
/// Largest answer that is held back for a logprob merge by default: 256 MiB. A 128k-token prompt with 20 top
/// logprobs a token is about 90 MB.
pub const DEFAULT_MAX_MERGE_SIZE: usize = 256 << 20;
/// How long a request may take by default, as in `sglang_router`.
pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How long a stream may be silent by default.
pub const DEFAULT_STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// How often a request is sent again by default that no server can have seen.
pub const DEFAULT_MAX_RETRIES: u32 = 1;
/// How long a router that is told to end goes on as before by default, so that whoever sends requests to it can
/// notice.
pub const DEFAULT_SHUTDOWN_LAME_DUCK: Duration = Duration::from_secs(3);
/// How long open requests may go on after a shutdown began by default, as in `sglang_router`.
pub const DEFAULT_SHUTDOWN_GRACE_PERIOD: Duration = Duration::from_secs(180);
/// How long a client may take to send a request's head by default.
pub const DEFAULT_REQUEST_HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a client may pause within a request's body by default.
pub const DEFAULT_REQUEST_BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client's connection may stay without a request by default.
pub const DEFAULT_CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// How long a TCP connection to a server may take to open by default.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection to a server may stay idle by default. SGLang's uvicorn closes at 5 s, so 4 s leaves a
/// second in which a reused connection is still good.
pub const DEFAULT_BACKEND_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Idle connections kept for one server in each worker by default.
pub const DEFAULT_MAX_IDLE_PER_BACKEND: usize = 512;
/// From one probe of a healthy server to the next by default.
pub const DEFAULT_HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a server may take to answer a probe by default, as in `sglang_router`.
pub const DEFAULT_HEALTH_CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Failures in a row that make a server unhealthy by default, as in `sglang_router`.
pub const DEFAULT_HEALTH_FAILURE_THRESHOLD: u32 = 3;
/// Successes in a row that make it healthy again by default, as in `sglang_router`.
pub const DEFAULT_HEALTH_SUCCESS_THRESHOLD: u32 = 2;
/// Requests at a time on one connection of HTTP/2 by default.
pub const DEFAULT_HTTP2_MAX_STREAMS: u32 = 128;
/// Port of the admin listener by default, as in `sglang_router`.
pub const DEFAULT_PROMETHEUS_PORT: u16 = 29_000;
/// From one probe of a server to the next by default that has not come up yet. `sglang_router` has 30 s.
pub const DEFAULT_WORKER_STARTUP_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a server is asked so often by default, as in `sglang_router`.
pub const DEFAULT_WORKER_STARTUP_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How often DNS names are resolved by default.
pub const DEFAULT_DNS_INTERVAL: Duration = Duration::from_secs(5);

//! The defaults that users of the library can refer to. Which option has which is in the table.

use std::time::Duration;

/// Default largest request body: 512 MiB, as in `sglang_router`.
pub const DEFAULT_MAX_PAYLOAD_SIZE: usize = 512 << 20;
/// Default largest response that is buffered for a logprob merge: 256 MiB. A 128k-token prompt with 20 top
/// logprobs per token is about 90 MB.
pub const DEFAULT_MAX_MERGE_SIZE: usize = 256 << 20;
/// Default largest number of samples of each prompt: enough for the 10 of pass@10.
pub const DEFAULT_MAX_SAMPLES: u32 = 16;
/// The largest number that can be set: all samples of a request are polled by one task.
pub(crate) const MAX_SAMPLES_LIMIT: u32 = 128;
/// Default longest time of a request, as in `sglang_router`.
pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(1_800);
/// Default longest time without data from decode within a stream.
pub const DEFAULT_STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Default number of other pairs that a request may try if a server cannot be connected.
pub const DEFAULT_MAX_RETRIES: u32 = 1;
/// Default drain delay, in which load balancers can see on `/ready` that the router shuts down.
pub const DEFAULT_SHUTDOWN_LAME_DUCK: Duration = Duration::from_secs(3);
/// Default time for open requests to finish after the drain delay, as in `sglang_router`.
pub const DEFAULT_SHUTDOWN_GRACE_PERIOD: Duration = Duration::from_secs(180);
/// Default longest time for a client to send a request's head.
pub const DEFAULT_REQUEST_HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Default longest pause within a request's body.
pub const DEFAULT_REQUEST_BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Default longest time for a client to send a request's body: 512 MiB, the largest by default, at 15 Mbit/s.
pub const DEFAULT_REQUEST_BODY_TIMEOUT: Duration = Duration::from_secs(300);
/// Default longest time of a client's connection without a request. Longer than the 60 s for which nginx
/// keeps idle connections to its upstreams (`keepalive_timeout`), so that a proxy in front closes first and
/// loses no request.
pub const DEFAULT_CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Default longest time to open a TCP connection to a server.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Default longest idle time of a connection to a server. SGLang's uvicorn closes at 5 s, so 4 s leaves a
/// second in which a reused connection is still open.
pub const DEFAULT_BACKEND_IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Default number of idle connections to one server in each worker thread.
pub const DEFAULT_MAX_IDLE_PER_BACKEND: usize = 512;
/// Default time between health checks of a healthy server. SGLang says from SIGTERM on that it leaves, and
/// may exit a few seconds later.
pub const DEFAULT_HEALTH_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Default longest time of a health check, as in `sglang_router`.
pub const DEFAULT_HEALTH_CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Default number of consecutive failures that take a server out of rotation, as in `sglang_router`.
pub const DEFAULT_HEALTH_FAILURE_THRESHOLD: u32 = 3;
/// Default number of consecutive successes that put it back, as in `sglang_router`.
pub const DEFAULT_HEALTH_SUCCESS_THRESHOLD: u32 = 2;
/// Default number of concurrent requests on one HTTP/2 connection.
pub const DEFAULT_HTTP2_MAX_STREAMS: u32 = 128;
/// Default port of the program's admin listener, as in `sglang_router`.
pub const DEFAULT_PROMETHEUS_PORT: u16 = 29_000;
/// Default time between health checks of a server that has not started yet. `sglang_router` has 30 s, by half
/// of which a server that is up would wait for its first request on average.
pub const DEFAULT_WORKER_STARTUP_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Default time for a server to start, as in `sglang_router`.
pub const DEFAULT_WORKER_STARTUP_TIMEOUT: Duration = Duration::from_secs(1_800);
/// Default time between lookups of DNS names.
pub const DEFAULT_DNS_INTERVAL: Duration = Duration::from_secs(5);
/// Default number of requests that may wait while a limit is reached, as in `sglang_router`.
pub const DEFAULT_QUEUE_SIZE: usize = 100;
/// Default longest time in the queue, as in `sglang_router`.
pub const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(60);
/// Default most memory of the index of prompts that servers have in their caches: enough for 1,000 servers
/// with 800,000 tokens each.
pub const DEFAULT_PREFIX_INDEX_BYTES: usize = crate::upstream::DEFAULT_INDEX_BYTES;
/// Default headers that name a request's conversation: smg's, and the one that clients of several routers
/// send.
pub const DEFAULT_HASH_KEY_HEADERS: [&str; 2] = ["x-smg-routing-key", "x-session-id"];

//! An HTTP router for SGLang with prefill-decode disaggregation.
//!
//! It sends each generation request to one prefill and one decode server at the same time: the client's own
//! bytes, and the three `bootstrap_*` fields that let the two servers find each other. Decode's response is
//! streamed back as it arrives.
//!
//! ```no_run
//! use mini_lb::{MiniLbConfig, MiniLoadBalancer};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let prefill = vec![("http://prefill-1:30000".into(), Some(8998))];
//!     let decode = vec!["http://decode-1:30000".into(), "http://decode-2:30000".into()];
//!     let config = MiniLbConfig::new("0.0.0.0", 8000, prefill, decode, 1800);
//!     Ok(MiniLoadBalancer::new(config)?.start().await?)
//! }
//! ```
//!
//! # Overview
//!
//! - [`MiniLbConfig`] is the configuration: addresses, servers, limits, timeouts. Invalid values are reported
//!   by [`MiniLoadBalancer::new`] as a [`ConfigError`].
//! - [`MiniLoadBalancer`] is the router. [`start`](MiniLoadBalancer::start) listens and runs until SIGINT or
//!   SIGTERM; [`serve`](MiniLoadBalancer::serve) runs on a listener of the caller's until a future of the
//!   caller's ends. [`reload`](MiniLoadBalancer::reload) applies another configuration while it serves.
//! - A [`Policy`] chooses one [`Backend`] of each [`Role`] for a request: [`CacheAware`], [`LeastLoad`],
//!   [`PowerOfTwo`], [`ConsistentHash`], [`RoundRobin`], [`Random`], or one of the caller's.
//!
//! # Threads
//!
//! Requests are served on worker threads that the router starts, each with a single-threaded tokio runtime.
//! The caller's runtime, which needs I/O and time enabled, accepts connections, runs health checks and serves
//! the admin listener.
//!
//! # Log
//!
//! Events are emitted with [`tracing`]. They never contain bodies, or headers other than the request id.
//! Request lines can go to a function instead: [`MiniLbConfig::request_log`]. Another one can record the load
//! as a trace: [`MiniLbConfig::trace_log`].

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::unwrap_used))]

mod admin;
mod admission;
mod balancer;
mod config;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::disallowed_methods, reason = "peers of the router are tasks of their own")]
pub mod fuzzing;
mod http1;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod observe;
mod options;
mod proxy;
mod server;
mod timer;
mod tls;
mod transport;
mod upstream;
mod wire;

pub use admin::{Finding, FleetCheck, ServerCheck, ServerFacts};
pub use balancer::MiniLoadBalancer;
pub use config::{
    ConfigError, DEFAULT_BACKEND_IDLE_TIMEOUT, DEFAULT_CLIENT_IDLE_TIMEOUT, DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_DNS_INTERVAL, DEFAULT_HASH_KEY_HEADERS, DEFAULT_HEALTH_CHECK_INTERVAL,
    DEFAULT_HEALTH_CHECK_TIMEOUT, DEFAULT_HEALTH_FAILURE_THRESHOLD, DEFAULT_HEALTH_SUCCESS_THRESHOLD,
    DEFAULT_HTTP2_MAX_STREAMS, DEFAULT_MAX_IDLE_PER_BACKEND, DEFAULT_MAX_MERGE_SIZE,
    DEFAULT_MAX_PAYLOAD_SIZE, DEFAULT_MAX_RETRIES, DEFAULT_MAX_SAMPLES, DEFAULT_PREFIX_INDEX_BYTES,
    DEFAULT_PROMETHEUS_PORT, DEFAULT_QUEUE_SIZE, DEFAULT_QUEUE_TIMEOUT, DEFAULT_REQUEST_BODY_IDLE_TIMEOUT,
    DEFAULT_REQUEST_BODY_TIMEOUT, DEFAULT_REQUEST_HEAD_TIMEOUT, DEFAULT_REQUEST_TIMEOUT,
    DEFAULT_SHUTDOWN_GRACE_PERIOD, DEFAULT_SHUTDOWN_LAME_DUCK, DEFAULT_STREAM_IDLE_TIMEOUT,
    DEFAULT_WORKER_STARTUP_CHECK_INTERVAL, DEFAULT_WORKER_STARTUP_TIMEOUT, MiniLbConfig, Reloaded,
};
pub use observe::report::{
    LineFieldName, RequestFailure, RequestLine, RequestLineVisitor, RequestTimes, TraceLine,
};
pub use options::{Bounds, OptionDefault, OptionSection, OptionSpec, Reload, ValueKind, option_sections};
pub use transport::Http1Engine;
pub use upstream::{
    Backend, CacheAware, Choice, CompletedPrefill, ConsistentHash, LeastLoad, Needs, Outcome, Policy,
    PowerOfTwo, Prompt, Random, Role, RoundRobin, Selection, SelectionReason, SelectionSummary, ServerPair,
};

/// The README's code is compiled with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

//! The tests of the router's behaviour once more, with hyper as the HTTP/1.1 engine on both sides
//! (`--http1-engine hyper`). `kit/engine.rs` chooses the engine by the name of this target.
//!
//! Left out is what does not depend on the engine: the command line, configuration and reloads, DNS
//! discovery, the choice of a backend, the status page, examples. `allocations.rs` and `fault_storms.rs`
//! measure a process and run alone.

// Each file declares `mod kit;` for its own target. Only what the tests use of a copy is compiled.
#![allow(clippy::duplicate_mod, reason = "each file is also a test target of its own")]

#[path = "authentication.rs"]
mod authentication;
#[path = "backend_connections.rs"]
mod backend_connections;
#[path = "backend_tls.rs"]
mod backend_tls;
#[path = "base_paths.rs"]
mod base_paths;
#[path = "client_connections.rs"]
mod client_connections;
#[path = "client_disconnects.rs"]
mod client_disconnects;
#[path = "client_timeouts.rs"]
mod client_timeouts;
#[path = "client_tls.rs"]
mod client_tls;
#[path = "cors.rs"]
mod cors;
#[path = "crosstalk.rs"]
mod crosstalk;
#[path = "data_path.rs"]
mod data_path;
#[path = "dialects.rs"]
mod dialects;
#[path = "dp_ranks.rs"]
mod dp_ranks;
#[path = "early_errors.rs"]
mod early_errors;
#[path = "early_responses.rs"]
mod early_responses;
#[path = "encoders.rs"]
mod encoders;
#[path = "endpoints.rs"]
mod endpoints;
#[path = "failure_matrix.rs"]
mod failure_matrix;
#[path = "failures.rs"]
mod failures;
#[path = "health.rs"]
mod health;
#[path = "http1_parsing.rs"]
mod http1_parsing;
#[path = "http2.rs"]
mod http2;
#[path = "invalid_requests.rs"]
mod invalid_requests;
#[path = "limits.rs"]
mod limits;
#[path = "logging.rs"]
mod logging;
#[path = "memory_bound.rs"]
mod memory_bound;
#[path = "metrics.rs"]
mod metrics;
#[path = "multimodal.rs"]
mod multimodal;
#[path = "prefill_usage.rs"]
mod prefill_usage;
#[path = "proxy_protocol.rs"]
mod proxy_protocol;
#[path = "real_clients.rs"]
mod real_clients;
#[path = "recorded_exchanges.rs"]
mod recorded_exchanges;
#[path = "regular.rs"]
mod regular;
#[path = "request_id.rs"]
mod request_id;
#[path = "response_encodings.rs"]
mod response_encodings;
#[path = "retries.rs"]
mod retries;
#[path = "rolling_restart.rs"]
mod rolling_restart;
#[path = "routed_experts.rs"]
mod routed_experts;
#[path = "routes.rs"]
mod routes;
#[path = "samples.rs"]
mod samples;
#[path = "shutdown.rs"]
mod shutdown;
#[path = "simulated_load.rs"]
mod simulated_load;
#[path = "simulated_merges.rs"]
mod simulated_merges;
#[path = "streams.rs"]
mod streams;
#[path = "trace_log.rs"]
mod trace_log;
#[path = "workers_api.rs"]
mod workers_api;

//! What a prefill-decode router does with bytes: it reads and rewrites request bodies and heads,
//! recognises errors in streams, and merges logprobs.
//!
//! Everything here is a function of its input. There is no async code, no clock, no randomness and no
//! socket, so that property tests and fuzz targets reach every line; `tests/architecture.rs` holds it.

pub(crate) mod body;
pub(crate) mod bootstrap;
pub(crate) mod client_response;
pub(crate) mod headers;
mod json;
pub(crate) mod logprobs;
pub(crate) mod plan;
pub(crate) mod samples;
pub(crate) mod segments;
pub(crate) mod shape;
pub(crate) mod sse;
pub(crate) mod stream_error;
pub(crate) mod upstream_request;
pub(crate) mod usage;

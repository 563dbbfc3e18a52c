//! Bytes in, bytes out. No async, no clock, no randomness, no socket.

pub(crate) mod body;
pub(crate) mod bootstrap;
pub(crate) mod client_response;
pub(crate) mod headers;
mod json;
pub(crate) mod logprobs;
pub(crate) mod segments;
pub(crate) mod shape;
pub(crate) mod sse;
pub(crate) mod stream_error;
pub(crate) mod upstream_request;

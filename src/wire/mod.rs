//! Bytes in, bytes out. No async, no clock, no randomness, no socket.

pub(crate) mod body;
pub(crate) mod bootstrap;
pub(crate) mod headers;
mod json;
pub(crate) mod logprobs;
pub(crate) mod message;
pub(crate) mod pieces;
pub(crate) mod refusal;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod shape;
pub(crate) mod sse;

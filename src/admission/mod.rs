//! What is decided about a request before its body is read: authentication
//! ([`AccessControl`]), CORS ([`CorsDecision`]), concurrency, rate and queue limits
//! ([`AdmissionController`]), and how much memory bodies may take ([`Reservation`]).
//!
//! Nothing here reads a body, knows a route, or chooses a backend.

mod access;
mod controller;
mod cors;
mod memory_budget;
mod rate_limit;
mod secret;
mod wait_queue;

pub(crate) use access::{AccessControl, AccessOptions, AuthDecision, AuthError};
pub(crate) use controller::{
    AdmissionController, AdmissionHandle, AdmissionOptions, BackendCaps, Rejection, WakeOnDrop,
};
pub(crate) use cors::{CorsDecision, Origins};
pub(crate) use memory_budget::{MemoryFull, Reservation};
pub(crate) use secret::Secret;
pub(crate) use wait_queue::Permit;

//! Generation requests: one client request becomes two legs, and the legs become one response.
//!
//! The life of a request, in order: [`intake`] reads the body, [`exchange`] sends both legs and decides when
//! the response can start, [`leg`] runs on one server, and [`relay`] is the body of the response. Both legs
//! run in the request's own task, so that dropping the task closes both. Who may send a request and when it
//! may start is decided in `admission`; how its body is changed, in `wire`.

mod exchange;
mod intake;
mod leg;
mod relay;

pub(crate) use exchange::{AdmittedPair, Proxy, RequestLimits, UpstreamResponse};
pub(crate) use intake::discard;
pub(crate) use relay::Relay;

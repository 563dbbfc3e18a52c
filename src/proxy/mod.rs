//! A user's request, and nothing else: one client request becomes two legs, and
//! the legs become one answer.
//!
//! The life of a request, in order: [`intake`] reads the body, [`exchange`] sends
//! both legs and decides when the answer can start, [`leg`] is what runs on one
//! server, [`relay`] is the answer's body. Both legs run in the request's own task,
//! so that dropping it ends both.

mod exchange;
mod intake;
mod leg;
mod relay;

pub(crate) use exchange::{AdmittedPair, Proxy, RequestLimits, UpstreamResponse};
pub(crate) use intake::discard;
pub(crate) use relay::Relay;

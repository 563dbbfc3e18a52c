//! Generation requests: one client request becomes two legs, and the legs become one response.
//!
//! The life of a request, in order: [`request`] reads it, its body in [`intake`]; [`exchange`] chooses
//! servers; [`leg_pair`] runs both legs until the response can start, each [`leg`] on one server; and
//! [`relay`] is the body of the response. A request for several samples (`n` > 1) is several requests, of
//! which [`samples`] makes one response. What an event of a leg means is decided in one place, [`decision`].
//! Both legs run in the request's own task, so that dropping the task closes both. Who may send a request and
//! when it may start is decided in `admission`; how its body is changed, in `wire`.

mod abort;
mod decision;
mod exchange;
pub(crate) mod intake;
mod leg;
mod leg_pair;
mod merge;
mod relay;
mod request;
mod samples;

pub(crate) use exchange::{AdmittedPair, UpstreamResponse};
pub(crate) use relay::Relay;
pub(crate) use request::{Proxy, RequestLimits};

//! Everything that is not a user's generation request: questions about the
//! servers, and orders to all of them.

mod descriptions;
mod discovery;
mod endpoints;
mod operators;
mod probes;
mod query;
mod role_switch;
mod status_page;
mod workers;

pub(crate) use discovery::follow_names;
pub(crate) use endpoints::{Draining, RouterEndpoint, RouterEndpoints, allows};
pub(crate) use operators::OperatorEndpoints;
pub(crate) use probes::probe_all;
pub(crate) use workers::WorkersApi;

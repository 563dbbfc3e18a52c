//! Everything that is not a user's generation request: questions about the
//! servers, and orders to all of them.

mod admin;
mod ask;
mod endpoints;
mod probes;

pub(crate) use admin::Admin;
pub(crate) use endpoints::{Control, Draining, Endpoint, allows};
pub(crate) use probes::probe_all;

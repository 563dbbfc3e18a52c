//! Everything that is not a user's generation request: questions about the
//! servers, and orders to all of them.

mod admin;
mod ask;
mod discovery;
mod endpoints;
mod learn;
mod probes;
mod role_switch;
mod ui;
mod workers;

pub(crate) use admin::Admin;
pub(crate) use discovery::follow_names;
pub(crate) use endpoints::{Control, Draining, Endpoint, allows};
pub(crate) use probes::probe_all;
pub(crate) use workers::Workers;

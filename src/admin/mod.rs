//! Everything that is not a user's generation request: the router's own endpoints, the
//! workers API, role switches, health probes, DNS discovery and the status page.
//!
//! Routes are matched and bodies are read in `server`; the admin API's rules of who may
//! ask are in `admission`.

mod admin_request;
mod descriptions;
mod discovery;
mod endpoints;
mod failures;
mod load_polls;
mod operators;
mod probes;
mod query;
mod role_switch;
mod server_info;
mod status_page;
mod workers;

pub(crate) use discovery::follow_names;
pub(crate) use endpoints::{Draining, RouterEndpoint, RouterEndpoints, allows};
pub(crate) use operators::OperatorEndpoints;
pub(crate) use probes::probe_all;
pub(crate) use workers::WorkersApi;

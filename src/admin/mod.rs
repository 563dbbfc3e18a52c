//! Everything that is not a user's generation request: the router's own endpoints, the
//! workers API, role switches, health probes, discovery by DNS and Kubernetes, the status
//! page, and the check of servers before traffic flows.
//!
//! Routes are matched and bodies are read in `server`; the admin API's rules of who may
//! ask are in `admission`.

mod admin_request;
mod descriptions;
mod discovery;
mod encoders;
mod endpoints;
mod failures;
mod fan_out;
mod fit;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod load_polls;
mod loads;
mod operators;
mod probes;
mod query;
mod role_switch;
mod router_api;
mod routes;
mod server_info;
mod status_page;
mod worker_loads;
mod workers;

pub(crate) use discovery::follow_names;
pub(crate) use encoders::keep_encoders;
pub(crate) use endpoints::{Draining, RouterEndpoints, RouterRequest};
pub(crate) use fit::check_fleet;
pub use fit::{Finding, FleetCheck, ServerCheck, ServerFacts};
#[cfg(feature = "kubernetes")]
pub(crate) use kubernetes::follow_pods;
pub(crate) use operators::OperatorEndpoints;
pub(crate) use probes::probe_all;
pub(crate) use routes::{Access, BodyUse, RouteAction, RouteEntry, RouterEndpoint, allows};
pub(crate) use workers::WorkersApi;

//! The servers behind the router and the sockets to them: who there is
//! ([`LiveFleet`]), who is chosen ([`Policy`]), and connections, fresh ([`dial`])
//! or kept ([`Pools`]).
//!
//! Nothing here knows what a request says or what an answer means.

mod address;
mod backend;
mod connection_counts;
mod desired_fleet;
mod dial;
mod fleet;
mod health;
mod id_map;
mod outcome;
mod policy;
mod pool;

pub(crate) use address::{Address, checked_host};
pub use backend::{Backend, Role};
pub(crate) use backend::{Description, InFlight, PrefillSpec};
pub(crate) use connection_counts::Connections;
pub(crate) use desired_fleet::{DesiredFleet, DnsName, MAX_SERVERS_PER_ROLE, NotChanged, ServerSpec};
pub(crate) use dial::{DialError, Dialer, SocketOptions};
pub use fleet::ServerPair;
pub(crate) use fleet::{Fleet, FleetSpec, LiveFleet, PairPermits};
pub(crate) use health::{HealthOptions, HealthState};
pub(crate) use id_map::IdMap;
pub use outcome::Outcome;
pub use policy::{Choice, Policy, Random, RoundRobin};
pub(crate) use pool::{Lease, Pools};

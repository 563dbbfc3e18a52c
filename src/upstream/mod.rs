//! The servers behind the router and the sockets to them: who there is
//! ([`LiveFleet`]), who is chosen ([`Policy`]), and connections, fresh ([`dial`])
//! or kept ([`Pools`]).
//!
//! Nothing here knows what a request says or what an answer means.

mod address;
mod backend;
mod conn;
mod connections;
mod dial;
mod fleet;
mod health;
mod ids;
mod members;
mod outcome;
mod policy;
mod pool;
mod tls;

pub(crate) use address::{Address, checked_host};
pub use backend::{Backend, Role};
pub(crate) use backend::{Description, InFlight, PrefillSpec};
pub(crate) use conn::{Come, ConnError, SendError, Sent};
pub(crate) use connections::Connections;
pub(crate) use dial::{DialError, Dialer, SocketOptions};
pub use fleet::ServerPair;
pub(crate) use fleet::{Fleet, LiveFleet, Seats, Wanted};
pub(crate) use health::{HealthOptions, State};
pub(crate) use ids::IdMap;
pub(crate) use members::{DnsName, MAX_SERVERS_PER_ROLE, Member, Members, NotChanged};
pub use outcome::Outcome;
pub use policy::{Choice, Policy, Random, RoundRobin};
pub(crate) use pool::{Lease, Pools};

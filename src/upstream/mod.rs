//! The servers behind the router and the sockets to them: the current set ([`LiveFleet`])
//! and how it comes about ([`DesiredFleet`]), selection ([`Policy`]), and connections, new
//! ([`Dialer`]) and pooled ([`Pools`]).
//!
//! Nothing here knows what a request asks for or what a response says.

mod address;
mod backend;
mod completed_prefill;
mod connection_counts;
mod desired_fleet;
mod dial;
mod encoder;
mod encoders;
mod fleet;
mod health;
mod id_map;
mod in_flight;
mod load_table;
mod outcome;
#[cfg(feature = "kubernetes")]
mod pod_source;
mod policy;
mod pool;
mod ranks;
mod role;
mod running_requests;
mod selection;
mod server_spec;
mod speed;

pub use crate::wire::shape::Prompt;
pub(crate) use address::{Address, checked_host};
pub use backend::Backend;
pub(crate) use backend::{Description, PrefillSpec, ProbeFailure};
pub use completed_prefill::CompletedPrefill;
pub(crate) use connection_counts::Connections;
pub(crate) use desired_fleet::{DesiredFleet, MAX_SERVERS_PER_ROLE, NotChanged};
pub(crate) use dial::{DialError, Dialer, SocketOptions};
pub(crate) use encoder::{Encoder, EncoderRegistration};
pub(crate) use encoders::{EncoderName, EncoderSpec, Encoders, MAX_ENCODERS};
pub(crate) use fleet::{Entered, Fleet, FleetSpec, LiveFleet, PairPermits, difference};
pub(crate) use health::{HealthOptions, HealthState};
pub(crate) use id_map::IdMap;
pub(crate) use in_flight::InFlight;
pub use outcome::Outcome;
#[cfg(feature = "kubernetes")]
pub(crate) use pod_source::{PodLabels, PodSource};
pub use policy::{
    CacheAware, Choice, ConsistentHash, LeastLoad, Needs, Policy, PowerOfTwo, Random, RoundRobin,
};
pub(crate) use policy::{DEFAULT_INDEX_BYTES, Demand, IndexUsage};
pub(crate) use pool::{Lease, Pools};
pub use role::Role;
pub(crate) use running_requests::{OWN_RID, Registration, RunningRequests};
pub(crate) use selection::SelectedBy;
pub use selection::{Selection, SelectionReason, SelectionSummary, ServerPair};
pub(crate) use server_spec::{DnsName, ServerSpec};

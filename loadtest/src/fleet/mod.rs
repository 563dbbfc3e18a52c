//! The fleet lab: prefill and decode servers that queue, cache and decode by a model, and what a router's
//! choice of servers makes of them.
//!
//! [`model`] is one server's behaviour, [`trace`] and [`generate`] are the load, [`simulate`] plays it
//! through a [`Router`] without sockets, [`live`] through a router's program. `docs/ROUTING.md` says what is
//! modelled, what is not, and what came out.

pub mod cache;
mod experiment;
pub mod generate;
pub mod live;
pub mod model;
mod noise;
mod plot;
mod report;
mod router;
mod simulation;
pub mod trace;

pub use experiment::{Candidate, Experiment, Load, random_use, runs};
pub use generate::Generator;
pub use report::{Outcome, Row, ServerLoad, table};
pub use router::{Arrival, Pair, PrefillEnd, Reference, Router, View};
pub use simulation::{Fleet, OUTAGE, Scenario, simulate};

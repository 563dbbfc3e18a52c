//! Simulated SGLang servers, a load generator, and a comparison of routers under load.
//!
//! [`sim`] behaves as SGLang does. [`canned`] only has SGLang's response bytes, and costs little CPU.
//! [`load`] is the generator, [`process`] reads what a process costs, and [`compare`], [`soak`] and
//! [`memory`] combine them. [`floor`] is the relay that routers are compared
//! with. [`fleet`] models servers whose time depends on what a router sends where.

pub mod canned;
pub mod compare;
pub mod fleet;
pub mod floor;
pub mod load;
pub mod memory;
pub mod process;
pub mod sim;
pub mod soak;
mod testbed;

//! Simulated SGLang servers, a load generator, and a comparison of routers under load.
//!
//! [`sim`] behaves as SGLang does. [`canned`] only has SGLang's response bytes, and costs little CPU.
//! [`load`] is the generator, [`process`] reads what a process costs, and [`compare`], [`soak`] and
//! [`memory`] combine them.

pub mod canned;
pub mod compare;
pub mod load;
pub mod memory;
pub mod process;
pub mod sim;
pub mod soak;
mod testbed;

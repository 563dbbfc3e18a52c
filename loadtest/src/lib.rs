//! Stand-ins for SGLang servers, and load to put on a router.
//!
//! [`sim`] behaves as SGLang does; [`canned`] only looks like it, and costs little. [`load`] is the generator,
//! [`process`] reads what a process costs, and [`compare`], [`soak`] and [`memory`] put these together.

mod bed;
pub mod canned;
pub mod compare;
pub mod load;
pub mod memory;
pub mod process;
pub mod sim;
pub mod soak;

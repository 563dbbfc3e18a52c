//! What the router does with bytes, without sockets: bodies, answers and heads, and
//! the choice of servers.
//!
//! `cargo bench --features internals --bench wire`. Bodies come in pieces as large as
//! a connection hands them out, except to the two parsers they are compared with,
//! which want a whole.

mod answers;
mod bodies;
mod choice;
mod heads;

use std::time::Duration;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// So much of what takes longest.
const MAX_TIME: Duration = Duration::from_secs(1);

fn main() {
    let benches = divan::Divan::default().sample_count(1_000).max_time(MAX_TIME);
    benches.config_with_args().main();
}

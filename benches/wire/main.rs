//! What the router does with bytes, without sockets: bodies, responses and heads; and how it selects a pair.
//!
//! `cargo bench --features internals --bench wire`. Bodies arrive in chunks of the size that a connection
//! reads, except for the two parsers beside them, which need all of a body.

mod bodies;
mod heads;
mod responses;
mod selection;

use std::time::Duration;

/// The program's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The slowest bench, serde_json on 8 MiB at 25 ms, gets about 40 samples in this time.
const MAX_TIME: Duration = Duration::from_secs(1);

fn main() {
    let benches = divan::Divan::default().sample_count(1_000).max_time(MAX_TIME);
    benches.config_with_args().main();
}

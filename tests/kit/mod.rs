//! What tests stand the router between: servers that follow a script, and a
//! client that shows every byte. Neither uses hyper, so that the router is not
//! tested against itself.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

mod client;
mod fixtures;
mod http;
pub mod program;
mod router;
mod upstream;

pub use client::{Answer, Client};
pub use fixtures::{Exchange, exchanges, fixture, fixture_names};
pub use http::{Head, dechunk};
pub use router::{BOOTSTRAP_PORT, Router};
pub use upstream::{Gate, Seen, Step, Upstream, json};

use std::time::Duration;

/// Nothing in a test takes longer than this unless the router hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Fails the test when `wait` takes longer than [`PATIENCE`].
pub async fn patiently<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, wait).await {
        Ok(value) => value,
        Err(_) => panic!("timed out: {what}"),
    }
}

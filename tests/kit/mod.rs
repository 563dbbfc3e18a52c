//! What tests stand the router between: servers that follow a script, and a
//! client that shows every byte. Neither uses hyper, so that the router is not
//! tested against itself.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

mod client;
mod fixtures;
mod http;
mod logged;
pub mod program;
mod router;
mod tls;
mod upstream;

pub use client::{Answer, Client};
pub use fixtures::{Exchange, exchanges, fixture, fixture_names};
pub use http::{Head, dechunk};
pub use logged::Program;
pub use router::{BOOTSTRAP_PORT, Router};
pub use tls::{Authority, FrontOptions, Handshake, Identity, TlsClient, TlsFront, shake_hands};
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

/// What curl printed. `None` where there is no curl, which CI does not allow.
pub async fn run_curl(mut curl: std::process::Command) -> Option<String> {
    let output = tokio::task::spawn_blocking(move || curl.output()).await.expect("no panic");
    match output {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
            Some(String::from_utf8(output.stdout).expect("UTF-8"))
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "no curl: {error}");
            None
        }
    }
}

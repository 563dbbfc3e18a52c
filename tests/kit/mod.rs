//! The test kit: the router under test, in process or as the built program, between scripted servers and a
//! client that keeps every byte. Neither peer uses hyper, so that the router is not tested against itself.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

mod client;
mod engine;
mod fixtures;
mod http;
pub mod media;
mod ports;
pub mod processes;
pub mod program;
pub mod raw;
mod router;
mod router_process;
mod scripted_server;
mod tls;

pub use client::{Client, Response};
pub use engine::{configure, skip_on_hyper};
pub use fixtures::{Exchange, Recording, exchanges, fixture, fixture_names};
pub use http::{Head, dechunk};
pub use ports::free_port;
pub use router::{BOOTSTRAP_PORT, Router};
pub use router_process::RouterProcess;
pub use scripted_server::{
    Gate, OK, ReceivedRequest, STREAM_HEAD, ScriptedServer, Step, chunk, json, ok_server,
};
pub use tls::{Handshake, Identity, TerminatorOptions, TestCa, TlsClient, TlsTerminator, tls_handshake};

use std::time::Duration;

/// How long a test waits for anything before it fails.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Fails the test when `wait` takes longer than [`TIMEOUT`].
pub async fn with_timeout<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(TIMEOUT, wait).await {
        Ok(value) => value,
        Err(_) => panic!("timed out: {what}"),
    }
}

/// The output of a curl command. `None` where curl is not installed, which fails in CI.
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

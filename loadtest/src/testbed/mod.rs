//! The processes of a measurement: backends, a router in front of them, the generator, and the cores of each.
//!
//! Only processes that were started here are killed, by their id. What is measured is decided in `compare`,
//! `soak` and `memory`.

mod backends;
mod child;
mod cores;
mod routers;

use std::io;
use std::net::{SocketAddr, TcpListener};

use tokio::runtime::{Builder, Runtime};

pub(crate) use backends::Backends;
pub(crate) use child::{Child, generate};
pub(crate) use cores::Cores;
pub(crate) use routers::{FLOOR, HYPER, ONE_LEG, Router, RouterPaths, RunningRouter};

/// A free port below the kernel's range of ephemeral ports: a load opens thousands of client connections,
/// each of which could take the router's port before the router does.
pub(crate) fn free_port() -> io::Result<u16> {
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let tried = (0..1000).map(|_| fastrand::u16(10_000..32_000)).find(free);
    tried.ok_or_else(|| io::Error::other("no free port below 32000"))
}

/// Runs one admin request or readiness check outside of a load.
fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime: Runtime = Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

//! What a measurement stands on: processes that end with it, cores for each, servers and a router in front of them.
//!
//! Only processes that were started here are ended, by their id. What is measured is not decided here.

mod child;
mod cores;
mod routers;
mod upstreams;

use std::io;
use std::net::{SocketAddr, TcpListener};

use tokio::runtime::{Builder, Runtime};

pub(crate) use child::{Child, generate};
pub(crate) use cores::Cores;
pub(crate) use routers::{Places, Router, Running};
pub(crate) use upstreams::Upstreams;

/// A port below those that the kernel gives to clients, which come and go by the thousand here.
fn free_port() -> io::Result<u16> {
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let tried = (0..1000).map(|_| fastrand::u16(10_000..32_000)).find(free);
    tried.ok_or_else(|| io::Error::other("no free port below 32000"))
}

/// For the few questions that are asked outside of a load.
fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime: Runtime = Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

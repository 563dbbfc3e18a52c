//! One prefill and one decode server, in one process that does little else than to copy bytes.

use std::io;
use std::net::SocketAddr;

use super::{Child, block_on};
use crate::canned::{Plan, Seen};
use crate::load::ask;

/// A running pair.
pub(crate) struct Upstreams {
    child: Child,
    pub(crate) prefill: SocketAddr,
    pub(crate) decode: SocketAddr,
}

impl Upstreams {
    pub(crate) fn start(cores: &[u32]) -> io::Result<Self> {
        let (child, lines) = Child::own(&["canned"], cores, 2)?;
        let addr = |line: usize| {
            let url = lines.get(line).and_then(|line: &String| line.rsplit_once("http://"));
            url.and_then(|(_, addr)| addr.parse().ok())
                .ok_or_else(|| io::Error::other("the servers did not start"))
        };
        Ok(Self { prefill: addr(0)?, decode: addr(1)?, child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Sets both servers' plan and their counters to zero.
    pub(crate) fn set(&self, plan: &Plan) -> io::Result<()> {
        for server in [self.prefill, self.decode] {
            block_on(ask_canned(server, "PUT", &plan.target()))??;
        }
        Ok(())
    }

    /// What prefill and decode have seen since then.
    pub(crate) fn seen(&self) -> io::Result<[Seen; 2]> {
        Ok([
            block_on(ask_canned(self.prefill, "GET", "/canned"))??,
            block_on(ask_canned(self.decode, "GET", "/canned"))??,
        ])
    }
}

async fn ask_canned(server: SocketAddr, method: &str, target: &str) -> io::Result<Seen> {
    let (_, body) = ask(server, method, target).await?;
    Ok(serde_json::from_str(&body)?)
}

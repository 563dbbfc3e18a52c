//! A canned prefill and a canned decode server, both in one process that does little but copy bytes.

use std::io;
use std::net::SocketAddr;

use super::{Child, block_on};
use crate::canned::{Plan, RequestCounts};
use crate::load::fetch;

/// A running pair.
pub(crate) struct Backends {
    child: Child,
    pub(crate) prefill: SocketAddr,
    pub(crate) decode: SocketAddr,
}

impl Backends {
    pub(crate) fn start(cores: &[u32]) -> io::Result<Self> {
        let (child, lines) = Child::spawn_self(&["canned"], cores, 2)?;
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

    /// Sets the response plan of both servers and resets their counters.
    pub(crate) fn set(&self, plan: &Plan) -> io::Result<()> {
        for server in [self.prefill, self.decode] {
            block_on(admin_request(server, "PUT", &plan.target()))??;
        }
        Ok(())
    }

    /// The counters of prefill and decode since then.
    pub(crate) fn counts(&self) -> io::Result<[RequestCounts; 2]> {
        Ok([
            block_on(admin_request(self.prefill, "GET", "/canned"))??,
            block_on(admin_request(self.decode, "GET", "/canned"))??,
        ])
    }
}

async fn admin_request(server: SocketAddr, method: &str, target: &str) -> io::Result<RequestCounts> {
    let (_, body) = fetch(server, method, target).await?;
    Ok(serde_json::from_str(&body)?)
}

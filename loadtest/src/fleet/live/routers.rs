//! The routers of a comparison, each with one of its policies, in front of all servers of the fleet.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::super::trace::Request;
use super::replay::Client;
use super::servers::{Clock, Servers};
use super::text::{Dialect, body};
use crate::testbed::{Child, free_port};

/// Python routers need several seconds, and wait for all servers.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A router program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    MiniLb,
    SglangRouter,
    Smg,
    PythonMiniLb,
}

/// A router with one of its policies: `mini-lb:cache_aware`, `smg:prefix_hash`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterPolicy {
    program: Program,
    /// With flags that follow it, as in `cache_aware --cache-threshold 0.5`.
    policy: String,
}

impl FromStr for RouterPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, policy) = text.split_once(':').ok_or("not ROUTER:POLICY")?;
        let program = match name {
            "mini-lb" => Program::MiniLb,
            "sglang-router" => Program::SglangRouter,
            "smg" => Program::Smg,
            "mini_lb.py" => Program::PythonMiniLb,
            _ => return Err("the routers are mini-lb, sglang-router, smg and mini_lb.py".to_owned()),
        };
        Ok(Self { program, policy: policy.to_owned() })
    }
}

impl fmt::Display for RouterPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.program {
            Program::MiniLb => "mini-lb",
            Program::SglangRouter => "sglang-router",
            Program::Smg => "smg",
            Program::PythonMiniLb => "mini_lb.py",
        };
        write!(f, "{name}:{}", self.policy)
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    pub(super) mini_lb: PathBuf,
    /// The Python of the peers' environment.
    pub(super) python: PathBuf,
}

impl RouterPolicy {
    /// Starts it and waits until a request has come through it.
    pub(super) async fn start(
        &self,
        programs: &Programs,
        servers: &Servers,
        cores: &[u32],
        folder: &Path,
    ) -> io::Result<(Child, SocketAddr)> {
        let port = free_port()?;
        let command = self.command(programs, servers, port)?;
        let mut child = Child::start(&command, cores, folder, &format!("{self}.log"))?;
        let router = SocketAddr::from(([127, 0, 0, 1], port));
        let deadline = Instant::now() + START_TIMEOUT;
        while !is_ready(router).await {
            if child.has_exited() || Instant::now() > deadline {
                return Err(io::Error::other(format!("{self} does not respond: see its log")));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok((child, router))
    }

    fn command(&self, programs: &Programs, servers: &Servers, port: u16) -> io::Result<Vec<OsString>> {
        let Self { program, policy } = self;
        let (program, module) = match program {
            // No admin listener: its port may be another router's.
            Program::MiniLb => (&programs.mini_lb, "--prometheus-port 0".to_owned()),
            Program::SglangRouter => (
                &programs.python,
                format!("-m sglang_router.launch_router {}", gateway_flags(servers.speed())?),
            ),
            Program::Smg => {
                let poll = scaled(LOAD_POLL, servers.speed());
                let flags = gateway_flags(servers.speed())?;
                (&programs.python, format!("-m smg.launch_router --load-monitor-interval {poll} {flags}"))
            }
            Program::PythonMiniLb => {
                (&programs.python, "-m sglang_router.launch_router --mini-lb --pd-disaggregation".to_owned())
            }
        };
        let log = if self.program == Program::MiniLb { "warn" } else { "error" };
        let prefill = servers.prefill().map(|server| format!("--prefill http://{server} 8998"));
        let decode = servers.decode().map(|server| format!("--decode http://{server}"));
        let servers = prefill.chain(decode).collect::<Vec<_>>().join(" ");
        let arguments =
            format!("{module} {servers} --host 127.0.0.1 --port {port} --policy {policy} --log-level {log}");
        let arguments = arguments.split_whitespace().map(OsString::from);
        Ok([OsString::from(program)].into_iter().chain(arguments).collect())
    }
}

/// Seconds between smg's polls of loads, and between evictions of both gateways: their defaults.
const LOAD_POLL: f64 = 10.0;
const EVICTION: f64 = 60.0;

/// A router's own interval in seconds by the model's clock, as far as its flag can tell.
fn scaled(interval: f64, speed: f64) -> u64 {
    (interval / speed).round().max(1.0) as u64
}

/// Flags that only sglang-router and smg have. What they do by their clock, they do as often in the model's
/// time as they would in ours.
fn gateway_flags(speed: f64) -> io::Result<String> {
    let port = free_port()?;
    let eviction = scaled(EVICTION, speed);
    Ok(format!(
        "--pd-disaggregation --prometheus-port {port} --max-concurrent-requests 20000 --worker-startup-check-interval 1 --eviction-interval-secs {eviction}"
    ))
}

/// Whether a short request gets its response.
async fn is_ready(router: SocketAddr) -> bool {
    let request = Request { at: 0.0, input: 1, output: 1, blocks: vec![u64::MAX] };
    let probe = body(usize::MAX, &request, Dialect::Completions);
    Client::new(router).send(probe, Dialect::Completions, Clock::new(1.0)).await.is_ok()
}

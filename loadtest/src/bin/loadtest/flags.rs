//! Command-line flags, and the load that they describe.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use loadtest::load::{Load, Mix, Mode, Request, RequestKind, Until};
use loadtest::process::WatchedProcess;
use loadtest::{compare, fleet, floor, memory, soak};

/// Puts load on a router and measures what it costs.
#[derive(Debug, Parser)]
#[command(name = "loadtest")]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the load generator against one address.
    Run(RunFlags),
    /// Run a prefill and a decode server with canned responses, which cost little CPU.
    Canned(CannedFlags),
    /// Compare mini-lb with other routers, scenario by scenario.
    Compare(compare::Options),
    /// Run a bare relay in front of a prefill and a decode server: the lower bound of what a router costs.
    Floor(floor::Options),
    /// Send a day's requests; memory and descriptors of the router must not grow.
    Soak(soak::Options),
    /// Measure the memory of an open stream and of a body in flight.
    Memory(memory::Options),
    /// Replay traces through routers, in front of a model of a fleet on loopback.
    Fleet(fleet::live::Options),
    /// Play traces through a model of a fleet, and compare policies that choose servers.
    Simulate(fleet::Experiment),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoadKind {
    Chat,
    ChatStream,
    Logprobs,
    LogprobStream,
    /// The mixture of `soak`: small responses, streams, and clients that disconnect.
    Mixed,
}

#[derive(Debug, Args)]
pub(crate) struct RunFlags {
    /// URL to load, for example http://127.0.0.1:8000.
    #[arg(long)]
    url: String,
    /// Kind of requests.
    #[arg(long, value_enum, default_value = "chat")]
    kind: LoadKind,
    /// Size of a request body, in bytes.
    #[arg(long, default_value_t = 300)]
    body: usize,
    /// Number of tokens in a complete stream.
    #[arg(long, default_value_t = 64)]
    tokens: u32,
    /// Number of keep-alive connections.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Open loop at this many requests per second. Without it (closed loop) each connection waits for its
    /// response before it sends the next request.
    #[arg(long)]
    rate: Option<f64>,
    /// Measured time, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Send this many requests instead of measuring for a time.
    #[arg(long, conflicts_with = "seconds")]
    requests: Option<u64>,
    /// Warm-up before measuring starts, in seconds.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Time over which connections start, in seconds.
    #[arg(long, default_value_t = 0.0)]
    ramp: f64,
    /// Measure the CPU time and memory of this process, too; may be repeated.
    #[arg(long, value_name = "NAME=PID", value_parser = watch)]
    watch: Vec<WatchedProcess>,
    /// Prefix of the progress line.
    #[arg(long, default_value = "loadtest")]
    label: String,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CannedFlags {
    /// Port of prefill on 127.0.0.1; 0 picks a free one.
    #[arg(long, default_value_t = 0)]
    pub(crate) prefill_port: u16,
    /// Port of decode; 0 picks a free one.
    #[arg(long, default_value_t = 0)]
    pub(crate) decode_port: u16,
}

fn watch(text: &str) -> Result<WatchedProcess, String> {
    let (name, pid) = text.split_once('=').ok_or("not NAME=PID")?;
    Ok(WatchedProcess { name: name.to_owned(), pid: pid.parse().map_err(|_| "not a process id")? })
}

impl RunFlags {
    pub(crate) fn load(&self) -> io::Result<Load> {
        let target = address(&self.url)?;
        let requests = match self.kind {
            LoadKind::Mixed => Mix::soak(target, self.tokens),
            LoadKind::Chat => vec![self.request(target, RequestKind::Chat)],
            LoadKind::ChatStream => vec![self.request(target, RequestKind::ChatStream)],
            LoadKind::Logprobs => vec![self.request(target, RequestKind::Logprobs)],
            LoadKind::LogprobStream => vec![self.request(target, RequestKind::LogprobStream)],
        };
        let until = self.requests.map_or(Until::Time(seconds(self.seconds)?), Until::Count);
        Ok(Load {
            target,
            requests,
            connections: self.connections,
            mode: self.rate.map_or(Mode::Closed, |rate| Mode::Open { rate }),
            ramp: seconds(self.ramp)?,
            warmup: seconds(self.warmup)?,
            until,
            watch: self.watch.clone(),
            label: Some(self.label.clone()),
        })
    }

    fn request(&self, target: SocketAddr, kind: RequestKind) -> Request {
        Request::new(target, kind, self.body, self.tokens)
    }
}

fn seconds(number: f64) -> io::Result<Duration> {
    Duration::try_from_secs_f64(number).map_err(io::Error::other)
}

fn address(url: &str) -> io::Result<SocketAddr> {
    let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let mut found = authority.to_socket_addrs()?;
    found.next().ok_or_else(|| io::Error::other(format!("{url} has no address")))
}

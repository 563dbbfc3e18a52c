//! Flags, and the run that they describe.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use loadtest::load::{Kind, Load, Mix, Mode, Request, Until};
use loadtest::process::Watch;
use loadtest::{compare, memory, soak};

/// Puts load on a router, and measures what it costs.
#[derive(Debug, Parser)]
#[command(name = "loadtest")]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The generator: load on one address.
    Run(RunFlags),
    /// A prefill and a decode server that cost little.
    Canned(CannedFlags),
    /// This router and its peers, scenario by scenario.
    Compare(compare::Options),
    /// Many requests; memory and descriptors must not grow.
    Soak(soak::Options),
    /// What an idle stream and a body in flight take.
    Memory(memory::Options),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Chat,
    ChatStream,
    Logprobs,
    LogprobStream,
    /// Small answers, streams, and clients that leave.
    Day,
}

#[derive(Debug, Args)]
pub(crate) struct RunFlags {
    /// The address to load, for example http://127.0.0.1:8000.
    #[arg(long)]
    url: String,
    /// What to send.
    #[arg(long, value_enum, default_value = "chat")]
    kind: What,
    /// Size of a request's body, in bytes.
    #[arg(long, default_value_t = 300)]
    body: usize,
    /// Tokens that are a complete stream.
    #[arg(long, default_value_t = 64)]
    tokens: u32,
    /// Connections.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Requests a second, due whether or not answers come; without it each connection waits for its answer.
    #[arg(long)]
    rate: Option<f64>,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Send so many requests instead.
    #[arg(long, conflicts_with = "seconds")]
    requests: Option<u64>,
    /// Seconds before anything is measured.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Seconds over which connections start.
    #[arg(long, default_value_t = 0.0)]
    ramp: f64,
    /// A process whose cost is measured; may be repeated.
    #[arg(long, value_name = "NAME=PID", value_parser = watch)]
    watch: Vec<Watch>,
    /// What the progress line begins with.
    #[arg(long, default_value = "loadtest")]
    label: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CannedFlags {
    /// Prefill's port on 127.0.0.1; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    pub(crate) prefill_port: u16,
    /// Decode's port.
    #[arg(long, default_value_t = 0)]
    pub(crate) decode_port: u16,
}

fn watch(text: &str) -> Result<Watch, String> {
    let (name, pid) = text.split_once('=').ok_or("not NAME=PID")?;
    Ok(Watch { name: name.to_owned(), pid: pid.parse().map_err(|_| "not a process id")? })
}

impl RunFlags {
    pub(crate) fn load(&self) -> io::Result<Load> {
        let target = address(&self.url)?;
        let requests = match self.kind {
            What::Day => Mix::day(target, self.tokens),
            What::Chat => vec![self.request(target, Kind::Chat)],
            What::ChatStream => vec![self.request(target, Kind::ChatStream)],
            What::Logprobs => vec![self.request(target, Kind::Logprobs)],
            What::LogprobStream => vec![self.request(target, Kind::LogprobStream)],
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

    fn request(&self, target: SocketAddr, kind: Kind) -> Request {
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

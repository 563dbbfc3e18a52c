//! `sglang-sim`: a simulated SGLang server, or a pair of them, as a process. It drains after SIGTERM and
//! stops at once after SIGINT. Only flags and signals are handled here.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, ValueEnum};
use loadtest::sim::{EncoderConfig, LoadBalance, Role, Sim, SimConfig};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Server {
    Prefill,
    Decode,
    Regular,
    /// Encodes images, audio and video for language-only servers.
    Encode,
    /// A prefill and a decode server in one process.
    Pair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Balance {
    FollowBootstrapRoom,
    RoundRobin,
}

/// Simulates SGLang servers: their protocol, errors and timeouts, without a model.
#[derive(Debug, Parser)]
#[command(name = "sglang-sim")]
struct Flags {
    /// Role of the server.
    #[arg(long)]
    role: Server,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port of the API; 0 picks a free one. With `pair` it is prefill's.
    #[arg(long, default_value_t = 30000)]
    port: u16,
    /// With `pair`: port of the decode server.
    #[arg(long, default_value_t = 30001)]
    decode_port: u16,
    /// Prefill: port of the bootstrap server, 0 picks a free one. Decode: the port that it assumes when a
    /// request has none.
    #[arg(long, default_value_t = 8998)]
    bootstrap_port: u16,
    /// Decode: milliseconds from the end of the transfer to the first token.
    #[arg(long, default_value_t = 0.0, value_parser = number)]
    first_token_ms: f64,
    /// Decode: milliseconds between two tokens.
    #[arg(long, default_value_t = 0.0, value_parser = number)]
    inter_token_ms: f64,
    /// Prefill: milliseconds from when both legs have met to the end of the transfer.
    #[arg(long, default_value_t = 0.0, value_parser = number)]
    prefill_ms: f64,
    /// Prefill: milliseconds from the end of the transfer to its HTTP response.
    #[arg(long, default_value_t = 0.0, value_parser = number)]
    prefill_response_delay_ms: f64,
    /// Factor for SGLang's own timeouts (300 s, 14 s, 4 s, ...).
    #[arg(long, default_value_t = 1.0, value_parser = number)]
    time_scale: f64,
    /// Seconds after which an idle connection is closed.
    #[arg(long, default_value_t = 5.0, value_parser = number)]
    keep_alive_secs: f64,
    /// Maximum tokens of prompt and output together.
    #[arg(long, default_value_t = 1 << 20)]
    context_length: usize,
    /// Stream only new tokens on /generate, instead of all tokens so far.
    #[arg(long)]
    incremental_streaming_output: bool,
    /// Leave out the prompt's empty lists of logprobs, as SGLang's Rust front end does.
    #[arg(long)]
    rust_front_end: bool,
    /// Have images, audio and video encoded by encoders.
    #[arg(long)]
    language_only: bool,
    /// Language-only: port on which encoders are registered, 0 picks a free one.
    #[arg(long, default_value_t = 8997)]
    encoder_bootstrap_port: u16,
    /// Language-only: encoders that are registered from the start.
    #[arg(long, num_args = 1..)]
    encoder_urls: Vec<String>,
    /// Encoder: the status with which every /encode fails.
    #[arg(long, value_parser = clap::value_parser!(u16).range(400..600))]
    encode_status: Option<u16>,
    /// Encoder: milliseconds that /health takes.
    #[arg(long, default_value_t = 0.0, value_parser = number)]
    health_ms: f64,
    /// Data-parallel ranks.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    dp_size: u16,
    /// How a rank is chosen for a request that names none [default: by the room on prefill, else in turn].
    #[arg(long)]
    load_balance_method: Option<Balance>,
    /// Each rank remembers whole prompts, and reports them as cached when they come again. Not on decode.
    #[arg(long)]
    prefix_cache: bool,
    /// Bearer token that requests must have.
    #[arg(long)]
    api_key: Option<String>,
    /// Name of the served model.
    #[arg(long, default_value = "tiny")]
    model: String,
    /// Worker threads [default: one per core].
    #[arg(long)]
    threads: Option<usize>,
}

/// Parses a number of seconds or milliseconds that is finite and not negative.
fn number(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..1e12).contains(&number) {
        Ok(number)
    } else {
        Err("must be at least 0 and below 1e12".to_owned())
    }
}

impl Flags {
    fn config(&self, role: Role, port: u16) -> SimConfig {
        let millis = |number: f64| Duration::from_secs_f64(number / 1e3);
        SimConfig {
            role,
            addr: Some(SocketAddr::from((self.host, port))),
            bootstrap_port: Some(self.bootstrap_port),
            model: self.model.clone(),
            first_token: millis(self.first_token_ms),
            inter_token: millis(self.inter_token_ms),
            prefill_time: millis(self.prefill_ms),
            prefill_response_delay: millis(self.prefill_response_delay_ms),
            time_scale: self.time_scale,
            keep_alive: Duration::from_secs_f64(self.keep_alive_secs),
            context_length: self.context_length,
            incremental_output: self.incremental_streaming_output,
            rust_front_end: self.rust_front_end,
            // A decode server of a pair lays out placeholders and encodes nothing.
            language_only: self.language_only && role == Role::Prefill,
            encoder_bootstrap_port: Some(self.encoder_bootstrap_port),
            encoder_urls: self.encoder_urls.clone(),
            encoder: EncoderConfig { failure: self.encode_status, health_time: millis(self.health_ms) },
            dp_size: self.dp_size,
            load_balance: self.load_balance_method.map(|method| match method {
                Balance::FollowBootstrapRoom => LoadBalance::FollowBootstrapRoom,
                Balance::RoundRobin => LoadBalance::RoundRobin,
            }),
            prefix_cache: self.prefix_cache,
            api_key: self.api_key.clone(),
            record: false,
        }
    }

    async fn start(&self) -> io::Result<Vec<Sim>> {
        match self.role {
            Server::Prefill => Ok(vec![Sim::start(self.config(Role::Prefill, self.port)).await?]),
            Server::Decode => Ok(vec![Sim::start(self.config(Role::Decode, self.port)).await?]),
            Server::Regular => Ok(vec![Sim::start(self.config(Role::Regular, self.port)).await?]),
            Server::Encode => Ok(vec![Sim::start(self.config(Role::Encoder, self.port)).await?]),
            Server::Pair => {
                let prefill = Sim::start(self.config(Role::Prefill, self.port)).await?;
                let decode = self.config(Role::Decode, self.decode_port);
                let decode = SimConfig { bootstrap_port: prefill.bootstrap_port(), ..decode };
                Ok(vec![prefill, Sim::start(decode).await?])
            }
        }
    }
}

fn announce(sim: &Sim) -> io::Result<()> {
    let name = if sim.role() == Role::Regular { "regular" } else { sim.role().name() };
    let mut out = io::stdout().lock();
    write!(out, "{name} listening on {}", sim.url())?;
    let has_bootstrap = matches!(sim.role(), Role::Prefill | Role::Decode);
    if let Some(port) = sim.bootstrap_port().filter(|_| has_bootstrap) {
        write!(out, " bootstrap {port}")?;
    }
    if let Some(port) = sim.encoder_bootstrap_port() {
        write!(out, " encoders {port}")?;
    }
    writeln!(out)?;
    out.flush()
}

async fn run(flags: &Flags) -> io::Result<()> {
    // Before the announcement: its reader may send a signal at once.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let sims = flags.start().await?;
    sims.iter().try_for_each(announce)?;
    tokio::select! {
        _ = terminate.recv() => {
            let mut ending = tokio::task::JoinSet::new();
            for sim in sims {
                ending.spawn(sim.terminate());
            }
            tokio::select! {
                _ = ending.join_all() => {}
                // Dropped, the servers stop at once.
                _ = interrupt.recv() => {}
            }
        }
        _ = interrupt.recv() => {
            for sim in sims {
                sim.shutdown().await;
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = flags.threads {
        builder.worker_threads(threads.max(1));
    }
    let result = builder.enable_all().build().and_then(|runtime| runtime.block_on(run(&flags)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sglang-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

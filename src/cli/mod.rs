//! The command line: what was typed, as a [`Plan`].
//!
//! It knows flags and their sentences. Whether the values make sense together
//! is the library's question ([`MiniLbConfig`]), and nothing is started here.

mod unsupported;

use std::ffi::OsString;
use std::fmt::Display;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use mini_lb::{
    DEFAULT_BACKEND_IDLE_TIMEOUT, DEFAULT_CLIENT_IDLE_TIMEOUT, DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_HEALTH_CHECK_INTERVAL, DEFAULT_HEALTH_CHECK_TIMEOUT, DEFAULT_HEALTH_FAILURE_THRESHOLD,
    DEFAULT_HEALTH_SUCCESS_THRESHOLD, DEFAULT_MAX_IDLE_PER_BACKEND, DEFAULT_MAX_MERGE_SIZE,
    DEFAULT_MAX_PAYLOAD_SIZE, DEFAULT_MAX_RETRIES, DEFAULT_REQUEST_BODY_IDLE_TIMEOUT,
    DEFAULT_REQUEST_HEAD_TIMEOUT, DEFAULT_REQUEST_TIMEOUT, DEFAULT_SHUTDOWN_GRACE_PERIOD,
    DEFAULT_SHUTDOWN_LAME_DUCK, DEFAULT_STREAM_IDLE_TIMEOUT, MiniLbConfig, Random, RoundRobin,
};

use unsupported::{ACCEPTED, POLICIES, REFUSED};

/// What the program is to do.
pub(crate) struct Plan {
    pub(crate) config: MiniLbConfig,
    pub(crate) log_level: LogLevel,
    /// Servers, policies and workers in a few words, for the log.
    pub(crate) summary: String,
}

/// Reads a command line, program name first. The error may also be a request for help or the version: its
/// [`exit`](clap::Error::exit) does what is right for each.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Plan, clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    refuse_unsupported(&args)?;
    let matches = command().try_get_matches_from(args)?;
    Flags::from_arg_matches(&matches)?.plan(&Servers::from_matches(&matches)?)
}

/// A usage error of one sentence: `error: ` before it and exit code 2.
pub(crate) fn refusal(sentence: impl Display) -> clap::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{sentence}\n"))
}

/// Runs before clap, which could only say that it does not know the flag.
///
/// A word that begins with `--` is never a value (neither here nor in argparse), so values cannot be mistaken
/// for flags. A request for help ends the search, as it ends argparse's.
fn refuse_unsupported(args: &[OsString]) -> Result<(), clap::Error> {
    let words = args.iter().skip(1).filter_map(|arg| arg.to_str());
    for word in words.take_while(|word| !["--", "--help", "-h", "--version", "-V"].contains(word)) {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        if let Some((flag, instead)) = REFUSED.iter().find(|(flag, _)| *flag == name) {
            return Err(refusal(format_args!("{flag} is not supported: {instead}")));
        }
    }
    Ok(())
}

fn command() -> Command {
    let empty = Command::new("mini-lb")
        .disable_help_flag(true)
        .disable_version_flag(true)
        // As in argparse, the last of several wins.
        .args_override_self(true);
    Flags::augment_args(empty.args(server_args()))
        .args(ACCEPTED.iter().map(|flag| accepted_arg(flag)))
        .args(help_args())
        .version(env!("CARGO_PKG_VERSION"))
        .about("Routes SGLang requests to pairs of a prefill and a decode server, byte for byte.")
        .override_usage("mini-lb --prefill <URL> [PORT|none]... --decode <URL>... [OPTIONS]")
        .after_help(EXAMPLE)
}

const EXAMPLE: &str = "\
Example:
  mini-lb --prefill http://10.0.0.1:30000 8998 --prefill http://10.0.0.2:30000 none \\
          --decode http://10.0.0.3:30000 --host 0.0.0.0 --port 8000

The flags are those of `python -m sglang_router.launch_router --pd-disaggregation --mini-lb`.
One of its flags that mini-lb does not support is refused by name.";

/// The flags that clap's derive can express; [`Servers`] has the others.
#[derive(Debug, Args)]
struct Flags {
    #[command(flatten, next_help_heading = "Choosing servers")]
    choosing: Choosing,
    #[command(flatten, next_help_heading = "Listening")]
    listening: Listening,
    #[command(flatten, next_help_heading = "Limits and timeouts")]
    limits: Limits,
    #[command(flatten, next_help_heading = "Health of servers")]
    health: Health,
    #[command(flatten, next_help_heading = "Sockets and threads")]
    sockets: Sockets,
    #[command(flatten, next_help_heading = "Logging")]
    logging: Logging,
}

impl Flags {
    fn plan(self, servers: &Servers) -> Result<Plan, clap::Error> {
        let (prefill_policy, decode_policy) = self.choosing.policies()?;
        let workers = self.sockets.workers();
        let config = MiniLbConfig::new(
            &self.listening.host,
            self.listening.port,
            servers.prefill.clone(),
            servers.decode.clone(),
            self.limits.request_timeout_secs.into(),
        );
        let config = servers.add_bootstrap_hosts(config);
        let config = decode_policy.for_decode(prefill_policy.for_prefill(config));
        let config = self.health.add(self.limits.add(config));
        let config = self.sockets.add(config).worker_threads(workers);
        let summary = format!(
            "{} prefill, {} decode, policy {}/{}, {workers} worker{}",
            servers.prefill.len(),
            servers.decode.len(),
            prefill_policy.name(),
            decode_policy.name(),
            if workers == 1 { "" } else { "s" },
        );
        Ok(Plan { config, log_level: self.logging.log_level, summary })
    }
}

/// Built by hand: derive cannot keep the values of one `--prefill` apart from those of the next.
struct Servers {
    prefill: Vec<(String, Option<u16>)>,
    decode: Vec<String>,
    /// A prefill server's URL and the host that decode servers know it by.
    bootstrap_hosts: Vec<(String, String)>,
}

fn server_args() -> [Arg; 3] {
    let arg = |name| {
        let arg = Arg::new(name).long(name).action(ArgAction::Append).help_heading("Servers");
        arg.value_parser(NonEmptyStringValueParser::new())
    };
    [
        arg("prefill").num_args(1..=2).value_names(["URL", "PORT|none"]).help(
            "A prefill server and its --disaggregation-bootstrap-port; with none or nothing as PORT, decode \
             servers use their own. May be repeated",
        ),
        arg("decode").num_args(1).value_name("URL").help("A decode server. May be repeated"),
        arg("prefill-bootstrap-host").num_args(2).value_names(["URL", "HOST"]).help(
            "Tells decode servers to find the prefill server at URL under HOST instead of the URL's own \
             host. May be repeated",
        ),
    ]
}

impl Servers {
    fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let prefill = occurrences(matches, "prefill").map(|values| prefill_server(&values));
        let pair = |values: Vec<String>| (values[0].clone(), values[1].clone());
        Ok(Self {
            prefill: prefill.collect::<Result<_, _>>()?,
            decode: occurrences(matches, "decode").flatten().collect(),
            bootstrap_hosts: occurrences(matches, "prefill-bootstrap-host").map(pair).collect(),
        })
    }

    fn add_bootstrap_hosts(&self, config: MiniLbConfig) -> MiniLbConfig {
        self.bootstrap_hosts.iter().fold(config, |config, (url, host)| config.bootstrap_host(url, host))
    }
}

/// The values of each use of a flag; clap has checked how many there are.
fn occurrences<'a>(matches: &'a ArgMatches, flag: &str) -> impl Iterator<Item = Vec<String>> + use<'a> {
    matches.get_occurrences::<String>(flag).into_iter().flatten().map(|values| values.cloned().collect())
}

fn prefill_server(values: &[String]) -> Result<(String, Option<u16>), clap::Error> {
    let url = values[0].clone();
    match values.get(1) {
        None => Ok((url, None)),
        Some(port) if port.eq_ignore_ascii_case("none") => Ok((url, None)),
        Some(port) => match port.parse() {
            Ok(port) => Ok((url, Some(port))),
            Err(_) => Err(refusal(format_args!(
                "--prefill {} {}: the bootstrap port must be between 1 and 65535, or none",
                url.escape_debug(),
                port.escape_debug(),
            ))),
        },
    }
}

#[derive(Debug, Args)]
struct Choosing {
    /// How servers are chosen: random or round_robin
    #[arg(long, value_name = "POLICY", default_value = "random")]
    policy: String,
    /// How prefill servers are chosen [default: --policy]
    #[arg(long, value_name = "POLICY")]
    prefill_policy: Option<String>,
    /// How decode servers are chosen [default: --policy]
    #[arg(long, value_name = "POLICY")]
    decode_policy: Option<String>,
}

impl Choosing {
    /// The policies for prefill and for decode.
    fn policies(&self) -> Result<(Policy, Policy), clap::Error> {
        let both = Policy::parse("--policy", &self.policy)?;
        let own =
            |flag, name: &Option<String>| name.as_ref().map_or(Ok(both), |name| Policy::parse(flag, name));
        Ok((own("--prefill-policy", &self.prefill_policy)?, own("--decode-policy", &self.decode_policy)?))
    }
}

#[derive(Debug, Clone, Copy)]
enum Policy {
    Random,
    RoundRobin,
}

impl Policy {
    fn parse(flag: &str, name: &str) -> Result<Self, clap::Error> {
        match name {
            "random" => Ok(Self::Random),
            "round_robin" => Ok(Self::RoundRobin),
            theirs if POLICIES.contains(&theirs) => Err(refusal(format_args!(
                "{flag} {theirs} is not supported: \
                 use random, as sglang_router does under --mini-lb, or round_robin"
            ))),
            unknown => {
                let unknown = unknown.escape_debug();
                Err(refusal(format_args!("{flag} {unknown}: not a policy; use random or round_robin")))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round_robin",
        }
    }

    fn for_prefill(self, config: MiniLbConfig) -> MiniLbConfig {
        match self {
            Self::Random => config.prefill_policy(Random),
            Self::RoundRobin => config.prefill_policy(RoundRobin::default()),
        }
    }

    fn for_decode(self, config: MiniLbConfig) -> MiniLbConfig {
        match self {
            Self::Random => config.decode_policy(Random),
            Self::RoundRobin => config.decode_policy(RoundRobin::default()),
        }
    }
}

#[derive(Debug, Args)]
struct Listening {
    /// Address to listen on
    #[arg(long, default_value = "0.0.0.0")]
    host: String,
    /// Port to listen on
    #[arg(long, default_value_t = 30_000)]
    port: u16,
}

/// Seconds are `u32`, 136 years at most, so that no deadline overflows the clock.
#[derive(Debug, Args)]
struct Limits {
    /// Longest time a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_TIMEOUT))]
    request_timeout_secs: u32,
    /// Longest time a stream may be silent once it has begun
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_STREAM_IDLE_TIMEOUT))]
    stream_idle_timeout_secs: u32,
    /// How often a request is sent again that no server can have seen: a connection could not be opened, or a kept
    /// one had been closed
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_MAX_RETRIES)]
    retry_max_retries: u32,
    /// Send a request again, as often, if a server refuses it with one of these, such as 429,503; each attempt may cost
    /// a server work
    #[arg(long, value_name = "STATUS", value_delimiter = ',', value_parser = value_parser!(u16).range(400..600))]
    retry_on_status: Vec<u16>,
    /// Never send a request again
    #[arg(long)]
    disable_retries: bool,
    /// Longest time a client may take to send a request's head
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_HEAD_TIMEOUT))]
    request_head_timeout_secs: u32,
    /// Longest pause within a request's body
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_REQUEST_BODY_IDLE_TIMEOUT))]
    request_body_idle_timeout_secs: u32,
    /// Longest time a client's connection may stay without a request
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_CLIENT_IDLE_TIMEOUT))]
    client_idle_timeout_secs: u32,
    /// Longest time a connection to a server may take to open
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_CONNECT_TIMEOUT))]
    connect_timeout_secs: u32,
    /// Time in which a router that got SIGTERM or SIGINT goes on taking connections, while /ready says 503
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_SHUTDOWN_LAME_DUCK))]
    shutdown_lame_duck_secs: u32,
    /// Time that open requests have to finish after that; a second signal ends them at once
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_SHUTDOWN_GRACE_PERIOD))]
    shutdown_grace_period_secs: u32,
    /// Largest request body; a larger one is refused with 413
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_PAYLOAD_SIZE)]
    max_payload_size: usize,
    /// Largest answer, or event of a stream, that is held to merge logprobs; a larger one fails with 502
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_MERGE_SIZE)]
    max_merge_size: usize,
}

impl Limits {
    /// All but the request timeout, which every configuration is made with.
    fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        config
            .stream_idle_timeout(Duration::from_secs(self.stream_idle_timeout_secs.into()))
            .max_retries(if self.disable_retries { 0 } else { self.retry_max_retries })
            .retry_on_status(self.retry_on_status.iter().copied())
            .request_head_timeout(Duration::from_secs(self.request_head_timeout_secs.into()))
            .request_body_idle_timeout(Duration::from_secs(self.request_body_idle_timeout_secs.into()))
            .client_idle_timeout(Duration::from_secs(self.client_idle_timeout_secs.into()))
            .connect_timeout(Duration::from_secs(self.connect_timeout_secs.into()))
            .shutdown_lame_duck(Duration::from_secs(self.shutdown_lame_duck_secs.into()))
            .shutdown_grace_period(Duration::from_secs(self.shutdown_grace_period_secs.into()))
            .max_payload_size(self.max_payload_size)
            .max_merge_size(self.max_merge_size)
    }
}

/// A default of the library, for the help text.
fn seconds(default: Duration) -> u32 {
    u32::try_from(default.as_secs()).unwrap_or(u32::MAX)
}

#[derive(Debug, Args)]
struct Health {
    /// Time from one probe of a healthy server (GET /ready, or /health where that is 404) to the next; one that has
    /// failed is asked once a second
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_HEALTH_CHECK_INTERVAL))]
    health_check_interval_secs: u32,
    /// Longest time a server may take to answer a probe
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_HEALTH_CHECK_TIMEOUT))]
    health_check_timeout_secs: u32,
    /// Failures in a row, of probes and requests, after which a server gets no requests
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_HEALTH_FAILURE_THRESHOLD)]
    health_failure_threshold: u32,
    /// Successes in a row after which it gets requests again
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_HEALTH_SUCCESS_THRESHOLD)]
    health_success_threshold: u32,
    /// Probe no server, and take every one for healthy
    #[arg(long)]
    disable_health_check: bool,
}

impl Health {
    fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        config
            .health_checks(!self.disable_health_check)
            .health_check_interval(Duration::from_secs(self.health_check_interval_secs.into()))
            .health_check_timeout(Duration::from_secs(self.health_check_timeout_secs.into()))
            .health_failure_threshold(self.health_failure_threshold)
            .health_success_threshold(self.health_success_threshold)
    }
}

#[derive(Debug, Args)]
struct Sockets {
    /// Threads that serve, each with connections of its own [default: one a core]
    #[arg(long, value_name = "COUNT")]
    worker_threads: Option<usize>,
    /// Longest time a connection to a server may stay idle; keep it below the server's own keep-alive (5 s in SGLang)
    #[arg(long, value_name = "SECONDS", default_value_t = seconds(DEFAULT_BACKEND_IDLE_TIMEOUT))]
    backend_idle_timeout_secs: u32,
    /// Idle connections that each thread keeps to one server
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_MAX_IDLE_PER_BACKEND)]
    max_idle_per_backend: usize,
    /// Send and receive buffer of every socket [default: tuned by the kernel]
    #[arg(long, value_name = "BYTES")]
    socket_buffer_size: Option<usize>,
}

impl Sockets {
    fn workers(&self) -> usize {
        self.worker_threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// All but the threads: [`Sockets::workers`] counts them once, for the log too.
    fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let config = config
            .backend_idle_timeout(Duration::from_secs(self.backend_idle_timeout_secs.into()))
            .max_idle_per_backend(self.max_idle_per_backend);
        match self.socket_buffer_size {
            Some(bytes) => config.socket_buffer_size(bytes),
            None => config,
        }
    }
}

#[derive(Debug, Args)]
struct Logging {
    /// Least severe events that are logged, to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

/// The two that name this program are in the help, as everyone who moves here types them.
fn accepted_arg(flag: &'static str) -> Arg {
    let name = flag.trim_start_matches('-');
    let shown = ["pd-disaggregation", "mini-lb"].contains(&name);
    let arg = Arg::new(name).long(name).action(ArgAction::SetTrue).hide(!shown);
    arg.help_heading("Compatibility").help("Accepted, no effect: it is what this program does")
}

/// clap's own two would come first, before the headings.
fn help_args() -> [Arg; 2] {
    let arg = |name| Arg::new(name).long(name).help_heading("Help");
    [
        arg("help").short('h').action(ArgAction::Help).help("Print this text"),
        arg("version").short('V').action(ArgAction::Version).help("Print the version"),
    ]
}

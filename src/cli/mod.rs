//! The command line, and what the environment and a file put below it ([`layers`]), as a [`Plan`].
//!
//! It knows flags and their sentences. Whether the values make sense together
//! is the library's question ([`MiniLbConfig`]), and nothing is started here.

mod access;
mod configuring;
mod discovery;
mod gate;
mod layers;
mod limits;
mod logging;
mod operating;
mod servers;
mod tls;
mod understood;
mod unsupported;

use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};
use mini_lb::MiniLbConfig;

use crate::log::LogOptions;
use access::Access;
use configuring::Configuring;
use discovery::{Discovery, Names, name_args};
use gate::Gate;
use layers::Layers;
use limits::{Health, Limits, Sockets};
use logging::{Logging, Tracing};
use operating::Operating;
use servers::{Choosing, Servers, server_args};
use tls::Tls;
pub(crate) use understood::Understood;
use unsupported::{ACCEPTED, REFUSED};

/// What the program is to do.
pub(crate) struct Plan {
    pub(crate) config: MiniLbConfig,
    pub(crate) log: LogOptions,
    /// For the log.
    pub(crate) understood: Understood,
    /// What was asked for by flags that the library does not know, by their names.
    pub(crate) of_the_program: Vec<(&'static str, String)>,
    /// Where it all comes from.
    pub(crate) layers: Layers,
    /// The files that it was read from, or that it names.
    pub(crate) files: Vec<PathBuf>,
    /// The effective configuration as text, if that is all that is wanted.
    pub(crate) check: Option<String>,
}

/// Reads a command line, program name first. The error may also be a request for help or the version: its
/// [`exit`](clap::Error::exit) does what is right for each.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Plan, clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    refuse_unsupported(&args)?;
    let layers = if words_before_help(&args).count() + 1 < args.len() {
        Layers::none(args)
    } else {
        Layers::read(command(), args, environment)?
    };
    plan(layers)
}

fn plan(layers: Layers) -> Result<Plan, clap::Error> {
    let command = command();
    let matches = command.clone().try_get_matches_from(&layers.words)?;
    let flags = Flags::from_arg_matches(&matches)?;
    let check = flags.configuring.check_config.then(|| layers::show(command.clone(), &matches, &layers));
    let files = layers::files(&command, &matches, &layers);
    let servers = Servers::from_matches(&matches).map_err(|error| layers.placed_error(error))?;
    let names = Names::from_matches(&matches).map_err(|error| layers.placed_error(error))?;
    let mut plan = flags.plan(&servers, &names).map_err(|error| layers.placed_error(error))?;
    plan.understood.changed = understood::changed(&matches);
    Ok(Plan { check, files, layers, ..plan })
}

/// What an error says, in one sentence.
pub(crate) fn sentence(error: &clap::Error) -> String {
    layers::sentence(error)
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
    for word in words_before_help(args) {
        let word = word.to_str().unwrap_or_default();
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        if let Some((flag, instead)) = REFUSED.iter().find(|(flag, _)| *flag == name) {
            return Err(refusal(format_args!("{flag} is not supported: {instead}")));
        }
    }
    Ok(())
}

/// The words that a request for help, or for the version, does not make idle.
fn words_before_help(args: &[OsString]) -> impl Iterator<Item = &OsString> {
    let ends = ["--", "--help", "-h", "--version", "-V"];
    args.iter().skip(1).take_while(move |word| !word.to_str().is_some_and(|word| ends.contains(&word)))
}

fn command() -> Command {
    let empty = Command::new("mini-lb")
        .disable_help_flag(true)
        .disable_version_flag(true)
        // As in argparse, the last of several wins.
        .args_override_self(true);
    Flags::augment_args(empty.args(server_args()).args(name_args()))
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
    #[command(flatten, next_help_heading = "TLS and HTTP/2")]
    tls: Tls,
    #[command(flatten, next_help_heading = "Limits and timeouts")]
    limits: Limits,
    #[command(flatten, next_help_heading = "Queue and rate")]
    gate: Gate,
    #[command(flatten, next_help_heading = "Keys and origins")]
    access: Access,
    #[command(flatten, next_help_heading = "Health of servers")]
    health: Health,
    #[command(flatten, next_help_heading = "Servers that come and go")]
    discovery: Discovery,
    #[command(flatten, next_help_heading = "Sockets and threads")]
    sockets: Sockets,
    #[command(flatten, next_help_heading = "Metrics and status")]
    operating: Operating,
    #[command(flatten, next_help_heading = "Logging")]
    logging: Logging,
    #[command(flatten, next_help_heading = "Traces")]
    tracing: Tracing,
    #[command(flatten, next_help_heading = "Configuration")]
    configuring: Configuring,
}

impl Flags {
    fn plan(self, servers: &Servers, names: &Names) -> Result<Plan, clap::Error> {
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
        let config = self.discovery.add(names.add(config));
        let config = self.health.add(self.limits.add(config));
        let config = self.access.add(self.gate.add(config))?;
        let config = self.operating.add(self.sockets.add(config).worker_threads(workers));
        let config = self.tls.add(config);
        let summary = format!(
            "{} prefill, {} decode{}, policy {}/{}, {workers} worker{}",
            servers.prefill.len(),
            servers.decode.len(),
            match names.count() {
                0 => String::new(),
                1 => " and those of a name".to_owned(),
                count => format!(" and those of {count} names"),
            },
            prefill_policy.name(),
            decode_policy.name(),
            if workers == 1 { "" } else { "s" },
        );
        let config = self.tracing.add(self.logging.add(config))?;
        let understood = Understood::new(self.tls.scheme(), summary, servers);
        let of_the_program = self.logging.of_the_program();
        let log = self.logging.into_options();
        let (layers, files, check) = (Layers::none(Vec::new()), Vec::new(), None);
        Ok(Plan { config, log, understood, of_the_program, layers, files, check })
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

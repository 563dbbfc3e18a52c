//! The command line, and below it the environment and a file ([`layers`]), as a [`Plan`].
//!
//! Which options there are is in [`options`]. Whether values make sense is for the
//! library to check ([`MiniLbConfig`]), and nothing is started here.

mod arguments;
mod layers;
mod options;
mod program_options;
mod start_line;
mod stray;
mod unsupported;

use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::error::ErrorKind;
use mini_lb::{DEFAULT_PROMETHEUS_PORT, DEFAULT_REQUEST_TIMEOUT, MiniLbConfig, Reload};
use tracing::level_filters::LevelFilter;

use crate::log::{self, Format, LogOptions};
use layers::Layers;
use options::Flag;
pub(crate) use start_line::StartLine;
use unsupported::{POLICIES, REFUSED};

/// What the program is to do.
pub(crate) struct Plan {
    pub(crate) config: MiniLbConfig,
    pub(crate) log: LogOptions,
    pub(crate) start_line: StartLine,
    /// The options that only the program knows and that need a restart, with their values.
    pub(crate) program_options: Vec<(&'static str, String)>,
    /// Where each value comes from.
    pub(crate) layers: Layers,
    /// The files that the configuration was read from, or that it names.
    pub(crate) files: Vec<PathBuf>,
    /// For `--check-config`: what to do instead of serving.
    pub(crate) check: Option<Check>,
}

/// What `--check-config` does with a good configuration.
pub(crate) enum Check {
    /// Prints it, as this text.
    Configuration(String),
    /// Asks the servers (`--probe`).
    Servers,
}

/// Reads a command line, program name first. The error may also be a request for help or the version: its
/// [`exit`](clap::Error::exit) does what is right for each.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Plan, clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    refuse_unsupported(&args)?;
    let matches =
        arguments::command().try_get_matches_from(&args).map_err(|error| stray::explained(error, &args))?;
    let layers = Layers::read(&matches, environment)?;
    let placed = |sentence: String| refusal(layers.placed(&sentence));
    // First, as the level is a part of the library's configuration: less severe lines are not passed on.
    let log = log_options(&layers).map_err(placed)?;
    let mut config = config(&layers).map_err(placed)?.request_log(log.level, log::log_request);
    if log.trace.is_some() {
        config = config.trace_log(log::trace_request);
    }
    Ok(Plan {
        config,
        log,
        start_line: StartLine::new(&layers),
        program_options: program_options(&layers),
        files: layers.files(),
        check: check(&matches, &layers)?,
        layers,
    })
}

fn check(matches: &ArgMatches, layers: &Layers) -> Result<Option<Check>, clap::Error> {
    match (matches.get_flag("check-config"), matches.get_flag("probe")) {
        (true, false) => Ok(Some(Check::Configuration(layers.effective_configuration()))),
        (true, true) => Ok(Some(Check::Servers)),
        (false, false) => Ok(None),
        // Somebody who only wants to look must not start a router.
        (false, true) => {
            Err(refusal("--probe: goes with --check-config, which does not start the router; give both"))
        }
    }
}

/// The library's configuration. The error is a sentence that begins with the flag.
fn config(layers: &Layers) -> Result<MiniLbConfig, String> {
    refuse_two_modes(layers)?;
    refuse_policies(layers)?;
    refuse_features(layers)?;
    let timeout = DEFAULT_REQUEST_TIMEOUT.as_secs();
    let config = MiniLbConfig::new("0.0.0.0", 30_000, Vec::new(), Vec::new(), timeout);
    // A router without configuration should show its metrics, and two on one machine should both start.
    let mut config = config.admin_address_if_free("127.0.0.1", DEFAULT_PROMETHEUS_PORT);
    // In the order of the table: --policy sets both roles before the options of one role override it.
    for Flag { spec, .. } in options::layered().filter(|flag| flag.is_library) {
        // An option that no layer sets keeps its default, and the admin listener the address above.
        if layers.is_set(spec.name) {
            config =
                config.set_option(spec.name, layers.values(spec.name)).map_err(|error| error.to_string())?;
        }
    }
    Ok(config)
}

fn log_options(layers: &Layers) -> Result<LogOptions, String> {
    let value = |name| layers.value(name);
    // clap knows no types, and the library none of these options.
    let wrong = |name: &str, value: &str, known: &str| {
        Err(format!("--{name} {}: must be {known}", value.escape_debug()))
    };
    let level = match value("log-level") {
        None | Some("info") => LevelFilter::INFO,
        Some("debug") => LevelFilter::DEBUG,
        Some("warn") => LevelFilter::WARN,
        Some("error") => LevelFilter::ERROR,
        Some(other) => return wrong("log-level", other, "debug, info, warn or error"),
    };
    let format = match value("log-format") {
        None | Some("text") => Format::Text,
        Some("json") => Format::Json,
        Some(other) => return wrong("log-format", other, "text or json"),
    };
    let path = |name| value(name).map(PathBuf::from);
    let (folder, trace) = (path("log-dir"), path("trace-log"));
    let trace_max_bytes = number(layers, "trace-log-max-bytes")?;
    Ok(LogOptions { level, format, folder, trace, trace_max_bytes })
}

/// The value of a number among the program's own options, within its bounds.
fn number(layers: &Layers, name: &str) -> Result<u64, String> {
    let spec = options::by_key(name).ok_or_else(|| format!("--{name}: there is no such option"))?;
    let default = spec.default.to_string();
    let value = layers.value(name).unwrap_or(&default);
    let wrong = |why: &str| format!("--{name} {}: {why}", value.escape_debug());
    let number = value.parse().map_err(|_| wrong("not a whole number"))?;
    match (spec.bounds.min..=spec.bounds.max).contains(&number) {
        true => Ok(number),
        false => Err(wrong(&format!("the value must be {}", spec.bounds))),
    }
}

fn program_options(layers: &Layers) -> Vec<(&'static str, String)> {
    let own = options::layered().filter(|flag| !flag.is_library).map(|flag| &flag.spec);
    let own = own.filter(|spec| spec.reload == Reload::AfterRestart);
    own.map(|spec| {
        let default = || spec.default.to_string();
        (spec.name, layers.value(spec.name).map_or_else(default, str::to_owned))
    })
    .collect()
}

/// A usage error of one sentence: `error: ` before it and exit code 2.
pub(crate) fn refusal(sentence: impl Display) -> clap::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{sentence}\n"))
}

/// What an error says, in one sentence, without clap's advice.
pub(crate) fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
    first.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Runs before clap, which could only say that it does not know the flag.
///
/// A word that begins with `--` is never a value (neither here nor in argparse), so values cannot be mistaken
/// for flags. A request for help ends the search, as it ends argparse's.
fn refuse_unsupported(args: &[OsString]) -> Result<(), clap::Error> {
    let ends = ["--", "--help", "-h", "--version", "-V"];
    // A word that is not UTF-8 is no flag, and left to clap.
    let words = args.iter().skip(1).map(|word| word.to_str().unwrap_or_default());
    for word in words.take_while(|word| !ends.contains(word)) {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        if let Some((flag, instead)) = REFUSED.iter().find(|(flag, _)| *flag == name) {
            return Err(refusal(format_args!("{flag} is not supported: {instead}")));
        }
    }
    Ok(())
}

/// sglang_router asks for pairs with a flag, which the library does not know.
fn refuse_two_modes(layers: &Layers) -> Result<(), String> {
    let given = |names: [&'static str; 2]| names.into_iter().find(|name| layers.is_set(name));
    match (given(["worker-urls", "worker-dns"]), layers.is_set("pd-disaggregation")) {
        (Some(flag), true) => Err(format!(
            "--{flag} and --pd-disaggregation exclude each other: requests go to plain servers or to pairs"
        )),
        _ => Ok(()),
    }
}

/// Names the policies of sglang_router that do not exist here, of which the library knows nothing.
fn refuse_policies(layers: &Layers) -> Result<(), String> {
    let flags = ["policy", "prefill-policy", "decode-policy"];
    let policies = flags.iter().filter_map(|flag| Some((flag, layers.value(flag)?)));
    for (flag, policy) in policies {
        if let Some((_, instead)) = POLICIES.iter().find(|(name, _)| *name == policy) {
            return Err(format!("--{flag} {policy} is not supported: {instead}"));
        }
    }
    Ok(())
}

/// Options of features that this program may have been built without: the feature, whether it is there, its
/// options, and what to do instead.
const FEATURES: [(&str, bool, &[&str], &str); 2] = [
    ("otel", cfg!(feature = "otel"), &["otlp-traces-endpoint", "enable-trace"], "leave the flag out"),
    (
        "kubernetes",
        cfg!(feature = "kubernetes"),
        &[
            "service-discovery",
            "selector",
            "prefill-selector",
            "decode-selector",
            "service-discovery-port",
            "service-discovery-namespace",
        ],
        "give headless services with --prefill-dns and --decode-dns",
    ),
];

/// Without a feature, the library could say neither how to get it nor what to do instead.
fn refuse_features(layers: &Layers) -> Result<(), String> {
    for (feature, _, flags, instead) in FEATURES.iter().filter(|(_, is_built, ..)| !is_built) {
        if let Some(flag) = flags.iter().find(|flag| !layers.values(flag).is_empty()) {
            return Err(format!(
                "--{flag} is not supported: this program was built without the feature {feature}; build it with \
                 `cargo build --release --features {feature}`, or {instead}"
            ));
        }
    }
    Ok(())
}

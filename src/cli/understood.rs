//! What was understood of a command line, for the log.

use std::net::SocketAddr;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command};
use tracing::info;

use super::Servers;
use super::limits::{Health, Limits, Sockets};

/// Servers of one role that are named; of more, the number is said.
const MAX_NAMED: usize = 64;

/// What the program says when it starts.
pub(crate) struct Understood {
    /// How clients' URLs begin.
    scheme: &'static str,
    /// Servers, policies and workers, counted.
    summary: String,
    prefill: String,
    decode: String,
    /// Limits that are not at their defaults, as flags.
    pub(super) changed: String,
}

impl Understood {
    pub(super) fn new(scheme: &'static str, summary: String, servers: &Servers) -> Self {
        let prefill = servers.prefill.iter().map(|(url, port)| match port {
            Some(port) => format!("{url} {port}"),
            None => url.clone(),
        });
        let decode = servers.decode.iter().cloned();
        Self { scheme, summary, prefill: named(prefill), decode: named(decode), changed: String::new() }
    }

    pub(crate) fn log(&self, address: SocketAddr) {
        let Self { scheme, summary, prefill, decode, changed } = self;
        let version = env!("CARGO_PKG_VERSION");
        let changed = (!changed.is_empty()).then_some(changed);
        info!(target: "mini_lb", version, prefill, decode, changed, "listening on {scheme}://{address}: {summary}");
    }
}

fn named(servers: impl ExactSizeIterator<Item = String>) -> String {
    let more = servers.len().saturating_sub(MAX_NAMED);
    let named = servers.take(MAX_NAMED).collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// Flags of limits, and of nothing else: no other flag's value is logged, as it may be a key.
pub(super) fn changed(matches: &ArgMatches) -> String {
    let limits = Sockets::augment_args(Health::augment_args(Limits::augment_args(Command::new(""))));
    let changed = limits.get_arguments().filter_map(|arg| {
        let (id, name) = (arg.get_id().as_str(), arg.get_long()?);
        if matches.value_source(id) != Some(ValueSource::CommandLine) {
            return None;
        }
        let values: Vec<_> = matches.get_raw(id)?.map(|value| value.to_string_lossy()).collect();
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let is_switch = !arg.get_action().takes_values();
        (values != defaults).then(|| match is_switch {
            true => format!("--{name}"),
            false => format!("--{name} {}", values.join(",")),
        })
    });
    changed.collect::<Vec<_>>().join(" ")
}

//! The line that is logged when the program starts: which servers, and which options are not at their
//! defaults.

use std::net::SocketAddr;

use mini_lb::ValueKind;
use tracing::{info, warn};

use super::layers::Layers;
use super::options::{self, Flag};
use super::unsupported::WITHOUT_EFFECT;

/// Servers of one role that are named; of the others only the number is logged.
const MAX_NAMED: usize = 64;

/// Sections whose options are in the line anyway, or whose values may hold a token (a collector's URL).
const NOT_LISTED: [&str; 4] = ["Servers", "Load balancing", "Listening", "Traces"];

/// What the program logs when it starts.
pub(crate) struct StartLine {
    /// How clients' URLs begin.
    scheme: &'static str,
    /// Servers, policies and workers, counted.
    summary: String,
    prefill: String,
    decode: String,
    workers: String,
    /// Options of the library that are not at their defaults, as flags.
    changed: String,
    /// Flags that have no effect, and why.
    without_effect: Vec<&'static (&'static str, &'static str)>,
}

impl StartLine {
    pub(super) fn new(layers: &Layers) -> Self {
        Self {
            scheme: if layers.value("tls-cert-path").is_some() { "https" } else { "http" },
            summary: summary(layers),
            prefill: named(&layers.values("prefill")),
            decode: named(&layers.values("decode")),
            workers: named(&layers.values("worker-urls")),
            changed: changed(layers),
            without_effect: WITHOUT_EFFECT
                .iter()
                .filter(|(flag, _)| layers.is_set(flag.trim_start_matches('-')))
                .collect(),
        }
    }

    pub(crate) fn log(&self, address: SocketAddr) {
        let Self { scheme, summary, prefill, decode, workers, changed, without_effect } = self;
        for (flag, why) in without_effect {
            warn!(target: "mini_lb", "{flag} has no effect: {why}");
        }
        let version = env!("CARGO_PKG_VERSION");
        // An empty field would look like a value that was lost.
        let shown = |text: &String| (!text.is_empty()).then(|| text.clone());
        let (prefill, decode, workers, changed) =
            (shown(prefill), shown(decode), shown(workers), shown(changed));
        info!(target: "mini_lb", version, prefill, decode, workers, changed, "listening on {scheme}://{address}: {summary}");
    }
}

fn summary(layers: &Layers) -> String {
    let count = |name| layers.values(name).len();
    let names = match count("prefill-dns") + count("decode-dns") + count("worker-dns") {
        0 => String::new(),
        1 => " and those of 1 DNS name".to_owned(),
        count => format!(" and those of {count} DNS names"),
    };
    let names = match layers.is_set("service-discovery") {
        true => format!("{names} and those of Kubernetes"),
        false => names,
    };
    // As the library does: the role's own option, then --policy, then its default.
    let policy = |role| layers.value(role).or(layers.value("policy")).unwrap_or("cache_aware");
    // Of decode servers it chooses as the other does.
    let decode_policy = match policy("decode-policy") {
        "cache_aware" => "least_load",
        other => other,
    };
    let workers = layers.value("worker-threads").and_then(|text| text.parse().ok());
    let workers = workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let plural = |count| if count == 1 { "" } else { "s" };
    // A worker alone is a server to users of sglang_router.
    let workers = format!("{workers} worker thread{}", plural(workers));
    if layers.is_set("worker-urls") || count("worker-dns") > 0 || layers.is_set("selector") {
        let policy = layers.value("policy").unwrap_or("cache_aware");
        let servers = count("worker-urls");
        let servers = format!("{servers} plain server{}", plural(servers));
        return format!("{servers}{names}, policy {policy}, {workers}");
    }
    format!(
        "{} prefill, {} decode{names}, policy {}/{}, {workers}",
        count("prefill"),
        count("decode"),
        policy("prefill-policy"),
        decode_policy,
    )
}

/// Servers, with their bootstrap ports.
fn named(servers: &[Vec<String>]) -> String {
    let server = |values: &Vec<String>| {
        let known = values.iter().filter(|value| !value.eq_ignore_ascii_case("none"));
        known.map(String::as_str).collect::<Vec<_>>().join(" ")
    };
    // 64 URLs of 100 bytes stay below the 8 KiB at which the log cuts a value.
    let more = servers.len().saturating_sub(MAX_NAMED);
    let named = servers.iter().take(MAX_NAMED).map(server).collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// Options that are not at their defaults. A secret is not logged.
fn changed(layers: &Layers) -> String {
    let is_listed =
        |flag: &&Flag| flag.is_library && !flag.spec.secret && !NOT_LISTED.contains(&flag.section);
    let changed = options::layered().filter(is_listed).filter_map(|Flag { spec, .. }| {
        let occurrences = layers.values(spec.name);
        let values: Vec<String> = occurrences.iter().flatten().cloned().collect();
        match spec.kind {
            ValueKind::Switch => (!occurrences.is_empty()).then(|| format!("--{}", spec.name)),
            _ if values.is_empty() || values == spec.default.values() => None,
            _ => Some(format!("--{} {}", spec.name, values.join(","))),
        }
    });
    changed.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section with another name would bring its values into the log.
    #[test]
    fn the_sections_that_are_not_listed_exist() {
        for section in NOT_LISTED {
            assert!(options::all().any(|flag| flag.section == section), "{section}");
        }
    }
}

//! Whether a configuration can work: checks that involve more than one value.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::{ConfigSnapshot, MiniLbConfig, Options};
use crate::admission::AccessOptions;
use crate::options::BAD_BOOTSTRAP_PORT;
use crate::upstream::{
    Address, DnsName, EncoderSpec, FleetSpec, MAX_SERVERS_PER_ROLE, PrefillSpec, checked_host,
};

/// A configuration that can work.
pub(crate) struct Settings {
    pub(crate) fleet_spec: FleetSpec,
    pub(crate) access: AccessOptions,
    pub(crate) dns_names: Vec<DnsName>,
    #[cfg(feature = "kubernetes")]
    pub(crate) pod_source: Option<crate::upstream::PodSource>,
    pub(crate) encoders: EncoderSpec,
    pub(crate) options: Options,
    pub(crate) snapshot: ConfigSnapshot,
}

impl MiniLbConfig {
    /// Checks everything, and reads the files of certificates and keys. The first fault is the error.
    pub(crate) fn validate(self) -> Result<Settings, ConfigError> {
        let mut options = self.options;
        // What costs nothing is checked first: no file is read for a configuration that cannot work.
        options.check_bounds().map_err(ConfigError)?;
        let dns_names = options.discovery.names()?;
        #[cfg(feature = "kubernetes")]
        let pod_source = options.pod_source()?;
        options.refuse_two_kinds()?;
        options.check_reports()?;
        let (prefill, decode) = (options.prefill_servers()?, options.decode_servers()?);
        let (regular, encoders) = (options.plain_servers()?, options.encoders.spec()?);
        let addresses = || prefill.iter().map(|spec| &spec.address).chain(&decode).chain(&regular);
        refuse_duplicates(
            (prefill.iter().map(|spec| ("--prefill", &spec.address)))
                .chain(decode.iter().map(|address| ("--decode", address)))
                .chain(regular.iter().map(|address| ("--worker-urls", address)))
                .chain(encoders.configured.iter().map(|address| ("--encode", address))),
        )?;
        if prefill.len().max(decode.len()).max(regular.len()) > MAX_SERVERS_PER_ROLE {
            return Err(ConfigError(format!(
                "at most {MAX_SERVERS_PER_ROLE} servers of a role are supported"
            )));
        }
        // Servers behind DNS names need no TLS: their URLs are built with http.
        let mut urls = addresses().chain(&encoders.configured);
        options.load_tls(urls.any(|address| address.tls_name.is_some()))?;
        // Before the snapshot, so that a key which has changed in its file is a change.
        options.keys.read_files()?;
        let access = options.keys.validate()?;
        // Before the snapshot too: --disable-retries and --enable-trace are reported as the options that they
        // set.
        options.apply_switches();
        let has_peers = !options.health.load_poll_interval.is_zero();
        options.policies.configure_cache_aware(options.prefix_index_bytes, has_peers);
        let fleet_spec = FleetSpec {
            prefill,
            decode,
            regular,
            is_regular: options.is_regular(),
            prefill_policy: Arc::clone(&options.policies.prefill.policy),
            decode_policy: Arc::clone(&options.policies.decode.policy),
            regular_policy: Arc::clone(&options.policies.regular.policy),
            is_dp_aware: options.is_dp_aware,
            health: options.health.clone(),
        };
        let snapshot = ConfigSnapshot::of(&mut options);
        Ok(Settings {
            fleet_spec,
            access,
            dns_names,
            #[cfg(feature = "kubernetes")]
            pod_source,
            encoders,
            options,
            snapshot,
        })
    }
}

impl Options {
    /// If the servers are plain ones, none may be of a pair.
    fn refuse_two_kinds(&self) -> Result<(), ConfigError> {
        if !self.is_regular() {
            return Ok(());
        }
        let of_pairs = [
            ("--prefill", self.prefill.is_empty()),
            ("--decode", self.decode.is_empty()),
            ("--prefill-dns", self.discovery.prefill.is_empty()),
            ("--decode-dns", self.discovery.decode.is_empty()),
        ];
        let Some((flag, _)) = of_pairs.into_iter().find(|(_, is_empty)| !is_empty) else { return Ok(()) };
        let own = match (self.worker_urls.is_given, self.has_plain_pods()) {
            (true, _) => "--worker-urls",
            (false, true) => "--selector",
            (false, false) => "--worker-dns",
        };
        Err(ConfigError(format!(
            "{own} and {flag} exclude each other: requests go to plain servers or to pairs"
        )))
    }

    fn plain_servers(&self) -> Result<Vec<Address>, ConfigError> {
        self.worker_urls.urls.iter().map(|url| address("--worker-urls", url)).collect()
    }

    fn prefill_servers(&self) -> Result<Vec<PrefillSpec>, ConfigError> {
        let server = |(url, port): &(String, Option<u16>)| {
            // A flag's 0 was rejected when it was parsed; this is for users of the library.
            if *port == Some(0) {
                return Err(ConfigError(format!("--prefill {url} 0: {BAD_BOOTSTRAP_PORT}")));
            }
            let address = address("--prefill", url)?;
            Ok(PrefillSpec { bootstrap_host: address.host.clone(), address, bootstrap_port: *port })
        };
        let mut servers: Vec<PrefillSpec> = self.prefill.iter().map(server).collect::<Result<_, _>>()?;
        for (url, host) in &self.bootstrap_hosts {
            let flag = "--prefill-bootstrap-host";
            let address = address(flag, url)?;
            // Not by URL: `http://P/` and `http://p:80` are one server.
            let server = servers.iter_mut().find(|server| server.address.key() == address.key());
            let Some(server) = server else {
                return Err(ConfigError(format!("{flag} {url}: no --prefill has this URL")));
            };
            server.bootstrap_host = checked_host(host).ok_or_else(|| {
                let host = host.escape_debug();
                ConfigError(format!("{flag} {url} {host}: the host is not a name or an address"))
            })?;
        }
        Ok(servers)
    }

    fn decode_servers(&self) -> Result<Vec<Address>, ConfigError> {
        self.decode.iter().map(|url| address("--decode", url)).collect()
    }

    /// Applies the options that turn something else on or off.
    fn apply_switches(&mut self) {
        if self.disable_retries {
            self.max_retries = 0;
        }
        self.health.enabled = !self.disable_health_check;
        self.settle_internal_fields();
        self.apply_trace_switch();
    }
}

/// Reads the URL given with `flag`.
pub(super) fn address(flag: &str, url: &str) -> Result<Address, ConfigError> {
    Address::parse(url).map_err(|why| ConfigError(format!("{flag} {}: {why}", url.escape_debug())))
}

fn refuse_duplicates<'a>(
    servers: impl Iterator<Item = (&'static str, &'a Address)>,
) -> Result<(), ConfigError> {
    let mut seen = HashMap::new();
    // By host, port and base path, and over all roles: an SGLang server has one role, and two entries
    // would split its health and its limit of requests in flight.
    for (flag, server) in servers {
        if let Some(before) = seen.insert(server.key(), flag) {
            let how = match before == flag {
                true => format!("given twice with {flag}"),
                false => format!("given with {before} and with {flag}"),
            };
            return Err(ConfigError(format!("{} is {how}: each server may be named once", server.url)));
        }
    }
    Ok(())
}

/// A configuration that cannot work: one sentence that names the option and the value at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub(super) String);

impl ConfigError {
    pub(crate) fn new(sentence: String) -> Self {
        Self(sentence)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn config() -> MiniLbConfig {
        MiniLbConfig::new("127.0.0.1", 1, vec![("http://p".into(), None)], vec!["http://d".into()], u64::MAX)
    }

    #[test]
    fn a_timeout_of_ages_is_shortened_to_what_a_clock_can_count() {
        let settings = config().validate().ok().unwrap();
        assert!(std::time::Instant::now().checked_add(settings.options.request_timeout).is_some());
    }

    /// `tests/options.rs` has every option; here those that no flag can set are.
    #[test]
    fn values_that_methods_set_have_the_same_bounds() {
        let refused = |config: MiniLbConfig| config.validate().err().unwrap().to_string();
        for (config, name) in [
            (config().connect_timeout(Duration::ZERO), "--connect-timeout-secs"),
            (config().max_in_flight_per_decode(0), "--max-in-flight-per-decode"),
            (config().max_concurrent_requests(0), "--max-concurrent-requests"),
        ] {
            assert_eq!(refused(config), format!("{name} 0: the value must be at least 1"));
        }
        assert!(config().connect_timeout(Duration::from_millis(1)).validate().is_ok());
    }

    #[test]
    fn retries_are_for_error_statuses_only() {
        for (status, good) in [(399, false), (400, true), (599, true), (600, false), (200, false)] {
            assert_eq!(config().retry_on_status([503, status]).validate().is_ok(), good, "{status}");
        }
    }

    #[test]
    fn a_server_may_have_one_role_once() {
        for (config, how) in [
            (
                MiniLbConfig::new("h", 1, vec![("http://p".into(), None)], vec!["http://P:80/".into()], 1),
                "with --prefill and with --decode",
            ),
            (
                MiniLbConfig::new("h", 1, vec![("http://p".into(), None); 2], vec!["http://d".into()], 1),
                "twice with --prefill",
            ),
        ] {
            let sentence = format!("http://p:80 is given {how}: each server may be named once");
            assert_eq!(config.validate().err().unwrap().to_string(), sentence);
        }
    }
}

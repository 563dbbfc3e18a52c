//! Whether what was asked for makes sense.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::{MiniLbConfig, Options};
use crate::admission::AccessOptions;
use crate::upstream::{Address, DnsName, FleetSpec, MAX_SERVERS_PER_ROLE, PrefillSpec, Role, checked_host};

impl MiniLbConfig {
    /// Checks everything at once; the first thing found wrong is the error.
    pub(crate) fn settle(mut self) -> Result<Settings, ConfigError> {
        let bad = |what: String| Err(ConfigError(what));
        if self.port == 0 {
            return bad("--port 0: the port to listen on must be between 1 and 65535".into());
        }
        let names = self.options.discovery.names()?;
        let is_named = |role| names.iter().any(|name| name.role == role);
        if self.prefill.is_empty() && !is_named(Role::Prefill) {
            return bad("no prefill server: give at least one --prefill URL [BOOTSTRAP_PORT]".into());
        }
        if self.decode.is_empty() && !is_named(Role::Decode) {
            return bad("no decode server: give at least one --decode URL".into());
        }
        self.options.check()?;
        let mut prefill = Vec::with_capacity(self.prefill.len());
        for (url, port) in &self.prefill {
            if *port == Some(0) {
                return bad(format!(
                    "--prefill {url} 0: the bootstrap port must be between 1 and 65535, or none"
                ));
            }
            let address = address("--prefill", url)?;
            prefill.push(PrefillSpec {
                bootstrap_host: address.host.clone(),
                address,
                bootstrap_port: *port,
            });
        }
        let decode: Vec<Address> =
            self.decode.iter().map(|url| address("--decode", url)).collect::<Result<_, _>>()?;
        for (url, host) in &self.bootstrap_hosts {
            let server = address("--prefill-bootstrap-host", url)?;
            let Some(spec) = prefill.iter_mut().find(|spec| spec.address.authority == server.authority)
            else {
                return bad(format!("--prefill-bootstrap-host {url}: no --prefill has this URL"));
            };
            let Some(host) = checked_host(host) else {
                let what = host.escape_debug();
                return bad(format!(
                    "--prefill-bootstrap-host {url} {what}: the host is not a name or an address"
                ));
            };
            spec.bootstrap_host = host;
        }
        refuse_duplicates(prefill.iter().map(|spec| &spec.address).chain(&decode))?;
        let speaks_tls = |address: &Address| address.tls_name.is_some();
        let any_tls = prefill.iter().map(|spec| &spec.address).chain(&decode).any(speaks_tls);
        self.options.load_tls(any_tls)?;
        let wanted = FleetSpec {
            prefill,
            decode,
            prefill_policy: Arc::clone(&self.options.prefill_policy),
            decode_policy: Arc::clone(&self.options.decode_policy),
            health: self.options.health.clone(),
        };
        if wanted.prefill.len().max(wanted.decode.len()) > MAX_SERVERS_PER_ROLE {
            return bad(format!("there may be {MAX_SERVERS_PER_ROLE} servers of a role"));
        }
        let access = self.options.keys.settle()?;
        Ok(Settings { host: self.host, port: self.port, wanted, names, access, options: self.options })
    }
}

impl Options {
    fn check(&self) -> Result<(), ConfigError> {
        let zero = [
            ("--request-timeout-secs", self.request_timeout.is_zero()),
            ("--stream-idle-timeout-secs", self.stream_idle_timeout.is_zero()),
            ("--request-head-timeout-secs", self.request_head_timeout.is_zero()),
            ("--request-body-idle-timeout-secs", self.request_body_idle_timeout.is_zero()),
            ("--client-idle-timeout-secs", self.client_idle_timeout.is_zero()),
            ("--max-payload-size", self.max_payload_size == 0),
            ("--max-merge-size", self.max_merge_size == 0),
            ("--backend-idle-timeout-secs", self.sockets.idle_timeout.is_zero()),
            ("--connect-timeout-secs", self.sockets.connect_timeout.is_zero()),
            ("--worker-threads", self.worker_threads == 0),
            ("--socket-buffer-size", self.sockets.buffer_size == Some(0)),
            ("--http2-max-streams", self.tls.http2_max_streams == 0),
            ("--health-check-interval-secs", self.health.interval.is_zero()),
            ("--worker-startup-timeout-secs", self.health.startup_timeout.is_zero()),
            ("--worker-startup-check-interval", self.health.startup_interval.is_zero()),
            ("--dns-interval-secs", self.discovery.interval.is_zero()),
            ("--health-check-timeout-secs", self.health.timeout.is_zero()),
            ("--health-failure-threshold", self.health.failure_threshold == 0),
            ("--health-success-threshold", self.health.success_threshold == 0),
        ];
        let zero = zero.into_iter().find_map(|(flag, wrong)| wrong.then_some(flag));
        if let Some(flag) = zero.or_else(|| self.gate.zero()) {
            return Err(ConfigError(format!("{flag} 0: the value must be at least 1")));
        }
        self.check_reports()?;
        match self.retry_on.iter().find(|status| !(400..600).contains(*status)) {
            Some(status) => Err(ConfigError(format!(
                "--retry-on-status {status}: only a status of 400 to 599 is a refusal"
            ))),
            None => Ok(()),
        }
    }
}

/// A configuration that made sense.
pub(crate) struct Settings {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) wanted: FleetSpec,
    pub(crate) access: AccessOptions,
    pub(crate) names: Vec<DnsName>,
    pub(crate) options: Options,
}

/// Reads the URL given with `flag`.
fn address(flag: &str, url: &str) -> Result<Address, ConfigError> {
    Address::parse(url).map_err(|why| ConfigError(format!("{flag} {}: {why}", url.escape_debug())))
}

fn refuse_duplicates<'a>(servers: impl Iterator<Item = &'a Address>) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for server in servers {
        if !seen.insert(&server.authority) {
            return Err(ConfigError(format!("{} is given twice: each server may be named once", server.url)));
        }
    }
    Ok(())
}

/// A configuration that cannot work: one sentence that names the value at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub(super) String);

impl ConfigError {
    pub(super) fn new(sentence: String) -> Self {
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
        let settings = config().settle().ok().unwrap();
        assert!(std::time::Instant::now().checked_add(settings.options.request_timeout).is_some());
    }

    #[test]
    fn limits_of_zero_are_refused_by_name() {
        let refused = |config: MiniLbConfig| config.settle().err().unwrap().to_string();
        let zero = Duration::ZERO;
        for (config, name) in [
            (config().backend_idle_timeout(zero), "--backend-idle-timeout-secs"),
            (config().connect_timeout(zero), "--connect-timeout-secs"),
            (config().request_head_timeout(zero), "--request-head-timeout-secs"),
            (config().request_body_idle_timeout(zero), "--request-body-idle-timeout-secs"),
            (config().client_idle_timeout(zero), "--client-idle-timeout-secs"),
            (config().health_check_interval(zero), "--health-check-interval-secs"),
            (config().health_check_timeout(zero), "--health-check-timeout-secs"),
            (config().health_failure_threshold(0), "--health-failure-threshold"),
            (config().health_success_threshold(0), "--health-success-threshold"),
            (config().worker_startup_timeout(zero), "--worker-startup-timeout-secs"),
            (config().worker_startup_check_interval(zero), "--worker-startup-check-interval"),
            (config().dns_interval(zero), "--dns-interval-secs"),
            (config().max_payload_size(0), "--max-payload-size"),
            (config().max_merge_size(0), "--max-merge-size"),
            (config().worker_threads(0), "--worker-threads"),
            (config().socket_buffer_size(0), "--socket-buffer-size"),
            (config().max_concurrent_requests(0), "--max-concurrent-requests"),
            (config().queue_timeout(zero), "--queue-timeout-secs"),
            (config().rate_limit(0), "--rate-limit-tokens-per-second"),
            (config().max_in_flight_per_prefill(0), "--max-in-flight-per-prefill"),
            (config().max_in_flight_per_decode(0), "--max-in-flight-per-decode"),
            (config().http2_max_streams(0), "--http2-max-streams"),
        ] {
            assert_eq!(refused(config), format!("{name} 0: the value must be at least 1"));
        }
    }

    #[test]
    fn only_refusals_are_sent_again() {
        for (status, good) in [(399, false), (400, true), (599, true), (600, false), (200, false)] {
            assert_eq!(config().retry_on_status([503, status]).settle().is_ok(), good, "{status}");
        }
    }

    #[test]
    fn a_server_may_have_one_role_once() {
        let twice = "http://p:80 is given twice: each server may be named once";
        for config in [
            MiniLbConfig::new("h", 1, vec![("http://p".into(), None)], vec!["http://P:80/".into()], 1),
            MiniLbConfig::new("h", 1, vec![("http://p".into(), None); 2], vec!["http://d".into()], 1),
        ] {
            assert_eq!(config.settle().err().unwrap().to_string(), twice);
        }
    }
}

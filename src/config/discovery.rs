//! Servers that are found by name, and servers that have not come up yet.

use std::time::Duration;

use super::{ConfigError, DEFAULT_DNS_INTERVAL, LONGEST_TIMEOUT, MiniLbConfig};
use crate::upstream::{Address, DnsName, Role};

/// Which names stand for servers.
#[derive(Debug, Clone)]
pub(crate) struct DiscoveryOptions {
    /// As `host:port`, and the bootstrap port of those that are prefill servers.
    names: Vec<(Role, String, Option<u16>)>,
    pub(crate) interval: Duration,
}

impl Default for DiscoveryOptions {
    fn default() -> Self {
        Self { names: Vec::new(), interval: DEFAULT_DNS_INTERVAL }
    }
}

impl DiscoveryOptions {
    /// The names, if each is a host and a port.
    pub(super) fn names(&self) -> Result<Vec<DnsName>, ConfigError> {
        let name = |(role, name, bootstrap_port): &(Role, String, Option<u16>)| {
            let bad = |why: &str| ConfigError(format!("--{role}-dns {}: {why}", name.escape_debug()));
            if *bootstrap_port == Some(0) {
                return Err(bad("the bootstrap port must be between 1 and 65535, or none"));
            }
            const NO_NAME: &str = "not a name and a port such as prefill.default.svc:30000";
            // An IPv6 address needs no resolver, and a URL's path is none of a name.
            let has_port = name.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':'));
            let address =
                Address::parse(&format!("http://{name}")).ok().filter(|_| has_port && !name.contains('/'));
            let Address { host, port, .. } = address.ok_or_else(|| bad(NO_NAME))?;
            Ok(DnsName { role: *role, host, port, bootstrap_port: *bootstrap_port })
        };
        self.names.iter().map(name).collect()
    }
}

impl MiniLbConfig {
    /// Takes every address of a name for a prefill server, and follows its changes: a new address gets requests once its
    /// server is up, and one that is gone gets no more. `name` is `host:port`; `bootstrap_port` is that of all of them,
    /// and without one each is asked for its own. May be called for several names.
    #[must_use]
    pub fn prefill_dns(mut self, name: impl Into<String>, bootstrap_port: Option<u16>) -> Self {
        self.options.discovery.names.push((Role::Prefill, name.into(), bootstrap_port));
        self
    }

    /// Takes every address of a name (`host:port`) for a decode server, as [`prefill_dns`](Self::prefill_dns).
    #[must_use]
    pub fn decode_dns(mut self, name: impl Into<String>) -> Self {
        self.options.discovery.names.push((Role::Decode, name.into(), None));
        self
    }

    /// Resolves names this often. Default: [`DEFAULT_DNS_INTERVAL`].
    #[must_use]
    pub fn dns_interval(mut self, interval: Duration) -> Self {
        self.options.discovery.interval = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// Asks a server that has not come up yet often for this long; then it is logged as late, and asked as seldom as a
    /// healthy one. Default: [`DEFAULT_WORKER_STARTUP_TIMEOUT`](super::DEFAULT_WORKER_STARTUP_TIMEOUT).
    #[must_use]
    pub fn worker_startup_timeout(mut self, timeout: Duration) -> Self {
        self.options.health.startup_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// How often such a server is asked. Default:
    /// [`DEFAULT_WORKER_STARTUP_CHECK_INTERVAL`](super::DEFAULT_WORKER_STARTUP_CHECK_INTERVAL).
    #[must_use]
    pub fn worker_startup_check_interval(mut self, interval: Duration) -> Self {
        self.options.health.startup_interval = interval.min(LONGEST_TIMEOUT);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_host_and_a_port() {
        let name = |name: &str| {
            let config = MiniLbConfig::new("h", 1, vec![], vec![], 1);
            config.decode_dns(name).options.discovery.names().map(|names| names[0].clone())
        };
        let expected =
            DnsName { role: Role::Decode, host: "d.svc".into(), port: 30_000, bootstrap_port: None };
        assert_eq!(name("d.svc:30000"), Ok(expected));
        for wrong in
            ["d.svc", "d.svc:", ":1", "d.svc:0", "d.svc:65536", "http://d:1", "d:1/", "::1:1", "a b:1"]
        {
            let error = name(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--decode-dns {wrong}: ")), "{error}");
        }
        let config = MiniLbConfig::new("h", 1, vec![], vec![], 1).prefill_dns("p:1", Some(0));
        assert!(config.options.discovery.names().is_err());
    }
}

//! Servers that are found with DNS, and the time that servers have to start.

use std::time::Duration;

use super::{ConfigError, LONGEST_TIMEOUT, MiniLbConfig};
use crate::options::{BAD_BOOTSTRAP_PORT, DiscoveryOptions};
use crate::upstream::{Address, DnsName, Role};

impl DiscoveryOptions {
    /// The names, if each is a host and a port.
    pub(super) fn names(&self) -> Result<Vec<DnsName>, ConfigError> {
        let prefill = self.prefill.iter().map(|(name, port)| dns_name(Role::Prefill, name, *port));
        let decode = self.decode.iter().map(|name| dns_name(Role::Decode, name, None));
        let regular = self.regular.iter().map(|name| dns_name(Role::Regular, name, None));
        prefill.chain(decode).chain(regular).collect()
    }
}

fn dns_name(role: Role, name: &str, bootstrap_port: Option<u16>) -> Result<DnsName, ConfigError> {
    let flag = match role {
        Role::Prefill => "--prefill-dns",
        Role::Decode => "--decode-dns",
        Role::Regular => "--worker-dns",
    };
    // A flag's 0 was rejected when it was parsed; this is for users of the library.
    if bootstrap_port == Some(0) {
        return Err(bad_name(flag, name, BAD_BOOTSTRAP_PORT));
    }
    let (host, port) = host_and_port(flag, name)?;
    Ok(DnsName { role, host, port, bootstrap_port })
}

/// Reads a name to resolve, as it was given with `flag`.
pub(super) fn host_and_port(flag: &str, name: &str) -> Result<(String, u16), ConfigError> {
    // An IPv6 address needs no resolver, and a URL's path is not a part of a name.
    let has_port = name.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':'));
    // Parsed as a URL, so that names follow the same rules as hosts of servers.
    let address = Address::parse(&format!("http://{name}")).ok();
    let address = address.filter(|_| has_port && !name.contains('/'));
    let Some(Address { host, port, .. }) = address else {
        return Err(bad_name(flag, name, "not a name and a port such as prefill.default.svc:30000"));
    };
    Ok((host, port))
}

fn bad_name(flag: &str, name: &str, why: &str) -> ConfigError {
    ConfigError(format!("{flag} {}: {why}", name.escape_debug()))
}

impl MiniLbConfig {
    /// Treats every address of a DNS name as a prefill server, and follows changes: a new address gets
    /// requests once its server is healthy, and one that is gone gets no more. `name` is `host:port`;
    /// `bootstrap_port` is that of every address, and without one each server is asked for its own. May be
    /// called for several names.
    #[must_use]
    pub fn prefill_dns(mut self, name: impl Into<String>, bootstrap_port: Option<u16>) -> Self {
        self.options.discovery.prefill.push((name.into(), bootstrap_port));
        self
    }

    /// Treats every address of a DNS name (`host:port`) as a decode server, as
    /// [`prefill_dns`](Self::prefill_dns).
    #[must_use]
    pub fn decode_dns(mut self, name: impl Into<String>) -> Self {
        self.options.discovery.decode.push(name.into());
        self
    }

    /// Treats every address of a DNS name (`host:port`) as a server without disaggregation, as
    /// [`worker_urls`](Self::worker_urls) and [`prefill_dns`](Self::prefill_dns).
    #[must_use]
    pub fn worker_dns(mut self, name: impl Into<String>) -> Self {
        self.options.discovery.regular.push(name.into());
        self
    }

    /// Looks DNS names up this often. Default: [`DEFAULT_DNS_INTERVAL`](super::DEFAULT_DNS_INTERVAL).
    #[must_use]
    pub fn dns_interval(mut self, interval: Duration) -> Self {
        self.options.discovery.interval = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// The time that a server has to start. After it, a server that is still down is logged, and checked at
    /// the [interval](Self::health_check_interval) of healthy ones. Default:
    /// [`DEFAULT_WORKER_STARTUP_TIMEOUT`](super::DEFAULT_WORKER_STARTUP_TIMEOUT).
    #[must_use]
    pub fn worker_startup_timeout(mut self, timeout: Duration) -> Self {
        self.options.health.startup_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Checks a server that has not started yet this often. Default:
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

//! The four sources of servers, and their merge into one list.
//!
//! A server belongs to the first source that names it: configuration, DNS, Kubernetes,
//! admin API. An operator's change to a server of the first three (removed, or another role)
//! is an override, which holds for as long as the server's entry there stays the same.

use std::collections::{HashMap, HashSet};

use crate::upstream::server_spec::{DnsName, ServerSpec};
use crate::upstream::{Address, FleetSpec};

/// Which source names a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerSource {
    Configuration,
    Dns,
    Kubernetes,
    Operator,
}

impl ServerSource {
    /// As in `GET /workers`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Configuration => "config",
            Self::Dns => "dns",
            Self::Kubernetes => "kubernetes",
            Self::Operator => "api",
        }
    }
}

/// The servers that each source names.
pub(super) struct Sources {
    pub(super) configured: FleetSpec,
    pub(super) dns_names: Vec<DnsName>,
    /// The addresses of each name at its last successful lookup.
    pub(super) resolved: HashMap<DnsName, Vec<Address>>,
    /// The pods at the last list and the events since. Always empty without the feature `kubernetes`.
    pub(super) pods: Vec<ServerSpec>,
    /// Added by operators.
    added: Vec<ServerSpec>,
    /// Operators' changes to servers of the other sources, by [`ServerSpec::key`].
    overrides: HashMap<String, Override>,
    /// Keys of servers whose role is being switched.
    pub(super) switching: HashSet<String>,
}

/// An operator's change to a server that another source names, void once its entry differs from `entry`.
struct Override {
    entry: ServerSpec,
    /// `None`: the server is removed.
    replacement: Option<ServerSpec>,
}

impl Sources {
    pub(super) fn new(configured: FleetSpec, dns_names: Vec<DnsName>) -> Self {
        Self {
            configured,
            dns_names,
            resolved: HashMap::new(),
            pods: Vec::new(),
            added: Vec::new(),
            overrides: HashMap::new(),
            switching: HashSet::new(),
        }
    }

    /// The servers of configuration, DNS and Kubernetes, each once, without overrides.
    pub(super) fn declared(&self) -> Vec<(ServerSpec, ServerSource)> {
        let prefill = self.configured.prefill.iter().cloned().map(ServerSpec::Prefill);
        let decode = self.configured.decode.iter().cloned().map(ServerSpec::Decode);
        let resolved = self.dns_names.iter().flat_map(|name| {
            let addresses = self.resolved.get(name).into_iter().flatten().cloned();
            addresses.map(|address| ServerSpec::new(name.role, address, name.bootstrap_port))
        });
        let regular = self.configured.regular.iter().cloned().map(ServerSpec::Regular);
        let configured = prefill.chain(decode).chain(regular).map(|spec| (spec, ServerSource::Configuration));
        let pods = self.pods.iter().cloned().map(|spec| (spec, ServerSource::Kubernetes));
        let all = configured.chain(resolved.map(|spec| (spec, ServerSource::Dns))).chain(pods);
        // The first one wins, so configuration comes before the others.
        let mut seen = HashSet::new();
        all.filter(|(spec, _)| seen.insert(spec.key().to_owned())).collect()
    }

    /// The servers that there should be, each once.
    pub(super) fn effective(&self) -> Vec<(ServerSpec, ServerSource)> {
        let overridden = |(spec, source): (ServerSpec, ServerSource)| match self.overrides.get(spec.key()) {
            // The source stays: it says which entry an operator would have to change for good.
            Some(Override { replacement, .. }) => Some((replacement.clone()?, source)),
            None => Some((spec, source)),
        };
        let added = self.added.iter().map(|spec| (spec.clone(), ServerSource::Operator));
        self.declared().into_iter().filter_map(overridden).chain(added).collect()
    }

    /// Records an operator's change: what the server with this key should be, or `None` to remove it.
    pub(super) fn set(&mut self, key: &str, desired: Option<&ServerSpec>) {
        let entry = self.declared().into_iter().find_map(|(spec, _)| (spec.key() == key).then_some(spec));
        match entry {
            // The server is again as it is declared, so it follows its source again.
            Some(entry) if desired.is_some_and(|desired| desired.is_same_as(&entry)) => {
                self.overrides.remove(key);
            }
            Some(entry) => {
                self.overrides.insert(key.to_owned(), Override { entry, replacement: desired.cloned() });
            }
            // No other source names it, so it is an operator's own server.
            None => {
                self.added.retain(|added| added.key() != key);
                self.added.extend(desired.cloned());
            }
        }
    }

    /// Drops overrides whose entry has changed or is gone, and added servers that another source names by
    /// now.
    pub(super) fn drop_superseded(&mut self) {
        let declared = self.declared();
        let entry = |key: &str| declared.iter().find(|(spec, _)| spec.key() == key);
        self.overrides
            .retain(|key, change| entry(key).is_some_and(|(spec, _)| spec.is_same_as(&change.entry)));
        self.added.retain(|added| entry(added.key()).is_none());
    }
}

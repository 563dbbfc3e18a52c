//! What has changed between two configurations, and whether that needs a restart.
//!
//! It only compares; `balancer` takes new values over.

use std::fmt;

use super::Options;
use crate::options::Reload;

/// What a [`reload`](crate::MiniLoadBalancer::reload) has changed. Options have the names of their flags,
/// without the dashes. As text it is one line for a log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reloaded {
    /// Servers that were added.
    pub servers_added: usize,
    /// Servers that were removed.
    pub servers_removed: usize,
    /// Options whose new value is in effect, for requests and connections that begin after the reload.
    pub changed: Vec<&'static str>,
    /// Options whose value is not the one that the router was started with, and which only a restart changes.
    pub needs_restart: Vec<&'static str>,
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { servers_added, servers_removed, changed, needs_restart } = self;
        let mut parts: Vec<String> = Vec::new();
        if servers_added + servers_removed > 0 {
            parts.push(format!("servers +{servers_added} -{servers_removed}"));
        }
        parts.extend(changed.iter().map(|&name| name.to_owned()));
        // Logged too: an operator who has sent SIGHUP waits for a line.
        match parts.is_empty() {
            true => f.write_str("nothing has changed")?,
            false => f.write_str(&parts.join(", "))?,
        }
        if !needs_restart.is_empty() {
            write!(f, "; needs a restart: {}", needs_restart.join(", "))?;
        }
        Ok(())
    }
}

/// A value in a snapshot: the name of its option, when a change takes effect, and the value as text that is
/// compared and never shown, as it may be a key.
type Value = (&'static str, Reload, String);

/// The values of all options, to compare configurations with.
#[derive(Clone)]
pub(crate) struct ConfigSnapshot(Vec<Value>);

impl ConfigSnapshot {
    /// The options are validated: keys in files have been read.
    pub(super) fn of(options: &mut Options) -> Self {
        // New certificates are taken over, but a listener cannot switch between TLS and plain HTTP.
        let has_tls = ("tls-cert-path", Reload::AfterRestart, options.tls.server.is_some().to_string());
        let values = options.snapshot().into_iter().map(|(spec, value)| (spec.name, spec.reload, value));
        // The name is in the list a second time: the first stands for the contents of the file, which a
        // reload applies.
        Self(values.chain([has_tls]).collect())
    }

    /// The options that have another value in `new`, among those that change in the same way.
    fn changed(&self, new: &Self, reload: Reload) -> Vec<&'static str> {
        // Both have the order of the table.
        let pairs = self.0.iter().zip(&new.0);
        pairs.filter(|(old, new)| old.1 == reload && old.2 != new.2).map(|(old, _)| old.0).collect()
    }

    /// What `new` changes while the router runs.
    pub(crate) fn changed_now(&self, new: &Self) -> Vec<&'static str> {
        self.changed(new, Reload::Now)
    }

    /// What `new` would change after a restart.
    pub(crate) fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        self.changed(new, Reload::AfterRestart)
    }
}

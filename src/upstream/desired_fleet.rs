//! The desired set of servers, merged from configuration, DNS, Kubernetes and the admin
//! API, and published as the [`LiveFleet`].
//!
//! Changes are serialized, so that each is computed from the set that it replaces. No name
//! is resolved, no pod is listed and no server is asked here (`admin` does that).

mod sources;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(feature = "kubernetes")]
use tokio::sync::watch;
use tracing::{info, warn};

#[cfg(feature = "kubernetes")]
use super::PodSource;
use super::server_spec::{DnsName, ServerSpec};
use super::{Address, Backend, FleetSpec, LiveFleet, Role};
pub(super) use sources::ServerSource;
use sources::Sources;

/// Most servers of one role, from all sources together. A bound for DNS names with thousands of addresses:
/// every server has a probe task, and a connection pool per worker.
pub(crate) const MAX_SERVERS_PER_ROLE: usize = 1_024;

/// Why an operator's change was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotChanged {
    /// There is no such server.
    Unknown,
    /// The server exists with another role or other bootstrap fields.
    Exists,
    /// The server's role is being switched.
    Busy,
    /// The role has [`MAX_SERVERS_PER_ROLE`] servers.
    Full(Role),
    /// There are [`MAX_ENCODERS`](super::MAX_ENCODERS) encoders.
    TooManyEncoders,
}

/// The sources of servers, and the fleet that they make.
pub(crate) struct DesiredFleet {
    fleet: Arc<LiveFleet>,
    sources: Mutex<Sources>,
    /// Which pods are servers. A channel, as the task that follows them starts anew when it changes.
    #[cfg(feature = "kubernetes")]
    pod_source: watch::Sender<Option<PodSource>>,
}

impl DesiredFleet {
    pub(crate) fn new(configured: FleetSpec, dns_names: Vec<DnsName>) -> Self {
        let fleet = Arc::new(LiveFleet::new(configured.clone()));
        Self {
            fleet,
            sources: Mutex::new(Sources::new(configured, dns_names)),
            #[cfg(feature = "kubernetes")]
            pod_source: watch::Sender::new(None),
        }
    }

    pub(crate) fn fleet(&self) -> &Arc<LiveFleet> {
        &self.fleet
    }

    /// The names to resolve.
    pub(crate) fn dns_names(&self) -> Vec<DnsName> {
        self.sources().dns_names.clone()
    }

    /// Replaces the configuration. Operators' changes stay, except to servers whose entry has changed.
    pub(crate) fn configure(&self, configured: FleetSpec, dns_names: Vec<DnsName>) {
        let mut sources = self.sources();
        sources.resolved.retain(|name, _| dns_names.contains(name));
        (sources.configured, sources.dns_names) = (configured, dns_names);
        self.rebuild_fleet(&mut sources);
    }

    /// Sets the addresses of a DNS name.
    pub(crate) fn set_addresses(&self, name: &DnsName, addresses: Vec<Address>) {
        let mut sources = self.sources();
        let before: HashSet<&str> =
            sources.resolved.get(name).into_iter().flatten().map(Address::key).collect();
        let after: HashSet<&str> = addresses.iter().map(Address::key).collect();
        // A reload may have removed the name during the lookup.
        if before == after || !sources.dns_names.contains(name) {
            return;
        }
        let (added, removed) = (after.difference(&before).count(), before.difference(&after).count());
        let DnsName { role, host, port, .. } = name;
        info!("{host}:{port} resolves to {} {role} servers: {added} added, {removed} removed", after.len());
        // They borrow from `sources` and `addresses`.
        drop((before, after));
        sources.resolved.insert(name.clone(), addresses);
        self.rebuild_fleet(&mut sources);
    }

    /// Sets which pods are servers. Those of the ones before stay until the new ones are listed.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn set_pod_source(&self, source: Option<PodSource>) {
        let mut sources = self.sources();
        if *self.pod_source.borrow() == source {
            return;
        }
        if source.is_none() {
            sources.pods.clear();
            self.rebuild_fleet(&mut sources);
        }
        self.pod_source.send_replace(source);
    }

    /// Whether pods may be servers of this role.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn expects_pods(&self, role: Role) -> bool {
        let source = self.pod_source.borrow();
        source.iter().flat_map(|source| &source.selectors).any(|(selected, _)| *selected == role)
    }

    /// A build without discovery has no pods.
    #[cfg(not(feature = "kubernetes"))]
    pub(crate) fn expects_pods(&self, _: Role) -> bool {
        false
    }

    /// Which pods are servers, now and after each reload.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn pod_source(&self) -> watch::Receiver<Option<PodSource>> {
        self.pod_source.subscribe()
    }

    /// Sets the servers that are pods of `source`.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn set_pods(&self, source: &PodSource, servers: Vec<ServerSpec>) {
        let mut sources = self.sources();
        // A reload may have changed the source during a list.
        if self.pod_source.borrow().as_ref() != Some(source) {
            return;
        }
        let id = |spec: &ServerSpec| (spec.role(), spec.key().to_owned(), spec.bootstrap_port());
        let before: HashSet<_> = sources.pods.iter().map(id).collect();
        let after: HashSet<_> = servers.iter().map(id).collect();
        // Most events of pods change nothing that is known here.
        if before == after {
            return;
        }
        let (added, removed) = (after.difference(&before).count(), before.difference(&after).count());
        info!("{} servers from Kubernetes: {added} added, {removed} removed", after.len());
        sources.pods = servers;
        self.rebuild_fleet(&mut sources);
    }

    /// Adds a server. Succeeds too if exactly this server is there already.
    pub(crate) fn add(&self, spec: &ServerSpec) -> Result<Arc<Backend>, NotChanged> {
        let mut sources = self.sources();
        if sources.switching.contains(spec.key()) {
            return Err(NotChanged::Busy);
        }
        let present = sources.effective();
        let same_role = present.iter().filter(|(present, _)| present.role() == spec.role()).count();
        match present.iter().find(|(present, _)| present.key() == spec.key()) {
            // Idempotent: a deployment script may add its servers again.
            Some((present, _)) if present.is_same_as(spec) => {}
            Some(_) => return Err(NotChanged::Exists),
            None if same_role >= MAX_SERVERS_PER_ROLE => return Err(NotChanged::Full(spec.role())),
            None => {
                sources.set(spec.key(), Some(spec));
                self.rebuild_fleet(&mut sources);
            }
        }
        self.fleet.now().all().find(|server| spec.matches(server)).cloned().ok_or(NotChanged::Unknown)
    }

    /// Takes a server out of rotation; its requests in flight continue.
    pub(crate) fn remove(&self, server: &Backend) -> Result<(), NotChanged> {
        let mut sources = self.sources();
        let key = server.address().key();
        if sources.switching.contains(key) {
            return Err(NotChanged::Busy);
        }
        // By role too: the same address may have been added again in the other role.
        if !sources.effective().iter().any(|(spec, _)| spec.matches(server)) {
            return Err(NotChanged::Unknown);
        }
        sources.set(key, None);
        self.rebuild_fleet(&mut sources);
        Ok(())
    }

    /// The source of each server, by its [`Address::key`].
    pub(crate) fn source_by_key(&self) -> HashMap<String, ServerSource> {
        let effective = self.sources().effective();
        effective.into_iter().map(|(spec, source)| (spec.key().to_owned(), source)).collect()
    }

    /// Replaces backends whose bootstrap port changed with fresh ones.
    pub(crate) fn replace_stale(&self) {
        self.rebuild_fleet(&mut self.sources());
    }

    /// Starts to switch a server's role. Until the result is dropped, no one else can change the server.
    pub(crate) fn begin_switch(self: &Arc<Self>, server: &Backend) -> Result<RoleSwitch, NotChanged> {
        let mut sources = self.sources();
        let present = sources.effective().into_iter().find(|(spec, _)| spec.matches(server));
        let (before, source) = present.ok_or(NotChanged::Unknown)?;
        if !sources.switching.insert(before.key().to_owned()) {
            return Err(NotChanged::Busy);
        }
        Ok(RoleSwitch { desired: Arc::clone(self), before, source })
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        // Poisoning is ignored: a change is complete before the fleet is rebuilt, which is where a panic
        // could come from.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Recomputes the fleet from configuration, DNS, pods and operators' changes, and publishes it.
    fn rebuild_fleet(&self, sources: &mut Sources) {
        sources.drop_superseded();
        let mut spec = sources.configured.without_servers();
        for (server, _) in sources.effective() {
            match server {
                ServerSpec::Prefill(prefill) => spec.prefill.push(prefill),
                ServerSpec::Decode(address) => spec.decode.push(address),
                ServerSpec::Regular(address) => spec.regular.push(address),
            }
        }
        if spec.prefill.len().max(spec.decode.len()).max(spec.regular.len()) > MAX_SERVERS_PER_ROLE {
            warn!("more than {MAX_SERVERS_PER_ROLE} servers of one role: the excess is ignored");
            // The last ones, which DNS, pods and operators added: the configuration comes first.
            spec.prefill.truncate(MAX_SERVERS_PER_ROLE);
            spec.decode.truncate(MAX_SERVERS_PER_ROLE);
            spec.regular.truncate(MAX_SERVERS_PER_ROLE);
        }
        self.fleet.apply(spec);
    }
}

/// The switch of one server's role, in progress until this is dropped.
pub(crate) struct RoleSwitch {
    desired: Arc<DesiredFleet>,
    before: ServerSpec,
    source: ServerSource,
}

impl RoleSwitch {
    /// Takes the server out of rotation.
    pub(crate) fn take_out(&self) {
        self.set(None);
    }

    /// Puts the server back into rotation in its old role.
    pub(crate) fn restore(&self) {
        self.set(Some(&self.before));
    }

    /// Puts the server into rotation in its new role.
    pub(crate) fn complete(&self, role: Role, bootstrap_host: Option<String>, bootstrap_port: Option<u16>) {
        let spec = ServerSpec::new(role, self.before.address().clone(), bootstrap_port);
        self.set(Some(&spec.with_bootstrap_host(bootstrap_host)));
    }

    fn set(&self, spec: Option<&ServerSpec>) {
        let (key, mut sources) = (self.before.key(), self.desired.sources());
        // A reload or a DNS change during the switch may have removed the server: then it is not put back.
        let is_declared = || sources.declared().iter().any(|(declared, _)| declared.key() == key);
        if spec.is_none() || self.source == ServerSource::Operator || is_declared() {
            sources.set(key, spec);
            self.desired.rebuild_fleet(&mut sources);
        }
    }
}

impl Drop for RoleSwitch {
    fn drop(&mut self) {
        self.desired.sources().switching.remove(self.before.key());
    }
}

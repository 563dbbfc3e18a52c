//! Which servers there should be, by all who have a say: the configuration, the
//! DNS names in it, and operators.
//!
//! What they say is put together here and becomes the fleet, one change at a time.
//! Nobody is asked and no name is resolved here (`control` does that).
//!
//! A server belongs to whoever names it first: the configuration, then a DNS name,
//! then an operator. What operators say of a server of the first two (out, or
//! another role) holds for as long as its entry there stays as it is.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use super::{Address, Backend, FleetSpec, LiveFleet, PrefillSpec, Role};

/// Servers of one role, from all sources together.
pub(crate) const MAX_SERVERS_PER_ROLE: usize = 1_024;

/// One server that there should be.
#[derive(Debug, Clone)]
pub(crate) enum ServerSpec {
    Prefill(PrefillSpec),
    Decode(Address),
}

impl ServerSpec {
    /// A server of a role; a decode server has no bootstrap port.
    pub(crate) fn new(role: Role, address: Address, bootstrap_port: Option<u16>) -> Self {
        match role {
            Role::Decode => Self::Decode(address),
            Role::Prefill => {
                Self::Prefill(PrefillSpec { bootstrap_host: address.host.clone(), address, bootstrap_port })
            }
        }
    }

    fn role(&self) -> Role {
        match self {
            Self::Prefill(_) => Role::Prefill,
            Self::Decode(_) => Role::Decode,
        }
    }

    fn address(&self) -> &Address {
        match self {
            Self::Prefill(spec) => &spec.address,
            Self::Decode(address) => address,
        }
    }

    /// What makes two servers the same.
    fn key(&self) -> &str {
        &self.address().authority
    }

    fn is(&self, server: &Backend) -> bool {
        self.role() == server.role() && self.key() == server.address().authority
    }

    fn equals(&self, other: &Self) -> bool {
        let bootstrap = |member: &Self| match member {
            Self::Prefill(spec) => Some((spec.bootstrap_host.clone(), spec.bootstrap_port)),
            Self::Decode(_) => None,
        };
        self.address().url == other.address().url && bootstrap(self) == bootstrap(other)
    }
}

/// A name whose addresses are all servers of one role.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DnsName {
    pub(crate) role: Role,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) bootstrap_port: Option<u16>,
}

/// Who names a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Configuration,
    Dns,
    Operator,
}

impl Source {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Configuration => "config",
            Self::Dns => "dns",
            Self::Operator => "api",
        }
    }
}

/// Why an operator's change was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotChanged {
    /// There is no such server.
    Unknown,
    /// It is there, with another role or another bootstrap port.
    Exists,
    /// Its role is being switched.
    Busy,
    /// There are [`MAX_SERVERS_PER_ROLE`].
    Full(Role),
}

/// All who have a say, and the fleet that comes of it.
pub(crate) struct DesiredFleet {
    fleet: Arc<LiveFleet>,
    said: Mutex<Sources>,
}

/// What everyone has said.
struct Sources {
    configured: FleetSpec,
    names: Vec<DnsName>,
    found: HashMap<DnsName, Vec<Address>>,
    /// By operators.
    added: Vec<ServerSpec>,
    /// What operators said of servers that others name, by [`ServerSpec::key`].
    overrides: HashMap<String, Override>,
    /// Servers whose role is being switched.
    busy: HashSet<String>,
}

/// What takes the place of a server's entry, for as long as that is the same.
struct Override {
    of: ServerSpec,
    instead: Option<ServerSpec>,
}

impl DesiredFleet {
    pub(crate) fn new(configured: FleetSpec, names: Vec<DnsName>) -> Self {
        let fleet = Arc::new(LiveFleet::new(configured.clone()));
        let said = Sources {
            configured,
            names,
            found: HashMap::new(),
            added: Vec::new(),
            overrides: HashMap::new(),
            busy: HashSet::new(),
        };
        Self { fleet, said: Mutex::new(said) }
    }

    pub(crate) fn fleet(&self) -> &Arc<LiveFleet> {
        &self.fleet
    }

    /// The names to be resolved.
    pub(crate) fn names(&self) -> Vec<DnsName> {
        self.said().names.clone()
    }

    /// Takes another configuration in the place of the present one. What operators have said stays, but for the servers
    /// whose entry is another now.
    pub(crate) fn configure(&self, configured: FleetSpec, names: Vec<DnsName>) {
        let mut said = self.said();
        said.found.retain(|name, _| names.contains(name));
        (said.configured, said.names) = (configured, names);
        self.settle(&mut said);
    }

    /// Takes the addresses that a name has now.
    pub(crate) fn found(&self, name: &DnsName, addresses: Vec<Address>) {
        let mut said = self.said();
        let before: HashSet<&str> = said.found.get(name).into_iter().flatten().map(key).collect();
        let after: HashSet<&str> = addresses.iter().map(key).collect();
        if before == after || !said.names.contains(name) {
            return;
        }
        let (new, gone) = (after.difference(&before).count(), before.difference(&after).count());
        let DnsName { role, host, port, .. } = name;
        info!("{host}:{port} has {} {role} servers, {new} of them new; {gone} are gone", after.len());
        drop((before, after));
        said.found.insert(name.clone(), addresses);
        self.settle(&mut said);
    }

    /// Adds a server, or finds that it is there as it should be.
    pub(crate) fn add(&self, member: &ServerSpec) -> Result<Arc<Backend>, NotChanged> {
        let mut said = self.said();
        if said.busy.contains(member.key()) {
            return Err(NotChanged::Busy);
        }
        let present = said.effective();
        match present.iter().find(|(present, _)| present.key() == member.key()) {
            Some((present, _)) if present.equals(member) => {}
            Some(_) => return Err(NotChanged::Exists),
            None if present.iter().filter(|(present, _)| present.role() == member.role()).count()
                >= MAX_SERVERS_PER_ROLE =>
            {
                return Err(NotChanged::Full(member.role()));
            }
            None => {
                said.put(member.key(), Some(member));
                self.settle(&mut said);
            }
        }
        self.fleet.now().all().find(|server| member.is(server)).cloned().ok_or(NotChanged::Unknown)
    }

    /// Gives a server no more requests.
    pub(crate) fn remove(&self, server: &Backend) -> Result<(), NotChanged> {
        let mut said = self.said();
        let key = &server.address().authority;
        if said.busy.contains(key) {
            return Err(NotChanged::Busy);
        }
        if !said.effective().iter().any(|(member, _)| member.is(server)) {
            return Err(NotChanged::Unknown);
        }
        said.put(key, None);
        self.settle(&mut said);
        Ok(())
    }

    /// Who names each server, by its authority.
    pub(crate) fn sources(&self) -> HashMap<String, Source> {
        let effective = self.said().effective();
        effective.into_iter().map(|(member, source)| (member.key().to_owned(), source)).collect()
    }

    /// Puts servers that are outdated into the hands of new ones.
    pub(crate) fn renew(&self) {
        self.settle(&mut self.said());
    }

    /// Begins to switch a server's role; until the end nobody else can change it.
    pub(crate) fn begin_switch(self: &Arc<Self>, server: &Backend) -> Result<Switch, NotChanged> {
        let mut said = self.said();
        let present = said.effective().into_iter().find(|(member, _)| member.is(server));
        let (before, source) = present.ok_or(NotChanged::Unknown)?;
        if !said.busy.insert(before.key().to_owned()) {
            return Err(NotChanged::Busy);
        }
        Ok(Switch { members: Arc::clone(self), before, source })
    }

    fn said(&self) -> MutexGuard<'_, Sources> {
        // Each change is whole before the fleet hears of it.
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the fleet what everyone's word comes to.
    fn settle(&self, said: &mut Sources) {
        said.forget_what_is_over();
        let mut wanted = FleetSpec { prefill: Vec::new(), decode: Vec::new(), ..said.configured.clone() };
        for (member, _) in said.effective() {
            match member {
                ServerSpec::Prefill(spec) => wanted.prefill.push(spec),
                ServerSpec::Decode(address) => wanted.decode.push(address),
            }
        }
        if wanted.prefill.len().max(wanted.decode.len()) > MAX_SERVERS_PER_ROLE {
            warn!("over {MAX_SERVERS_PER_ROLE} servers of a role: the others get no requests");
            wanted.prefill.truncate(MAX_SERVERS_PER_ROLE);
            wanted.decode.truncate(MAX_SERVERS_PER_ROLE);
        }
        self.fleet.become_as(wanted);
    }
}

fn key(address: &Address) -> &str {
    &address.authority
}

impl Sources {
    /// The servers that the configuration and DNS name, each once.
    fn named(&self) -> Vec<(ServerSpec, Source)> {
        let prefill = self.configured.prefill.iter().cloned().map(ServerSpec::Prefill);
        let decode = self.configured.decode.iter().cloned().map(ServerSpec::Decode);
        let found = self.names.iter().flat_map(|name| {
            let addresses = self.found.get(name).into_iter().flatten().cloned();
            addresses.map(|address| ServerSpec::new(name.role, address, name.bootstrap_port))
        });
        let configured = prefill.chain(decode).map(|member| (member, Source::Configuration));
        let mut seen = HashSet::new();
        let all = configured.chain(found.map(|member| (member, Source::Dns)));
        all.filter(|(member, _)| seen.insert(member.key().to_owned())).collect()
    }

    /// The servers that there should be, each once.
    fn effective(&self) -> Vec<(ServerSpec, Source)> {
        let in_force = |(member, source): (ServerSpec, Source)| match self.overrides.get(member.key()) {
            Some(Override { instead, .. }) => Some((instead.clone()?, source)),
            None => Some((member, source)),
        };
        let added = self.added.iter().map(|member| (member.clone(), Source::Operator));
        self.named().into_iter().filter_map(in_force).chain(added).collect()
    }

    /// Takes an operator's word on a server: what it shall be, or that it shall not be.
    fn put(&mut self, key: &str, member: Option<&ServerSpec>) {
        let of = self.named().into_iter().find_map(|(named, _)| (named.key() == key).then_some(named));
        match of {
            Some(of) if member.is_some_and(|member| member.equals(&of)) => {
                self.overrides.remove(key);
            }
            Some(of) => {
                self.overrides.insert(key.to_owned(), Override { of, instead: member.cloned() });
            }
            None => {
                self.added.retain(|added| added.key() != key);
                self.added.extend(member.cloned());
            }
        }
    }

    fn forget_what_is_over(&mut self) {
        let named = self.named();
        let entry = |key: &str| named.iter().find(|(member, _)| member.key() == key);
        self.overrides.retain(|key, over| entry(key).is_some_and(|(member, _)| member.equals(&over.of)));
        self.added.retain(|added| entry(added.key()).is_none());
    }
}

/// The switch of one server's role, for as long as this lives.
pub(crate) struct Switch {
    members: Arc<DesiredFleet>,
    before: ServerSpec,
    source: Source,
}

impl Switch {
    /// Gives the server no more requests.
    pub(crate) fn take_out(&self) {
        self.put(None);
    }

    /// Leaves it in the role that it had.
    pub(crate) fn put_back(&self) {
        self.put(Some(&self.before));
    }

    /// Gives it requests in its new role.
    pub(crate) fn become_as(&self, role: Role, bootstrap_host: Option<String>, bootstrap_port: Option<u16>) {
        let mut member = ServerSpec::new(role, self.before.address().clone(), bootstrap_port);
        if let (ServerSpec::Prefill(spec), Some(host)) = (&mut member, bootstrap_host) {
            spec.bootstrap_host = host;
        }
        self.put(Some(&member));
    }

    fn put(&self, member: Option<&ServerSpec>) {
        let (key, mut said) = (self.before.key(), self.members.said());
        // Whoever named it may have dropped it in the meantime, and then it is gone.
        let is_named = || said.named().iter().any(|(named, _)| named.key() == key);
        if member.is_none() || self.source == Source::Operator || is_named() {
            said.put(key, member);
            self.members.settle(&mut said);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.members.said().busy.remove(self.before.key());
    }
}

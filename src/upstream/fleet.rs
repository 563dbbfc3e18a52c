//! All servers, and the choice of two of them for a request.
//!
//! A [`Fleet`] never changes: [`LiveFleet`] puts another one in its place, so that
//! whoever looks sees one state and waits for nobody.

mod permits;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use super::health::{HealthTracker, Watching};
use super::{Address, Backend, Choice, HealthOptions, Policy, PrefillSpec, Random, Role};
pub(crate) use permits::PairPermits;

/// Which servers there should be, and how they are chosen.
#[derive(Clone)]
pub(crate) struct FleetSpec {
    pub(crate) prefill: Vec<PrefillSpec>,
    pub(crate) decode: Vec<Address>,
    pub(crate) prefill_policy: Arc<dyn Policy>,
    pub(crate) decode_policy: Arc<dyn Policy>,
    /// For all servers.
    pub(crate) health: HealthOptions,
}

#[cfg(test)]
impl FleetSpec {
    /// So many servers, `http://prefill-0:80` and so on, of which nobody knows anything.
    pub(crate) fn unknown(prefill: usize, decode: usize) -> Self {
        use std::time::Duration;

        let address = |role: &str, number| Address::parse(&format!("http://{role}-{number}:80")).unwrap();
        let spec = |number| PrefillSpec {
            bootstrap_host: "p".into(),
            address: address("prefill", number),
            bootstrap_port: None,
        };
        Self {
            prefill: (0..prefill).map(spec).collect(),
            decode: (0..decode).map(|number| address("decode", number)).collect(),
            prefill_policy: Arc::new(super::RoundRobin::default()),
            decode_policy: Arc::new(super::RoundRobin::default()),
            health: HealthOptions {
                enabled: false,
                interval: Duration::from_secs(1),
                timeout: Duration::from_secs(1),
                failure_threshold: 1,
                success_threshold: 1,
                startup_interval: Duration::from_secs(1),
                startup_timeout: Duration::from_secs(1),
            },
        }
    }
}

/// The servers as they are now.
pub(crate) struct LiveFleet {
    now: ArcSwap<Fleet>,
    /// One change at a time: each is made from the state that it replaces.
    changing: Mutex<()>,
    changes: watch::Sender<()>,
}

impl LiveFleet {
    pub(crate) fn new(wanted: FleetSpec) -> Self {
        let now = ArcSwap::from_pointee(Fleet::new(wanted.health.clone()).become_as(wanted));
        Self { now, changing: Mutex::default(), changes: watch::channel(()).0 }
    }

    /// The present state, for a moment: not to be held across an await.
    pub(crate) fn now(&self) -> Guard<Arc<Fleet>> {
        self.now.load()
    }

    /// The present state, to be kept.
    pub(crate) fn snapshot(&self) -> Arc<Fleet> {
        self.now.load_full()
    }

    /// Puts the fleet that is wanted in the place of the present one.
    pub(crate) fn become_as(&self, wanted: FleetSpec) {
        // A change that panicked has changed nothing.
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.now.store(Arc::new(self.now.load().become_as(wanted)));
        self.changes.send_replace(());
    }

    /// How servers are watched.
    pub(crate) fn watching(&self) -> Arc<HealthOptions> {
        self.now.load().watching.options()
    }

    /// Tells of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

/// The servers of both roles at one moment.
pub(crate) struct Fleet {
    prefill: Group,
    decode: Group,
    draining: Vec<Arc<Backend>>,
    watching: Arc<Watching>,
}

impl Fleet {
    /// Without a server.
    fn new(health: HealthOptions) -> Self {
        let watching = Arc::new(Watching::new(health));
        Self { prefill: Group::default(), decode: Group::default(), draining: Vec::new(), watching }
    }

    /// The fleet that is wanted, with the servers that it has already: whoever is wanted still, at the same address and
    /// under the same bootstrap fields, stays who it is. The others get no more requests, and finish those they have.
    fn become_as(&self, wanted: FleetSpec) -> Self {
        let FleetSpec { prefill, decode, prefill_policy, decode_policy, health } = wanted;
        self.watching.become_as(health);
        let new_health = |group: &Group| {
            // Where there are others, nothing need be tried on a server of which nothing is known.
            let make = if group.servers.is_empty() { HealthTracker::new } else { HealthTracker::starting };
            make(Arc::clone(&self.watching), Arc::clone(&group.unhealthy))
        };
        let prefill = prefill.into_iter().map(|spec| {
            let known = self.known(|server| server.is_prefill(&spec));
            known.unwrap_or_else(|| Arc::new(Backend::prefill(spec, new_health(&self.prefill))))
        });
        let decode = decode.into_iter().map(|address| {
            let known = self.known(|server| server.is_decode(&address));
            known.unwrap_or_else(|| Arc::new(Backend::decode(address, new_health(&self.decode))))
        });
        let prefill = self.prefill.with(prefill.collect(), prefill_policy);
        let decode = self.decode.with(decode.collect(), decode_policy);
        let is_wanted = |server: &Arc<Backend>| {
            prefill.servers.iter().chain(&decode.servers).any(|wanted| Arc::ptr_eq(wanted, server))
        };
        let draining = self.known_servers().filter(|server| !is_wanted(server) && server.in_flight() > 0);
        let draining = draining.cloned().collect();
        Self { prefill, decode, draining, watching: Arc::clone(&self.watching) }
    }

    fn known(&self, is_it: impl Fn(&Backend) -> bool) -> Option<Arc<Backend>> {
        self.known_servers().find(|server| is_it(server)).cloned()
    }

    /// Also those that are not wanted any more and have requests under way.
    pub(crate) fn known_servers(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.all().chain(&self.draining)
    }

    /// Chooses two servers. The error is a role that has none.
    pub(crate) fn select_pair(&self) -> Result<ServerPair, Role> {
        let prefill = self.prefill.pick().ok_or(Role::Prefill)?;
        Ok(ServerPair { prefill, decode: self.decode.pick().ok_or(Role::Decode)? })
    }

    /// Chooses two servers without the one that has just failed, where there is another of its role.
    pub(crate) fn select_other_pair(&self, failed: &Arc<Backend>) -> Result<ServerPair, Role> {
        let prefill = self.prefill.pick_other(failed).ok_or(Role::Prefill)?;
        Ok(ServerPair { prefill, decode: self.decode.pick_other(failed).ok_or(Role::Decode)? })
    }

    pub(crate) fn prefill(&self) -> &[Arc<Backend>] {
        &self.prefill.servers
    }

    pub(crate) fn decode(&self) -> &[Arc<Backend>] {
        &self.decode.servers
    }

    /// The servers that get no more requests and have not finished those they had.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.draining.iter().filter(|server| server.in_flight() > 0)
    }

    /// Every server that gets requests, prefill first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.prefill.servers.iter().chain(&self.decode.servers)
    }
}

/// The servers of one role, and the policy that chooses among them.
struct Group {
    servers: Vec<Arc<Backend>>,
    policy: Arc<dyn Policy>,
    /// How many of them are unhealthy: while none is, nothing is looked through.
    unhealthy: Arc<AtomicUsize>,
}

impl Default for Group {
    fn default() -> Self {
        Self { servers: Vec::new(), policy: Arc::new(Random), unhealthy: Arc::default() }
    }
}

impl Group {
    /// The same role with other servers.
    fn with(&self, servers: Vec<Arc<Backend>>, policy: Arc<dyn Policy>) -> Self {
        Self { servers, policy, unhealthy: Arc::clone(&self.unhealthy) }
    }

    /// A server that may be down is better than none: if all are unhealthy, any is picked.
    fn pick(&self) -> Option<Arc<Backend>> {
        if self.unhealthy.load(Ordering::Relaxed) == 0 {
            return self.pick_of(&self.servers);
        }
        self.pick_where(|server| server.is_healthy()).or_else(|| self.pick_of(&self.servers))
    }

    fn pick_other(&self, failed: &Arc<Backend>) -> Option<Arc<Backend>> {
        let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed);
        self.pick_where(|server| is_other(server) && server.is_healthy())
            .or_else(|| self.pick_where(is_other))
            .or_else(|| self.pick_of(&self.servers))
    }

    /// One of those that are as wished. Most often all are, and no list of them is made.
    fn pick_where(&self, wish: impl Fn(&Arc<Backend>) -> bool) -> Option<Arc<Backend>> {
        if self.servers.iter().all(&wish) {
            return self.pick_of(&self.servers);
        }
        let wanted: Vec<_> = self.servers.iter().filter(|server| wish(server)).cloned().collect();
        self.pick_of(&wanted)
    }

    fn pick_of(&self, servers: &[Arc<Backend>]) -> Option<Arc<Backend>> {
        (!servers.is_empty()).then(|| Arc::clone(self.policy.pick(&Choice::new(servers))))
    }
}

/// The two servers that answer one request together.
#[derive(Debug, Clone)]
pub struct ServerPair {
    prefill: Arc<Backend>,
    decode: Arc<Backend>,
}

impl ServerPair {
    /// The server that computes the prompt's KV cache.
    pub fn prefill(&self) -> &Arc<Backend> {
        &self.prefill
    }

    /// The server that generates the tokens.
    pub fn decode(&self) -> &Arc<Backend> {
        &self.decode
    }
}

//! All backends at one moment, and the selection of a prefill-decode pair for a request.
//!
//! A [`Fleet`] is immutable: [`LiveFleet`] replaces it as a whole, so that a reader sees one
//! consistent state without a lock. Which servers there should be is decided in
//! `desired_fleet`.

mod permits;

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use super::completed_prefill::Expectation;
use super::health::{HealthTracker, SharedHealthOptions};
use super::load_table::LoadTable;
use super::policy::Candidates;
use super::{
    Address, Backend, CacheAware, Choice, Demand, HealthOptions, InFlight, IndexUsage, Needs, Policy,
    PrefillSpec, Random, Role, RunningRequests, SelectedBy, Selection, SelectionReason, ServerPair,
};
pub(crate) use permits::PairPermits;

/// Which servers there should be, and how they are selected and probed.
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
    /// Servers `http://prefill-0:80`, `http://prefill-1:80` and so on, without health checks.
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
                load_poll_interval: Duration::ZERO,
            },
        }
    }
}

/// The current [`Fleet`], replaceable at any time.
pub(crate) struct LiveFleet {
    current: ArcSwap<Fleet>,
    /// Serializes changes: each is computed from the fleet that it replaces.
    changing: Mutex<()>,
    changes: watch::Sender<()>,
    running: Arc<RunningRequests>,
}

impl LiveFleet {
    pub(crate) fn new(spec: FleetSpec) -> Self {
        let current = ArcSwap::from_pointee(Fleet::empty(spec.health.clone()).updated(spec));
        Self { current, changing: Mutex::default(), changes: watch::channel(()).0, running: Arc::default() }
    }

    /// The current fleet, borrowed for a moment: cheaper than [`snapshot`](Self::snapshot), but a guard that
    /// is held across an await slows writers and later readers down.
    pub(crate) fn now(&self) -> Guard<Arc<Fleet>> {
        self.current.load()
    }

    /// The current fleet, to keep for as long as needed.
    pub(crate) fn snapshot(&self) -> Arc<Fleet> {
        self.current.load_full()
    }

    /// The current servers, prefill first.
    pub(crate) fn servers(&self) -> Vec<Arc<Backend>> {
        self.now().all().cloned().collect()
    }

    /// Replaces the fleet with that of `spec`.
    pub(crate) fn apply(&self, spec: FleetSpec) {
        // Poisoning is ignored: a change that panicked has stored nothing.
        let _lock = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.current.store(Arc::new(self.current.load().updated(spec)));
        // Not `send`, which fails and keeps nothing while no task listens.
        self.changes.send_replace(());
    }

    /// Tells the policies that a server has told the capacity of its cache.
    pub(crate) fn capacity_changed(&self) {
        let _lock = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let fleet = self.now();
        fleet.prefill.tell_policy();
        fleet.decode.tell_policy();
    }

    /// The requests in progress that clients can name.
    pub(crate) fn running(&self) -> &Arc<RunningRequests> {
        &self.running
    }

    /// The health check options in force.
    pub(crate) fn health_options(&self) -> Arc<HealthOptions> {
        self.current.load().health.options()
    }

    /// Notifies of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

/// Those of `backends` that are not in `others`. Compared by identity: a backend that was removed and added
/// again at the same address starts with new counts.
pub(crate) fn difference<'a>(
    backends: &'a [Arc<Backend>],
    others: &[Arc<Backend>],
) -> impl Iterator<Item = &'a Arc<Backend>> {
    backends.iter().filter(|backend| !others.iter().any(|other| Arc::ptr_eq(backend, other)))
}

/// The servers of both roles at one moment.
pub(crate) struct Fleet {
    prefill: RoleGroup,
    decode: RoleGroup,
    /// Removed from rotation with requests in flight at the time. Kept until the fleet changes again.
    draining: Vec<Arc<Backend>>,
    health: Arc<SharedHealthOptions>,
}

impl Fleet {
    fn empty(health: HealthOptions) -> Self {
        let health = Arc::new(SharedHealthOptions::new(health));
        let (prefill, decode) = (RoleGroup::empty(Role::Prefill), RoleGroup::empty(Role::Decode));
        Self { prefill, decode, draining: Vec::new(), health }
    }

    /// The fleet of `spec`, reusing the [`Backend`] of each server that keeps its address and bootstrap
    /// fields, with its health, counts and connections. The others drain: they are selected no more and
    /// finish their requests.
    fn updated(&self, spec: FleetSpec) -> Self {
        let FleetSpec { prefill, decode, prefill_policy, decode_policy, health } = spec;
        self.health.apply(health);
        let tracker = |group: &RoleGroup| {
            // Beside other servers a new one must pass a probe before it gets requests; alone, it is tried at
            // once.
            let new = if group.servers().is_empty() { HealthTracker::new } else { HealthTracker::starting };
            new(Arc::clone(&self.health), Arc::clone(&group.excluded))
        };
        let prefill = prefill.into_iter().map(|spec| {
            let known = self.find_known(|server| server.is_prefill(&spec));
            let slot = || self.prefill.loads.take_slot();
            known.unwrap_or_else(|| Arc::new(Backend::prefill(spec, tracker(&self.prefill), slot())))
        });
        let decode = decode.into_iter().map(|address| {
            let known = self.find_known(|server| server.is_decode(&address));
            let slot = || self.decode.loads.take_slot();
            known.unwrap_or_else(|| Arc::new(Backend::decode(address, tracker(&self.decode), slot())))
        });
        let prefill = self.prefill.updated(prefill.collect(), prefill_policy);
        let decode = self.decode.updated(decode.collect(), decode_policy);
        // Quadratic, with at most 1,024 servers of a role, and only when the fleet changes.
        let is_active = |server: &Arc<Backend>| {
            prefill.servers().iter().chain(decode.servers()).any(|active| Arc::ptr_eq(active, server))
        };
        let draining = self.known_servers().filter(|server| !is_active(server) && server.in_flight() > 0);
        let draining = draining.cloned().collect();
        Self { prefill, decode, draining, health: Arc::clone(&self.health) }
    }

    fn find_known(&self, matches: impl Fn(&Backend) -> bool) -> Option<Arc<Backend>> {
        self.known_servers().find(|server| matches(server)).cloned()
    }

    /// The servers in rotation, and the removed ones that have requests in flight still.
    pub(crate) fn known_servers(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.all().chain(self.draining())
    }

    /// What the policies want to know of requests.
    pub(crate) fn needs(&self) -> Needs {
        self.prefill.needs.and(self.decode.needs)
    }

    /// Whether requests with the same prompt are meant to go to the same prefill server.
    pub(crate) fn keeps_prompts_together(&self) -> bool {
        self.prefill.needs != Needs::default() || self.prefill.servers().len() == 1
    }

    /// How full the index of the prefill policy is, if it has one.
    pub(crate) fn prefix_index_usage(&self) -> Option<IndexUsage> {
        (&*self.prefill.policy as &dyn Any).downcast_ref::<CacheAware>()?.index_usage()
    }

    /// Selects a pair. The error is the role that has no server.
    pub(crate) fn select_pair(&self, demand: Demand<'_>) -> Result<ServerPair, Role> {
        let prefill = self.prefill.pick(demand).ok_or(Role::Prefill)?;
        Ok(pair_of(prefill, self.decode.pick(demand).ok_or(Role::Decode)?))
    }

    /// Selects a pair, and counts the request on both of its servers.
    pub(crate) fn enter_pair(&self, demand: Demand<'_>) -> Result<(ServerPair, InFlight, InFlight), Role> {
        let stopwatch = Stopwatch::start();
        let prefill = self.prefill.pick(demand).ok_or(Role::Prefill)?;
        let decode = self.decode.pick(demand).ok_or(Role::Decode)?;
        let nanos = stopwatch.nanos();
        let (mut pair, on_prefill, on_decode) = enter(prefill, decode);
        pair.selection_nanos = nanos;
        Ok((pair, on_prefill, on_decode))
    }

    /// The same for a retry: without the server that has just failed, if its role has another one.
    pub(crate) fn enter_other_pair(
        &self,
        failed: &Arc<Backend>,
        demand: Demand<'_>,
    ) -> Result<(ServerPair, InFlight, InFlight), Role> {
        let prefill = self.prefill.pick_other(failed, demand).ok_or(Role::Prefill)?;
        Ok(enter(prefill, self.decode.pick_other(failed, demand).ok_or(Role::Decode)?))
    }

    pub(crate) fn prefill(&self) -> &[Arc<Backend>] {
        self.prefill.servers()
    }

    pub(crate) fn decode(&self) -> &[Arc<Backend>] {
        self.decode.servers()
    }

    /// The servers of one role that are in rotation.
    pub(crate) fn servers(&self, role: Role) -> &[Arc<Backend>] {
        match role {
            Role::Prefill => self.prefill(),
            Role::Decode => self.decode(),
        }
    }

    /// The servers that were removed from rotation and have requests in flight still.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.draining.iter().filter(|server| server.in_flight() > 0)
    }

    /// The servers in rotation, prefill first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.prefill().iter().chain(self.decode())
    }
}

/// Measures how long one in [`MEASURED`] selections takes.
struct Stopwatch(Option<Instant>);

/// To read the clock twice takes 50 ns, which is more than some selections.
const MEASURED: u32 = 16;

impl Stopwatch {
    fn start() -> Self {
        Self((fastrand::u32(..MEASURED) == 0).then(Instant::now))
    }

    fn nanos(self) -> Option<u32> {
        Some(u32::try_from(self.0?.elapsed().as_nanos()).unwrap_or(u32::MAX))
    }
}

/// A server that was picked, and how.
#[derive(Debug)]
struct Picked {
    server: Arc<Backend>,
    by: SelectedBy,
    expected: Expectation,
}

fn pair_of(prefill: Picked, decode: Picked) -> ServerPair {
    ServerPair::new((prefill.server, prefill.by), (decode.server, decode.by))
}

fn enter(prefill: Picked, decode: Picked) -> (ServerPair, InFlight, InFlight) {
    let [on_prefill, on_decode] = [&prefill, &decode].map(|picked| {
        let mut in_flight = InFlight::enter(Arc::clone(&picked.server));
        in_flight.add_work(picked.by.work());
        in_flight.set_expectation(picked.expected);
        in_flight
    });
    (pair_of(prefill, decode), on_prefill, on_decode)
}

/// How much a server is wanted. Others than the first are used only while no server of the role has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    InRotation,
    /// Down, or on its way back. A refused connection costs little, and then another server is selected.
    Excluded,
    /// It still accepts requests, but those of its last 1.5 s are lost.
    Draining,
}

fn rank(server: &Backend) -> Rank {
    match (server.is_healthy(), server.is_draining()) {
        (true, _) => Rank::InRotation,
        (false, false) => Rank::Excluded,
        (false, true) => Rank::Draining,
    }
}

/// The servers of one role, and the policy that selects among them.
struct RoleGroup {
    role: Role,
    candidates: Candidates,
    loads: Arc<LoadTable>,
    policy: Arc<dyn Policy>,
    needs: Needs,
    /// How many servers health checks exclude: while it is 0, selection looks at no server's health.
    excluded: Arc<AtomicUsize>,
}

impl RoleGroup {
    fn empty(role: Role) -> Self {
        Self {
            role,
            candidates: Candidates::default(),
            loads: Arc::default(),
            policy: Arc::new(Random),
            needs: Needs::default(),
            excluded: Arc::default(),
        }
    }

    fn servers(&self) -> &[Arc<Backend>] {
        &self.candidates.servers
    }

    /// The same role with other servers, which share the count of excluded ones.
    fn updated(&self, servers: Vec<Arc<Backend>>, next: Arc<dyn Policy>) -> Self {
        let keeps = self.policy.continues_as(&*next);
        let policy = if keeps { Arc::clone(&self.policy) } else { next };
        let updated = Self {
            role: self.role,
            candidates: Candidates::new(servers),
            loads: Arc::clone(&self.loads),
            needs: policy.needs(self.role),
            policy,
            excluded: Arc::clone(&self.excluded),
        };
        updated.loads.set_policy(&updated.policy);
        updated.tell_policy();
        updated
    }

    fn tell_policy(&self) {
        self.policy.servers_changed(self.servers());
    }

    /// Selects among the healthy servers, or among all if none is: one that may be down is better than none
    /// (envoy's "panic mode").
    fn pick(&self, demand: Demand<'_>) -> Option<Picked> {
        // Relaxed: a server that became unhealthy a moment ago may get one more request.
        if self.excluded.load(Ordering::Relaxed) == 0 {
            return self.pick_of(&self.candidates, demand);
        }
        let best = self.best_rank();
        self.pick_where(|server| rank(server) <= best, demand)
            .or_else(|| self.pick_of(&self.candidates, demand))
    }

    /// Selects another server than `failed`: one of the best rank that another has, else `failed` again.
    fn pick_other(&self, failed: &Arc<Backend>, demand: Demand<'_>) -> Option<Picked> {
        let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed);
        let best = self.servers().iter().filter(|server| is_other(server)).map(|server| rank(server)).min();
        best.and_then(|best| self.pick_where(|server| is_other(server) && rank(server) <= best, demand))
            .or_else(|| self.pick_where(is_other, demand))
            .or_else(|| self.pick_of(&self.candidates, demand))
    }

    /// The best rank that a server of this role has now.
    fn best_rank(&self) -> Rank {
        self.servers().iter().map(|server| rank(server)).min().unwrap_or(Rank::InRotation)
    }

    /// Selects among the servers that match. Usually all do, and then no list of them is allocated.
    fn pick_where(&self, matches: impl Fn(&Arc<Backend>) -> bool, demand: Demand<'_>) -> Option<Picked> {
        if self.servers().iter().all(&matches) {
            return self.pick_of(&self.candidates, demand);
        }
        let matching = self.servers().iter().filter(|server| matches(server)).cloned();
        self.pick_of(&Candidates::new(matching.collect()), demand)
    }

    fn pick_of(&self, candidates: &Candidates, demand: Demand<'_>) -> Option<Picked> {
        if candidates.servers.is_empty() {
            return None;
        }
        let choice = Choice::new(self.role, candidates, &self.loads, demand);
        let Selection { server, cached, reason, memo } = self.policy.choose(&choice);
        let by = self.selected_by(demand, cached, reason, candidates.servers.len());
        let expected = Expectation {
            prompt_bytes: by.prompt_bytes,
            cached_bytes: cached,
            // What others have given to it is computed before this request, too.
            work_before: server.work() + server.foreign_work(),
            memo,
        };
        Some(Picked { server: Arc::clone(server), by, expected })
    }

    fn selected_by(
        &self,
        demand: Demand<'_>,
        cached: u64,
        reason: SelectionReason,
        candidates: usize,
    ) -> SelectedBy {
        // Whatever the policy looks at, there was nothing to select.
        let reason = if candidates == 1 { SelectionReason::Only } else { reason };
        SelectedBy { policy: self.policy.name(), reason, prompt_bytes: demand.prompt_bytes(), cached }
    }
}

#[cfg(test)]
mod tests;

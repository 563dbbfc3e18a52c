//! All backends at one moment, and the selection of a prefill-decode pair, or of a plain server, for a
//! request.
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
use super::ranks::RankSlot;
use super::{
    Address, Backend, CacheAware, Choice, Demand, Encoders, HealthOptions, InFlight, IndexUsage, Needs,
    Policy, PrefillSpec, Random, Role, RunningRequests, SelectedBy, Selection, SelectionReason, ServerPair,
};
pub(crate) use permits::PairPermits;

/// Which servers there should be, and how they are selected and probed.
#[derive(Clone)]
pub(crate) struct FleetSpec {
    pub(crate) prefill: Vec<PrefillSpec>,
    pub(crate) decode: Vec<Address>,
    /// Servers without disaggregation.
    pub(crate) regular: Vec<Address>,
    /// Each request goes to one plain server, and not to a pair.
    pub(crate) is_regular: bool,
    pub(crate) prefill_policy: Arc<dyn Policy>,
    pub(crate) decode_policy: Arc<dyn Policy>,
    pub(crate) regular_policy: Arc<dyn Policy>,
    /// Servers that do not follow the room are told the rank that was chosen for them.
    pub(crate) is_dp_aware: bool,
    /// For all servers.
    pub(crate) health: HealthOptions,
}

impl FleetSpec {
    /// The same without servers.
    pub(crate) fn without_servers(&self) -> Self {
        let (prefill, decode, regular) = Default::default();
        Self { prefill, decode, regular, ..self.clone() }
    }
}

#[cfg(test)]
impl FleetSpec {
    /// Servers `http://regular-0:80` and so on, without health checks.
    pub(crate) fn unknown_regular(servers: usize) -> Self {
        let address = |number| Address::parse(&format!("http://regular-{number}:80")).unwrap();
        Self { regular: (0..servers).map(address).collect(), is_regular: true, ..Self::unknown(0, 0) }
    }

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
            regular: Vec::new(),
            is_regular: false,
            prefill_policy: Arc::new(super::RoundRobin::default()),
            decode_policy: Arc::new(super::RoundRobin::default()),
            regular_policy: Arc::new(super::RoundRobin::default()),
            is_dp_aware: false,
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

    /// A server has told something else about itself: its ranks are candidates from now on, and the policies
    /// are told. All servers stay.
    pub(crate) fn descriptions_changed(&self) {
        let _lock = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let fleet = self.now();
        if fleet.update_ranks() {
            self.current.store(Arc::new(fleet.with_new_ranks()));
        } else {
            fleet.prefill.tell_policy();
            fleet.decode.tell_policy();
            fleet.regular.tell_policy();
        }
    }

    /// The requests in progress that clients can name.
    pub(crate) fn running(&self) -> &Arc<RunningRequests> {
        &self.running
    }

    /// The encoders, which are there beside all fleets.
    pub(crate) fn encoders(&self) -> Arc<Encoders> {
        Arc::clone(&self.current.load().encoders)
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

/// The servers of all roles at one moment.
pub(crate) struct Fleet {
    prefill: RoleGroup,
    decode: RoleGroup,
    regular: RoleGroup,
    /// Each request goes to one plain server, and not to a pair.
    is_regular: bool,
    /// Removed from rotation with requests in flight at the time. Kept until the fleet changes again.
    draining: Vec<Arc<Backend>>,
    is_dp_aware: bool,
    health: Arc<SharedHealthOptions>,
    /// Shared by all fleets, as they change on their own.
    encoders: Arc<Encoders>,
}

impl Fleet {
    fn empty(health: HealthOptions) -> Self {
        let health = Arc::new(SharedHealthOptions::new(health));
        let [prefill, decode, regular] = [Role::Prefill, Role::Decode, Role::Regular].map(RoleGroup::empty);
        let encoders = Arc::new(Encoders::new(Arc::clone(&health)));
        let (is_regular, is_dp_aware, draining) = (false, false, Vec::new());
        Self { prefill, decode, regular, is_regular, draining, is_dp_aware, health, encoders }
    }

    /// The fleet of `spec`, reusing the [`Backend`] of each server that keeps its address and bootstrap
    /// fields, with its health, counts and connections. The others drain: they are selected no more and
    /// finish their requests.
    fn updated(&self, spec: FleetSpec) -> Self {
        self.health.apply(spec.health);
        let tracker = |group: &RoleGroup| {
            // Beside other servers a new one must pass a probe before it gets requests; alone, it is tried at
            // once.
            let new = if group.servers().is_empty() { HealthTracker::new } else { HealthTracker::starting };
            new(Arc::clone(&self.health), Arc::clone(&group.excluded))
        };
        let prefill = spec.prefill.into_iter().map(|spec| {
            let known = self.find_known(|server| server.is_prefill(&spec));
            let slot = || self.prefill.loads.take_slot();
            known.unwrap_or_else(|| Arc::new(Backend::prefill(spec, tracker(&self.prefill), slot())))
        });
        let decode = spec.decode.into_iter().map(|address| {
            let known = self.find_known(|server| server.is_decode(&address));
            let slot = || self.decode.loads.take_slot();
            known.unwrap_or_else(|| Arc::new(Backend::decode(address, tracker(&self.decode), slot())))
        });
        let regular = spec.regular.into_iter().map(|address| {
            let known = self.find_known(|server| server.is_regular(&address));
            let slot = || self.regular.loads.take_slot();
            known.unwrap_or_else(|| Arc::new(Backend::regular(address, tracker(&self.regular), slot())))
        });
        let (prefill, decode): (Vec<_>, Vec<_>) = (prefill.collect(), decode.collect());
        // Plain servers choose among their ranks themselves: they get the client's bytes.
        self.prefill.update_ranks(&prefill, spec.is_dp_aware);
        self.decode.update_ranks(&decode, spec.is_dp_aware);
        let mut updated = Self {
            prefill: self.prefill.updated(prefill, spec.prefill_policy),
            decode: self.decode.updated(decode, spec.decode_policy),
            regular: self.regular.updated(regular.collect(), spec.regular_policy),
            is_regular: spec.is_regular,
            draining: Vec::new(),
            is_dp_aware: spec.is_dp_aware,
            health: Arc::clone(&self.health),
            encoders: Arc::clone(&self.encoders),
        };
        // Quadratic, with at most 1,024 servers of a role, and only when the fleet changes.
        let is_active = |server: &Arc<Backend>| updated.all().any(|active| Arc::ptr_eq(active, server));
        let draining = self.known_servers().filter(|server| !is_active(server) && server.in_flight() > 0);
        updated.draining = draining.cloned().collect();
        updated
    }

    /// Gives the servers the ranks that they have told. Returns whether any has others now.
    fn update_ranks(&self) -> bool {
        // Both: the second has its effect even if the first has changed something.
        self.prefill.update_ranks(self.prefill(), self.is_dp_aware)
            | self.decode.update_ranks(self.decode(), self.is_dp_aware)
    }

    /// The same servers and policies, with the servers' ranks as candidates.
    fn with_new_ranks(&self) -> Self {
        let again = |group: &RoleGroup| group.updated(group.servers.clone(), Arc::clone(&group.policy));
        Self {
            prefill: again(&self.prefill),
            decode: again(&self.decode),
            regular: again(&self.regular),
            is_regular: self.is_regular,
            draining: self.draining.clone(),
            is_dp_aware: self.is_dp_aware,
            health: Arc::clone(&self.health),
            encoders: Arc::clone(&self.encoders),
        }
    }

    fn find_known(&self, matches: impl Fn(&Backend) -> bool) -> Option<Arc<Backend>> {
        self.known_servers().find(|server| matches(server)).cloned()
    }

    /// The servers in rotation, and the removed ones that have requests in flight still.
    pub(crate) fn known_servers(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.all().chain(self.draining())
    }

    pub(crate) fn encoders(&self) -> &Encoders {
        &self.encoders
    }

    /// What the policies want to know of requests.
    pub(crate) fn needs(&self) -> Needs {
        if self.is_regular { self.regular.needs } else { self.prefill.needs.and(self.decode.needs) }
    }

    /// Whether requests with the same prompt are meant to go to the same prefill server.
    pub(crate) fn keeps_prompts_together(&self) -> bool {
        self.prefill.needs != Needs::default() || self.prefill.servers().len() == 1
    }

    /// How full the index of the policy that looks at prompts is, if there is one.
    pub(crate) fn prefix_index_usage(&self) -> Option<IndexUsage> {
        let group = if self.is_regular { &self.regular } else { &self.prefill };
        (&*group.policy as &dyn Any).downcast_ref::<CacheAware>()?.index_usage()
    }

    /// Whether each request goes to one plain server, and not to a pair.
    pub(crate) fn is_regular(&self) -> bool {
        self.is_regular
    }

    /// The roles of which servers are needed.
    pub(crate) fn roles(&self) -> &'static [Role] {
        if self.is_regular { &[Role::Regular] } else { &[Role::Prefill, Role::Decode] }
    }

    /// Selects a pair. The error is the role that has no server.
    pub(crate) fn select_pair(&self, demand: Demand<'_>) -> Result<ServerPair, Role> {
        if self.is_regular {
            let Picked { server, by, .. } = self.regular.pick(demand).ok_or(Role::Regular)?;
            return Ok(ServerPair::single(server, by));
        }
        let prefill = self.prefill.pick(demand).ok_or(Role::Prefill)?;
        Ok(pair_of(prefill, self.decode.pick(demand).ok_or(Role::Decode)?))
    }

    /// Selects a pair, and counts the request on both of its servers.
    pub(crate) fn enter_pair(&self, demand: Demand<'_>) -> Result<Entered, Role> {
        let stopwatch = Stopwatch::start();
        if self.is_regular {
            let picked = self.regular.pick(demand).ok_or(Role::Regular)?;
            let nanos = stopwatch.nanos();
            let mut entered = enter_single(picked);
            entered.0.selection_nanos = nanos;
            return Ok(entered);
        }
        let prefill = self.prefill.pick(demand).ok_or(Role::Prefill)?;
        let decode = self.decode.pick(demand).ok_or(Role::Decode)?;
        let nanos = stopwatch.nanos();
        let (mut pair, on_prefill, on_decode) = enter(prefill, decode);
        pair.selection_nanos = nanos;
        Ok((pair, Some(on_prefill), on_decode))
    }

    /// The same for a retry: without the server that has just failed, if its role has another one.
    pub(crate) fn enter_other_pair(
        &self,
        failed: &Arc<Backend>,
        demand: Demand<'_>,
    ) -> Result<Entered, Role> {
        if self.is_regular {
            return Ok(enter_single(self.regular.pick_other(failed, demand).ok_or(Role::Regular)?));
        }
        let prefill = self.prefill.pick_other(failed, demand).ok_or(Role::Prefill)?;
        let decode = self.decode.pick_other(failed, demand).ok_or(Role::Decode)?;
        let (pair, on_prefill, on_decode) = enter(prefill, decode);
        Ok((pair, Some(on_prefill), on_decode))
    }

    pub(crate) fn prefill(&self) -> &[Arc<Backend>] {
        self.prefill.servers()
    }

    pub(crate) fn decode(&self) -> &[Arc<Backend>] {
        self.decode.servers()
    }

    pub(crate) fn regular(&self) -> &[Arc<Backend>] {
        self.regular.servers()
    }

    /// The servers of one role that are in rotation.
    pub(crate) fn servers(&self, role: Role) -> &[Arc<Backend>] {
        match role {
            Role::Prefill => self.prefill(),
            Role::Decode => self.decode(),
            Role::Regular => self.regular(),
        }
    }

    /// The servers that were removed from rotation and have requests in flight still.
    pub(crate) fn draining(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.draining.iter().filter(|server| server.in_flight() > 0)
    }

    /// The servers in rotation, prefill first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.prefill().iter().chain(self.decode()).chain(self.regular())
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
    rank: Option<Arc<RankSlot>>,
    by: SelectedBy,
    expected: Expectation,
}

fn pair_of(prefill: Picked, decode: Picked) -> ServerPair {
    ServerPair::new((prefill.server, prefill.by), (decode.server, decode.by))
}

/// A pair, and its entries in the in-flight counts of prefill and of decode. A plain server has one entry.
pub(crate) type Entered = (ServerPair, Option<InFlight>, InFlight);

fn enter(prefill: Picked, decode: Picked) -> (ServerPair, InFlight, InFlight) {
    let [on_prefill, on_decode] = [&prefill, &decode].map(count);
    (pair_of(prefill, decode), on_prefill, on_decode)
}

fn enter_single(picked: Picked) -> Entered {
    let in_flight = count(&picked);
    (ServerPair::single(picked.server, picked.by), None, in_flight)
}

/// Counts a request on the server that was picked for it.
fn count(picked: &Picked) -> InFlight {
    let mut in_flight = InFlight::enter(Arc::clone(&picked.server), picked.rank.clone());
    in_flight.add_work(picked.by.work());
    in_flight.set_expectation(picked.expected);
    in_flight
}

/// How much a server is wanted. Others than the first are used only while no server of the role has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Priority {
    InRotation,
    /// Down, or on its way back. A refused connection costs little, and then another server is selected.
    Excluded,
    /// It still accepts requests, but those of its last 1.5 s are lost.
    Draining,
}

fn priority(server: &Backend) -> Priority {
    match (server.is_healthy(), server.is_draining()) {
        (true, _) => Priority::InRotation,
        (false, false) => Priority::Excluded,
        (false, true) => Priority::Draining,
    }
}

/// The servers of one role, and the policy that selects among them.
struct RoleGroup {
    role: Role,
    servers: Vec<Arc<Backend>>,
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
            servers: Vec::new(),
            candidates: Candidates::default(),
            loads: Arc::default(),
            policy: Arc::new(Random),
            needs: Needs::default(),
            excluded: Arc::default(),
        }
    }

    fn servers(&self) -> &[Arc<Backend>] {
        &self.servers
    }

    fn update_ranks(&self, servers: &[Arc<Backend>], is_dp_aware: bool) -> bool {
        // Of each server, so not with `any`.
        let update = |server: &Arc<Backend>| server.update_ranks(&self.loads, is_dp_aware);
        servers.iter().filter(|server| update(server)).count() > 0
    }

    /// The same role with other servers, which share the count of excluded ones.
    fn updated(&self, servers: Vec<Arc<Backend>>, next: Arc<dyn Policy>) -> Self {
        let keeps = self.policy.continues_as(&*next);
        let policy = if keeps { Arc::clone(&self.policy) } else { next };
        let updated = Self {
            role: self.role,
            candidates: Candidates::new(&servers),
            servers,
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
        self.policy.servers_changed(&self.candidates.servers);
    }

    /// Selects among the healthy servers, or among all if none is: one that may be down is better than none
    /// (envoy's "panic mode").
    fn pick(&self, demand: Demand<'_>) -> Option<Picked> {
        // Relaxed: a server that became unhealthy a moment ago may get one more request.
        if self.excluded.load(Ordering::Relaxed) == 0 {
            return self.pick_of(&self.candidates, demand);
        }
        let best = self.best_priority();
        self.pick_where(|server| priority(server) <= best, demand)
            .or_else(|| self.pick_of(&self.candidates, demand))
    }

    /// Selects another server than `failed`: one of the best priority that another has, else `failed` again.
    fn pick_other(&self, failed: &Arc<Backend>, demand: Demand<'_>) -> Option<Picked> {
        let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed);
        let best =
            self.servers().iter().filter(|server| is_other(server)).map(|server| priority(server)).min();
        best.and_then(|best| self.pick_where(|server| is_other(server) && priority(server) <= best, demand))
            .or_else(|| self.pick_where(is_other, demand))
            .or_else(|| self.pick_of(&self.candidates, demand))
    }

    /// The best priority that a server of this role has now.
    fn best_priority(&self) -> Priority {
        self.servers().iter().map(|server| priority(server)).min().unwrap_or(Priority::InRotation)
    }

    /// Selects among the servers that match. Usually all do, and then no list of them is allocated.
    fn pick_where(&self, matches: impl Fn(&Arc<Backend>) -> bool, demand: Demand<'_>) -> Option<Picked> {
        if self.servers().iter().all(&matches) {
            return self.pick_of(&self.candidates, demand);
        }
        self.pick_of(&self.candidates.filtered(|server, _| matches(server)), demand)
    }

    fn pick_of(&self, candidates: &Candidates, demand: Demand<'_>) -> Option<Picked> {
        if candidates.servers.is_empty() {
            return None;
        }
        // The client's choice of a rank counts; where no server has such a rank, one will refuse the request.
        if candidates.has_ranks()
            && let Some(chosen) = demand.ranks.of(self.role == Role::Prefill)
        {
            let has = |rank: &Arc<RankSlot>| rank.rank().number() == chosen;
            let having = candidates.filtered(|_, rank| rank.is_none_or(has));
            if !having.servers.is_empty() {
                return Some(self.choose(&having, demand));
            }
        }
        Some(self.choose(candidates, demand))
    }

    fn choose(&self, candidates: &Candidates, demand: Demand<'_>) -> Picked {
        let choice = Choice::new(self.role, candidates, &self.loads, demand);
        let selection = self.policy.choose(&choice);
        let Selection { server, cached, reason, memo, .. } = selection;
        let rank = if candidates.has_ranks() { choice.rank_of(&selection) } else { None };
        let by = self.selected_by(demand, cached, reason, candidates.servers.len());
        let by = SelectedBy { rank: rank.map(|rank| rank.rank()), ..by };
        let expected = Expectation {
            prompt_bytes: by.prompt_bytes,
            cached_bytes: cached,
            // What others have given to it is computed before this request, too.
            work_before: match rank {
                None => server.work() + server.foreign_work(),
                Some(rank) => rank.load().work() + rank.slot().foreign_work(),
            },
            memo,
        };
        Picked { server: Arc::clone(server), rank: rank.cloned(), by, expected }
    }

    /// The least loaded rank of a server that was selected without its rank.
    fn rank_of(&self, server: &Arc<Backend>) -> Option<Arc<RankSlot>> {
        if !self.candidates.has_ranks() {
            return None;
        }
        let choice = Choice::new(self.role, &self.candidates, &self.loads, Demand::default());
        choice.rank_of(&Selection::new(server)).cloned()
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
        SelectedBy {
            policy: self.policy.name(),
            reason,
            prompt_bytes: demand.prompt_bytes(),
            cached,
            rank: None,
        }
    }
}

#[cfg(test)]
mod tests;

//! One server behind the router: its address, its bootstrap fields, and the counts and
//! health that belong to it.
//!
//! No socket is opened here, no request is counted here ([`InFlight`](super::InFlight)
//! does that), and no policy is kept.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::completed_prefill::{CompletedPrefill, Expectation, ToldTokens};
use super::connection_counts::{ConnectionCounts, Connections};
use super::health::{HealthState, HealthTracker, Signal, hastens_probe, health_signal};
use super::load_table::{LoadTable, Slot};
use super::outcome::OutcomeCounts;
use super::ranks::{RankLayout, RankSlot, Ranks};
use super::{Address, Outcome, Role};
use crate::wire::bootstrap::BootstrapFields;
use crate::wire::shape::key_hash;
use crate::wire::upstream_request::UpstreamTarget;
use crate::wire::usage::Usage;

/// A prefill server and how decode servers reach its bootstrap server.
#[derive(Debug, Clone)]
pub(crate) struct PrefillSpec {
    pub(crate) address: Address,
    pub(crate) bootstrap_host: String,
    pub(crate) bootstrap_port: Option<u16>,
}

/// What a server reports about itself in `/server_info`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Description {
    /// Its `--disaggregation-mode`.
    pub(crate) role: Option<Role>,
    pub(crate) bootstrap_port: Option<u16>,
    /// Whether it has media encoded by encoders.
    pub(crate) language_only: Option<bool>,
    /// Where it takes their registrations then.
    pub(crate) encoder_bootstrap_port: Option<u16>,
    /// Its number of data-parallel ranks.
    pub(crate) dp_size: Option<u64>,
    /// Whether the remainder of a request's room is its rank (`load_balance_method`).
    pub(crate) follows_bootstrap_room: Option<bool>,
    /// How many tokens the cache holds, that of each rank; 0 if it keeps none from one request to the next.
    pub(crate) cache_tokens: Option<u64>,
}

/// The [`Backend::id`] of the next backend.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// An id that no other server of this process has.
pub(super) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// The [`Backend::cache_epoch`] of the next cache that is empty.
static NEXT_EPOCH: AtomicU64 = AtomicU64::new(1);

/// The [`Description::cache_tokens`] of a server that has not told it.
const UNKNOWN: u64 = u64::MAX;

/// A server.
#[derive(Debug)]
pub struct Backend {
    id: u64,
    role: Role,
    address: Address,
    target: UpstreamTarget,
    /// From the configuration.
    bootstrap: Option<BootstrapFields>,
    /// From the server's own description, if no port is configured. Set once: requests read it without a
    /// lock.
    learned_bootstrap: OnceLock<BootstrapFields>,
    description: Mutex<Option<Description>>,
    /// The server has another bootstrap port than the learned one, so a new `Backend` must replace this one.
    is_stale: AtomicBool,
    /// Counts its requests and their work.
    slot: Slot,
    /// Where those are counted, too, if it has several ranks that the router chooses.
    ranks: ArcSwapOption<Ranks>,
    url_hash: u64,
    cache_tokens: AtomicU64,
    cache_epoch: AtomicU64,
    told: ToldTokens,
    outcomes: OutcomeCounts,
    /// Shared with the pools, which outlive the backend while they close its connections.
    connections: Arc<ConnectionCounts>,
    health: HealthTracker,
    /// Wakes the task that probes this server.
    probe_wanted: Notify,
}

/// The result of a probe that did not succeed, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ProbeFailure {
    /// The server answered with 503.
    Refused(String),
    Failed(String),
}

impl Backend {
    pub(super) fn prefill(spec: PrefillSpec, health: HealthTracker, slot: Slot) -> Self {
        let fields = BootstrapFields::new(spec.bootstrap_host, spec.bootstrap_port);
        Self::new(Role::Prefill, spec.address, Some(fields), health, slot)
    }

    pub(super) fn decode(address: Address, health: HealthTracker, slot: Slot) -> Self {
        Self::new(Role::Decode, address, None, health, slot)
    }

    pub(super) fn regular(address: Address, health: HealthTracker, slot: Slot) -> Self {
        Self::new(Role::Regular, address, None, health, slot)
    }

    fn new(
        role: Role,
        address: Address,
        bootstrap: Option<BootstrapFields>,
        health: HealthTracker,
        slot: Slot,
    ) -> Self {
        let target = UpstreamTarget::new(&address.authority, &address.base_path);
        Self {
            id: next_id(),
            role,
            url_hash: key_hash(address.url.as_bytes()),
            address,
            target,
            bootstrap,
            learned_bootstrap: OnceLock::new(),
            description: Mutex::default(),
            is_stale: AtomicBool::new(false),
            slot,
            ranks: ArcSwapOption::empty(),
            cache_tokens: AtomicU64::new(UNKNOWN),
            cache_epoch: AtomicU64::new(NEXT_EPOCH.fetch_add(1, Ordering::Relaxed)),
            told: ToldTokens::default(),
            outcomes: OutcomeCounts::default(),
            connections: Arc::default(),
            health,
            probe_wanted: Notify::new(),
        }
    }

    /// Whether this is the prefill server of `spec`, with the same bootstrap fields, and not stale.
    pub(super) fn is_prefill(&self, spec: &PrefillSpec) -> bool {
        self.is_at(Role::Prefill, &spec.address)
            && self.bootstrap_host() == Some(&spec.bootstrap_host)
            && self.configured_port() == spec.bootstrap_port
            && !self.is_stale.load(Ordering::Relaxed)
    }

    pub(super) fn is_decode(&self, address: &Address) -> bool {
        self.is_at(Role::Decode, address)
    }

    pub(super) fn is_regular(&self, address: &Address) -> bool {
        self.is_at(Role::Regular, address)
    }

    fn is_at(&self, role: Role, address: &Address) -> bool {
        self.role == role && self.address.url == address.url
    }

    /// Unique in this process, and never reused: a server that is removed and added again gets a new id.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The server's role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The server's URL, `http://host:port` or `https://host:port`, and its base path if it has one.
    pub fn url(&self) -> &str {
        &self.address.url
    }

    /// The `bootstrap_host` that requests carry; `None` if it is no prefill server.
    pub fn bootstrap_host(&self) -> Option<&str> {
        self.bootstrap.as_ref().map(BootstrapFields::host)
    }

    /// The `bootstrap_port` that requests carry: the configured one, or the one that the server reports.
    /// `None` if it is no prefill server, and if the port is not known, where requests carry `null`.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.bootstrap().and_then(BootstrapFields::port)
    }

    fn configured_port(&self) -> Option<u16> {
        self.bootstrap.as_ref().and_then(BootstrapFields::port)
    }

    /// What the server has reported, if it was asked.
    pub(crate) fn description(&self) -> Option<Description> {
        // Poisoning is ignored: the value is replaced as a whole.
        self.description.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records what the server reports about itself. Returns whether a new [`Backend`] must replace this one:
    /// the bootstrap port has changed, while requests that carry the old one may still be in flight.
    pub(crate) fn record_description(&self, reported: Description) -> bool {
        let mut description = self.description.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = description.replace(reported.clone());
        self.cache_tokens.store(reported.cache_tokens.unwrap_or(UNKNOWN), Ordering::Relaxed);
        drop(description);
        // Once per change: the description is fetched again after every outage.
        if previous.as_ref() != Some(&reported) {
            self.log_mismatch(&reported);
        }
        // A configured port wins: the server may be reached through a port mapping that it does not know.
        if self.role != Role::Prefill
            || reported.role == Some(Role::Decode)
            || self.configured_port().is_some()
        {
            return false;
        }
        // Without a port requests carry `null`, and the decode server assumes its own default.
        let (Some(host), Some(port)) = (self.bootstrap_host(), reported.bootstrap_port) else { return false };
        let learned = self.learned_bootstrap.get_or_init(|| {
            info!("prefill server {} reports bootstrap port {port}", self.url());
            BootstrapFields::new(host.to_owned(), Some(port))
        });
        // `learned_bootstrap` is set once, so another port cannot be stored here.
        let is_stale = learned.port() != Some(port);
        if is_stale {
            let (url, before) = (self.url(), learned.port().unwrap_or_default());
            warn!(
                "prefill server {url} reports bootstrap port {port}, before {before}: requests have {port} from \
                 now on"
            );
            self.is_stale.store(true, Ordering::Relaxed);
        }
        is_stale
    }

    /// Logs where the configuration and the server's report differ. The configuration is used all the same.
    fn log_mismatch(&self, reported: &Description) {
        let (role, url) = (self.role, self.url());
        if let Some(other) = reported.role.filter(|reported| *reported != role) {
            error!(
                "{url} is configured as a {role} server but reports that it is a {other} server; \
                 requests to it will fail until the configuration or its --disaggregation-mode is corrected"
            );
        } else if let (Some(configured), Some(port)) = (self.configured_port(), reported.bootstrap_port)
            && configured != port
        {
            // SGLang's Rust front end ignores the flag and serves the registry on its API port: that is in
            // its report only, and the requests fail after 14 s with no word about the port.
            warn!(
                "{role} server {url} is configured with bootstrap port {configured} but reports {port}: unless \
                 {configured} is mapped to {port}, decode servers do not find it and every request fails after \
                 SGLang's own timeout; configure {port}, or no port, which is then learned"
            );
        }
    }

    /// Requests in flight on this server, from its selection to the end of its response.
    pub fn in_flight(&self) -> usize {
        self.slot.load().requests()
    }

    /// The bytes of prompt that a prefill server has been given and has not computed yet, without those that
    /// it was believed to have cached; of a decode server, the prompts of its requests. Of a plain server,
    /// the prompts of its requests without what it was believed to have cached.
    pub fn work(&self) -> u64 {
        self.slot.load().work()
    }

    /// The bytes of prompt that wait on a prefill server and that this router has not given to it, as far as
    /// the server tells (`--load-poll-secs`).
    pub fn foreign_work(&self) -> u64 {
        self.slot.foreign_work()
    }

    /// A prefill server has told that so many tokens wait on it, while this router's own work there was `own`
    /// bytes.
    pub(crate) fn record_waiting_tokens(&self, tokens: u64, own: u64) {
        self.set_foreign_work(self.told.bytes_of(tokens).saturating_sub(own));
    }

    /// What the server has told of others' work is too old.
    pub(crate) fn forget_foreign_work(&self) {
        self.set_foreign_work(0);
    }

    /// Others choose their ranks as they like: the sum is taken as even.
    fn set_foreign_work(&self, bytes: u64) {
        self.slot.set_foreign_work(bytes);
        self.for_each_rank(|rank, count| rank.slot().set_foreign_work(bytes / count));
    }

    /// Gives the server the ranks that it has told, as far as the router chooses among them. Returns whether
    /// they are others now. Requests on the ones before stay counted there.
    pub(super) fn update_ranks(&self, loads: &Arc<LoadTable>, is_dp_aware: bool) -> bool {
        let description = self.description().unwrap_or_default();
        let Description { dp_size, follows_bootstrap_room, .. } = description;
        let layout = RankLayout::of(self.role, dp_size, follows_bootstrap_room, is_dp_aware);
        if self.ranks.load().as_deref().map(Ranks::layout) == layout {
            return false;
        }
        let ranks = layout.map(|layout| Ranks::new(layout, self.url(), loads));
        if ranks.as_ref().is_some_and(|ranks| ranks.all().is_empty()) {
            let (role, url) = (self.role, self.url());
            warn!("{role} server {url}: its ranks are not told apart, as there are too many of all servers");
        }
        // Who had what is not known of the new ones.
        self.forget_cache();
        self.ranks.store(ranks.map(Arc::new));
        true
    }

    /// Calls back with each rank and how many there are.
    fn for_each_rank(&self, mut each: impl FnMut(&Arc<RankSlot>, u64)) {
        if let Some(ranks) = &*self.ranks.load() {
            ranks.all().iter().for_each(|rank| each(rank, ranks.all().len() as u64));
        }
    }

    /// Its ranks, if it has several that the router chooses among.
    pub(super) fn ranks(&self) -> Vec<Arc<RankSlot>> {
        self.ranks.load().as_deref().map_or_else(Vec::new, |ranks| ranks.all().to_vec())
    }

    /// The [work](Self::work) of each rank; empty if the router does not choose among them.
    pub(crate) fn work_by_rank(&self) -> Vec<u64> {
        self.ranks().iter().map(|rank| rank.load().work()).collect()
    }

    pub(super) fn load_slot(&self) -> &Slot {
        &self.slot
    }

    pub(super) fn slot(&self) -> u16 {
        self.slot.index()
    }

    pub(super) fn url_hash(&self) -> u64 {
        self.url_hash
    }

    /// How many tokens its cache holds, or that of each of its ranks (`max_total_num_tokens`), if it has
    /// told: 0 with `--disable-radix-cache`.
    pub fn cache_tokens(&self) -> Option<u64> {
        Some(self.cache_tokens.load(Ordering::Relaxed)).filter(|tokens| *tokens != UNKNOWN)
    }

    /// Another number each time that the server's cache is known to be empty: after a start, a flush, or a
    /// time out of rotation. Different for all servers.
    pub fn cache_epoch(&self) -> u64 {
        self.cache_epoch.load(Ordering::Relaxed)
    }

    /// Notes that the server's cache is empty, or may be.
    pub(crate) fn forget_cache(&self) {
        self.cache_epoch.store(NEXT_EPOCH.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// How many tokens the prompts had that a prefill server has computed, as far as its responses say it.
    pub fn told_prompt_tokens(&self) -> u64 {
        self.told.prompt_tokens()
    }

    /// The bytes of the same prompts.
    pub fn told_prompt_bytes(&self) -> u64 {
        self.told.prompt_bytes()
    }

    /// How many of those tokens were in its cache. On the OpenAI endpoints servers say it only with
    /// `--enable-cache-report`.
    pub fn told_cached_tokens(&self) -> u64 {
        self.told.cached_tokens()
    }

    /// A prefill leg has ended well: counts what its response says, and tells the policy.
    pub(super) fn prefill_completed(
        self: &Arc<Self>,
        rank: Option<&RankSlot>,
        expected: Expectation,
        usage: Option<Usage>,
        time: Option<Duration>,
    ) {
        let told = usage.map(|usage| self.told.count(usage, expected.prompt_bytes));
        let (prompt_tokens, cached_tokens) = told.unwrap_or_default();
        let completed = CompletedPrefill { server: self, rank, expected, prompt_tokens, cached_tokens, time };
        let slot = rank.map_or(&self.slot, RankSlot::slot);
        if let Some(time) = time {
            slot.add_sample(expected.work_before, completed.new_bytes(), time);
        }
        slot.tell_policy(&completed);
    }

    /// How many requests have ended with this outcome on this server.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(outcome)
    }

    /// Whether policies may select this server: it is not known to be down. Always true without health
    /// checks.
    pub fn is_healthy(&self) -> bool {
        !self.health.state().is_excluded()
    }

    /// The state of its health checks.
    pub(crate) fn health(&self) -> HealthState {
        self.health.state()
    }

    /// Whether it is known to be up, which `/ready` needs; a server that was never probed is not.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.health.state(), HealthState::Healthy | HealthState::Suspect)
    }

    /// Whether it has answered its last probe with 503: it finishes its requests and exits.
    pub(crate) fn is_draining(&self) -> bool {
        self.health.state() == HealthState::Draining
    }

    /// Whether its last probe failed, or it is out of rotation, so that it is probed more often.
    pub(crate) fn is_recovering(&self) -> bool {
        self.health.is_recovering()
    }

    /// Completes when a request has ended in a way that is a reason to probe at once; also if it did so
    /// before the call, and nobody has waited for it since.
    pub(crate) async fn probe_wanted(&self) {
        self.probe_wanted.notified().await;
    }

    /// Records a probe's result.
    pub(crate) fn record_probe(&self, result: Result<(), ProbeFailure>) {
        let (signal, reason) = match result {
            Ok(()) => (Signal::ProbeSucceeded, String::new()),
            Err(ProbeFailure::Refused(reason)) => (Signal::ProbeRefused, reason),
            Err(ProbeFailure::Failed(reason)) => (Signal::ProbeFailed, reason),
        };
        self.record_health(signal, || reason);
    }

    /// Counts the outcome of a request, which is a health signal too.
    pub(super) fn record_outcome(&self, outcome: Outcome) {
        self.outcomes.count(outcome);
        // Nobody listens, so the process has ended, and its cache with it.
        if outcome == Outcome::Connect {
            self.forget_cache();
        }
        // Passive health checks: traffic notices a failure sooner than the next probe does.
        if let Some(signal) = health_signal(outcome) {
            self.record_health(signal, || format!("requests fail ({})", outcome.as_str()));
        }
        if hastens_probe(outcome) {
            self.probe_wanted.notify_one();
        }
    }

    /// `reason` is called only if the state changes: nearly every call records one more success.
    fn record_health(&self, signal: Signal, reason: impl FnOnce() -> String) {
        let (role, url) = (self.role, self.url());
        let changed = self.health.record(signal);
        // It comes into rotation or goes out of it: in between it may have been another process.
        if changed.is_some() {
            self.forget_cache();
        }
        match changed {
            None => {}
            Some(HealthState::Unhealthy) => {
                warn!("{role} server {url} is unhealthy, taken out of rotation: {}", reason());
            }
            Some(HealthState::Draining) => {
                warn!("{role} server {url} is draining, taken out of rotation: {}", reason());
            }
            Some(HealthState::Starting) => {
                warn!(
                    "{role} server {url} is not up, kept out of rotation until a probe succeeds: {}",
                    reason()
                )
            }
            Some(_) => info!("{role} server {url} is healthy"),
        }
    }

    /// The fields that requests carry: one load of a value that never changes once it is set.
    pub(crate) fn bootstrap(&self) -> Option<&BootstrapFields> {
        self.learned_bootstrap.get().or(self.bootstrap.as_ref())
    }

    /// Its connections, summed over all workers.
    pub(crate) fn connections(&self) -> Connections {
        self.connections.sum()
    }

    pub(super) fn connection_counts(&self) -> &Arc<ConnectionCounts> {
        &self.connections
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Where requests to this server go.
    pub(crate) fn target(&self) -> &UpstreamTarget {
        &self.target
    }
}

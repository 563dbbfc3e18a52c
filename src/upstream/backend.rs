//! One server behind the router: where it is and what is known of it.
//!
//! No socket is opened here and no policy is kept.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hyper::header::HeaderValue;
use tracing::{error, info, warn};

use super::connection_counts::{ConnectionCounts, Connections};
use super::health::{HealthState, HealthTracker, sign};
use super::outcome::Outcomes;
use super::{Address, Outcome};
use crate::admission::{AdmissionHandle, WakeOnDrop};
use crate::wire::bootstrap::BootstrapFields;

/// What a server does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates the tokens.
    Decode,
}

impl Role {
    /// `prefill` or `decode`, as in error codes and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A prefill server and how decode servers find it.
#[derive(Debug, Clone)]
pub(crate) struct PrefillSpec {
    pub(crate) address: Address,
    pub(crate) bootstrap_host: String,
    pub(crate) bootstrap_port: Option<u16>,
}

/// What a server says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Description {
    /// Its `--disaggregation-mode`.
    pub(crate) role: Option<Role>,
    pub(crate) bootstrap_port: Option<u16>,
    /// Data-parallel ranks within it.
    pub(crate) dp_size: Option<u64>,
}

/// The next server's [`Backend::id`].
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A prefill or decode server.
#[derive(Debug)]
pub struct Backend {
    id: u64,
    role: Role,
    address: Address,
    host_header: HeaderValue,
    bootstrap: Option<BootstrapFields>,
    /// What it said itself, where no port was given.
    learned: OnceLock<BootstrapFields>,
    described: Mutex<Option<Description>>,
    /// What was learned is true no more, so another must take its place.
    outdated: AtomicBool,
    in_flight: AtomicUsize,
    outcomes: Outcomes,
    /// Shared with the pools.
    connections: Arc<ConnectionCounts>,
    health: HealthTracker,
}

impl Backend {
    pub(super) fn prefill(spec: PrefillSpec, health: HealthTracker) -> Self {
        let fields = BootstrapFields::new(spec.bootstrap_host, spec.bootstrap_port);
        Self::new(Role::Prefill, spec.address, Some(fields), health)
    }

    pub(super) fn decode(address: Address, health: HealthTracker) -> Self {
        Self::new(Role::Decode, address, None, health)
    }

    fn new(role: Role, address: Address, bootstrap: Option<BootstrapFields>, health: HealthTracker) -> Self {
        let host_header = HeaderValue::from_str(&address.authority).expect("a URL's authority is printable");
        let (in_flight, outcomes) = (AtomicUsize::new(0), Outcomes::default());
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self {
            id,
            role,
            address,
            host_header,
            bootstrap,
            learned: OnceLock::new(),
            described: Mutex::default(),
            outdated: AtomicBool::new(false),
            in_flight,
            outcomes,
            connections: Arc::default(),
            health,
        }
    }

    /// Whether this is the prefill server that is meant, as decode servers find it too.
    pub(super) fn is_prefill(&self, spec: &PrefillSpec) -> bool {
        self.is_at(Role::Prefill, &spec.address)
            && self.bootstrap_host() == Some(&spec.bootstrap_host)
            && self.given_port() == spec.bootstrap_port
            && !self.outdated.load(Ordering::Relaxed)
    }

    pub(super) fn is_decode(&self, address: &Address) -> bool {
        self.is_at(Role::Decode, address)
    }

    fn is_at(&self, role: Role, address: &Address) -> bool {
        self.role == role && self.address.url == address.url
    }

    /// A number that no other server of this process has, or had.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The server's role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The server's URL, `http://host:port` or `https://host:port`.
    pub fn url(&self) -> &str {
        &self.address.url
    }

    /// What is sent as `bootstrap_host`; `None` for a decode server.
    pub fn bootstrap_host(&self) -> Option<&str> {
        self.bootstrap.as_ref().map(BootstrapFields::host)
    }

    /// What is sent as `bootstrap_port`: what was given, or what the server has said itself. `None` is `null`, and for a
    /// decode server.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.bootstrap().and_then(BootstrapFields::port)
    }

    fn given_port(&self) -> Option<u16> {
        self.bootstrap.as_ref().and_then(BootstrapFields::port)
    }

    /// What it has said of itself, if it was asked.
    pub(crate) fn description(&self) -> Option<Description> {
        // It is put there whole.
        self.described.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what the server says of itself. Returns whether another [`Backend`] must take this one's place: its bootstrap
    /// port is another than before, and requests are under way that were told the old one.
    pub(crate) fn note_description(&self, said: Description) -> bool {
        let before = self.described.lock().unwrap_or_else(PoisonError::into_inner).replace(said.clone());
        if before.as_ref() != Some(&said) {
            self.log_contradictions(&said);
        }
        if self.role != Role::Prefill || said.role == Some(Role::Decode) || self.given_port().is_some() {
            return false;
        }
        let (Some(host), Some(port)) = (self.bootstrap_host(), said.bootstrap_port) else { return false };
        let sent = self.learned.get_or_init(|| {
            info!("prefill server {} has bootstrap port {port}, as it says itself", self.url());
            BootstrapFields::new(host.to_owned(), Some(port))
        });
        let outdated = sent.port() != Some(port);
        if outdated {
            warn!("prefill server {} has bootstrap port {port} now", self.url());
            self.outdated.store(true, Ordering::Relaxed);
        }
        outdated
    }

    fn log_contradictions(&self, said: &Description) {
        let (role, url) = (self.role, self.url());
        if let Some(other) = said.role.filter(|said| *said != role) {
            error!(
                "{url} was given as a {role} server, but it says that it is a {other} server: requests will fail"
            );
        } else if let (Some(given), Some(port)) = (self.given_port(), said.bootstrap_port)
            && given != port
        {
            warn!("{role} server {url} was given bootstrap port {given}, but it says that it has {port}");
        }
    }

    /// Requests that are under way on this server, from choosing it to the end of its answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// How many requests have ended like this on this server.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.outcomes.of(outcome)
    }

    /// Whether policies are given this server: it is not known to be down. Always so without health checks.
    pub fn is_healthy(&self) -> bool {
        !self.health.state().is_out()
    }

    /// In one word, for operators.
    pub(crate) fn health(&self) -> HealthState {
        self.health.state()
    }

    /// Whether it is known to be up, which a server that was never asked is not.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.health.state(), HealthState::Healthy | HealthState::Suspect)
    }

    /// Whether nothing speaks against it, so that there is no hurry to ask again.
    pub(crate) fn is_settled(&self) -> bool {
        self.health.state() == HealthState::Healthy
    }

    /// A probe has been answered well, or has failed for a reason.
    pub(crate) fn note_probe(&self, result: Result<(), String>) {
        self.note_sign(result.is_ok(), || result.err().unwrap_or_default());
    }

    fn note_end(&self, outcome: Outcome) {
        self.outcomes.count(outcome);
        if let Some(well) = sign(outcome) {
            self.note_sign(well, || format!("requests end with {}", outcome.as_str()));
        }
    }

    fn note_sign(&self, well: bool, why: impl FnOnce() -> String) {
        let (role, url) = (self.role, self.url());
        match self.health.note(well) {
            None => {}
            Some(HealthState::Unhealthy) => {
                warn!("{role} server {url} is unhealthy and gets no requests: {}", why())
            }
            Some(HealthState::Starting) => {
                warn!("{role} server {url} is not up and gets no requests before it is: {}", why())
            }
            Some(_) => info!("{role} server {url} is healthy"),
        }
    }

    /// What is learned is there once the server was asked, so this is one look at what does not change.
    pub(crate) fn bootstrap(&self) -> Option<&BootstrapFields> {
        self.learned.get().or(self.bootstrap.as_ref())
    }

    /// Its connections, of all workers.
    pub(crate) fn connections(&self) -> Connections {
        self.connections.sum()
    }

    pub(super) fn connection_counts(&self) -> &Arc<ConnectionCounts> {
        &self.connections
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The value of the `Host` header towards this server.
    pub(crate) fn host_header(&self) -> &HeaderValue {
        &self.host_header
    }
}

/// Counts one request on a server for as long as it lives, and how it ended.
#[derive(Debug)]
pub(crate) struct InFlight {
    seat: BackendPermit,
    outcome: Outcome,
}

impl InFlight {
    pub(crate) fn enter(backend: Arc<Backend>) -> Self {
        Self::on(BackendPermit::take(backend))
    }

    /// On a seat that was taken before.
    pub(crate) fn on(seat: BackendPermit) -> Self {
        Self { seat, outcome: Outcome::Cancelled }
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.seat.backend
    }

    /// Says how it ended. A request of which nothing is said was cancelled.
    pub(crate) fn ends_as(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Before the seat is free: whoever sees that nothing is under way sees how it ended.
        self.seat.backend.note_end(self.outcome);
    }
}

/// A request's place on a server, until it is dropped.
#[derive(Debug)]
pub(crate) struct BackendPermit {
    backend: Arc<Backend>,
    /// Last, so that it is dropped when the seat is free. Only where seats are limited.
    _freed: Option<WakeOnDrop>,
}

impl BackendPermit {
    pub(super) fn take(backend: Arc<Backend>) -> Self {
        // Relaxed: a policy may read a count that is a moment old.
        backend.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { backend, _freed: None }
    }

    /// Takes one of `cap`, if one is free.
    pub(super) fn take_of(backend: &Arc<Backend>, cap: usize) -> Option<Self> {
        let counted = |count: usize| (count < cap).then_some(count + 1);
        let taken = backend.in_flight.fetch_update(Ordering::Acquire, Ordering::Acquire, counted);
        taken.ok().map(|_| Self { backend: Arc::clone(backend), _freed: None })
    }

    /// Whoever waits for a seat will be told.
    pub(super) fn told_of(mut self, entrance: &Arc<AdmissionHandle>) -> Self {
        self._freed = Some(WakeOnDrop::by(entrance));
        self
    }
}

impl Drop for BackendPermit {
    fn drop(&mut self) {
        self.backend.in_flight.fetch_sub(1, Ordering::Release);
    }
}

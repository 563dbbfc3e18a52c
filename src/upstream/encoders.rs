//! All encoders: which there should be, from configuration, DNS and the workers API, and whether any of
//! them works.
//!
//! They are a set of their own beside the fleet, because no leg goes to them. No name is resolved and no
//! server is asked here (`admin` does that).

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tracing::{info, warn};

use super::desired_fleet::ServerSource;
use super::encoder::Encoder;
use super::health::SharedHealthOptions;
use super::{Address, NotChanged};

/// Most encoders, from all sources together: each has a probe task, and each prefill server is told of each.
pub(crate) const MAX_ENCODERS: usize = 128;

/// A DNS name, each address of which is an encoder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EncoderName {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// What the configuration says of encoders.
#[derive(Debug, Clone)]
pub(crate) struct EncoderSpec {
    pub(crate) configured: Vec<Address>,
    pub(crate) names: Vec<EncoderName>,
    /// Where language-only prefill servers take registrations, if not where each says.
    pub(crate) bootstrap_port: Option<u16>,
}

/// The encoders, replaceable at any time.
pub(crate) struct Encoders {
    current: ArcSwap<Vec<Arc<Encoder>>>,
    sources: Mutex<EncoderSources>,
    /// There are some, and none works. Read by every generation request.
    are_down: AtomicBool,
    /// 0: as each prefill server says.
    bootstrap_port: AtomicU16,
    changes: watch::Sender<()>,
    health: Arc<SharedHealthOptions>,
}

/// The encoders that each source names.
#[derive(Default)]
struct EncoderSources {
    configured: Vec<Address>,
    names: Vec<EncoderName>,
    /// The addresses of each name at its last successful lookup.
    resolved: HashMap<EncoderName, Vec<Address>>,
    /// By operators.
    added: Vec<Address>,
    /// Removed by operators, for as long as another source names them. By key.
    removed: HashSet<String>,
}

impl EncoderSources {
    /// The encoders of configuration and DNS, each once.
    fn declared(&self) -> Vec<(Address, ServerSource)> {
        let configured = self.configured.iter().map(|address| (address, ServerSource::Configuration));
        let resolved = self.names.iter().flat_map(|name| self.resolved.get(name).into_iter().flatten());
        let mut seen = HashSet::new();
        let all = configured.chain(resolved.map(|address| (address, ServerSource::Dns)));
        let first = all.filter(|(address, _)| seen.insert(address.key().to_owned()));
        first.map(|(address, source)| (address.clone(), source)).collect()
    }

    /// The encoders that there should be, each once. As for servers, the configuration comes first.
    fn effective(&self) -> Vec<(Address, ServerSource)> {
        let added = self.added.iter().map(|address| (address.clone(), ServerSource::Operator));
        let declared = self.declared().into_iter();
        declared.filter(|(address, _)| !self.removed.contains(address.key())).chain(added).collect()
    }

    /// Drops operators' changes that another source has overtaken.
    fn drop_superseded(&mut self) {
        let declared: HashSet<String> =
            self.declared().into_iter().map(|(address, _)| address.key().to_owned()).collect();
        self.removed.retain(|key| declared.contains(key));
        self.added.retain(|address| !declared.contains(address.key()));
    }
}

impl Encoders {
    pub(super) fn new(health: Arc<SharedHealthOptions>) -> Self {
        Self {
            current: ArcSwap::default(),
            sources: Mutex::default(),
            are_down: AtomicBool::new(false),
            bootstrap_port: AtomicU16::new(0),
            changes: watch::channel(()).0,
            health,
        }
    }

    /// All encoders now.
    pub(crate) fn all(&self) -> Arc<Vec<Arc<Encoder>>> {
        self.current.load_full()
    }

    /// Whether there are encoders and all are known to be down: what needs one cannot be served.
    pub(crate) fn are_down(&self) -> bool {
        self.are_down.load(Relaxed)
    }

    /// Whether there are encoders and none is known to work.
    pub(crate) fn are_degraded(&self) -> bool {
        let all = self.current.load();
        !all.is_empty() && !all.iter().any(|encoder| encoder.is_up())
    }

    /// Notifies of each change of the set from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// The port of prefill servers' encoder bootstrap servers, if it is configured.
    pub(crate) fn bootstrap_port(&self) -> Option<u16> {
        Some(self.bootstrap_port.load(Relaxed)).filter(|port| *port != 0)
    }

    /// Replaces the configuration. Operators' changes stay as long as they are changes.
    pub(crate) fn configure(&self, spec: EncoderSpec) {
        let mut sources = self.sources();
        self.bootstrap_port.store(spec.bootstrap_port.unwrap_or(0), Relaxed);
        sources.resolved.retain(|name, _| spec.names.contains(name));
        (sources.configured, sources.names) = (spec.configured, spec.names);
        self.rebuild(&mut sources);
    }

    /// The names to resolve.
    pub(crate) fn names(&self) -> Vec<EncoderName> {
        self.sources().names.clone()
    }

    /// Sets the addresses of a DNS name.
    pub(crate) fn set_addresses(&self, name: &EncoderName, addresses: Vec<Address>) {
        let mut sources = self.sources();
        let urls =
            |addresses: &[Address]| addresses.iter().map(|one| one.url.clone()).collect::<HashSet<_>>();
        let before = sources.resolved.get(name).map(|before| urls(before));
        // A reload may have removed the name during the lookup.
        if sources.names.contains(name) && before != Some(urls(&addresses)) {
            sources.resolved.insert(name.clone(), addresses);
            self.rebuild(&mut sources);
        }
    }

    /// Adds an encoder. Succeeds too if it is there already.
    pub(crate) fn add(&self, address: &Address) -> Result<Arc<Encoder>, NotChanged> {
        let mut sources = self.sources();
        let all = self.all();
        match find(&all, address.key()) {
            Some(known) if known.url() == address.url => return Ok(Arc::clone(known)),
            Some(_) => return Err(NotChanged::Exists),
            None if all.len() >= MAX_ENCODERS => return Err(NotChanged::TooManyEncoders),
            None => {}
        }
        // One that an operator had removed follows its source again.
        if !sources.removed.remove(address.key()) {
            sources.added.push(address.clone());
        }
        self.rebuild(&mut sources);
        find(&self.all(), address.key()).cloned().ok_or(NotChanged::Unknown)
    }

    /// Removes an encoder.
    pub(crate) fn remove(&self, encoder: &Encoder) -> Result<(), NotChanged> {
        let mut sources = self.sources();
        let key = encoder.address().key();
        find(&self.all(), key).ok_or(NotChanged::Unknown)?;
        sources.added.retain(|added| added.key() != key);
        if sources.declared().iter().any(|(address, _)| address.key() == key) {
            sources.removed.insert(key.to_owned());
        }
        self.rebuild(&mut sources);
        Ok(())
    }

    /// The encoder with this key, if there is one.
    pub(crate) fn find(&self, key: &str) -> Option<Arc<Encoder>> {
        find(&self.all(), key).cloned()
    }

    /// Where an encoder comes from, as in `GET /workers`.
    pub(crate) fn source(&self, encoder: &Encoder) -> Option<&'static str> {
        let effective = self.sources().effective();
        let key = encoder.address().key();
        let found = effective.into_iter().find(|(address, _)| address.key() == key);
        found.map(|(_, source)| source.as_str())
    }

    /// Records a probe's result, with the reason of a failure.
    pub(crate) fn record_probe(&self, encoder: &Encoder, result: Result<(), String>) {
        // Held, so that two results do not overtake each other on the way to `are_down`.
        let _sources = self.sources();
        encoder.record(result);
        self.judge();
    }

    fn sources(&self) -> MutexGuard<'_, EncoderSources> {
        // Poisoning is ignored: a change is complete before the set is rebuilt.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the set that the sources make. An encoder that stays keeps its health.
    fn rebuild(&self, sources: &mut EncoderSources) {
        sources.drop_superseded();
        let mut wanted = sources.effective();
        if wanted.len() > MAX_ENCODERS {
            warn!("more than {MAX_ENCODERS} encoders: the excess is ignored");
            wanted.truncate(MAX_ENCODERS);
        }
        let before = self.all();
        let known = |address: &Address| before.iter().find(|known| known.url() == address.url).cloned();
        let new = |address: Address| Arc::new(Encoder::new(address, Arc::clone(&self.health)));
        let all = wanted.into_iter().map(|(address, _)| known(&address).unwrap_or_else(|| new(address)));
        let now: Vec<Arc<Encoder>> = all.collect();
        log_changes(&before, &now);
        self.current.store(Arc::new(now));
        self.judge();
        // Not `send`, which fails and keeps nothing while no task listens.
        self.changes.send_replace(());
    }

    fn judge(&self) {
        let all = self.current.load();
        let are_down = !all.is_empty() && all.iter().all(|encoder| encoder.is_down());
        let were_down = self.are_down.swap(are_down, Relaxed);
        match (were_down, are_down) {
            (false, true) => warn!("no encoder is up: requests with images, audio or video are rejected"),
            (true, false) => info!("requests with images, audio or video are served again"),
            _ => {}
        }
    }
}

fn find<'a>(all: &'a [Arc<Encoder>], key: &str) -> Option<&'a Arc<Encoder>> {
    all.iter().find(|encoder| encoder.address().key() == key)
}

fn log_changes(before: &[Arc<Encoder>], now: &[Arc<Encoder>]) {
    let is_in = |some: &[Arc<Encoder>], one: &Encoder| some.iter().any(|other| other.id() == one.id());
    before.iter().filter(|one| !is_in(now, one)).for_each(|one| info!("encoder {} removed", one.url()));
    now.iter().filter(|one| !is_in(before, one)).for_each(|one| info!("encoder {} added", one.url()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::HealthOptions;

    fn options(enabled: bool) -> HealthOptions {
        HealthOptions { enabled, failure_threshold: 2, success_threshold: 1, ..HealthOptions::default() }
    }

    fn encoders() -> Encoders {
        Encoders::new(Arc::new(SharedHealthOptions::new(options(true))))
    }

    fn address(url: &str) -> Address {
        Address::parse(url).unwrap()
    }

    fn spec(urls: &[&str], names: &[EncoderName]) -> EncoderSpec {
        let configured = urls.iter().map(|url| address(url)).collect();
        EncoderSpec { configured, names: names.to_vec(), bootstrap_port: None }
    }

    fn urls(encoders: &Encoders) -> Vec<String> {
        encoders.all().iter().map(|encoder| encoder.url().to_owned()).collect()
    }

    #[test]
    fn they_are_down_when_probes_of_all_have_failed() {
        let encoders = encoders();
        assert!(!encoders.are_down() && !encoders.are_degraded(), "there are none");
        encoders.configure(spec(&["http://a:1", "http://b:1"], &[]));
        assert!(!encoders.are_down() && encoders.are_degraded(), "not probed yet");
        let all = encoders.all();
        let fail = |encoder: &Encoder| encoders.record_probe(encoder, Err("it failed".into()));
        encoders.record_probe(&all[0], Ok(()));
        fail(&all[1]);
        assert!(!encoders.are_down() && !encoders.are_degraded(), "one works");
        fail(&all[0]);
        assert!(!encoders.are_down(), "less often than the threshold");
        fail(&all[0]);
        assert!(encoders.are_down() && encoders.are_degraded());
        encoders.record_probe(&all[1], Ok(()));
        assert!(!encoders.are_down(), "one is back");
        encoders.remove(&all[1]).unwrap();
        assert!(encoders.are_down());
        encoders.health.apply(options(false));
        encoders.configure(spec(&["http://a:1"], &[]));
        assert!(!encoders.are_down(), "without checks all work");
        encoders.configure(spec(&[], &[]));
        assert!(!encoders.are_down() && !encoders.are_degraded());
    }

    #[test]
    fn operators_changes_hold_until_a_source_overtakes_them() {
        let encoders = encoders();
        let name = EncoderName { host: "e".into(), port: 1 };
        encoders.configure(spec(&["http://a:1"], std::slice::from_ref(&name)));
        encoders.set_addresses(&name, vec![address("http://b:1"), address("http://a:1")]);
        encoders.add(&address("http://c:1")).unwrap();
        let first = encoders.add(&address("http://a:1")).unwrap();
        assert_eq!(urls(&encoders), ["http://a:1", "http://b:1", "http://c:1"]);
        let sources: Vec<_> = encoders.all().iter().map(|one| encoders.source(one)).collect();
        assert_eq!(sources, [Some("config"), Some("dns"), Some("api")]);
        assert_eq!(encoders.add(&address("https://a:1")).unwrap_err(), NotChanged::Exists);
        encoders.remove(&first).unwrap();
        assert_eq!(encoders.remove(&first), Err(NotChanged::Unknown));
        encoders.configure(spec(&["http://a:1", "http://c:1"], std::slice::from_ref(&name)));
        assert_eq!(urls(&encoders), ["http://c:1", "http://b:1"], "a stays out");
        assert_eq!(encoders.add(&address("http://a:1")).unwrap().url(), "http://a:1");
        encoders.configure(spec(&["http://b:1"], &[]));
        assert_eq!(urls(&encoders), ["http://b:1"]);
        encoders.set_addresses(&name, vec![address("http://d:1")]);
        assert_eq!(urls(&encoders), ["http://b:1"], "the name is gone");
    }

    #[test]
    fn there_are_no_more_than_the_bound() {
        let encoders = encoders();
        let many: Vec<String> = (0..MAX_ENCODERS + 2).map(|port| format!("http://e:{}", port + 1)).collect();
        encoders.configure(spec(&many.iter().map(String::as_str).collect::<Vec<_>>(), &[]));
        assert_eq!(encoders.all().len(), MAX_ENCODERS);
        assert_eq!(encoders.add(&address("http://x:1")).unwrap_err(), NotChanged::TooManyEncoders);
    }
}

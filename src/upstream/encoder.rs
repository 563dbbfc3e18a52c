//! One encoder: a server that turns images, audio and video into embeddings for prefill servers
//! (SGLang's `--encoder-only`).
//!
//! No request of a client goes to it, so no policy selects it, and it is no [`Backend`](super::Backend).
//! It is probed, and registered with prefill servers, in `admin::encoders`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use super::Address;
use super::backend::next_id;
use super::health::{HealthState, HealthTracker, SharedHealthOptions, Signal};

/// Whether an encoder is registered with one prefill server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum EncoderRegistration {
    /// Not yet: the prefill server or the encoder is down, or was not asked so far.
    Pending,
    Registered,
    /// The prefill server says that it is not language-only, or nobody listens on the port.
    Refused,
    /// The request failed otherwise, or was answered with an error.
    Unreachable,
}

impl EncoderRegistration {
    pub(crate) const ALL: [Self; 4] = [Self::Pending, Self::Registered, Self::Refused, Self::Unreachable];

    /// As in `GET /workers` and in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Registered => "registered",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
        }
    }
}

/// An encoder, what its probes say, and where it is registered.
#[derive(Debug)]
pub(crate) struct Encoder {
    id: u64,
    address: Address,
    health: HealthTracker,
    /// By the URL of the prefill server.
    registrations: Mutex<BTreeMap<String, EncoderRegistration>>,
}

impl Encoder {
    pub(super) fn new(address: Address, health: Arc<SharedHealthOptions>) -> Self {
        // The count of excluded servers is for selection, which there is none of.
        let health = HealthTracker::new(health, Arc::default());
        Self { id: next_id(), address, health, registrations: Mutex::default() }
    }

    /// Unique among encoders and backends.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The URL under which prefill servers get to know it.
    pub(crate) fn url(&self) -> &str {
        &self.address.url
    }

    pub(crate) fn health(&self) -> HealthState {
        self.health.state()
    }

    /// Whether its probes say that it works.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.health(), HealthState::Healthy | HealthState::Suspect)
    }

    /// Whether its probes say that it does not. One that was not probed yet is neither up nor down.
    pub(crate) fn is_down(&self) -> bool {
        self.health().is_excluded()
    }

    /// Whether its last probe failed, so that it is probed more often.
    pub(crate) fn is_recovering(&self) -> bool {
        self.health.is_recovering()
    }

    /// Records a probe's result, with the reason of a failure.
    pub(super) fn record(&self, result: Result<(), String>) {
        let (signal, reason) = match result {
            Ok(()) => (Signal::ProbeSucceeded, String::new()),
            // Also of 503, which says that it could not encode, not that it leaves.
            Err(reason) => (Signal::ProbeFailed, reason),
        };
        let url = self.url();
        match self.health.record(signal) {
            None => {}
            Some(HealthState::Unhealthy) => warn!("encoder {url} is unhealthy: {reason}"),
            Some(HealthState::Starting) => warn!("encoder {url} is not up: {reason}"),
            Some(_) => info!("encoder {url} is healthy"),
        }
    }

    /// Notes whether it is registered with the prefill server at this URL.
    pub(crate) fn note_registration(&self, prefill: &str, registration: EncoderRegistration) {
        let mut registrations = self.lock();
        match registrations.get_mut(prefill) {
            Some(known) => *known = registration,
            None => {
                registrations.insert(prefill.to_owned(), registration);
            }
        }
    }

    /// Forgets prefill servers that are gone.
    pub(crate) fn retain_registrations(&self, is_there: impl Fn(&str) -> bool) {
        self.lock().retain(|prefill, _| is_there(prefill));
    }

    /// Prefill servers by URL, and whether it is registered with each.
    pub(crate) fn registrations(&self) -> Vec<(String, EncoderRegistration)> {
        self.lock().iter().map(|(prefill, registration)| (prefill.clone(), *registration)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, EncoderRegistration>> {
        // Poisoning is ignored: each change is one insertion or removal.
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

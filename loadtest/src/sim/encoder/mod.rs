//! Encoder disaggregation: an encoder's routes, and what a language-only prefill server does with encoders.
//! Embeddings are not made up and not transferred: 200 stands for them.

mod dispatch;
pub(crate) mod media;
pub(crate) mod registry;
pub(crate) mod server;

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

pub(crate) use dispatch::dispatch;

/// How an encoder behaves.
#[derive(Clone, Debug, Default)]
pub struct EncoderConfig {
    /// The status with which `/encode` fails; `None`: it succeeds.
    pub failure: Option<u16>,
    /// How long `/health` takes to encode its dummy. Not scaled.
    pub health_time: Duration,
}

/// What a server knows of encoders, or an encoder of itself.
#[derive(Debug)]
pub(crate) struct EncoderState {
    /// Language-only: the registered encoders. SGLang drops those that do not answer its probes; here they
    /// stay.
    urls: Mutex<Vec<String>>,
    /// Encoder: the status of all `/encode`, and of `/health`; 0 is success.
    failure: AtomicU16,
    health: AtomicU16,
}

impl EncoderState {
    pub(crate) fn new(config: &EncoderConfig, urls: &[String]) -> Self {
        let failure = AtomicU16::new(config.failure.unwrap_or(0));
        Self { urls: Mutex::new(urls.to_vec()), failure, health: AtomicU16::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.urls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        self.lock().clone()
    }

    pub(crate) fn fail_encodes(&self, status: Option<u16>) {
        self.failure.store(status.unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn fail_health(&self, status: Option<u16>) {
        self.health.store(status.unwrap_or(0), Ordering::Relaxed);
    }

    /// The status with which an `/encode` fails now.
    fn failure(&self) -> Option<u16> {
        Some(self.failure.load(Ordering::Relaxed)).filter(|status| *status != 0)
    }

    fn health_failure(&self) -> Option<u16> {
        Some(self.health.load(Ordering::Relaxed)).filter(|status| *status != 0)
    }
}

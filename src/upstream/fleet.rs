//! All servers, and the choice of two of them for a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::health::Health;
use super::{Address, Backend, Choice, HealthOptions, Policy, PrefillSpec};

/// The servers of both roles.
pub(crate) struct Fleet {
    prefill: Group,
    decode: Group,
}

impl Fleet {
    pub(crate) fn new(
        prefill: Vec<PrefillSpec>,
        decode: Vec<Address>,
        prefill_policy: Arc<dyn Policy>,
        decode_policy: Arc<dyn Policy>,
        health: &HealthOptions,
    ) -> Self {
        let first_decode = prefill.len();
        let (prefill_unhealthy, decode_unhealthy) = (Arc::default(), Arc::default());
        let prefill = prefill.into_iter().enumerate().map(|(index, spec)| {
            Backend::prefill(index, spec, Health::new(health.clone(), Arc::clone(&prefill_unhealthy)))
        });
        let decode = decode.into_iter().zip(first_decode..).map(|(address, index)| {
            Backend::decode(index, address, Health::new(health.clone(), Arc::clone(&decode_unhealthy)))
        });
        let (prefill, decode) = (prefill.map(Arc::new).collect(), decode.map(Arc::new).collect());
        Self {
            prefill: Group { servers: prefill, policy: prefill_policy, unhealthy: prefill_unhealthy },
            decode: Group { servers: decode, policy: decode_policy, unhealthy: decode_unhealthy },
        }
    }

    pub(crate) fn select_pair(&self) -> ServerPair {
        ServerPair { prefill: self.prefill.pick(), decode: self.decode.pick() }
    }

    /// Chooses two servers without the one that has just failed, where there is another of its role.
    pub(crate) fn select_other_pair(&self, failed: &Arc<Backend>) -> ServerPair {
        ServerPair { prefill: self.prefill.pick_other(failed), decode: self.decode.pick_other(failed) }
    }

    pub(crate) fn prefill(&self) -> &[Arc<Backend>] {
        &self.prefill.servers
    }

    pub(crate) fn decode(&self) -> &[Arc<Backend>] {
        &self.decode.servers
    }

    /// Every server, prefill first.
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

impl Group {
    /// A server that may be down is better than none: if all are unhealthy, any is picked.
    fn pick(&self) -> Arc<Backend> {
        if self.unhealthy.load(Ordering::Relaxed) == 0 {
            return self.pick_of(&self.servers);
        }
        self.pick_where(|server| server.is_healthy()).unwrap_or_else(|| self.pick_of(&self.servers))
    }

    fn pick_other(&self, failed: &Arc<Backend>) -> Arc<Backend> {
        let is_other = |server: &Arc<Backend>| !Arc::ptr_eq(server, failed);
        self.pick_where(|server| is_other(server) && server.is_healthy())
            .or_else(|| self.pick_where(is_other))
            .unwrap_or_else(|| self.pick_of(&self.servers))
    }

    fn pick_where(&self, wish: impl Fn(&Arc<Backend>) -> bool) -> Option<Arc<Backend>> {
        let wanted: Vec<_> = self.servers.iter().filter(|server| wish(server)).cloned().collect();
        (!wanted.is_empty()).then(|| self.pick_of(&wanted))
    }

    fn pick_of(&self, servers: &[Arc<Backend>]) -> Arc<Backend> {
        Arc::clone(self.policy.pick(&Choice::new(servers)))
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

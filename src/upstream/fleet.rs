//! All servers, and the choice of two of them for a request.

use std::sync::Arc;

use super::{Address, Backend, Choice, Policy, PrefillSpec};

/// The servers of both roles and the policies that choose among them.
pub(crate) struct Fleet {
    prefill: Vec<Arc<Backend>>,
    decode: Vec<Arc<Backend>>,
    prefill_policy: Arc<dyn Policy>,
    decode_policy: Arc<dyn Policy>,
}

impl Fleet {
    pub(crate) fn new(
        prefill: Vec<PrefillSpec>,
        decode: Vec<Address>,
        prefill_policy: Arc<dyn Policy>,
        decode_policy: Arc<dyn Policy>,
    ) -> Self {
        let first_decode = prefill.len();
        let (prefill, decode) = (prefill.into_iter().enumerate(), decode.into_iter().enumerate());
        Self {
            prefill: prefill.map(|(index, spec)| Arc::new(Backend::prefill(index, spec))).collect(),
            decode: decode.map(|(i, address)| Arc::new(Backend::decode(first_decode + i, address))).collect(),
            prefill_policy,
            decode_policy,
        }
    }

    pub(crate) fn select_pair(&self) -> ServerPair {
        ServerPair {
            prefill: Arc::clone(self.prefill_policy.pick(&Choice::new(&self.prefill))),
            decode: Arc::clone(self.decode_policy.pick(&Choice::new(&self.decode))),
        }
    }

    /// Chooses two servers without the one that has just failed, where there is another of its role.
    pub(crate) fn select_other_pair(&self, failed: Option<&Arc<Backend>>) -> ServerPair {
        let others = |servers: &[Arc<Backend>]| -> Vec<Arc<Backend>> {
            let is_other = |server: &&Arc<Backend>| failed.is_none_or(|failed| !Arc::ptr_eq(server, failed));
            servers.iter().filter(is_other).cloned().collect()
        };
        let pick = |policy: &Arc<dyn Policy>, servers: &[Arc<Backend>]| {
            let others = others(servers);
            Arc::clone(policy.pick(&Choice::new(if others.is_empty() { servers } else { &others })))
        };
        ServerPair {
            prefill: pick(&self.prefill_policy, &self.prefill),
            decode: pick(&self.decode_policy, &self.decode),
        }
    }

    pub(crate) fn prefill(&self) -> &[Arc<Backend>] {
        &self.prefill
    }

    /// Every server, prefill first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.prefill.iter().chain(&self.decode)
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

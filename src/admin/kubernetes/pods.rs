//! The pods that are known, and the servers that they make.
//!
//! A list replaces all pods, an event one. Nothing is asked here.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use tracing::warn;

use super::pod::{Pod, Verdict};
use crate::upstream::{MAX_SERVERS_PER_ROLE, PodSource, Role, ServerSpec};

/// Most pods that are remembered: servers, and pods with an error. Others need no memory.
pub(super) const MAX_PODS: usize = 16_384;

/// The identity of a pod: namespace and name. A stateful set gives a new pod the name of the one before.
type PodId = (String, String);

/// A pod that is a server, or would be but for an error.
struct KnownPod {
    uid: Option<String>,
    created: Option<String>,
    verdict: Verdict,
}

/// The pods of one source.
pub(super) struct Pods {
    source: PodSource,
    known: BTreeMap<PodId, KnownPod>,
    /// Whether a bound was exceeded at the last look, which is logged once.
    has_excess: bool,
}

impl Pods {
    pub(super) fn new(source: PodSource) -> Self {
        Self { source, known: BTreeMap::new(), has_excess: false }
    }

    /// Replaces all pods by those of a complete list.
    pub(super) fn replace(&mut self, listed: Vec<Pod>) {
        // What was refused before is not logged again.
        let before = std::mem::take(&mut self.known);
        for pod in listed {
            let known = before.get(&id(&pod));
            self.put(&pod, known.map(|known| &known.verdict));
        }
    }

    /// A pod was added or has changed.
    pub(super) fn apply(&mut self, pod: &Pod) {
        let before = self.known.remove(&id(pod));
        self.put(pod, before.as_ref().map(|known| &known.verdict));
    }

    /// A pod is gone, or its labels are not asked for any more.
    pub(super) fn delete(&mut self, pod: &Pod) {
        if let Entry::Occupied(known) = self.known.entry(id(pod))
            // Not its successor of the same name.
            && known.get().uid == pod.metadata.uid
        {
            known.remove();
        }
    }

    fn put(&mut self, pod: &Pod, before: Option<&Verdict>) {
        let verdict = pod.judge(&self.source);
        match (&verdict, before) {
            (Verdict::Absent, _) => return,
            (Verdict::Refused(why), Some(Verdict::Refused(known))) if why == known => {}
            (Verdict::Refused(why), _) => {
                warn!("pod {} gets no requests: {why}", pod.shown_name());
            }
            (Verdict::Server { .. }, _) => {}
        }
        if self.known.len() >= MAX_PODS {
            self.warn_of_excess(&format!("over {MAX_PODS} pods are servers"));
            return;
        }
        let (uid, created) = (pod.metadata.uid.clone(), pod.metadata.creation_timestamp.clone());
        self.known.insert(id(pod), KnownPod { uid, created, verdict });
    }

    /// The servers, those of the oldest pods first: a new one takes the place of none if there are too many.
    pub(super) fn servers(&mut self) -> Vec<ServerSpec> {
        let mut pods: Vec<(&Option<String>, &PodId, IpAddr, &ServerSpec)> = Vec::new();
        for (id, KnownPod { created, verdict, .. }) in &self.known {
            if let Verdict::Server { address, spec } = verdict {
                pods.push((created, id, *address, spec));
            }
        }
        pods.sort_unstable_by_key(|(created, id, ..)| (*created, *id));
        // Two ready pods with one address: the older one is stale, as on a node that is cut off, and the
        // address has been given to the other.
        let newest: HashMap<IpAddr, &PodId> =
            pods.iter().map(|(_, id, address, _)| (*address, *id)).collect();
        pods.retain(|(_, id, address, _)| newest.get(address) == Some(id));
        let mut by_role: HashMap<Role, usize> = HashMap::new();
        let mut excess = None;
        let mut is_in_bounds = |spec: &ServerSpec| {
            let count = by_role.entry(spec.role()).or_default();
            *count += 1;
            let is_in_bounds = *count <= MAX_SERVERS_PER_ROLE;
            if !is_in_bounds {
                excess = Some(spec.role());
            }
            is_in_bounds
        };
        let servers: Vec<ServerSpec> =
            pods.into_iter().map(|(.., spec)| spec).filter(|spec| is_in_bounds(spec)).cloned().collect();
        match excess {
            Some(role) => {
                self.warn_of_excess(&format!("over {MAX_SERVERS_PER_ROLE} pods are {role} servers"))
            }
            None if self.known.len() < MAX_PODS => self.has_excess = false,
            None => {}
        }
        servers
    }

    /// How many pods have an error.
    pub(super) fn refused(&self) -> usize {
        self.known.values().filter(|known| matches!(known.verdict, Verdict::Refused(_))).count()
    }

    fn warn_of_excess(&mut self, what: &str) {
        if !self.has_excess {
            self.has_excess = true;
            warn!("{what}: the excess gets no requests");
        }
    }
}

fn id(pod: &Pod) -> PodId {
    (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone())
}

#[cfg(test)]
mod tests;

//! Which servers have the requests that clients can name by a `rid`.
//!
//! How a request is aborted on its servers is for `proxy` and `admin`.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Backend, ServerPair};

/// What an id begins with that the router gives to a request. That of one of several copies is the client's
/// id, a hyphen and such an id.
pub(crate) const OWN_RID: &str = "minilb-";

/// The requests in progress that have a `rid`, of all workers.
///
/// There are as many as requests in flight. A lock is taken twice for each request that has a `rid`, and for
/// no other.
#[derive(Debug, Default)]
pub(crate) struct RunningRequests {
    /// Two requests may have the same one: servers refuse the second, or they are on other servers.
    by_rid: Mutex<BTreeMap<String, Vec<ServerPair>>>,
}

impl RunningRequests {
    /// Registers a request with its ids until the result is dropped.
    pub(crate) fn register(self: &Arc<Self>, rids: &[String], pair: &ServerPair) -> Registration {
        let mut by_rid = self.lock();
        for rid in rids {
            by_rid.entry(rid.clone()).or_default().push(pair.clone());
        }
        Registration { running: Arc::clone(self), rids: rids.to_vec(), pair: pair.clone() }
    }

    /// The servers of the requests whose id begins with `rid`, each once: SGLang aborts by prefix, too. The
    /// items of a batch have the ids `rid_0`, `rid_1` and so on, which are found by the id of the whole.
    pub(crate) fn servers_of(&self, rid: &str) -> Vec<Arc<Backend>> {
        let by_rid = self.lock();
        let from = (Bound::Included(rid), Bound::Unbounded);
        let by_prefix = by_rid.range::<str, _>(from).take_while(|(other, _)| other.starts_with(rid));
        let of_batch = rid.rsplit_once('_').and_then(|(batch, _)| by_rid.get_key_value(batch));
        let mut servers: Vec<Arc<Backend>> = Vec::new();
        for pair in by_prefix.chain(of_batch).flat_map(|(_, pairs)| pairs) {
            for server in [pair.prefill(), pair.decode()] {
                if !servers.iter().any(|known| Arc::ptr_eq(known, server)) {
                    servers.push(Arc::clone(server));
                }
            }
        }
        servers
    }

    /// The ids of the copies of the requests for several samples that have this id. Servers do not know those
    /// by the client's own.
    pub(crate) fn copies_of(&self, rid: &str) -> Vec<String> {
        let start = format!("{rid}-{OWN_RID}");
        let by_rid = self.lock();
        let from = by_rid.range::<str, _>((Bound::Included(&*start), Bound::Unbounded));
        from.map(|(id, _)| id.clone()).take_while(|id| id.starts_with(&start)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<ServerPair>>> {
        // Poisoning is ignored: no step in between can panic.
        self.by_rid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a request registered until it is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    running: Arc<RunningRequests>,
    rids: Vec<String>,
    pair: ServerPair,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut by_rid = self.running.lock();
        for rid in &self.rids {
            let Some(pairs) = by_rid.get_mut(rid) else { continue };
            let is_own = |pair: &ServerPair| {
                Arc::ptr_eq(pair.prefill(), self.pair.prefill())
                    && Arc::ptr_eq(pair.decode(), self.pair.decode())
            };
            if let Some(own) = pairs.iter().position(is_own) {
                pairs.swap_remove(own);
            }
            if pairs.is_empty() {
                by_rid.remove(rid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::{Demand, FleetSpec, LiveFleet};

    fn urls(running: &RunningRequests, rid: &str) -> Vec<String> {
        running.servers_of(rid).iter().map(|server| server.url().to_owned()).collect()
    }

    #[test]
    fn a_request_is_found_by_its_id_or_a_prefix_of_it_until_it_has_ended() {
        let fleet = LiveFleet::new(FleetSpec::unknown(2, 2));
        let pairs = [(); 2].map(|()| fleet.now().select_pair(Demand::default()).unwrap());
        let running = Arc::new(RunningRequests::default());
        let first = running.register(&["r-1".into(), "r-2".into()], &pairs[0]);
        let second = running.register(&["r-2".into()], &pairs[1]);
        let of_first = ["http://prefill-0:80", "http://decode-0:80"];
        let both = ["http://prefill-0:80", "http://decode-0:80", "http://prefill-1:80", "http://decode-1:80"];
        assert_eq!(urls(&running, "r-1"), of_first);
        assert_eq!(urls(&running, "r-2"), both);
        assert_eq!(urls(&running, "r-"), both);
        // An item of the batch `r-1`.
        assert_eq!(urls(&running, "r-1_7"), of_first);
        for unknown in ["r-3", "q", "r-1_", "r-11"] {
            assert_eq!(urls(&running, unknown).is_empty(), unknown != "r-1_", "{unknown}");
        }
        let copy = running.register(&["r-minilb-1".into()], &pairs[1]);
        assert_eq!(running.copies_of("r"), ["r-minilb-1"]);
        assert!(running.copies_of("r-1").is_empty());
        drop((second, copy));
        assert_eq!(urls(&running, "r-2"), of_first);
        drop(first);
        assert!(running.lock().is_empty());
    }
}

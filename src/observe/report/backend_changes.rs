//! Log lines about backends that are added and removed. A backend's health is logged by `upstream`, where it
//! is known.

use std::sync::Arc;

use tracing::info;

use crate::upstream::{Backend, LiveFleet};

/// Logs each change of the fleet for as long as it is polled.
pub(crate) async fn log_backend_changes(fleet: &LiveFleet) {
    let mut changes = fleet.changes();
    let mut before = backends(fleet);
    while changes.changed().await.is_ok() {
        let now = backends(fleet);
        for removed in missing(&before, &now) {
            let in_flight = removed.in_flight();
            info!(in_flight, "{} server {} removed; it gets no new requests", removed.role(), removed.url());
        }
        for added in missing(&now, &before) {
            info!("{} server {} added", added.role(), added.url());
        }
        before = now;
    }
    // The fleet is gone, so nothing will change. To return would end the caller's `select!`, and with it the
    // router.
    std::future::pending().await
}

fn backends(fleet: &LiveFleet) -> Vec<Arc<Backend>> {
    fleet.now().all().cloned().collect()
}

/// Those of `backends` that are not in `others`. Compared by identity: a backend that was removed and added
/// again at the same address starts with new counts.
fn missing<'a>(
    backends: &'a [Arc<Backend>],
    others: &[Arc<Backend>],
) -> impl Iterator<Item = &'a Arc<Backend>> {
    backends.iter().filter(|backend| !others.iter().any(|other| Arc::ptr_eq(backend, other)))
}

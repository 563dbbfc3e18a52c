//! Tells which servers come and go. What is found out about one is told by `upstream`.

use std::sync::Arc;

use tracing::info;

use crate::upstream::{Backend, LiveFleet};

/// Tells of each change of the servers for as long as it is polled.
pub(crate) async fn tell_changes(fleet: &LiveFleet) {
    let mut changes = fleet.changes();
    let mut before = servers(fleet);
    while changes.changed().await.is_ok() {
        let now = servers(fleet);
        for gone in missing(&before, &now) {
            let requests = gone.in_flight();
            info!(requests, "{} server {} is gone; it gets no new requests", gone.role(), gone.url());
        }
        for new in missing(&now, &before) {
            info!("{} server {} is new", new.role(), new.url());
        }
        before = now;
    }
    // Nothing changes any more.
    std::future::pending().await
}

fn servers(fleet: &LiveFleet) -> Vec<Arc<Backend>> {
    fleet.now().all().cloned().collect()
}

/// Those that are not in `others`.
fn missing<'a>(
    servers: &'a [Arc<Backend>],
    others: &[Arc<Backend>],
) -> impl Iterator<Item = &'a Arc<Backend>> {
    servers.iter().filter(|server| !others.iter().any(|other| Arc::ptr_eq(server, other)))
}

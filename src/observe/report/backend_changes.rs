//! Log lines about backends that are added and removed. A backend's health is logged by `upstream`, where it
//! is known.

use tracing::info;

use crate::upstream::{LiveFleet, difference};

/// Logs each change of the fleet for as long as it is polled.
pub(crate) async fn log_backend_changes(fleet: &LiveFleet) {
    let mut changes = fleet.changes();
    let mut before = fleet.servers();
    while changes.changed().await.is_ok() {
        let now = fleet.servers();
        for removed in difference(&before, &now) {
            let in_flight = removed.in_flight();
            info!(in_flight, "{} server {} removed; it gets no new requests", removed.role(), removed.url());
        }
        for added in difference(&now, &before) {
            info!("{} server {} added", added.role(), added.url());
        }
        before = now;
    }
    // The fleet is gone, so nothing will change. To return would end the caller's `select!`, and with it the
    // router.
    std::future::pending().await
}

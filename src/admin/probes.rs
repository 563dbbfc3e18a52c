//! Active health checks: probes each server in the background.
//!
//! One task per server, and a new connection for each probe: whether the server still
//! accepts connections is part of the check. What a result means for the server's state is
//! decided in `upstream::health`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::error;

use super::descriptions::DescriptionCache;
use super::query::{QueryResponse, ServerQuery, query};
use crate::admission::AccessControl;
use crate::error::Error;
use crate::upstream::{Backend, DesiredFleet, HealthOptions, HealthState, Outcome, Pools, SocketOptions};

/// How often a server is probed after a failure: with the default threshold of two successes, a server that
/// works again is back in rotation after two seconds.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// Reads a flag, in SGLang 0.5.21 and later.
const READY: &str = "/ready";
/// For servers without [`READY`], where it generates one token.
const HEALTH: &str = "/health";

/// Probes all servers, also those that are added later, for as long as it is polled.
pub(crate) async fn probe_all(
    desired: &Arc<DesiredFleet>,
    access: &Arc<AccessControl>,
    sockets: &SocketOptions,
) {
    // No idle connections, so that each probe opens one.
    let pools = Arc::new(Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() }));
    let fleet = desired.fleet();
    let mut changes = fleet.changes();
    // Aborts the tasks when this future is dropped.
    let mut tasks = JoinSet::new();
    let mut probed: HashMap<u64, AbortHandle> = HashMap::new();
    let mut options = fleet.health_options();
    loop {
        let servers = fleet.snapshot();
        let previous = std::mem::replace(&mut options, fleet.health_options());
        // Tasks hold the options that they started with: after a change all are started again.
        let is_unchanged = options.enabled && previous == options;
        probed.retain(|id, task| {
            let stays = is_unchanged && servers.all().any(|server| server.id() == *id);
            if !stays {
                task.abort();
            }
            stays
        });
        for server in servers.all().filter(|_| options.enabled) {
            probed.entry(server.id()).or_insert_with(|| {
                let (server, desired) = (Arc::clone(server), Arc::clone(desired));
                let client = ProbeClient { pools: Arc::clone(&pools), access: Arc::clone(access) };
                tasks.spawn(probe_server(server, client, desired, Arc::clone(&options)))
            });
        }
        drop(servers);
        if changes.changed().await.is_err() {
            return;
        }
        // Takes the results of aborted tasks, which the set keeps otherwise.
        while tasks.try_join_next().is_some() {}
    }
}

/// Sends the router's own requests of the probe tasks.
pub(super) struct ProbeClient {
    pools: Arc<Pools>,
    /// Has the key for backends, which a reload may change.
    access: Arc<AccessControl>,
}

impl ProbeClient {
    pub(super) async fn get(
        &self,
        server: &Arc<Backend>,
        path: &'static str,
        timeout: Duration,
    ) -> QueryResponse {
        let request = ServerQuery::get(path, self.access.backend_headers(), timeout);
        query(&self.pools, Arc::clone(server), request).await
    }
}

/// Probes one server for as long as it is polled.
async fn probe_server(
    server: Arc<Backend>,
    client: ProbeClient,
    desired: Arc<DesiredFleet>,
    options: Arc<HealthOptions>,
) {
    let mut probe = Probe { server: &server, client: &client, timeout: options.timeout, path: READY };
    let mut description = DescriptionCache::default();
    let mut startup = StartupWatch { since: Instant::now(), is_late: false };
    loop {
        let start = Instant::now();
        if let Some(result) = probe.send().await {
            // Before the probe is recorded, which puts the server into rotation: the first request needs the
            // bootstrap port.
            if result.is_err() {
                description.clear();
            } else if let Some(reported) = description.refresh(&server, &client, options.timeout).await
                && server.record_description(reported)
            {
                desired.replace_stale();
            }
            server.record_probe(result);
        }
        match server.health() {
            HealthState::Unknown | HealthState::Starting => {
                sleep_until(start + startup.interval(&server, &options)).await;
            }
            _ => wait_for_next_probe(start, &server, options.interval).await,
        }
    }
}

/// Watches a server that has not started yet: SGLang loads a model for minutes before it answers.
struct StartupWatch {
    since: Instant,
    is_late: bool,
}

impl StartupWatch {
    /// The time from one probe to the next.
    fn interval(&mut self, server: &Backend, options: &HealthOptions) -> Duration {
        if self.since.elapsed() < options.startup_timeout {
            return options.startup_interval.min(options.interval);
        }
        if !self.is_late {
            self.is_late = true;
            let (role, url) = (server.role(), server.url());
            let (timeout, interval) = (options.startup_timeout, options.interval);
            error!(
                "{role} server {url} has not come up within {timeout:?}: check its log and its address; \
                 probing it every {interval:?} from now on"
            );
        }
        options.interval
    }
}

/// Waits until the next probe is due: after `interval`, or earlier if a request has failed meanwhile.
async fn wait_for_next_probe(start: Instant, server: &Backend, interval: Duration) {
    let end = start + interval;
    let mut next = start;
    loop {
        next += RECOVERY_INTERVAL.min(interval);
        sleep_until(next.min(end)).await;
        if next >= end || !server.is_healthy_now() {
            return;
        }
    }
}

struct Probe<'a> {
    server: &'a Arc<Backend>,
    client: &'a ProbeClient,
    timeout: Duration,
    /// The endpoint that the server was found to have.
    path: &'static str,
}

impl Probe<'_> {
    /// Probes once. `None` says nothing about the server: the router itself could not open a connection.
    async fn send(&mut self) -> Option<Result<(), String>> {
        // After a failure the server may be back in another version.
        if !self.server.is_healthy_now() {
            self.path = READY;
        }
        let mut status = self.status().await;
        if self.path == READY && matches!(status, Ok(StatusCode::NOT_FOUND)) {
            self.path = HEALTH;
            status = self.status().await;
        }
        match status {
            Ok(status) if status.is_success() => Some(Ok(())),
            Ok(status) => Some(Err(format!("GET {} returned {}", self.path, status.as_u16()))),
            Err(Error::Upstream { cause, .. }) if cause.outcome() == Outcome::Exhausted => None,
            // Without the server, which the log line names already.
            Err(Error::Upstream { cause, .. }) => Some(Err(cause.to_string())),
            Err(error) => Some(Err(error.to_string())),
        }
    }

    async fn status(&self) -> Result<StatusCode, Error> {
        let (head, _) = self.client.get(self.server, self.path, self.timeout).await.result?;
        Ok(head.status)
    }
}

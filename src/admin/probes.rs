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
use super::load_polls::{is_polled, poll_load};
use super::query::{QueryResponse, ServerQuery, query};
use crate::admission::AccessControl;
use crate::error::Error;
use crate::upstream::{
    Backend, DesiredFleet, HealthOptions, HealthState, Outcome, Pools, ProbeFailure, SocketOptions,
};

/// How often a server is probed after a failure: with the default threshold of two successes, a server that
/// works again is back in rotation after two seconds.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// Shortest time from one probe to the next that failing requests cause: a crowd of them costs the server ten
/// probes a second.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

/// Reads a flag, in SGLang 0.5.21 and later.
pub(super) const READY: &str = "/ready";
/// For servers without [`READY`], where it generates one token.
const HEALTH: &str = "/health";
/// How much rarer probes of [`HEALTH`] are: by default 10 s apart.
const HEALTH_FACTOR: u32 = 10;

/// Probes all servers, also those that are added later, for as long as it is polled.
pub(crate) async fn probe_all(
    desired: &Arc<DesiredFleet>,
    access: &Arc<AccessControl>,
    sockets: &SocketOptions,
) {
    let client = ProbeClient::new(sockets, access);
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
        let is_unchanged = previous == options;
        probed.retain(|id, task| {
            let stays = is_unchanged && servers.all().any(|server| server.id() == *id);
            if !stays {
                task.abort();
            }
            stays
        });
        for server in servers.all().filter(|server| options.enabled || is_polled(server, &options)) {
            probed.entry(server.id()).or_insert_with(|| {
                let (server, desired) = (Arc::clone(server), Arc::clone(desired));
                tasks.spawn(watch_server(server, client.clone(), desired, Arc::clone(&options)))
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
#[derive(Clone)]
pub(super) struct ProbeClient {
    pools: Arc<Pools>,
    /// Has the key for backends, which a reload may change.
    access: Arc<AccessControl>,
}

impl ProbeClient {
    /// Opens a connection for each request.
    pub(super) fn new(sockets: &SocketOptions, access: &Arc<AccessControl>) -> Self {
        // No idle connections, so that each probe opens one.
        let pools = Arc::new(Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() }));
        Self { pools, access: Arc::clone(access) }
    }

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

/// Sends one server all that the options want, for as long as it is polled.
async fn watch_server(
    server: Arc<Backend>,
    client: ProbeClient,
    desired: Arc<DesiredFleet>,
    options: Arc<HealthOptions>,
) {
    let probes = async {
        if options.enabled {
            probe_server(&server, &client, &desired, &options).await;
        }
    };
    // Beside each other: neither waits for a response to the other.
    tokio::join!(probes, poll_load(&server, &client, &options));
}

/// Probes one server for as long as it is polled.
async fn probe_server(
    server: &Arc<Backend>,
    client: &ProbeClient,
    desired: &Arc<DesiredFleet>,
    options: &HealthOptions,
) {
    let mut probe = Probe { server, client, timeout: options.timeout, path: READY };
    let mut description = DescriptionCache::default();
    let mut startup = StartupWatch { since: Instant::now(), is_late: false };
    loop {
        let start = Instant::now();
        if let Some(result) = probe.send().await {
            // Before the probe is recorded, which puts the server into rotation: the first request needs the
            // bootstrap port.
            if result.is_err() {
                description.clear();
            } else if let Some(reported) = description.refresh(server, client, options.timeout).await {
                let before = server.description();
                if server.record_description(reported) {
                    desired.replace_stale();
                } else if server.description() != before {
                    desired.fleet().descriptions_changed();
                }
            }
            server.record_probe(result);
        }
        match server.health() {
            HealthState::Unknown | HealthState::Starting => {
                sleep_until(start + startup.interval(server, options)).await;
            }
            _ => {
                let regular = probe.regular_interval(options.interval);
                wait_for_next_probe(start, server, regular, probe.shortest_interval(regular)).await;
            }
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

/// Waits until the next probe is due: after `regular`, or earlier if a request has failed.
async fn wait_for_next_probe(start: Instant, server: &Backend, regular: Duration, shortest: Duration) {
    let early = async {
        server.probe_wanted().await;
        sleep_until(start + shortest).await;
    };
    tokio::select! {
        () = sleep_until(start + regular) => {}
        () = early => {}
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
    /// The time to the next probe if no request fails.
    fn regular_interval(&self, interval: Duration) -> Duration {
        if self.server.is_recovering() {
            return RECOVERY_INTERVAL.min(interval);
        }
        if self.path == HEALTH { interval.saturating_mul(HEALTH_FACTOR) } else { interval }
    }

    /// The time to the next probe if requests fail.
    fn shortest_interval(&self, regular: Duration) -> Duration {
        if self.path == HEALTH { RECOVERY_INTERVAL } else { SHORTEST_INTERVAL }.min(regular)
    }

    /// Probes once. `None` says nothing about the server: the router itself could not open a connection.
    async fn send(&mut self) -> Option<Result<(), ProbeFailure>> {
        // After a failure the server may be back in another version.
        if self.server.is_recovering() {
            self.path = READY;
        }
        let mut status = self.status().await;
        if self.path == READY && matches!(status, Ok(StatusCode::NOT_FOUND)) {
            self.path = HEALTH;
            status = self.status().await;
        }
        let failed = |reason| Some(Err(ProbeFailure::Failed(reason)));
        match status {
            Ok(status) if status.is_success() => Some(Ok(())),
            Ok(status) => {
                let reason = format!("GET {} returned {}", self.path, status.as_u16());
                if status == StatusCode::SERVICE_UNAVAILABLE {
                    return Some(Err(ProbeFailure::Refused(reason)));
                }
                failed(reason)
            }
            Err(Error::Upstream { cause, .. }) if cause.outcome() == Outcome::Exhausted => None,
            // Without the server, which the log line names already.
            Err(Error::Upstream { cause, .. }) => {
                // Nobody listens: it is no process that answers late, and its cache is gone.
                if cause.outcome() == Outcome::Connect {
                    self.server.forget_cache();
                }
                failed(cause.to_string())
            }
            Err(error) => failed(error.to_string()),
        }
    }

    async fn status(&self) -> Result<StatusCode, Error> {
        let (head, _) = self.client.get(self.server, self.path, self.timeout).await.result?;
        Ok(head.status)
    }
}

//! Asks servers, in the background, whether they are well.
//!
//! A task a server, each probe on a connection of its own: that the server still
//! takes connections is a part of the question. What follows from an answer is for
//! [`Backend`] to know.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::error;

use super::descriptions::DescriptionCache;
use super::query::{ServerQuery, query};
use crate::admission::AccessControl;
use crate::error::Error;
use crate::upstream::{Backend, DesiredFleet, HealthOptions, HealthState, Outcome, Pools, SocketOptions};

/// How often a server is asked that has failed: twice in a row well, and it has its requests back.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A flag in SGLang 0.5.21 and later.
const READY: &str = "/ready";
/// Where there is no [`READY`]. It costs the server a token.
const HEALTH: &str = "/health";

/// Probes all servers, those that are added later as well, on the runtime that polls it.
pub(crate) async fn probe_all(
    members: &Arc<DesiredFleet>,
    access: &Arc<AccessControl>,
    sockets: &SocketOptions,
) {
    // Nothing is kept, so that each probe opens a connection.
    let pools = Arc::new(Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() }));
    let fleet = members.fleet();
    let mut changes = fleet.changes();
    // Dropped with this future, and with them whatever they do.
    let mut tasks = JoinSet::new();
    let mut probed: HashMap<u64, AbortHandle> = HashMap::new();
    let mut options = fleet.watching();
    loop {
        let servers = fleet.snapshot();
        let before = std::mem::replace(&mut options, fleet.watching());
        let goes_on = options.enabled && before == options;
        probed.retain(|id, task| {
            let stays = goes_on && servers.all().any(|server| server.id() == *id);
            if !stays {
                task.abort();
            }
            stays
        });
        for server in servers.all().filter(|_| options.enabled) {
            probed.entry(server.id()).or_insert_with(|| {
                let (server, members) = (Arc::clone(server), Arc::clone(members));
                let asker = ProbeClient { pools: Arc::clone(&pools), access: Arc::clone(access) };
                tasks.spawn(watch(server, asker, members, Arc::clone(&options)))
            });
        }
        drop(servers);
        if changes.changed().await.is_err() {
            return;
        }
        // What has been aborted.
        while tasks.try_join_next().is_some() {}
    }
}

/// What questions of the router's own are asked with.
pub(super) struct ProbeClient {
    pub(super) pools: Arc<Pools>,
    /// Has the key that servers want.
    pub(super) access: Arc<AccessControl>,
}

/// Probes one server for as long as it is polled.
async fn watch(
    server: Arc<Backend>,
    asker: ProbeClient,
    members: Arc<DesiredFleet>,
    options: Arc<HealthOptions>,
) {
    let mut probe = Probe { server: &server, asker: &asker, timeout: options.timeout, path: READY };
    let mut learner = DescriptionCache::default();
    let mut startup = StartupWatch { since: Instant::now(), is_late: false };
    loop {
        let begun = Instant::now();
        if let Some(result) = probe.ask().await {
            // Before the server gets requests, so that the first of them says what was learned.
            if result.is_err() {
                learner.forget();
            } else if let Some(said) = learner.learn(&server, &asker, options.timeout).await
                && server.note_description(said)
            {
                members.renew();
            }
            server.note_probe(result);
        }
        match server.health() {
            HealthState::Unknown | HealthState::Starting => {
                sleep_until(begun + startup.wait(&server, &options)).await
            }
            _ => rest(begun, &server, options.interval).await,
        }
    }
}

/// The wait for a server that has not come up yet.
struct StartupWatch {
    since: Instant,
    is_late: bool,
}

impl StartupWatch {
    /// From one probe to the next.
    fn wait(&mut self, server: &Backend, options: &HealthOptions) -> Duration {
        if self.since.elapsed() < options.startup_timeout {
            return options.startup_interval.min(options.interval);
        }
        if !self.is_late {
            self.is_late = true;
            let (role, url) = (server.role(), server.url());
            let (timeout, interval) = (options.startup_timeout, options.interval);
            error!(
                "{role} server {url} has not come up within {timeout:?}; it is asked every {interval:?} now"
            );
        }
        options.interval
    }
}

/// Waits for the time of the next probe, which comes sooner when a request has failed in between.
async fn rest(begun: Instant, server: &Backend, interval: Duration) {
    let end = begun + interval;
    let mut next = begun;
    loop {
        next += RECOVERY_INTERVAL.min(interval);
        sleep_until(next.min(end)).await;
        if next >= end || !server.is_settled() {
            return;
        }
    }
}

struct Probe<'a> {
    server: &'a Arc<Backend>,
    asker: &'a ProbeClient,
    timeout: Duration,
    /// What the server was found to have.
    path: &'static str,
}

impl Probe<'_> {
    /// Asks once. `None` says nothing of the server: the router could not ask.
    async fn ask(&mut self) -> Option<Result<(), String>> {
        // One that has failed may be another version when it is back.
        if !self.server.is_settled() {
            self.path = READY;
        }
        let mut status = self.get().await;
        if self.path == READY && matches!(status, Ok(StatusCode::NOT_FOUND)) {
            self.path = HEALTH;
            status = self.get().await;
        }
        match status {
            Ok(status) if status.is_success() => Some(Ok(())),
            Ok(status) => Some(Err(format!("{} is answered with {}", self.path, status.as_u16()))),
            Err(Error::Upstream { cause, .. }) if cause.outcome() == Outcome::Exhausted => None,
            Err(error) => Some(Err(error.to_string())),
        }
    }

    async fn get(&self) -> Result<StatusCode, Error> {
        let question = ServerQuery {
            method: Method::GET,
            target: self.path.into(),
            fields: self.asker.access.own_fields(),
            body: Bytes::new(),
            timeout: self.timeout,
        };
        let (head, _) = query(&self.asker.pools, Arc::clone(self.server), question).await.outcome?;
        Ok(head.status)
    }
}

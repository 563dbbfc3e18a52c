//! Asks servers, in the background, whether they are well.
//!
//! A task a server, each probe on a connection of its own: that the server still
//! takes connections is a part of the question. What follows from an answer is for
//! [`Backend`] to know.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::ask::{Question, ask};
use crate::access::Access;
use crate::error::Error;
use crate::upstream::{Backend, HealthOptions, LiveFleet, Outcome, Pools, SocketOptions};

/// How often a server is asked that has failed: twice in a row well, and it has its requests back.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A flag in SGLang 0.5.21 and later.
const READY: &str = "/ready";
/// Where there is no [`READY`]. It costs the server a token.
const HEALTH: &str = "/health";

/// Probes all servers, those that are added later as well, on the runtime that polls it.
pub(crate) async fn probe_all(fleet: &LiveFleet, access: &Arc<Access>, sockets: &SocketOptions) {
    // Nothing is kept, so that each probe opens a connection.
    let pools = Arc::new(Pools::new(&SocketOptions { max_idle: 0, ..sockets.clone() }));
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
                let (server, pools) = (Arc::clone(server), Arc::clone(&pools));
                tasks.spawn(watch(server, pools, Arc::clone(access), Arc::clone(&options)))
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

/// Probes one server for as long as it is polled.
async fn watch(server: Arc<Backend>, pools: Arc<Pools>, access: Arc<Access>, options: Arc<HealthOptions>) {
    let mut probe =
        Probe { server: &server, pools: &pools, access: &access, timeout: options.timeout, path: READY };
    loop {
        let begun = Instant::now();
        if let Some(result) = probe.ask().await {
            server.note_probe(result);
        }
        rest(begun, &server, options.interval).await;
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
    pools: &'a Pools,
    access: &'a Access,
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
        let question = Question {
            method: Method::GET,
            target: Some(PathAndQuery::from_static(self.path)),
            headers: self.access.own_headers(),
            timeout: self.timeout,
        };
        let (head, _) = ask(self.pools, Arc::clone(self.server), question).await.outcome?;
        Ok(head.status)
    }
}

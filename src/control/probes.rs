//! Asks servers, in the background, whether they are well.
//!
//! A task a server, each probe on a connection of its own: that the server still
//! takes connections is a part of the question. What follows from an answer is for
//! [`Backend`] to know.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::HeaderMap;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::ask::{Question, ask};
use crate::error::Error;
use crate::upstream::{Backend, Fleet, HealthOptions, Outcome, Pools, SocketOptions};

/// How often a server is asked that has failed: twice in a row well, and it has its requests back.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A flag in SGLang 0.5.21 and later.
const READY: &str = "/ready";
/// Where there is no [`READY`]. It costs the server a token.
const HEALTH: &str = "/health";

/// Probes of all servers; they end when this is dropped.
pub(crate) struct Probes {
    _tasks: JoinSet<()>,
}

impl Probes {
    /// Begins at once, on the caller's runtime.
    pub(crate) fn start(fleet: &Fleet, options: &HealthOptions, sockets: &SocketOptions) -> Self {
        let mut tasks = JoinSet::new();
        if options.enabled {
            // Nothing is kept, so that each probe opens a connection.
            let sockets = SocketOptions { max_idle: 0, ..sockets.clone() };
            let pools = Arc::new(Pools::new(fleet.all().count(), &sockets));
            for server in fleet.all() {
                tasks.spawn(watch(Arc::clone(server), Arc::clone(&pools), options.clone()));
            }
        }
        Self { _tasks: tasks }
    }
}

/// Probes one server for as long as it is polled.
async fn watch(server: Arc<Backend>, pools: Arc<Pools>, options: HealthOptions) {
    let mut probe = Probe { server: &server, pools: &pools, timeout: options.timeout, path: READY };
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
            headers: HeaderMap::new(),
            timeout: self.timeout,
        };
        let (head, _) = ask(self.pools, Arc::clone(self.server), question).await.outcome?;
        Ok(head.status)
    }
}

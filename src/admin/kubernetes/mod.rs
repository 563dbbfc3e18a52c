//! Kubernetes discovery: follows the pods that selectors match, and makes each one that is
//! ready a server.
//!
//! Pods are listed in pages and then watched. After any failure they are listed again, with a
//! pause; the servers stay as they are meanwhile. An empty list is a fact, other than an empty
//! answer of DNS: the API server says it with a resource version, after a quorum read, so there
//! are no servers then.
//!
//! This file decides when to list and to watch, and says so. `pod_api` has the requests and
//! responses, `client` the transport, `cluster` and `kubeconfig` the address and credentials.
//!
//! On a thread of its own: files of credentials are read, which blocks, and a page of a list is
//! megabytes of JSON, during which no connection would be accepted.

mod backoff;
mod client;
mod cluster;
mod failure;
mod kubeconfig;
mod pod;
mod pod_api;
mod pods;

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use kube_core::WatchEvent;
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::sleep;
use tracing::{debug, error, info, warn};

use crate::observe::metrics::PodMetrics;
use crate::upstream::{DesiredFleet, PodSource};
use backoff::Backoff;
use failure::{ApiError, FailureReason, PodVerb, PodWatchFailure};
use pod::Pod;
use pod_api::{PodApi, PodEvents};
use pods::Pods;

/// Most pages: a list that does not end must not fill the memory. 100,000 pods.
const MAX_PAGES: usize = 200;
/// A watch that ends earlier is not opened again before this time has passed since it was opened.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
/// A watch of this length shows that the API server is well: the pauses begin anew.
const STABLE_WATCH: Duration = Duration::from_secs(10);
/// Most events that are applied at once, so that a rollout of hundreds of pods does not publish the fleet as
/// often, and a flood of events does not keep it from being published.
const MAX_BATCH: usize = 256;

/// Follows the pods for as long as it is polled.
pub(crate) async fn follow_pods(desired: &Arc<DesiredFleet>, metrics: &Arc<PodMetrics>) {
    let mut source = desired.pod_source();
    // A reload may switch discovery on. The sender lives in `desired`.
    if source.wait_for(Option::is_some).await.is_err() {
        return pending().await;
    }
    let (_stop_on_drop, stop) = oneshot::channel();
    let (desired, metrics) = (Arc::clone(desired), Arc::clone(metrics));
    let started =
        thread::Builder::new().name("kubernetes".into()).spawn(move || run(&desired, &metrics, stop));
    if let Err(why) = started {
        error!("Kubernetes: cannot start a thread, so pods are not followed: {why}");
    }
    pending().await
}

/// The thread: follows the pods until the other end of `stop` is dropped.
fn run(desired: &DesiredFleet, metrics: &PodMetrics, stop: oneshot::Receiver<()>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(why) => {
            error!("Kubernetes: cannot start a runtime, so pods are not followed: {why}");
            return;
        }
    };
    runtime.block_on(async {
        tokio::select! {
            _ = stop => {}
            () = follow_sources(desired, metrics) => {}
        }
    });
    // A lookup of the API server's name cannot be cancelled.
    runtime.shutdown_background();
}

/// Follows the pods of the source of each configuration.
async fn follow_sources(desired: &DesiredFleet, metrics: &PodMetrics) {
    let mut source = desired.pod_source();
    loop {
        let current = source.borrow_and_update().clone();
        metrics.is_on.store(current.is_some(), Relaxed);
        let changed = match current {
            None => source.changed().await,
            Some(current) => {
                tokio::select! {
                    changed = source.changed() => changed,
                    () = PodWatch::new(desired, metrics, current).run() => return,
                }
            }
        };
        metrics.is_watching.store(false, Relaxed);
        if changed.is_err() {
            return;
        }
    }
}

/// What was last logged about the watch.
enum WatchState {
    Starting,
    Watching,
    Failing(PodVerb, FailureReason),
}

/// The watch of one source.
struct PodWatch<'a> {
    desired: &'a DesiredFleet,
    metrics: &'a PodMetrics,
    source: PodSource,
    pods: Pods,
    /// Whether there was a complete list. Before it nothing is known, and the servers of a source before a
    /// reload stay.
    is_listed: bool,
    /// Servers at the last publication.
    published: Option<usize>,
    state: WatchState,
    backoff: Backoff,
}

impl<'a> PodWatch<'a> {
    fn new(desired: &'a DesiredFleet, metrics: &'a PodMetrics, source: PodSource) -> Self {
        let (pods, state) = (Pods::new(source.clone()), WatchState::Starting);
        Self {
            desired,
            metrics,
            source,
            pods,
            is_listed: false,
            published: None,
            state,
            backoff: Backoff::default(),
        }
    }

    /// Lists and watches again and again.
    async fn run(mut self) {
        loop {
            let failure = self.list_and_watch().await;
            // Events before the failure hold: a pod that terminates must not get requests because of it.
            self.publish();
            self.report(&failure);
            sleep(self.backoff.next_pause()).await;
        }
    }

    /// Lists the pods and watches them until that fails.
    async fn list_and_watch(&mut self) -> PodWatchFailure {
        // A new client each time: it reads the files of credentials and certificates again.
        let mut api = match PodApi::new(&self.source) {
            Ok(api) => api,
            Err(error) => return PodWatchFailure::of(PodVerb::List, error),
        };
        let mut version = match self.list(&mut api).await {
            Ok(version) => version,
            Err(failure) => return failure,
        };
        loop {
            let began = Instant::now();
            let ended = self.watch(&mut api, &mut version).await;
            if began.elapsed() >= STABLE_WATCH {
                self.backoff.reset();
            }
            if let Err(failure) = ended {
                return failure;
            }
            self.publish();
            sleep(SHORTEST_WATCH.saturating_sub(began.elapsed())).await;
        }
    }

    /// Lists all pods. Returns the version of the list, from which to watch.
    async fn list(&mut self, api: &mut PodApi) -> Result<String, PodWatchFailure> {
        let malformed = |why: &str| PodWatchFailure::new(PodVerb::List, FailureReason::Malformed, why);
        let mut listed = Vec::new();
        let mut continue_token = None;
        for _ in 0..MAX_PAGES {
            let page = api.page(continue_token).await;
            let page = page.map_err(|error| PodWatchFailure::of(PodVerb::List, error))?;
            listed.extend(page.items);
            continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if continue_token.is_some() {
                continue;
            }
            let version = page.metadata.resource_version.filter(|version| !version.is_empty());
            // Without it the list is not an API server's, and its being empty would be no fact.
            let version = version.ok_or_else(|| malformed("the list has no resource version"))?;
            self.metrics.lists.fetch_add(1, Relaxed);
            self.pods.replace(listed);
            self.is_listed = true;
            self.publish();
            return Ok(version);
        }
        Err(malformed(&format!("the list has more than {MAX_PAGES} pages")))
    }

    /// Applies events until the watch ends, as it does every minute. `version` is where to go on.
    async fn watch(&mut self, api: &mut PodApi, version: &mut String) -> Result<(), PodWatchFailure> {
        let failure = |error: ApiError| PodWatchFailure::of(PodVerb::Watch, error);
        let mut events = api.watch(version).await.map_err(failure)?;
        self.watching();
        while let Some(event) = events.next().await.map_err(failure)? {
            self.take(event, version)?;
            self.take_ready(&mut events, version).await?;
            self.publish();
        }
        api.keep(events);
        Ok(())
    }

    /// Applies events that are there already.
    async fn take_ready(
        &mut self,
        events: &mut PodEvents,
        version: &mut String,
    ) -> Result<(), PodWatchFailure> {
        for _ in 1..MAX_BATCH {
            let event = tokio::select! {
                biased;
                event = events.next() => event,
                // Until the connection had its turn to read.
                () = yield_now() => return Ok(()),
            };
            let event = event.map_err(|error| PodWatchFailure::of(PodVerb::Watch, error))?;
            let Some(event) = event else { return Ok(()) };
            self.take(event, version)?;
        }
        Ok(())
    }

    /// Applies an event.
    fn take(&mut self, event: WatchEvent<Pod>, version: &mut String) -> Result<(), PodWatchFailure> {
        let pod = match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                self.pods.apply(&pod);
                pod
            }
            WatchEvent::Deleted(pod) => {
                self.pods.delete(&pod);
                pod
            }
            WatchEvent::Bookmark(bookmark) => {
                *version = bookmark.metadata.resource_version;
                return Ok(());
            }
            WatchEvent::Error(status) => return Err(PodWatchFailure::of_status(PodVerb::Watch, &status)),
        };
        self.metrics.events.fetch_add(1, Relaxed);
        *version = pod.metadata.resource_version.filter(|version| !version.is_empty()).ok_or_else(|| {
            PodWatchFailure::new(PodVerb::Watch, FailureReason::Malformed, "an event has no resource version")
        })?;
        Ok(())
    }

    /// Makes the pods the servers.
    fn publish(&mut self) {
        if !self.is_listed {
            return;
        }
        let servers = self.pods.servers();
        self.metrics.servers.store(servers.len() as u64, Relaxed);
        self.metrics.refused.store(self.pods.refused() as u64, Relaxed);
        let before = self.published.replace(servers.len());
        if servers.is_empty() && before != Some(0) {
            warn!("Kubernetes: none of the {} is ready: there are no servers from there", self.source);
        }
        self.desired.set_pods(&self.source, servers);
    }

    /// The API server sends events now.
    fn watching(&mut self) {
        self.metrics.is_watching.store(true, Relaxed);
        let count = self.published.unwrap_or_default();
        match self.state {
            WatchState::Starting => info!("Kubernetes: watching {}: {count} servers", self.source),
            WatchState::Failing(..) => info!("Kubernetes: watching {} again: {count} servers", self.source),
            WatchState::Watching => {}
        }
        self.state = WatchState::Watching;
    }

    /// Counts a failure, and logs it unless the one before was of the same kind.
    fn report(&mut self, failure: &PodWatchFailure) {
        let &PodWatchFailure { verb, reason, ref text } = failure;
        self.metrics.failures[reason as usize].fetch_add(1, Relaxed);
        // Not an error, and the list comes right away.
        if reason == FailureReason::Gone {
            debug!("Kubernetes: listing {} again: {text}", self.source);
            return;
        }
        self.metrics.is_watching.store(false, Relaxed);
        if matches!(self.state, WatchState::Failing(known_verb, known) if (known_verb, known) == (verb, reason))
        {
            return;
        }
        self.state = WatchState::Failing(verb, reason);
        let (label, source, verb) = (reason.as_str(), &self.source, verb.as_str());
        let kept = self.published.unwrap_or_default();
        warn!(reason = label, "Kubernetes: cannot {verb} {source}, keeping {kept} servers: {text}");
    }
}

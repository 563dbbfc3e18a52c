//! Kubernetes discovery: follows the pods that selectors match, and makes each one that is
//! ready a server.
//!
//! Pods are listed in pages and then watched. After any failure they are listed again, with a
//! pause; the servers stay as they are meanwhile. An empty list is a fact, other than an empty
//! answer of DNS: the API server says it with a resource version, after a quorum read, so there
//! are no servers then.
//!
//! Not kube's own `watcher`, for what its version 5.0 does not do: it watches on from a version
//! for which the response is 410, it opens a watch that ends at once again without a pause, it
//! does not tell when a watch has begun, and a list has no deadline.
//!
//! On a thread of its own: credential plugins of a kubeconfig block, and a page of a list is
//! megabytes of JSON, during which no connection would be accepted.

mod backoff;
mod failure;
mod pod;
mod pods;

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::{FutureExt, TryStreamExt};
use kube::api::{ListParams, Request, WatchParams};
use kube::core::{ObjectList, WatchEvent};
use kube::{Client, Config};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::observe::metrics::PodMetrics;
use crate::upstream::{DesiredFleet, PodSource};
use backoff::Backoff;
use failure::{FailureReason, PodVerb, PodWatchFailure};
use pod::Pod;
use pods::Pods;

/// Pods of one page, as in Kubernetes' own clients.
const PAGE: u32 = 500;
/// Most pages: a list that does not end must not fill the memory. 100,000 pods.
const MAX_PAGES: usize = 200;
/// Time to connect to the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a page of a list, and for the head of the response to a watch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the API server is asked to keep a watch open. It sends the version to go on from right before the
/// end. Shorter than in other clients, since it is also how long a connection that was cut without a word is
/// taken for a quiet one.
const WATCH_SECONDS: u32 = 60;
/// Time after which a watch must have ended or sent something.
const WATCH_SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);
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
        let client = match connect().await {
            Ok(client) => client,
            Err(failure) => return failure,
        };
        let mut version = match self.list(&client).await {
            Ok(version) => version,
            Err(failure) => return failure,
        };
        loop {
            let began = Instant::now();
            let ended = self.watch(&client, &mut version).await;
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
    async fn list(&mut self, client: &Client) -> Result<String, PodWatchFailure> {
        let failure = |error: &kube::Error| PodWatchFailure::of(PodVerb::List, error);
        let malformed = |why: &str| PodWatchFailure::new(PodVerb::List, FailureReason::Malformed, why);
        let mut params = ListParams::default().limit(PAGE).labels(&self.source.label_selector());
        let mut listed = Vec::new();
        for _ in 0..MAX_PAGES {
            let request = self.request().list(&params).map_err(kube::Error::BuildRequest);
            let page = client.request_text(request.map_err(|error| failure(&error))?);
            let page = within(PodVerb::List, page).await?;
            let page: ObjectList<Pod> = serde_json::from_str(&page)
                .map_err(|error| malformed(&format!("the response is not a list of pods: {error}")))?;
            listed.extend(page.items);
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_some() {
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
    async fn watch(&mut self, client: &Client, version: &mut String) -> Result<(), PodWatchFailure> {
        let failure = |error: &kube::Error| PodWatchFailure::of(PodVerb::Watch, error);
        let params = WatchParams::default().timeout(WATCH_SECONDS).labels(&self.source.label_selector());
        let request = self.request().watch(&params, version).map_err(kube::Error::BuildRequest);
        let events = client.request_events::<Pod>(request.map_err(|error| failure(&error))?);
        let mut events = pin!(within(PodVerb::Watch, events).await?);
        self.watching();
        loop {
            // Silence for longer than the watch can last: the connection is dead, so another is opened.
            let Ok(first) = timeout(WATCH_SILENCE, events.try_next()).await else { return Ok(()) };
            let mut next = Some(first);
            let mut count = 0;
            while let Some(event) = next {
                let Some(event) = event.map_err(|error| failure(&error))? else { return Ok(()) };
                self.take(event, version)?;
                count += 1;
                next = if count < MAX_BATCH { events.try_next().now_or_never() } else { None };
            }
            self.publish();
        }
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

    fn request(&self) -> Request {
        Request::new(self.source.path())
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

/// The client of the API server that the kubeconfig or the service account names.
async fn connect() -> Result<Client, PodWatchFailure> {
    // kube takes the process's provider. There is one if a user of the library has set it.
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // An error means that another thread has just set one.
        rustls::crypto::ring::default_provider().install_default().ok();
    }
    let mut config = Config::infer()
        .await
        .map_err(|error| PodWatchFailure::of(PodVerb::List, &kube::Error::InferConfig(error)))?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Its own retries take minutes, in which nobody would learn why.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| PodWatchFailure::of(PodVerb::List, &error))
}

/// Waits for a response, but not for ever.
async fn within<T>(
    verb: PodVerb,
    response: impl Future<Output = kube::Result<T>>,
) -> Result<T, PodWatchFailure> {
    match timeout(ANSWER_TIMEOUT, response).await {
        Ok(response) => response.map_err(|error| PodWatchFailure::of(verb, &error)),
        Err(_) => {
            let text = format!("no response within {ANSWER_TIMEOUT:?}");
            Err(PodWatchFailure::new(verb, FailureReason::Timeout, text))
        }
    }
}

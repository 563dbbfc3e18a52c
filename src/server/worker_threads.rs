//! Worker threads: which one gets a connection, and how they end.
//!
//! Each worker is a thread with a runtime and connections of its own, so that a request never changes
//! threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::admission_state::Admission;
use super::connection;
use super::live_settings::LiveSettings;
use super::negotiate::Negotiator;
use super::service::Service;
use crate::admin::{Draining, RouterEndpoints, WorkersApi};
use crate::admission::AdmissionHandle;
use crate::config::Options;
use crate::http1;
use crate::observe::metrics::Metrics;
use crate::observe::record::Recorder;
use crate::observe::report::RequestLogger;
use crate::proxy::Proxy;
use crate::transport::Transport;
use crate::upstream::{LiveFleet, Pools};

/// Accepted sockets that wait for one worker.
const MAX_ACCEPTED: usize = 1_024;
/// How often a worker frees buffers for bodies that it has not needed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The worker threads, as the acceptor sees them.
pub(super) struct WorkerThreads {
    workers: Vec<Worker>,
    /// Workers end at once when this is dropped.
    _alive: watch::Sender<()>,
}

/// What all workers share.
pub(super) struct SharedState<'a> {
    pub(super) fleet: &'a Arc<LiveFleet>,
    pub(super) workers_api: &'a Arc<WorkersApi>,
    pub(super) admission: &'a Admission,
    pub(super) settings: &'a Arc<LiveSettings>,
    pub(super) draining: &'a Draining,
    pub(super) metrics: &'a Metrics,
    pub(super) logger: &'a Arc<RequestLogger>,
    pub(super) transport: Transport,
}

struct Worker {
    sockets: mpsc::Sender<std::net::TcpStream>,
    /// Connections that the worker has.
    connections: Arc<AtomicUsize>,
    ended: oneshot::Receiver<()>,
}

impl WorkerThreads {
    pub(super) fn spawn(shared: &SharedState<'_>, options: &Options) -> io::Result<Self> {
        let (alive_sender, alive) = watch::channel(());
        let worker = |number| {
            let (sockets, accepted) = mpsc::channel(MAX_ACCEPTED);
            let (ends, ended) = oneshot::channel();
            let connections = Arc::new(AtomicUsize::new(0));
            let service = Arc::new(service(shared, options));
            let (settings, counted) = (Arc::clone(shared.settings), Arc::clone(&connections));
            let how = (Negotiator::new(&options.tls, options.proxy_protocol), shared.transport);
            let mut alive = alive.clone();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = work(service, accepted, counted, how, &settings) => {}
                        _ = alive.changed() => {}
                    }
                });
                // Tasks that still run are dropped with the runtime, before the acceptor is told.
                drop(runtime);
                let _ = ends.send(());
            })?;
            Ok(Worker { sockets, connections, ended })
        };
        let workers = (0..options.worker_threads).map(worker).collect::<io::Result<_>>()?;
        Ok(Self { workers, _alive: alive_sender })
    }

    /// Gives a socket to the worker with the fewest connections. `SO_REUSEPORT` would spread them by a hash,
    /// which leaves a few long-lived connections uneven.
    pub(super) async fn hand_over(&self, socket: std::net::TcpStream) {
        let count = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        let worker = self.workers.iter().min_by_key(count).expect("there is at least one worker");
        worker.connections.fetch_add(1, Ordering::Relaxed);
        if worker.sockets.send(socket).await.is_err() {
            warn!("a worker thread has ended; closing the connection that it was given");
        }
    }

    /// Waits until every worker has finished its requests or has run out of time.
    pub(super) async fn finish(self) {
        let Self { workers, _alive } = self;
        for worker in workers {
            drop(worker.sockets);
            let _ = worker.ended.await;
        }
    }
}

/// What one worker answers requests with.
fn service(shared: &SharedState<'_>, options: &Options) -> Service {
    let SharedState { fleet, workers_api, admission, settings, draining, metrics, logger, .. } = *shared;
    let pools = Arc::new(Pools::new(&options.sockets));
    let (metrics, queue_metrics) = (metrics.worker(), Arc::clone(metrics.queue()));
    let handle = AdmissionHandle::new(Arc::clone(&admission.controller));
    let limits = Arc::clone(settings.limits());
    Service {
        proxy: Proxy::new(Arc::clone(fleet), Arc::clone(&pools), limits, Arc::clone(&handle)),
        endpoints: RouterEndpoints::new(Arc::clone(fleet), Arc::clone(&pools), draining.clone()),
        workers_api: Arc::clone(workers_api),
        pools,
        recorder: Recorder::new(vec![Arc::clone(&metrics) as _, Arc::clone(logger) as _]),
        logger: Arc::clone(logger),
        metrics,
        draining: draining.clone(),
        settings: Arc::clone(settings),
        fleet: Arc::clone(fleet),
        admission: handle,
        queue_metrics,
        access: Arc::clone(&admission.access),
    }
}

/// A worker's life: serves sockets as they are handed over, then waits for the open requests.
#[cfg_attr(
    not(test),
    expect(clippy::disallowed_methods, reason = "a task for each connection, and two for the worker itself")
)]
async fn work(
    service: Arc<Service>,
    mut accepted: mpsc::Receiver<std::net::TcpStream>,
    connections: Arc<AtomicUsize>,
    how: (Negotiator, Transport),
    settings: &LiveSettings,
) {
    // Closed when the last connection has dropped its receiver.
    let (close, closing) = watch::channel(());
    let (sweeping, recorder) = (Arc::clone(&service), Arc::clone(&service.recorder));
    tokio::spawn(async move { sweeping.pools.sweep().await });
    tokio::spawn(sweep_body_buffers());
    while let Some(socket) = accepted.recv().await {
        let count = ConnectionCount(Arc::clone(&connections));
        match TcpStream::from_std(socket) {
            Ok(socket) => {
                let (service, how) = (Arc::clone(&service), how.clone());
                let (timeouts, closing) = (settings.client_timeouts(), closing.clone());
                // The future is built inside the task, otherwise it is stored twice.
                tokio::spawn(async move {
                    connection::serve(socket, service, how, timeouts, closing).await;
                    drop(count);
                });
            }
            Err(error) => warn!("cannot serve an accepted connection: {error}"),
        }
    }
    drop(closing);
    close.send_replace(());
    if tokio::time::timeout(settings.grace_period(), close.closed()).await.is_err() {
        recorder.set_grace_period_over();
        warn!("the grace period is over; closing connections with open requests");
    }
}

async fn sweep_body_buffers() {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        http1::sweep();
    }
}

/// Counts a connection for its worker until it is dropped.
struct ConnectionCount(Arc<AtomicUsize>);

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

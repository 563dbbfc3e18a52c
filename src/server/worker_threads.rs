//! Worker threads: which one gets a socket, and how they end.

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
use crate::admin::{self, Draining};
use crate::config::Options;
use crate::observe::metrics::Metrics;
use crate::observe::report::RequestLogger;
use crate::upstream::LiveFleet;

/// Accepted sockets that wait for one worker.
const MAX_HANDED_OVER: usize = 1_024;

/// The worker threads, as the acceptor sees them.
pub(super) struct WorkerThreads {
    workers: Vec<Worker>,
    /// WorkerThreads end at once when this is dropped.
    _alive: watch::Sender<()>,
}

/// What all workers have in common.
pub(super) struct SharedState<'a> {
    pub(super) fleet: &'a Arc<LiveFleet>,
    pub(super) servers: &'a Arc<admin::WorkersApi>,
    pub(super) guards: &'a Admission,
    pub(super) live: &'a Arc<LiveSettings>,
    pub(super) draining: &'a Draining,
    pub(super) metrics: &'a Metrics,
    pub(super) reporter: &'a Arc<RequestLogger>,
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
            let (sockets, handed_over) = mpsc::channel(MAX_HANDED_OVER);
            let (ends, ended) = oneshot::channel();
            let connections = Arc::new(AtomicUsize::new(0));
            let service = Arc::new(Service::new(shared, options));
            let (live, front) = (Arc::clone(shared.live), Negotiator::new(&options.tls));
            let (mut alive, counted) = (alive.clone(), Arc::clone(&connections));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = work(service, handed_over, counted, front, &live) => {}
                        _ = alive.changed() => {}
                    }
                });
                // Whatever runs still is dropped with the runtime, before anyone is told.
                drop(runtime);
                let _ = ends.send(());
            })?;
            Ok(Worker { sockets, connections, ended })
        };
        let workers = (0..options.worker_threads).map(worker).collect::<io::Result<_>>()?;
        Ok(Self { workers, _alive: alive_sender })
    }

    /// Gives a socket to the worker that has the fewest connections.
    pub(super) async fn hand_over(&self, socket: std::net::TcpStream) {
        let count = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        let worker = self.workers.iter().min_by_key(count).expect("there is at least one worker");
        worker.connections.fetch_add(1, Ordering::Relaxed);
        if worker.sockets.send(socket).await.is_err() {
            warn!("a worker has ended; its connection is closed");
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

/// A worker's life: serves sockets as they are handed over, then waits for the open requests.
async fn work(
    service: Arc<Service>,
    mut sockets: mpsc::Receiver<std::net::TcpStream>,
    connections: Arc<AtomicUsize>,
    front: Negotiator,
    live: &LiveSettings,
) {
    // Closed when the last connection has dropped its receiver.
    let (close, closing) = watch::channel(());
    let (sweeping, recorder) = (Arc::clone(&service), Arc::clone(&service.recorder));
    tokio::spawn(async move { sweeping.pools.sweep().await });
    tokio::spawn(sweep_rooms());
    while let Some(socket) = sockets.recv().await {
        let counted = ConnectionCount(Arc::clone(&connections));
        match TcpStream::from_std(socket) {
            Ok(socket) => {
                let (service, front) = (Arc::clone(&service), front.clone());
                let (patience, closing) = (live.patience(), closing.clone());
                // Made within the task: handed to it, it would have a second place there.
                tokio::spawn(async move {
                    connection::serve(socket, service, front, patience, closing).await;
                    drop(counted);
                });
            }
            Err(error) => warn!("a socket could not be served: {error}"),
        }
    }
    drop(closing);
    close.send_replace(());
    if tokio::time::timeout(live.grace_period(), close.closed()).await.is_err() {
        recorder.cut_off();
        warn!("the grace period is over; open requests are cut off");
    }
}

/// How often a worker lets go of room for bodies that it has not needed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

async fn sweep_rooms() {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        crate::http1::sweep();
    }
}

/// A connection that counts for its worker until it is dropped.
struct ConnectionCount(Arc<AtomicUsize>);

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

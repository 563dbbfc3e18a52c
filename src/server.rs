//! The router's own HTTP side: accepted sockets, workers, routes, and the end.
//!
//! An acceptor hands sockets to workers. Each worker is a thread with a runtime
//! and connections of its own, so that a request never changes threads. What a
//! request means is for `proxy` and `control` to know.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::config::Options;
use crate::control::{Control, Endpoint, allows};
use crate::error::Error;
use crate::proxy::{Limits, Proxy, Relay, discard};
use crate::upstream::{Dialer, Fleet, Pools};
use crate::wire::shape::Dialect;

/// Accepted sockets that wait for one worker.
const MAX_HANDED_OVER: usize = 1_024;
/// How long the acceptor rests when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a client may take for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(90);

/// Serves until `shutdown` ends, then lets open requests finish within the grace period.
///
/// Dropping the future ends all workers at once.
pub(crate) async fn serve(
    listener: TcpListener,
    fleet: Arc<Fleet>,
    options: Options,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let workers = Workers::spawn(&fleet, &options)?;
    let dialer = Dialer::new(&options.sockets);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, _)) => match dialer.tune(SockRef::from(&socket)).and_then(|()| socket.into_std()) {
                Ok(socket) => workers.hand_over(socket).await,
                // The client has left already.
                Err(error) => debug!("a socket could not be set up: {error}"),
            },
            Err(error) => {
                warn!("no connection could be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    info!("shutting down: open requests have {:?} to finish", options.shutdown_grace_period);
    workers.finish().await;
    Ok(())
}

/// The worker threads, as the acceptor sees them.
struct Workers {
    workers: Vec<Worker>,
    /// Workers end at once when this is dropped.
    _alive: watch::Sender<()>,
}

struct Worker {
    sockets: mpsc::Sender<std::net::TcpStream>,
    /// Connections that the worker has.
    connections: Arc<AtomicUsize>,
    ended: oneshot::Receiver<()>,
}

impl Workers {
    fn spawn(fleet: &Arc<Fleet>, options: &Options) -> io::Result<Self> {
        let (alive_sender, alive) = watch::channel(());
        let worker = |number| {
            let (sockets, handed_over) = mpsc::channel(MAX_HANDED_OVER);
            let (ends, ended) = oneshot::channel();
            let connections = Arc::new(AtomicUsize::new(0));
            let service = Arc::new(Service::new(fleet, options));
            let grace_period = options.shutdown_grace_period;
            let (mut alive, counted) = (alive.clone(), Arc::clone(&connections));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = work(service, handed_over, counted, grace_period) => {}
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
    async fn hand_over(&self, socket: std::net::TcpStream) {
        let count = |worker: &&Worker| worker.connections.load(Ordering::Relaxed);
        let worker = self.workers.iter().min_by_key(count).expect("there is at least one worker");
        worker.connections.fetch_add(1, Ordering::Relaxed);
        if worker.sockets.send(socket).await.is_err() {
            warn!("a worker has ended; its connection is closed");
        }
    }

    /// Waits until every worker has finished its requests or has run out of time.
    async fn finish(self) {
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
    grace_period: Duration,
) {
    let open = GracefulShutdown::new();
    let sweeping = Arc::clone(&service);
    tokio::spawn(async move { sweeping.pools.sweep().await });
    while let Some(socket) = sockets.recv().await {
        let counted = Counted(Arc::clone(&connections));
        match TcpStream::from_std(socket) {
            Ok(socket) => serve_connection(socket, &service, &open, counted),
            Err(error) => warn!("a socket could not be served: {error}"),
        }
    }
    if tokio::time::timeout(grace_period, open.shutdown()).await.is_err() {
        warn!("the grace period is over; open requests are cut off");
    }
}

/// A connection that counts for its worker until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one client connection in a task of its own.
fn serve_connection(socket: TcpStream, service: &Arc<Service>, open: &GracefulShutdown, counted: Counted) {
    let service = Arc::clone(service);
    let answer = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, std::convert::Infallible>(service.answer(request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let connection = open.watch(builder.serve_connection(TokioIo::new(socket), answer));
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!("a client connection ended: {error}");
        }
        drop(counted);
    });
}

/// What a worker answers requests with.
struct Service {
    proxy: Proxy,
    control: Control,
    pools: Arc<Pools>,
}

/// An answer: relayed from a server, or the router's own.
type Answer = Response<Either<Relay, Full<bytes::Bytes>>>;

/// Where a request goes.
enum Route {
    Proxy(Dialect),
    Control(Endpoint),
}

impl Service {
    fn new(fleet: &Arc<Fleet>, options: &Options) -> Self {
        let pools = Arc::new(Pools::new(fleet.all().count(), &options.sockets));
        let limits = Limits {
            max_payload_size: options.max_payload_size,
            max_merge_size: options.max_merge_size,
            request_timeout: options.request_timeout,
        };
        Self {
            proxy: Proxy::new(Arc::clone(fleet), Arc::clone(&pools), limits),
            control: Control::new(Arc::clone(fleet), Arc::clone(&pools), options.request_timeout),
            pools,
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let answered = match route(request.method(), request.uri().path()) {
            Ok(Route::Proxy(dialect)) => {
                let relayed = self.proxy.handle(dialect, request).await;
                return match relayed {
                    Ok(answer) => answer.map(Either::Left),
                    Err(error) => own(&error),
                };
            }
            Ok(Route::Control(endpoint)) => {
                let (head, body) = request.into_parts();
                let drained = discard(body).await;
                (self.control.handle(endpoint, head).await, drained)
            }
            Err(error) => (Err(error), discard(request.into_body()).await),
        };
        let (outcome, drained) = answered;
        let mut answer = match outcome {
            Ok(reply) => reply.map(Either::Right),
            Err(error) => own(&error),
        };
        if !drained {
            // What is left of the body would be taken for the next request.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// The router's own answer to an error.
fn own(error: &Error) -> Answer {
    match error {
        Error::Upstream { .. } => warn!(code = error.code(), "{error}"),
        _ => debug!(code = error.code(), "{error}"),
    }
    error.to_reply().map(Either::Right)
}

fn route(method: &Method, path: &str) -> Result<Route, Error> {
    let (route, allow) = match path {
        "/generate" => (Route::Proxy(Dialect::Generate), "POST, PUT"),
        "/v1/chat/completions" => (Route::Proxy(Dialect::Chat), "POST"),
        "/v1/completions" => (Route::Proxy(Dialect::Completions), "POST"),
        _ => {
            let endpoint = Endpoint::at(path).ok_or(Error::NotFound)?;
            (Route::Control(endpoint), endpoint.allow())
        }
    };
    if allows(allow, method) { Ok(route) } else { Err(Error::MethodNotAllowed { allow }) }
}

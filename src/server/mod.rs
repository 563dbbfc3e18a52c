//! The router's listeners: accept, worker threads, protocol negotiation, routes, and shutdown.
//!
//! The acceptor (here) gives sockets to [`worker_threads`]. [`negotiate`] finds out which protocol a client
//! uses (behind a load balancer's [`proxy_protocol`]), [`transport`](crate::transport) reads its requests,
//! and [`service`] responds to them by [`routes`]. Operators have a listener of their own
//! ([`admin_listener`]). What a reload changes is in [`live_settings`] and [`admission_state`]. What a
//! request means is known only to `proxy` and `admin`.

mod admin_body;
mod admin_listener;
mod admission_state;
mod connection;
mod forwarded_body;
mod listen;
mod live_settings;
mod negotiate;
mod proxy_protocol;
mod rejection;
mod response;
mod routes;
mod service;
mod worker_threads;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, info, warn};

use crate::admin::{
    Draining, FleetCheck, OperatorEndpoints, WorkersApi, check_fleet, follow_names, keep_encoders, probe_all,
};
use crate::config::Options;
use crate::observe::metrics::Metrics;
use crate::observe::report::{RequestLogger, log_backend_changes, log_limit};
use crate::transport::Transport;
use crate::upstream::{DesiredFleet, Dialer, Role};
use admin_listener::AdminService;
use listen::ACCEPT_PAUSE;
use worker_threads::{SharedState, WorkerThreads};

pub(crate) use admission_state::Admission;
pub(crate) use listen::listen;
pub(crate) use live_settings::LiveSettings;
#[cfg(any(test, fuzzing))]
pub(crate) use response::{ClientResponseBody, error as error_response, relayed as relayed_response};

/// Serves until `shutdown` completes, then announces the shutdown for the drain delay ("lame duck"), then
/// gives requests in flight the grace period to finish.
///
/// Dropping the future ends all worker threads and probes at once.
pub(crate) async fn serve(
    listener: TcpListener,
    desired_fleet: Arc<DesiredFleet>,
    admission: &Admission,
    options: Options,
    settings: Arc<LiveSettings>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let draining = Draining::default();
    let metrics = Arc::new(Metrics::default());
    let admin_listener = admin_listener::bind(options.admin.address().as_ref()).await?;
    let workers_api = workers_api(&desired_fleet, admission, &options);
    let logger = Arc::new(RequestLogger::new(&options.report));
    let transport = Transport::new(options.sockets.engine, options.tls.http2_max_streams);
    let admin = admin_service(&workers_api, &metrics, admission, &logger, transport);
    let shared = SharedState {
        fleet: desired_fleet.fleet(),
        workers_api: &workers_api,
        admission,
        settings: &settings,
        draining: &draining,
        metrics: &metrics,
        logger: &logger,
        transport,
    };
    let workers = WorkerThreads::spawn(&shared, &options).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot start the worker threads (--worker-threads): {error}"))
    })?;
    warn_of_no_servers(&desired_fleet);
    let clients =
        ClientServer { listener, workers, shared, desired_fleet: &desired_fleet, options: &options };
    // Operators are served to the end of the shutdown: they want to see what is still in flight, and why.
    tokio::select! {
        () = clients.run(shutdown) => {}
        () = admin_listener::serve(admin_listener, &admin) => {}
        () = logger.run() => {}
        () = log_backend_changes(desired_fleet.fleet()) => {}
    }
    logger.finish().await;
    Ok(())
}

/// Asks each server once whether it fits the configuration and the others.
pub(crate) async fn check_servers(
    desired_fleet: &Arc<DesiredFleet>,
    admission: &Admission,
    options: &Options,
) -> FleetCheck {
    check_fleet(desired_fleet, &admission.access, &options.sockets).await
}

/// Says which role has no server yet. They may all come later, but a flag may as well have been forgotten.
fn warn_of_no_servers(desired_fleet: &DesiredFleet) {
    let (fleet, names) = (desired_fleet.fleet().snapshot(), desired_fleet.dns_names());
    let has_name =
        |role: Role| names.iter().any(|name| name.role == role) || desired_fleet.expects_pods(role);
    for role in fleet.roles().iter().filter(|role| fleet.servers(**role).is_empty() && !has_name(**role)) {
        let [flag, dns_flag] = match role {
            Role::Prefill => ["--prefill", "--prefill-dns"],
            Role::Decode => ["--decode", "--decode-dns"],
            Role::Regular => ["--worker-urls", "--worker-dns"],
        };
        warn!(
            "there is no {role} server: requests get 503 until one is added with {flag}, {dns_flag} or \
             POST /workers"
        );
    }
}

/// The workers API. One for both listeners: they must see the same state, a role
/// switch in progress for example.
fn workers_api(
    desired_fleet: &Arc<DesiredFleet>,
    admission: &Admission,
    options: &Options,
) -> Arc<WorkersApi> {
    Arc::new(WorkersApi::new(
        Arc::clone(desired_fleet),
        Arc::clone(&admission.access),
        &options.sockets,
        options.request_timeout,
    ))
}

fn admin_service(
    workers_api: &Arc<WorkersApi>,
    metrics: &Arc<Metrics>,
    admission: &Admission,
    logger: &Arc<RequestLogger>,
    transport: Transport,
) -> AdminService {
    let controller = Arc::clone(&admission.controller);
    AdminService {
        endpoints: Arc::new(OperatorEndpoints::new(Arc::clone(workers_api), Arc::clone(metrics), controller)),
        logger: Arc::clone(logger),
        transport,
    }
}

/// Everything that serves clients, and what ends with it: health checks and discovery.
struct ClientServer<'a> {
    listener: TcpListener,
    workers: WorkerThreads,
    shared: SharedState<'a>,
    desired_fleet: &'a Arc<DesiredFleet>,
    options: &'a Options,
}

impl ClientServer<'_> {
    /// Serves until `shutdown` completes, and then shuts down.
    async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { listener, workers, shared, desired_fleet, options } = self;
        let encoders = desired_fleet.fleet().encoders();
        let acceptor = Acceptor { listener, dialer: Dialer::new(&options.sockets), workers: &workers };
        tokio::select! {
            () = acceptor.accept_until_shutdown(shutdown, shared.draining, shared.settings) => {}
            () = probe_all(desired_fleet, &shared.admission.access, &options.sockets) => {}
            () = follow_names(&**desired_fleet, options.discovery.interval) => {}
            () = follow_names(&*encoders, options.discovery.interval) => {}
            () = follow_pods(desired_fleet, shared.metrics) => {}
            () = keep_encoders(desired_fleet.fleet(), &shared.admission.access, &options.sockets) => {}
        }
        // Closes the listener, so that the kernel refuses connections instead of queueing them.
        drop(acceptor);
        let grace_period = shared.settings.grace_period();
        info!("stopped accepting connections; requests in flight have {grace_period:?} to finish");
        workers.finish().await;
    }
}

#[cfg(feature = "kubernetes")]
async fn follow_pods(desired_fleet: &Arc<DesiredFleet>, metrics: &Metrics) {
    crate::admin::follow_pods(desired_fleet, metrics.pods()).await;
}

/// A build without discovery has no pods.
#[cfg(not(feature = "kubernetes"))]
async fn follow_pods(_: &Arc<DesiredFleet>, _: &Metrics) {
    std::future::pending().await
}

struct Acceptor<'a> {
    listener: TcpListener,
    dialer: Dialer,
    workers: &'a WorkerThreads,
}

impl Acceptor<'_> {
    /// Accepts connections until `shutdown` completes, and for the drain delay after it.
    async fn accept_until_shutdown(
        &self,
        shutdown: impl Future<Output = ()>,
        draining: &Draining,
        settings: &LiveSettings,
    ) {
        self.accept_until(shutdown).await;
        draining.begin();
        let drain_delay = settings.lame_duck();
        // Load balancers take a while to act on a failed readiness probe, and send requests until then.
        info!("shutting down: /ready responds 503, and connections are accepted for {drain_delay:?} more");
        self.accept_until(tokio::time::sleep(drain_delay)).await;
    }

    async fn accept_until(&self, end: impl Future<Output = ()>) {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                // The end first: under a flood of connections there is always one to accept.
                biased;
                () = &mut end => return,
                accepted = self.listener.accept() => self.hand_over(accepted).await,
            }
        }
    }

    /// Gives an accepted socket to a worker thread.
    async fn hand_over(&self, accepted: io::Result<(TcpStream, SocketAddr)>) {
        match accepted {
            Ok((socket, _)) => {
                match self.dialer.tune(SockRef::from(&socket)).and_then(|()| socket.into_std()) {
                    Ok(socket) => self.workers.hand_over(socket).await,
                    // Not a warning: nearly always the client has closed the connection already.
                    Err(error) => debug!("cannot set socket options, closing the client connection: {error}"),
                }
            }
            // Out of descriptors or memory: accept would fail again at once, and keep a core busy.
            Err(error) => {
                if log_limit::allow("accept") {
                    warn!(
                        "cannot accept a client connection, retrying in {ACCEPT_PAUSE:?}: {error}; if file \
                         descriptors have run out, raise their limit (ulimit -n)"
                    );
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

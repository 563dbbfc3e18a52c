//! The router's listeners: accepting, worker threads, protocol negotiation, routes, and the end.
//!
//! An acceptor (here) hands sockets to [`worker_threads`]. [`negotiate`] finds out what a client
//! speaks, [`transport`](crate::transport) reads its requests, and [`service`] answers them by
//! [`routes`]. Operators have a listener of their own ([`admin_listener`]). What a reload changes is in
//! [`live_settings`] and [`admission_state`]. What a request means is for `proxy` and `admin` to know.

mod admin_body;
mod admin_listener;
mod admission_state;
mod connection;
mod listen;
mod live_settings;
mod negotiate;
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

use crate::admin::{Draining, OperatorEndpoints, WorkersApi, follow_names, probe_all};
use crate::config::Options;
use crate::observe::metrics::Metrics;
use crate::observe::report::{RequestLogger, log_backend_changes, log_limit};
use crate::transport::Transport;
use crate::upstream::{DesiredFleet, Dialer};
use admin_listener::AdminService;
use listen::ACCEPT_PAUSE;
use worker_threads::{SharedState, WorkerThreads};

pub(crate) use admission_state::Admission;
pub(crate) use listen::listen;
pub(crate) use live_settings::LiveSettings;
#[cfg(any(test, fuzzing))]
pub(crate) use response::{ClientResponseBody, error as error_response, relayed as relayed_response};

/// Serves until `shutdown` ends, announces the shutdown for the drain delay (lame duck), then lets open requests finish
/// within the grace period.
///
/// Dropping the future ends all workers and probes at once.
pub(crate) async fn serve(
    listener: TcpListener,
    members: Arc<DesiredFleet>,
    admission: &Admission,
    options: Options,
    settings: Arc<LiveSettings>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let draining = Draining::default();
    let metrics = Arc::new(Metrics::default());
    let admin_listener = admin_listener::bind(options.admin.address().as_ref()).await?;
    // One for both listeners, so that they see the same state.
    let workers_api = Arc::new(WorkersApi::new(
        Arc::clone(&members),
        Arc::clone(&admission.access),
        &options.sockets,
        options.request_timeout,
    ));
    let logger = Arc::new(RequestLogger::new(&options.report));
    let transport = Transport::new(options.sockets.engine, options.tls.http2_max_streams);
    let admin = AdminService {
        endpoints: Arc::new(OperatorEndpoints::new(
            Arc::clone(&workers_api),
            Arc::clone(&metrics),
            Arc::clone(&admission.gate),
        )),
        logger: Arc::clone(&logger),
        transport,
    };
    let shared = SharedState {
        fleet: members.fleet(),
        workers_api: &workers_api,
        admission,
        settings: &settings,
        draining: &draining,
        metrics: &metrics,
        logger: &logger,
        transport,
    };
    let workers = WorkerThreads::spawn(&shared, &options)?;
    let clients = async {
        let acceptor = Acceptor { listener, dialer: Dialer::new(&options.sockets), workers: &workers };
        let accept = async {
            acceptor.accept_until(shutdown).await;
            draining.begin();
            let lame_duck = settings.lame_duck();
            info!("shutting down: /ready responds 503, and connections are accepted for {lame_duck:?}");
            acceptor.accept_until(tokio::time::sleep(lame_duck)).await;
        };
        tokio::select! {
            () = accept => {}
            () = probe_all(&members, &admission.access, &options.sockets) => {}
            () = follow_names(&members, options.discovery.interval) => {}
        }
        drop(acceptor);
        let grace_period = settings.grace_period();
        info!("no more connections are accepted; open requests have {grace_period:?} to finish");
        workers.finish().await;
    };
    // Operators are served, and logs written, to the end of the shutdown.
    tokio::select! {
        () = clients => {}
        () = admin_listener::serve(admin_listener, &admin) => {}
        () = logger.run() => {}
        () = log_backend_changes(members.fleet()) => {}
    }
    logger.finish().await;
    Ok(())
}

struct Acceptor<'a> {
    listener: TcpListener,
    dialer: Dialer,
    workers: &'a WorkerThreads,
}

impl Acceptor<'_> {
    async fn accept_until(&self, end: impl Future<Output = ()>) {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                biased;
                () = &mut end => return,
                accepted = self.listener.accept() => self.take(accepted).await,
            }
        }
    }

    async fn take(&self, accepted: io::Result<(TcpStream, SocketAddr)>) {
        match accepted {
            Ok((socket, _)) => {
                match self.dialer.tune(SockRef::from(&socket)).and_then(|()| socket.into_std()) {
                    Ok(socket) => self.workers.hand_over(socket).await,
                    // Mostly the client has left already.
                    Err(error) => debug!("cannot set the options of an accepted socket: {error}"),
                }
            }
            Err(error) => {
                if log_limit::allow("accept") {
                    warn!("cannot accept a connection: {error}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

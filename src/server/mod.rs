//! The router's own HTTP side: accepted sockets, workers, connections, routes, and
//! the end.
//!
//! An acceptor (here) hands sockets to [`workers`]. Each worker is a thread with a
//! runtime and connections of its own, so that a request never changes threads.
//! [`opening`] finds out what a client speaks, over which [`stream`];
//! [`connection`] answers one request after the other over [`http1`], and [`http2`] many at
//! a time; [`service`] is who answers, and [`answer`] with what. Operators have a listener of their own
//! ([`admin`]), and what they send has an [`order`]. What may change meanwhile is in [`live`] and [`guards`]. What
//! a request means is for `proxy` and `control` to know.

mod admin_body;
mod admin_listener;
mod admission_state;
mod connection;
mod http1;
mod http2;
mod live_settings;
mod negotiate;
mod response;
mod service;
mod stream;
mod worker_threads;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, info, warn};

use crate::admin::{self, Draining, OperatorEndpoints, follow_names, probe_all};
use crate::config::Options;
use crate::observe::metrics::Metrics;
use crate::observe::report::{RequestLogger, log_limit, tell_changes};
use crate::upstream::{DesiredFleet, Dialer};
pub(crate) use admission_state::Admission;
use worker_threads::{SharedState, WorkerThreads};

pub(crate) use live_settings::LiveSettings;
#[cfg(any(test, fuzzing))]
pub(crate) use {
    connection::{ConnectionHandler, serve_http1},
    http1::{ClientTimeouts, Http1, NextRequest},
    response::ClientResponse,
    service::ClientTransport,
    stream::ClientStream,
};

/// How long the acceptor rests when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens on a host, IPv6 with or without brackets, and a port. The error names both.
pub(crate) async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let shown = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let bound = TcpListener::bind((host, port)).await;
    bound.map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {shown}:{port}: {error}")))
}

/// Serves until `shutdown` ends, says for the lame-duck time that it will end, then lets open requests finish within
/// the grace period.
///
/// Dropping the future ends all workers and probes at once.
pub(crate) async fn serve(
    listener: TcpListener,
    members: Arc<DesiredFleet>,
    guards: &Admission,
    options: Options,
    live: Arc<LiveSettings>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let draining = Draining::default();
    let metrics = Arc::new(Metrics::default());
    let admin_listener = admin_listener::bind(options.admin.as_ref()).await?;
    // What may change servers is the same for clients' port and for operators'.
    let access = Arc::clone(&guards.access);
    let servers =
        admin::WorkersApi::new(Arc::clone(&members), access, &options.sockets, options.request_timeout);
    let servers = Arc::new(servers);
    let operators = Arc::new(OperatorEndpoints::new(
        Arc::clone(&servers),
        Arc::clone(&metrics),
        Arc::clone(&guards.gate),
    ));
    let reporter = Arc::new(RequestLogger::new(&options.report));
    let shared = SharedState {
        fleet: members.fleet(),
        servers: &servers,
        guards,
        live: &live,
        draining: &draining,
        metrics: &metrics,
        reporter: &reporter,
    };
    let workers = WorkerThreads::spawn(&shared, &options)?;
    let clients = async {
        let acceptor = Acceptor { listener, dialer: Dialer::new(&options.sockets), workers: &workers };
        let accept = async {
            acceptor.accept_until(shutdown).await;
            draining.begin();
            let lame_duck = live.lame_duck();
            info!("shutting down: /ready says so, and connections are taken for {lame_duck:?}");
            acceptor.accept_until(tokio::time::sleep(lame_duck)).await;
        };
        tokio::select! {
            () = accept => {}
            () = probe_all(&members, &guards.access, &options.sockets) => {}
            () = follow_names(&members, options.discovery.interval) => {}
        }
        drop(acceptor);
        let grace_period = live.grace_period();
        info!("no more connections are taken; open requests have {grace_period:?} to finish");
        workers.finish().await;
    };
    // Whoever is on call wants to see how the shutdown goes.
    tokio::select! {
        () = clients => {}
        () = admin_listener::serve(admin_listener, &operators, &reporter) => {}
        () = reporter.run() => {}
        () = tell_changes(members.fleet()) => {}
    }
    reporter.finish().await;
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
                    // The client has left already.
                    Err(error) => debug!("a socket could not be set up: {error}"),
                }
            }
            Err(error) => {
                if log_limit::admit("accept") {
                    warn!("no connection could be accepted: {error}");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

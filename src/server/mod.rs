//! The router's own HTTP side: accepted sockets, workers, connections, routes, and
//! the end.
//!
//! An acceptor (here) hands sockets to [`workers`]. Each worker is a thread with a
//! runtime and connections of its own, so that a request never changes threads.
//! [`connection`] times and closes one client connection, with what [`activity`]
//! notes of it; [`service`] answers its requests, unless [`head`] refuses one. What a
//! request means is for `proxy` and `control` to know.

mod activity;
mod connection;
mod head;
mod service;
mod workers;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpListener;
use tracing::{debug, info, warn};

use crate::config::Options;
use crate::upstream::{Dialer, Fleet};
use workers::Workers;

/// How long the acceptor rests when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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

//! The admin listener: what operators look at, apart from clients' requests.
//!
//! It runs on the acceptor's runtime, so that a busy worker does not delay it and
//! it costs clients nothing. What is answered is for `control` to know.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::{ACCEPT_PAUSE, head, listen, order};
use crate::config::AdminAddress;
use crate::control::Admin;
use crate::error::{Error, Reply};

/// Connections that are served at a time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// How long a head may take, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// Listens where it was asked for. `None`: nowhere, or the address is taken and need not be had.
pub(super) async fn bind(address: Option<&AdminAddress>) -> io::Result<Option<TcpListener>> {
    let Some(AdminAddress { host, port, must }) = address else { return Ok(None) };
    match listen(host, *port).await {
        Ok(listener) => {
            let address = listener.local_addr()?;
            info!("metrics and status on http://{address}");
            Ok(Some(listener))
        }
        Err(error) if !must && error.kind() == io::ErrorKind::AddrInUse => {
            warn!("no metrics: {error}; choose another with --prometheus-port");
            Ok(None)
        }
        Err(error) => Err(io::Error::new(error.kind(), format!("metrics (--prometheus-port): {error}"))),
    }
}

/// Serves for as long as it is polled; dropping it closes all connections.
pub(super) async fn serve(listener: Option<TcpListener>, admin: &Arc<Admin>) {
    let Some(listener) = listener else { return std::future::pending().await };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, peer)) => { connections.spawn(converse(socket, peer, Arc::clone(admin))); }
                Err(error) => {
                    warn!("no connection to the admin listener could be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(socket: TcpStream, peer: SocketAddr, admin: Arc<Admin>) {
    let answer = service_fn(|request| {
        let admin = Arc::clone(&admin);
        async move { Ok::<_, Infallible>(answer(request, peer, &admin).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    if let Err(error) = builder.serve_connection(TokioIo::new(socket), answer).await {
        debug!("an admin connection ended: {error}");
    }
}

async fn answer(request: Request<Incoming>, peer: SocketAddr, admin: &Admin) -> Reply {
    if let Err(what) = head::check(&request) {
        return Error::BadRequest(what).to_reply();
    }
    let (head, body) = request.into_parts();
    let answer = async { admin.handle(&head, order::read(body).await?, peer).await };
    answer.await.unwrap_or_else(|error: Error| error.to_reply())
}

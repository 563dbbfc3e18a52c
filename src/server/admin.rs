//! The admin listener: what operators look at, apart from clients' requests.
//!
//! It runs on the acceptor's runtime, so that a busy worker does not delay it and
//! it costs clients nothing. What is answered is for `control` to know.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::{ACCEPT_PAUSE, head};
use crate::config::AdminAddress;
use crate::control::Admin;
use crate::error::{Error, Reply};

/// Connections that are served at a time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// How long a head may take, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the body of a request may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest body of a request.
const MAX_BODY: usize = 64 << 10;

/// Listens where it was asked for. `None`: nowhere, or the address is taken and need not be had.
pub(super) async fn bind(address: Option<&AdminAddress>) -> io::Result<Option<TcpListener>> {
    let Some(AdminAddress { host, port, must }) = address else { return Ok(None) };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match TcpListener::bind((bare, *port)).await {
        Ok(listener) => {
            let address = listener.local_addr()?;
            info!("metrics and status on http://{address}");
            Ok(Some(listener))
        }
        Err(error) if !must && error.kind() == io::ErrorKind::AddrInUse => {
            warn!("no metrics: {host}:{port} is in use; choose another with --prometheus-port");
            Ok(None)
        }
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("cannot listen on {host}:{port} for metrics (--prometheus-port): {error}"),
        )),
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
    let body = Limited::new(body, MAX_BODY).collect();
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => {
            let answer = admin.handle(&head, body.to_bytes(), peer).await;
            answer.unwrap_or_else(|error| error.to_reply())
        }
        Ok(Err(_)) => Error::BodyTooLarge { limit: MAX_BODY, drained: false }.to_reply(),
        Err(_) => Error::RequestTimeout { what: "the body", after: BODY_TIMEOUT }.to_reply(),
    }
}

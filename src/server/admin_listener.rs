//! The admin listener: what operators look at, apart from clients' requests.
//!
//! It runs on the acceptor's runtime, so that a busy worker does not delay it and
//! it costs clients nothing. What is answered is for `control` to know.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::connection::{self, ConnectionHandler};
use super::http1::{ClientTimeouts, Http1};
use super::response::ClientResponse;
use super::service::ClientTransport;
use super::stream::ClientStream;
use super::{ACCEPT_PAUSE, admin_body, listen};
use crate::admin::OperatorEndpoints;
use crate::config::AdminAddress;
use crate::error::{Error, OwnResponse};
use crate::http1::RequestHead;
use crate::observe::metrics::WorkerMetrics;
use crate::observe::record::{Recorder, RequestId};
use crate::observe::report::RequestLogger;
use crate::timer::Timer;

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
pub(super) async fn serve(
    listener: Option<TcpListener>,
    admin: &Arc<OperatorEndpoints>,
    reporter: &Arc<RequestLogger>,
) {
    let Some(listener) = listener else { return std::future::pending().await };
    let mut connections = JoinSet::new();
    // Connections are not closed before the end.
    let (_open, closing) = watch::channel(());
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, peer)) => {
                    let (admin, reporter) = (Arc::clone(admin), Arc::clone(reporter));
                    let operator = Operator { admin, reporter, peer, recorder: Recorder::new(Vec::new()) };
                    connections.spawn(serve_http1(socket, operator, closing.clone()));
                }
                Err(error) => {
                    warn!("no connection to the admin listener could be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_http1(socket: TcpStream, operator: Operator, closing: watch::Receiver<()>) {
    let patience = ClientTimeouts { head: HEAD_TIMEOUT, idle: HEAD_TIMEOUT };
    connection::serve_http1(ClientStream::Plain(socket), &operator, patience, closing).await;
}

/// An operator, and who answers.
struct Operator {
    admin: Arc<OperatorEndpoints>,
    reporter: Arc<RequestLogger>,
    peer: SocketAddr,
    /// Nobody is shown what is recorded: clients' requests are what is counted.
    recorder: Arc<Recorder>,
}

impl Operator {
    async fn reply(&self, connection: &mut Http1, head: &RequestHead) -> Result<Option<OwnResponse>, Error> {
        if let Some(reject_reason) = head.reject_reason {
            return Err(Error::BadRequest(reject_reason));
        }
        let body = admin_body::read(connection).await?;
        connection.cancel_on_disconnect(self.admin.handle(head, body, self.peer)).await.transpose()
    }
}

impl ConnectionHandler for Operator {
    async fn answer(
        &self,
        connection: &mut Http1,
        head: RequestHead,
        _: &mut Timer,
    ) -> Option<ClientResponse> {
        let record = self.recorder.begin();
        Some(match self.reply(connection, &head).await {
            Ok(reply) => ClientResponse::own(reply?, record),
            Err(error) => ClientResponse::error(&error, record),
        })
    }

    fn is_over(&self) -> bool {
        false
    }

    fn log_rejected_before_parse(&self, error: &Error) -> RequestId {
        self.reporter.log_rejected_before_parse(error)
    }

    fn metrics(&self) -> Option<&WorkerMetrics> {
        None
    }
}

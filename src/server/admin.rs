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

use super::answer::Answer;
use super::connection::{self, Answering};
use super::http1::{Http1, Patience};
use super::service::Client;
use super::stream::ClientStream;
use super::{ACCEPT_PAUSE, listen, order};
use crate::config::AdminAddress;
use crate::control::Admin;
use crate::error::{Error, Reply};
use crate::metrics::WorkerMetrics;
use crate::record::{Recorder, RequestId};
use crate::report::Reporter;
use crate::timer::Timer;
use crate::wire::message::ClientHead;

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
pub(super) async fn serve(listener: Option<TcpListener>, admin: &Arc<Admin>, reporter: &Arc<Reporter>) {
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
                    connections.spawn(converse(socket, operator, closing.clone()));
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

async fn converse(socket: TcpStream, operator: Operator, closing: watch::Receiver<()>) {
    let patience = Patience { head: HEAD_TIMEOUT, idle: HEAD_TIMEOUT };
    connection::converse(ClientStream::Plain(socket), &operator, patience, closing).await;
}

/// An operator, and who answers.
struct Operator {
    admin: Arc<Admin>,
    reporter: Arc<Reporter>,
    peer: SocketAddr,
    /// Nobody is shown what is recorded: clients' requests are what is counted.
    recorder: Arc<Recorder>,
}

impl Operator {
    async fn reply(&self, connection: &mut Http1, head: &ClientHead) -> Result<Option<Reply>, Error> {
        if let Some(flaw) = head.flaw {
            return Err(Error::BadRequest(flaw));
        }
        let body = order::read(connection).await?;
        connection.unless_left(self.admin.handle(head, body, self.peer)).await.transpose()
    }
}

impl Answering for Operator {
    async fn answer(&self, connection: &mut Http1, head: ClientHead, _: &mut Timer) -> Option<Answer> {
        let record = self.recorder.begin();
        Some(match self.reply(connection, &head).await {
            Ok(reply) => Answer::own(reply?, record),
            Err(error) => Answer::error(&error, record),
        })
    }

    fn is_over(&self) -> bool {
        false
    }

    fn unheard(&self, error: &Error) -> RequestId {
        self.reporter.unheard(error)
    }

    fn metrics(&self) -> Option<&WorkerMetrics> {
        None
    }
}

//! The admin listener: metrics and status for operators, apart from clients' requests.
//!
//! It runs on the acceptor's runtime, so that a busy worker does not delay it and it costs clients
//! nothing. The responses are made by `admin`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::listen::{ACCEPT_PAUSE, listen};
use super::response::{self, ClientResponseBody};
use super::routes::merge_slashes;
use super::{admin_body, rejection};
use crate::admin::OperatorEndpoints;
use crate::config::AdminAddress;
use crate::error::{Error, OwnResponse};
use crate::http1::{BodyTimeouts, ClientTimeouts, HeadRejection, RequestHead, Stream};
use crate::observe::record::Recorder;
use crate::observe::report::RequestLogger;
use crate::timer::Timer;
use crate::transport::{
    ClientResponse, ClientStream, ClientTransport, ConnectionHandler, RejectionResponse, Transport,
};

/// Connections that are served at a time; more are accepted when one of them has ended.
const MAX_CONNECTIONS: usize = 64;
/// How long a head may take, and how long a connection may be idle: scrapers come back every 15 or 30 s.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Who answers on the admin listener, and over which transport.
#[derive(Clone)]
pub(super) struct AdminService {
    pub(super) endpoints: Arc<OperatorEndpoints>,
    pub(super) logger: Arc<RequestLogger>,
    pub(super) transport: Transport,
}

/// Listens on the configured address. `None`: none is configured, or the default port is in use.
pub(super) async fn bind(address: Option<&AdminAddress>) -> io::Result<Option<TcpListener>> {
    let Some(AdminAddress { host, port, is_required }) = address else { return Ok(None) };
    match listen(host, *port).await {
        Ok(listener) => {
            let address = listener.local_addr()?;
            info!("metrics and status on http://{address}");
            Ok(Some(listener))
        }
        // The default port may be another router's on this machine, which must not keep this one from
        // starting.
        Err(error) if !is_required && error.kind() == io::ErrorKind::AddrInUse => {
            warn!("metrics and status are disabled: {error}; choose another port with --prometheus-port");
            Ok(None)
        }
        Err(error) => Err(io::Error::new(error.kind(), format!("metrics (--prometheus-port): {error}"))),
    }
}

/// Serves as long as it is polled; dropping it closes all connections.
pub(super) async fn serve(listener: Option<TcpListener>, service: &AdminService) {
    let Some(listener) = listener else { return std::future::pending().await };
    let mut connections = JoinSet::new();
    // Never signalled: operators are served to the end of a shutdown.
    let (_open, closing) = watch::channel(());
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, peer)) => {
                    connections.spawn(serve_connection(socket, peer, service.clone(), closing.clone()));
                }
                Err(error) => {
                    warn!("cannot accept a connection to the admin listener: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_connection(
    socket: TcpStream,
    peer: SocketAddr,
    service: AdminService,
    closing: watch::Receiver<()>,
) {
    let body = BodyTimeouts { idle: TIMEOUT, whole: TIMEOUT };
    let timeouts = ClientTimeouts { head: TIMEOUT, idle: TIMEOUT, body };
    let transport = service.transport;
    let handler = Arc::new(AdminHandler { service, peer, recorder: Recorder::new(Vec::new()) });
    transport.serve(ClientStream::http1(Stream::Tcp(socket)), handler, timeouts, closing).await;
}

/// Answers the requests of one operator's connection.
struct AdminHandler {
    service: AdminService,
    peer: SocketAddr,
    /// Without observers: only clients' requests are logged and counted.
    recorder: Arc<Recorder>,
}

impl AdminHandler {
    async fn handle<C: ClientTransport>(
        &self,
        client: &mut C,
        head: &RequestHead,
    ) -> Result<Option<OwnResponse>, Error> {
        if let Some(reason) = head.reject_reason {
            return Err(Error::BadRequest(reason));
        }
        let body = admin_body::read(client).await?;
        let response = self.service.endpoints.handle(head, body, self.peer);
        client.cancel_on_disconnect(response).await.transpose()
    }
}

impl ConnectionHandler for AdminHandler {
    type Body = ClientResponseBody;

    async fn respond<C: ClientTransport>(
        &self,
        client: &mut C,
        mut head: RequestHead,
        _: &mut Timer,
    ) -> Option<ClientResponse<ClientResponseBody>> {
        merge_slashes(&mut head);
        let record = self.recorder.begin();
        Some(match self.handle(client, &head).await {
            Ok(response) => response::own(response?, record),
            Err(error) => response::error(&error, record),
        })
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn reject(&self, rejection: HeadRejection) -> RejectionResponse {
        // Logged, although it is not counted.
        let recorder = Recorder::new(vec![Arc::clone(&self.service.logger) as _]);
        rejection::response(rejection, &recorder)
    }

    fn relayed(&self, _: Duration) {}
}

//! A client's connection, from the accepted socket to its end.

use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::negotiate::Negotiator;
use crate::http1::{ClientTimeouts, Stream};
use crate::transport::{ClientStream, ConnectionHandler, Transport};

/// Negotiates the protocol of a connection, and serves it. When `closing` changes, it finishes the requests
/// in flight and closes.
pub(super) async fn serve<H: ConnectionHandler>(
    socket: TcpStream,
    handler: Arc<H>,
    (negotiator, transport): (Negotiator, Transport),
    timeouts: ClientTimeouts,
    mut closing: watch::Receiver<()>,
) {
    // The common case pays for no peek and no select.
    if negotiator.is_plain() {
        let stream = Stream::Tcp(socket);
        return transport.serve(ClientStream::http1(stream), handler, timeouts, closing).await;
    }
    let negotiated = tokio::select! {
        negotiated = negotiator.negotiate(socket, timeouts, &*handler) => negotiated,
        // No request was read, so none is lost.
        _ = closing.changed() => None,
    };
    if let Some(negotiated) = negotiated {
        // Boxed, so that a plain connection takes no more memory than it needs.
        let served = transport.serve(negotiated, handler, timeouts, closing);
        Box::pin(served).await;
    }
}

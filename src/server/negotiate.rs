//! Which protocol a client's new connection speaks: a TLS handshake, or the preface of HTTP/2, after the
//! PROXY header of a load balancer if there has to be one.
//!
//! It happens in the connection's own task, so that a client that is slow here, or sends garbage,
//! costs no other client anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::proxy_protocol;
use crate::config::TlsOptions;
use crate::http1::{ClientTimeouts, HeadRejection, Stream};
use crate::observe::report::log_limit;
use crate::tls::{self, ServerTls};
use crate::transport::{self, ClientStream, ConnectionHandler, Protocol};

/// The first bytes of every HTTP/2 connection (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of a TLS connection: a record of type handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// Finds out what a client's connection speaks.
#[derive(Clone)]
pub(super) struct Negotiator {
    tls: Option<Arc<ServerTls>>,
    http2: bool,
    proxy_protocol: bool,
}

impl Negotiator {
    pub(super) fn new(options: &TlsOptions, proxy_protocol: bool) -> Self {
        let TlsOptions { server, http2, .. } = options;
        Self { tls: server.clone(), http2: *http2, proxy_protocol }
    }

    /// Whether there is nothing to find out: all clients speak HTTP/1.1 from the first byte on.
    pub(super) fn is_plain(&self) -> bool {
        self.tls.is_none() && !self.http2 && !self.proxy_protocol
    }

    /// Negotiates. `None`: the connection has ended.
    pub(super) async fn negotiate(
        &self,
        mut socket: TcpStream,
        timeouts: ClientTimeouts,
        handler: &impl ConnectionHandler,
    ) -> Option<ClientStream> {
        let mut proxied_for = None;
        if self.proxy_protocol {
            (socket, proxied_for) = self.read_proxy_header(socket, timeouts.head, handler).await?;
        }
        let negotiated = match &self.tls {
            Some(tls) => tls_handshake(tls, socket, timeouts.head, handler).await?,
            None if self.http2 => sniff_http2_preface(socket, timeouts).await?,
            None => ClientStream::http1(Stream::Tcp(socket)),
        };
        Some(ClientStream { proxied_for, ..negotiated })
    }

    /// Reads the PROXY header, with which every connection must begin: otherwise a client could send its own.
    async fn read_proxy_header(
        &self,
        mut socket: TcpStream,
        limit: Duration,
        handler: &impl ConnectionHandler,
    ) -> Option<(TcpStream, Option<SocketAddr>)> {
        let read = timeout(limit, proxy_protocol::read(&mut socket)).await;
        let error = match read {
            Ok(Ok(proxied_for)) => return Some((socket, proxied_for)),
            Ok(Err(error)) => error,
            Err(_) => std::io::ErrorKind::TimedOut.into(),
        };
        // A probe that connects and closes is no fault of anyone's.
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return None;
        }
        if log_limit::allow("proxy_protocol") {
            let peer = socket.peer_addr().map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string());
            warn!("closing a connection from {peer} without a PROXY header (--proxy-protocol): {error}");
        }
        // A TLS client could not read it.
        if error.kind() == std::io::ErrorKind::InvalidData && self.tls.is_none() {
            let why = "this port takes connections with a PROXY header only";
            transport::reject(Stream::Tcp(socket), handler.reject(HeadRejection::Malformed(why))).await;
        }
        None
    }
}

fn negotiated(stream: Stream, is_http2: bool) -> ClientStream {
    let protocol = if is_http2 { Protocol::Http2 } else { Protocol::Http1 };
    ClientStream { stream, protocol, proxied_for: None }
}

async fn tls_handshake(
    tls: &ServerTls,
    socket: TcpStream,
    limit: Duration,
    handler: &impl ConnectionHandler,
) -> Option<ClientStream> {
    let handshake = async {
        let mut first = [0];
        match socket.peek(&mut first).await {
            // rustls would answer with an alert, which a client that speaks plain HTTP cannot read.
            Ok(1..) if first != [TLS_HANDSHAKE] => {
                let rejection = HeadRejection::Malformed("this port speaks TLS; use https");
                transport::reject(Stream::Tcp(socket), handler.reject(rejection)).await;
                return None;
            }
            Ok(1..) => {}
            Ok(0) | Err(_) => return None,
        }
        match tls::accept(tls, socket).await {
            Ok(stream) => Some(stream),
            Err(error) => {
                debug!("TLS handshake with a client failed: {error}");
                None
            }
        }
    };
    // Boxed: rustls's state would make every connection's future larger.
    let Ok(stream) = timeout(limit, Box::pin(handshake)).await else {
        debug!("TLS handshake with a client did not complete within {limit:?}");
        return None;
    };
    let stream = Box::new(stream?);
    let is_http2 = stream.is_http2();
    Some(negotiated(Stream::Tls(stream), is_http2))
}

/// Looks at the first bytes without taking them. Only a client that sent a part of what could be the preface
/// is waited for.
async fn sniff_http2_preface(socket: TcpStream, timeouts: ClientTimeouts) -> Option<ClientStream> {
    let mut seen = [0; PREFACE.len()];
    let count = timeout(timeouts.idle, socket.peek(&mut seen)).await.ok()?.ok()?;
    if &seen[..count] == PREFACE {
        return Some(negotiated(Stream::Tcp(socket), true));
    }
    // Nearly all HTTP/1.1 clients: `POST` differs from the preface in its second byte.
    if count == 0 || !PREFACE.starts_with(&seen[..count]) {
        return Some(negotiated(Stream::Tcp(socket), false));
    }
    let mut read = Vec::with_capacity(PREFACE.len());
    // hyper reports what is wrong with the rest, or that it is missing.
    let _ = timeout(timeouts.head, read_preface(&socket, &mut read)).await;
    let is_http2 = read == PREFACE;
    Some(negotiated(Stream::prefixed(Bytes::from(read), socket), is_http2))
}

/// Reads for as long as what has arrived is a prefix of the preface.
async fn read_preface(socket: &TcpStream, read: &mut Vec<u8>) {
    while read.len() < PREFACE.len() && PREFACE.starts_with(read) {
        if socket.readable().await.is_err() {
            return;
        }
        let mut bytes = [0; PREFACE.len()];
        match socket.try_read(&mut bytes[..PREFACE.len() - read.len()]) {
            Ok(0) => return,
            Ok(count) => read.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

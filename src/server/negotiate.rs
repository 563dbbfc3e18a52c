//! Which protocol a client's new connection speaks: a TLS handshake, or the preface of HTTP/2.
//!
//! It happens in the connection's own task, so that a client that is slow here, or sends garbage,
//! costs no other client anything.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use crate::config::TlsOptions;
use crate::http1::{ClientTimeouts, HeadRejection, Stream};
use crate::tls::{self, ServerTls};
use crate::transport::{self, ConnectionHandler, Protocol};

/// The first bytes of every HTTP/2 connection (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of a TLS connection: a record of type handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// Finds out what a client's connection speaks.
#[derive(Clone)]
pub(super) struct Negotiator {
    tls: Option<Arc<ServerTls>>,
    http2: bool,
}

/// A connection whose protocol is known.
pub(super) struct Negotiated {
    pub(super) stream: Stream,
    pub(super) protocol: Protocol,
}

impl Negotiator {
    pub(super) fn new(options: &TlsOptions) -> Self {
        let TlsOptions { server, http2, .. } = options;
        Self { tls: server.clone(), http2: *http2 }
    }

    /// Whether there is nothing to find out: all clients speak HTTP/1.1 from the first byte on.
    pub(super) fn is_plain(&self) -> bool {
        self.tls.is_none() && !self.http2
    }

    /// Negotiates. `None`: the connection has ended.
    pub(super) async fn negotiate(
        &self,
        socket: TcpStream,
        timeouts: ClientTimeouts,
        handler: &impl ConnectionHandler,
    ) -> Option<Negotiated> {
        match &self.tls {
            Some(tls) => tls_handshake(tls, socket, timeouts.head, handler).await,
            None => sniff_http2_preface(socket, timeouts).await,
        }
    }
}

impl Negotiated {
    fn new(stream: Stream, is_http2: bool) -> Self {
        Self { stream, protocol: if is_http2 { Protocol::Http2 } else { Protocol::Http1 } }
    }
}

async fn tls_handshake(
    tls: &ServerTls,
    socket: TcpStream,
    limit: Duration,
    handler: &impl ConnectionHandler,
) -> Option<Negotiated> {
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
    Some(Negotiated::new(Stream::Tls(stream), is_http2))
}

/// Looks at the first bytes without taking them. Only a client that sent a part of what could be the preface
/// is waited for.
async fn sniff_http2_preface(socket: TcpStream, timeouts: ClientTimeouts) -> Option<Negotiated> {
    let mut seen = [0; PREFACE.len()];
    let count = timeout(timeouts.idle, socket.peek(&mut seen)).await.ok()?.ok()?;
    if &seen[..count] == PREFACE {
        return Some(Negotiated::new(Stream::Tcp(socket), true));
    }
    // Nearly all HTTP/1.1 clients: `POST` differs from the preface in its second byte.
    if count == 0 || !PREFACE.starts_with(&seen[..count]) {
        return Some(Negotiated::new(Stream::Tcp(socket), false));
    }
    let mut read = Vec::with_capacity(PREFACE.len());
    // hyper reports what is wrong with the rest, or that it is missing.
    let _ = timeout(timeouts.head, read_preface(&socket, &mut read)).await;
    let is_http2 = read == PREFACE;
    Some(Negotiated::new(Stream::prefixed(Bytes::from(read), socket), is_http2))
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

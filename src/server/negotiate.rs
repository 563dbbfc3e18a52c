//! How a connection begins: with a TLS handshake, or with the preface of HTTP/2.
//!
//! It happens in the connection's own task, so that whoever is slow here, or sends
//! garbage, costs nobody else anything.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::connection::{ConnectionHandler, refuse};
use super::http1::ClientTimeouts;
use super::stream::ClientStream;
use crate::config::TlsOptions;
use crate::error::Error;
use crate::tls::{HTTP_2, ServerTls};

/// What a client of HTTP/2 sends before anything else (RFC 9113 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of a TLS handshake: the type of its record.
const HANDSHAKE: u8 = 0x16;

/// What clients may begin with.
#[derive(Clone)]
pub(super) struct Negotiator {
    tls: Option<Arc<ServerTls>>,
    http2: bool,
    pub(super) max_streams: u32,
}

/// What a connection goes on with.
pub(super) enum Negotiated {
    Http1(ClientStream),
    Http2(ClientStream),
}

impl Negotiator {
    pub(super) fn new(options: &TlsOptions) -> Self {
        let TlsOptions { server, http2, http2_max_streams, .. } = options;
        Self { tls: server.clone(), http2: *http2, max_streams: *http2_max_streams }
    }

    /// Whether there is nothing to find out: all clients speak HTTP/1.1 from the first byte on.
    pub(super) fn is_plain(&self) -> bool {
        self.tls.is_none() && !self.http2
    }

    /// Finds out what a client speaks. `None`: the connection has ended.
    pub(super) async fn open(
        &self,
        socket: TcpStream,
        patience: ClientTimeouts,
        who: &impl ConnectionHandler,
    ) -> Option<Negotiated> {
        match &self.tls {
            Some(tls) => tls_handshake(tls, socket, patience.head, who).await,
            None => sniff_http2_preface(socket, patience).await,
        }
    }
}

async fn tls_handshake(
    tls: &ServerTls,
    socket: TcpStream,
    limit: Duration,
    who: &impl ConnectionHandler,
) -> Option<Negotiated> {
    let shaking = async {
        let mut first = [0];
        match socket.peek(&mut first).await {
            Ok(1..) if first != [HANDSHAKE] => {
                let error = Error::BadRequest("this port speaks TLS; use https");
                refuse(ClientStream::Plain(socket), &error, &who.log_rejected_before_parse(&error)).await;
                return None;
            }
            Ok(1..) => {}
            Ok(0) | Err(_) => return None,
        }
        match TlsAcceptor::from(tls.config()).accept(socket).await {
            Ok(stream) => Some(stream),
            Err(error) => {
                debug!("a TLS handshake failed: {error}");
                None
            }
        }
    };
    let Ok(shaken) = timeout(limit, Box::pin(shaking)).await else {
        debug!("a TLS handshake took over {limit:?}");
        return None;
    };
    let stream = Box::new(shaken?);
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(HTTP_2);
    let stream = ClientStream::Tls(stream);
    Some(if is_http2 { Negotiated::Http2(stream) } else { Negotiated::Http1(stream) })
}

/// Looks at the first bytes without taking them. Only a client that sends a part of what could be the preface is
/// waited for.
async fn sniff_http2_preface(socket: TcpStream, patience: ClientTimeouts) -> Option<Negotiated> {
    let mut seen = [0; PREFACE.len()];
    let count = timeout(patience.idle, socket.peek(&mut seen)).await.ok()?.ok()?;
    if &seen[..count] == PREFACE {
        return Some(Negotiated::Http2(ClientStream::Plain(socket)));
    }
    if count == 0 || !PREFACE.starts_with(&seen[..count]) {
        return Some(Negotiated::Http1(ClientStream::Plain(socket)));
    }
    let mut read = Vec::with_capacity(PREFACE.len());
    // What is wrong with the rest, or missing, is for hyper to say.
    let _ = timeout(patience.head, read_preface(&socket, &mut read)).await;
    let is_http2 = read == PREFACE;
    let stream = ClientStream::begun(Bytes::from(read), socket);
    Some(if is_http2 { Negotiated::Http2(stream) } else { Negotiated::Http1(stream) })
}

/// Reads for as long as what has come is the preface's beginning.
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

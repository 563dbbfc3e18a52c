//! A TLS connection: the handshake on either side, and a stream that is flushed and closed
//! as TLS wants it.

use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error as TlsError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{ClientTls, HTTP_2, ServerTls};

/// Completes the handshake with a server.
pub(crate) async fn connect(
    tls: &ClientTls,
    name: ServerName<'static>,
    socket: TcpStream,
) -> io::Result<TlsConnection> {
    let config = tls.config().map_err(io::Error::other)?;
    handshake(config, name, socket, &FLAGS).await
}

/// What can be changed about a failed handshake with a server.
pub(crate) struct HandshakeHints {
    /// Names the trusted CAs.
    pub(crate) cas: &'static str,
    /// Names our certificate.
    pub(crate) certificate: &'static str,
}

/// For backends.
const FLAGS: HandshakeHints = HandshakeHints { cas: "--ca-cert-paths", certificate: "--client-cert-path" };

/// Completes the handshake with a server by this configuration.
pub(crate) async fn handshake(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: TcpStream,
    hints: &HandshakeHints,
) -> io::Result<TlsConnection> {
    let connected = TlsConnector::from(config).connect(name, socket).await;
    let stream = connected.map_err(|error| explained(error, hints))?;
    Ok(TlsConnection { stream: stream.into(), unflushed: false })
}

/// Completes the handshake with a client.
pub(crate) async fn accept(tls: &ServerTls, socket: TcpStream) -> io::Result<TlsConnection> {
    let stream = TlsAcceptor::from(tls.config()).accept(socket).await?;
    Ok(TlsConnection { stream: stream.into(), unflushed: false })
}

/// Names the cause in words that say what can be done.
fn explained(error: io::Error, hints: &HandshakeHints) -> io::Error {
    let Some(cause) = error.get_ref().and_then(|cause| cause.downcast_ref::<TlsError>()) else {
        return io::Error::new(error.kind(), format!("TLS: {error}"));
    };
    // rustls writes for programmers: `InvalidCertificate(UnknownIssuer)` names no flag that would help.
    let why = match cause {
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            format!("its certificate does not come from a known CA (see {})", hints.cas)
        }
        TlsError::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has expired".to_owned()
        }
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another name".to_owned(),
        // TLS 1.3 has an alert for a missing client certificate; a server of TLS 1.2 sends the general
        // handshake_failure (RFC 8446, section 6.2).
        TlsError::AlertReceived(
            AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure,
        ) => format!("{cause} (it may want a certificate, see {})", hints.certificate),
        // Usually an https URL of a port that speaks plain HTTP.
        TlsError::InvalidMessage(_) => "what it sent is not TLS".to_owned(),
        cause => cause.to_string(),
    };
    io::Error::new(error.kind(), format!("TLS: {why}"))
}

/// An encrypted connection that knows whether TLS still holds bytes that were written.
pub(crate) struct TlsConnection {
    stream: TlsStream<TcpStream>,
    unflushed: bool,
}

impl TlsConnection {
    pub(crate) fn socket(&self) -> &TcpStream {
        self.stream.get_ref().0
    }

    /// Whether the handshake agreed on HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        self.stream.get_ref().1.alpn_protocol() == Some(HTTP_2)
    }

    /// Sends what TLS still holds.
    pub(crate) fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn is_flushed(&self) -> bool {
        !self.unflushed
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // A write is done when rustls has encrypted it, which may be before the kernel has it.
        self.unflushed = true;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.unflushed = true;
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flushed(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for TlsConnection {
    /// Tells a server that the end is meant, if the kernel takes the record at once. Not a client: the end of
    /// a response that was cut must not look like a clean one (RFC 8446, section 6.1).
    fn drop(&mut self) {
        if let TlsStream::Client(stream) = &mut self.stream {
            let (socket, session) = stream.get_mut();
            session.send_close_notify();
            let _ = session.write_tls(&mut TryWrite(socket));
        }
    }
}

/// Writes what can be written without waiting.
struct TryWrite<'a>(&'a TcpStream);

impl Write for TryWrite<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

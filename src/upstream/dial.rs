//! Opening sockets: which options they get, and how long opening may take.
//!
//! Accepted sockets get the same options here, so that there is one place for them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream, lookup_host};

use super::Address;
use crate::http1::Stream;
use crate::tls::{self, ClientTls};
use crate::transport::Http1Engine;

/// A peer that vanished without a word is noticed after this long and three unanswered probes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// Why no connection could be had.
#[derive(Debug)]
pub(crate) enum DialError {
    Io(io::Error),
    Timeout(Duration),
}

/// What can be set about sockets.
#[derive(Debug, Clone, Default)]
pub(crate) struct SocketOptions {
    /// How long opening a connection may take.
    pub(crate) connect_timeout: Duration,
    /// How long a connection to a server may stay idle.
    pub(crate) idle_timeout: Duration,
    /// Idle connections kept for one server in one worker.
    pub(crate) max_idle: usize,
    /// The kernel's send and receive buffers, in bytes; the kernel's own choice without it.
    pub(crate) buffer_size: Option<usize>,
    /// For backends with https.
    pub(crate) tls: Arc<ClientTls>,
    /// What speaks HTTP/1.1 over them.
    pub(crate) engine: Http1Engine,
}

/// Opens connections to servers and tunes every socket of the router.
#[derive(Debug)]
pub(crate) struct Dialer {
    connect_timeout: Duration,
    buffer_size: Option<usize>,
    tls: Arc<ClientTls>,
}

impl Dialer {
    pub(crate) fn new(options: &SocketOptions) -> Self {
        let SocketOptions { connect_timeout, buffer_size, tls, .. } = options;
        Self { connect_timeout: *connect_timeout, buffer_size: *buffer_size, tls: Arc::clone(tls) }
    }

    /// Opens a connection, with a TLS handshake if the server wants one. A name is resolved again each time,
    /// and its addresses are tried in order, all within the one timeout.
    pub(super) async fn dial(&self, address: &Address) -> Result<Stream, DialError> {
        match tokio::time::timeout(self.connect_timeout, self.open(address)).await {
            Ok(opened) => opened.map_err(DialError::Io),
            Err(_) => Err(DialError::Timeout(self.connect_timeout)),
        }
    }

    async fn open(&self, address: &Address) -> io::Result<Stream> {
        let socket = self.try_all(address).await?;
        let Some(name) = &address.tls_name else { return Ok(Stream::Tcp(socket)) };
        // Boxed: rustls's handshake would make every leg's future larger, with TLS or without.
        let encrypted = Box::pin(tls::connect(&self.tls, name.clone(), socket)).await?;
        Ok(Stream::Tls(Box::new(encrypted)))
    }

    async fn try_all(&self, address: &Address) -> io::Result<TcpStream> {
        let host = address.host.trim_start_matches('[').trim_end_matches(']');
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in lookup_host((host, address.port)).await? {
            match self.connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        self.tune(SockRef::from(&socket))?;
        TcpSocket::from_std_stream(socket.into()).connect(address).await
    }

    /// Sets the options of a socket, accepted or our own.
    pub(crate) fn tune(&self, socket: SockRef<'_>) -> io::Result<()> {
        // A token is a small write, and the next one must not wait for its acknowledgement.
        socket.set_tcp_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
        socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_PROBES))?;
        if let Some(bytes) = self.buffer_size {
            socket.set_send_buffer_size(bytes)?;
            socket.set_recv_buffer_size(bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn dialer(buffer_size: Option<usize>) -> Dialer {
        Dialer { connect_timeout: Duration::from_secs(5), buffer_size, tls: Arc::default() }
    }

    async fn dialled(host: &str, dialer: &Dialer) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = Address::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let (dialled, accepted) = tokio::join!(dialer.try_all(&address), listener.accept());
        (dialled.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn every_socket_is_tuned() {
        let dialer = dialer(Some(100_000));
        let (dialled, accepted) = dialled("127.0.0.1", &dialer).await;
        dialer.tune(SockRef::from(&accepted)).unwrap();
        for socket in [&dialled, &accepted] {
            let socket = SockRef::from(socket);
            assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
            // Linux books twice of what was asked for.
            assert_eq!(socket.send_buffer_size().unwrap(), 200_000);
            assert_eq!(socket.recv_buffer_size().unwrap(), 200_000);
        }
    }

    #[tokio::test]
    async fn an_ipv6_server_is_reached_and_buffers_are_the_kernels_by_default() {
        let plain = TcpSocket::new_v6().unwrap();
        let (dialled, _accepted) = dialled("::1", &dialer(None)).await;
        assert!(dialled.peer_addr().unwrap().is_ipv6());
        let kernels = plain.send_buffer_size().unwrap() as usize;
        assert!(SockRef::from(&dialled).send_buffer_size().unwrap() >= kernels);
    }

    #[tokio::test]
    async fn a_name_is_resolved() {
        let listener = TcpListener::bind("localhost:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = Address::parse(&format!("http://localhost:{port}")).unwrap();
        assert!(dialer(None).dial(&address).await.is_ok());
    }
}

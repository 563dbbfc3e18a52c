//! Opening sockets: which options they get, and how long opening may take.
//!
//! Accepted sockets get the same options here, so that there is one place for them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::{Sleep, sleep};

use super::Address;
use crate::http1::Stream;
use crate::tls::{self, ClientTls};
use crate::transport::Http1Engine;

/// A peer that vanished without a word is noticed after this long and three unanswered probes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// When the next address of a name is tried while the ones before have neither accepted nor refused: the
/// Connection Attempt Delay that RFC 8305 recommends (section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Attempts for one connection that run at the same time.
const MAX_ATTEMPTS: usize = 16;

/// Why no connection could be had.
#[derive(Debug)]
pub(crate) enum DialError {
    Io(io::Error),
    Timeout(Duration),
}

/// A connection that was opened.
pub(super) struct Dialed {
    pub(super) stream: Stream,
    /// From the SYN to the server's answer: about one round trip. Neither the name's lookup nor TLS is in it.
    pub(super) connect_time: Duration,
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
    /// and all its addresses are tried within the one timeout.
    pub(super) async fn dial(&self, address: &Address) -> Result<Dialed, DialError> {
        match tokio::time::timeout(self.connect_timeout, self.open(address)).await {
            Ok(opened) => opened.map_err(DialError::Io),
            Err(_) => Err(DialError::Timeout(self.connect_timeout)),
        }
    }

    async fn open(&self, address: &Address) -> io::Result<Dialed> {
        let (socket, connect_time) = self.connect_to_any(address).await?;
        let Some(name) = &address.tls_name else {
            return Ok(Dialed { stream: Stream::Tcp(socket), connect_time });
        };
        // Boxed: rustls's handshake would make every leg's future larger, with TLS or without.
        let encrypted = Box::pin(tls::connect(&self.tls, name.clone(), socket)).await?;
        Ok(Dialed { stream: Stream::Tls(Box::new(encrypted)), connect_time })
    }

    async fn connect_to_any(&self, address: &Address) -> io::Result<(TcpStream, Duration)> {
        let host = address.host.trim_start_matches('[').trim_end_matches(']');
        let mut addresses = lookup_host((host, address.port)).await?;
        let no_address = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        let first = addresses.next().ok_or_else(no_address)?;
        let rest: Vec<SocketAddr> = addresses.collect();
        // An address, and nearly every name: no timer, no list of attempts.
        if rest.is_empty() {
            return timed(self.connect(first)).await;
        }
        let addresses = interleaved(first, rest);
        Box::pin(first_to_connect(&addresses, |address| timed(self.connect(address)))).await
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

/// Waits for a connection, and takes the time.
async fn timed<T>(connecting: impl Future<Output = io::Result<T>>) -> io::Result<(T, Duration)> {
    let start = Instant::now();
    let connected = connecting.await?;
    Ok((connected, start.elapsed()))
}

/// The addresses of a name in the order in which they are tried: the resolver's, but with the families in
/// turn, so that a network without a route for one of them costs one attempt (RFC 8305, section 4).
fn interleaved(first: SocketAddr, rest: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let (same, other): (Vec<_>, Vec<_>) =
        rest.into_iter().partition(|address| address.is_ipv6() == first.is_ipv6());
    let mut in_turn = vec![first];
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    loop {
        let (second, third) = (other.next(), same.next());
        if second.is_none() && third.is_none() {
            return in_turn;
        }
        in_turn.extend(second.into_iter().chain(third));
    }
}

/// Connects to the first address that accepts. An attempt begins when the one before it has failed, or after
/// [`ATTEMPT_DELAY`]; the others go on meanwhile, and are dropped when one has succeeded.
async fn first_to_connect<T, F: Future<Output = io::Result<T>>>(
    addresses: &[SocketAddr],
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T> {
    let mut untried = addresses.iter();
    let mut attempts: Vec<Pin<Box<F>>> = Vec::new();
    let mut last_error = io::Error::from(io::ErrorKind::NotFound);
    // Until the next attempt; `None` before the first one and after a failure.
    let mut delay: Option<Pin<Box<Sleep>>> = None;
    std::future::poll_fn(|cx| {
        loop {
            match poll_attempts(&mut attempts, cx) {
                Poll::Ready(Ok(connected)) => return Poll::Ready(Ok(connected)),
                // The next one need not wait (RFC 8305, section 5).
                Poll::Ready(Err(error)) => (last_error, delay) = (error, None),
                Poll::Pending => {}
            }
            let is_due = attempts.len() < MAX_ATTEMPTS
                && delay.as_mut().is_none_or(|delay| delay.as_mut().poll(cx).is_ready());
            if is_due && let Some(address) = untried.next() {
                attempts.push(Box::pin(connect(*address)));
                delay = Some(Box::pin(sleep(ATTEMPT_DELAY)));
            } else if attempts.is_empty() {
                return Poll::Ready(Err(std::mem::replace(&mut last_error, io::ErrorKind::NotFound.into())));
            } else {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Polls all attempts. Ready with the first that succeeds, or with an error if some failed; those are gone.
fn poll_attempts<T, F: Future<Output = io::Result<T>>>(
    attempts: &mut Vec<Pin<Box<F>>>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<T>> {
    let mut failed = Poll::Pending;
    let mut at = 0;
    while at < attempts.len() {
        match attempts[at].as_mut().poll(cx) {
            Poll::Pending => at += 1,
            Poll::Ready(Ok(connected)) => return Poll::Ready(Ok(connected)),
            Poll::Ready(Err(error)) => {
                drop(attempts.remove(at));
                failed = Poll::Ready(Err(error));
            }
        }
    }
    failed
}

#[cfg(test)]
mod tests;

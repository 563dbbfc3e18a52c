//! A bare relay: the least that it costs to pass a client's bytes to two servers, and those of one back.
//!
//! Each client connection has a connection to prefill and one to decode of its own. What the client sends
//! goes to both, what decode sends goes to the client, and what prefill sends is discarded. One thread,
//! edge-triggered epoll; HTTP is not parsed, and nothing is checked, changed, pooled, counted or logged. A
//! connection that ends or fails closes the two beside it. It is what routers of pairs are compared with, and
//! is not one.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// As much as is passed on at a time. For a body of 1 MiB the relay took 760 µs of CPU with 64 KiB, 575 with
/// this, 537 with 512 KiB. Larger ones hold whole bodies, which is another thing than relaying them.
const CHUNK: usize = 256 << 10;
/// Events of one wait.
const EVENTS: usize = 1024;
const LISTENER: EventData = EventData::new_u64(u64::MAX);
/// Connections of one session: client, prefill, decode.
const SIDES: usize = 3;
const CLIENT: usize = 0;
const PREFILL: usize = 1;
const DECODE: usize = 2;

/// Where the relay listens, and its servers.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Port to listen on, on 127.0.0.1; 0 picks a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Address of the prefill server.
    #[arg(long, value_name = "HOST:PORT")]
    prefill: SocketAddr,
    /// Address of the decode server.
    #[arg(long, value_name = "HOST:PORT")]
    decode: SocketAddr,
}

/// Relays until the process is killed.
///
/// # Errors
/// If it cannot listen, or epoll fails.
pub fn run(options: &Options) -> io::Result<bool> {
    let listener = TcpListener::bind(("127.0.0.1", options.port))?;
    println!("listening on http://{}", listener.local_addr()?);
    Relay::new(listener, [options.prefill, options.decode])?.run()?;
    Ok(true)
}

struct Relay {
    epoll: OwnedFd,
    listener: TcpListener,
    servers: [SocketAddr; 2],
    sessions: Vec<Option<Session>>,
    free: Vec<usize>,
}

impl Relay {
    fn new(listener: TcpListener, servers: [SocketAddr; 2]) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        // As many as all connections of a test that connect at once.
        rustix::net::listen(&listener, 4096)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, LISTENER, EventFlags::IN)?;
        Ok(Self { epoll, listener, servers, sessions: Vec::new(), free: Vec::new() })
    }

    fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        let mut chunk = vec![0; CHUNK];
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // An index is used again only when no event of its former session can be left in this list.
            let mut closed = Vec::new();
            for event in &events {
                let (data, flags) = (event.data, event.flags);
                if data.u64() == LISTENER.u64() {
                    self.accept();
                } else {
                    let token = data.u64() as usize;
                    self.session(token / SIDES, token % SIDES, flags, &mut chunk, &mut closed);
                }
            }
            self.free.append(&mut closed);
        }
    }

    fn session(
        &mut self,
        index: usize,
        side: usize,
        flags: EventFlags,
        chunk: &mut [u8],
        closed: &mut Vec<usize>,
    ) {
        let Some(place) = self.sessions.get_mut(index) else { return };
        let Some(session) = place else { return };
        if session.advance(side, flags, chunk).is_err() {
            *place = None;
            closed.push(index);
        }
    }

    /// A client that cannot be served is disconnected: its error shows at the load generator.
    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            let index = self.free.pop().unwrap_or(self.sessions.len());
            let session = self.open(client, index).ok();
            match self.sessions.get_mut(index) {
                Some(place) => *place = session,
                None => self.sessions.push(session),
            }
        }
    }

    fn open(&self, client: TcpStream, index: usize) -> io::Result<Session> {
        let [prefill, decode] = self.servers;
        let sides = [client, TcpStream::connect(prefill)?, TcpStream::connect(decode)?];
        for (side, socket) in sides.iter().enumerate() {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let token = EventData::new_u64((index * SIDES + side) as u64);
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(&self.epoll, socket.as_fd(), token, flags)?;
        }
        Ok(Session { sides, request: Flow::to([PREFILL, DECODE]), response: Flow::to([CLIENT, CLIENT]) })
    }
}

/// A client and its two servers.
struct Session {
    sides: [TcpStream; SIDES],
    request: Flow,
    response: Flow,
}

impl Session {
    /// # Errors
    /// If a connection ended or failed.
    fn advance(&mut self, side: usize, flags: EventFlags, chunk: &mut [u8]) -> io::Result<()> {
        let is_readable = flags.contains(EventFlags::IN);
        let is_writable = flags.contains(EventFlags::OUT);
        match side {
            CLIENT => {
                if is_readable {
                    self.request.advance(&self.sides, CLIENT, chunk)?;
                }
                if is_writable && self.response.is_blocked() {
                    self.response.advance(&self.sides, DECODE, chunk)?;
                }
            }
            DECODE if is_readable => self.response.advance(&self.sides, DECODE, chunk)?,
            PREFILL if is_readable => while read(&self.sides[PREFILL], chunk)? == Some(chunk.len()) {},
            _ => {}
        }
        if side != CLIENT && is_writable && self.request.is_blocked() {
            self.request.advance(&self.sides, CLIENT, chunk)?;
        }
        // What is not passed on yet is lost; load generators end connections between requests only.
        if flags.intersects(EventFlags::HUP | EventFlags::RDHUP) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// Bytes on their way from one connection to others.
struct Flow {
    to: [usize; 2],
    /// What not all have taken yet, and how much each has. Nothing more is read meanwhile.
    left: Vec<u8>,
    taken: [usize; 2],
}

impl Flow {
    fn to(to: [usize; 2]) -> Self {
        Self { to, left: Vec::new(), taken: [0; 2] }
    }

    fn is_blocked(&self) -> bool {
        !self.left.is_empty()
    }

    /// Passes on what `from` has sent, until it has no more or a receiver takes no more.
    fn advance(&mut self, sides: &[TcpStream; SIDES], from: usize, chunk: &mut [u8]) -> io::Result<()> {
        let receivers = if self.to[0] == self.to[1] { 1 } else { 2 };
        if self.is_blocked() {
            let left = std::mem::take(&mut self.left);
            self.write(sides, receivers, &left)?;
        }
        while !self.is_blocked() {
            let Some(size) = read(&sides[from], chunk)? else { return Ok(()) };
            self.taken = [0; 2];
            self.write(sides, receivers, &chunk[..size])?;
            // A short read has emptied the socket: what comes later is another event.
            if size < chunk.len() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn write(&mut self, sides: &[TcpStream; SIDES], receivers: usize, bytes: &[u8]) -> io::Result<()> {
        for receiver in 0..receivers {
            let taken = &mut self.taken[receiver];
            if *taken < bytes.len() {
                *taken += write(&sides[self.to[receiver]], &bytes[*taken..])?;
            }
        }
        if self.taken[..receivers].iter().any(|taken| *taken < bytes.len()) {
            self.left = bytes.to_vec();
        }
        Ok(())
    }
}

/// None if there is nothing to read now; an error if there will never be.
fn read(mut socket: &TcpStream, chunk: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.read(chunk) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(size) => Ok(Some(size)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// How much the socket takes now.
fn write(mut socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match socket.write(bytes) {
        Ok(size) => Ok(size),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error),
    }
}

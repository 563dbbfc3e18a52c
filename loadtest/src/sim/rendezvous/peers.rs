//! The decode side: one connection to each prefill server's bootstrap port, shared by all rooms there.
//! Timeouts and error messages are up to the legs.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, oneshot},
};

use super::{Frame, Op, PROTOCOL, QUEUE, ROUTE};
use crate::sim::state::State;

/// Limit of the head of the upgrade's response.
const HEAD_LIMIT: usize = 4096;

/// How prefill finished a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TransferEnd {
    /// The prompt was transferred; this is its hash.
    Delivered(u64),
    /// The prefill leg failed.
    Failed,
}

type Waiting = Mutex<HashMap<u64, oneshot::Sender<TransferEnd>>>;

/// An open rendezvous connection.
#[derive(Debug)]
pub(crate) struct Peer {
    out: mpsc::Sender<Frame>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A claim on a room; dropping it before prefill has finished abandons the room.
pub(crate) struct Claim {
    peer: Arc<Peer>,
    leg: u64,
    end: oneshot::Receiver<TransferEnd>,
}

impl Claim {
    /// `None` if the connection is lost.
    pub(crate) async fn finished(&mut self) -> Option<TransferEnd> {
        (&mut self.end).await.ok()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if lock(&self.peer.waiting).remove(&self.leg).is_some() {
            // A full queue is a stuck partner, which will notice the end of the connection.
            let _ = self.peer.out.try_send(Frame { op: Op::Abandon, leg: self.leg, value: 0, rank: None });
        }
    }
}

impl Peer {
    /// Claims a room, of a rank if that was told. `None` if the connection is lost already.
    pub(crate) async fn claim(self: &Arc<Self>, room: u64, rank: Option<u64>) -> Option<Claim> {
        let leg = self.next.fetch_add(1, Ordering::Relaxed);
        let (send, end) = oneshot::channel();
        lock(&self.waiting).insert(leg, send);
        let claim = Claim { peer: Arc::clone(self), leg, end };
        self.out.send(Frame { op: Op::Claim, leg, value: room, rank }).await.ok()?;
        Some(claim)
    }
}

#[derive(Debug, Default)]
struct Slot {
    peer: tokio::sync::Mutex<Option<Arc<Peer>>>,
}

/// The connections of one decode server.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    slots: Mutex<HashMap<(String, u16), Arc<Slot>>>,
}

impl Peers {
    /// The open connection to a bootstrap server, or one attempt to open it.
    pub(crate) async fn reach(&self, host: &str, port: u16, state: &Arc<State>) -> io::Result<Arc<Peer>> {
        let key = (host.to_owned(), port);
        let slot = Arc::clone(lock(&self.slots).entry(key.clone()).or_default());
        let mut peer = slot.peer.lock().await;
        if let Some(open) = peer.as_ref().filter(|open| !open.out.is_closed()) {
            return Ok(Arc::clone(open));
        }
        *peer = None;
        match dial(host, port, state).await {
            Ok(stream) => Ok(Arc::clone(peer.insert(serve(stream, state)))),
            Err(error) => {
                // An address that refuses connections is not worth remembering.
                lock(&self.slots).remove(&key);
                Err(error)
            }
        }
    }
}

/// Connects, upgrades and identifies this server.
async fn dial(host: &str, port: u16, state: &State) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    stream.set_nodelay(true)?;
    let head = format!(
        "GET {ROUTE} HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: upgrade\r\nupgrade: {PROTOCOL}\r\n\
         x-sim-identity: decode {}\r\n\r\n",
        state.addr
    );
    stream.write_all(head.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // One byte at a time, so as not to read beyond the head; this happens once per pair.
        head.push(stream.read_u8().await?);
        if head.len() > HEAD_LIMIT {
            return Err(io::Error::other("the response's head is too long"));
        }
    }
    if head.starts_with(b"HTTP/1.1 101 ") { Ok(stream) } else { Err(io::Error::other("not a simulator")) }
}

/// Runs an upgraded connection until it is lost; all waiters learn that from their channels.
fn serve(stream: TcpStream, state: &Arc<State>) -> Arc<Peer> {
    let (out, frames) = mpsc::channel(QUEUE);
    let waiting = Arc::new(Waiting::default());
    let peer = Peer { out, waiting: Arc::clone(&waiting), next: AtomicU64::new(1) };
    state.spawn(async move {
        exchange(stream, frames, &waiting).await;
        lock(&waiting).clear();
    });
    Arc::new(peer)
}

async fn exchange(mut stream: TcpStream, mut frames: mpsc::Receiver<Frame>, waiting: &Waiting) {
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    loop {
        tokio::select! {
            read = stream.read_buf(&mut input) => {
                if !matches!(read, Ok(1..)) || settle(&mut input, waiting).is_err() {
                    return;
                }
            }
            frame = frames.recv() => {
                let Some(frame) = frame else { return };
                let mut next = Some(frame);
                while let Some(frame) = next {
                    frame.write(&mut output);
                    next = frames.try_recv().ok();
                }
                if stream.write_all_buf(&mut output).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn settle(input: &mut BytesMut, waiting: &Waiting) -> Result<(), u8> {
    while let Some(frame) = Frame::read(input)? {
        let end = match frame.op {
            Op::Delivered => TransferEnd::Delivered(frame.value),
            Op::Failed => TransferEnd::Failed,
            Op::Claim | Op::Abandon => return Err(frame.op as u8),
        };
        if let Some(leg) = lock(waiting).remove(&frame.leg) {
            // The leg may have been dropped meanwhile.
            let _ = leg.send(end);
        }
    }
    Ok(())
}

//! A server that follows a script: for each request, the steps that a test gives.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::http::{Head, read_body, read_head};

/// One request as a server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which connection it came on, counted from 0.
    pub connection: usize,
    pub head: Head,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        self.head.start_line.split(' ').nth(1).expect("a target")
    }
}

/// What a server does with a request, in order.
#[derive(Clone)]
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits for a gate to open.
    Wait(Gate),
    /// Opens a gate, for a test that waits until what stands before this has been done.
    Open(Gate),
    /// Waits for the router to close the connection.
    Hang,
    /// Closes the connection.
    Close,
    /// Resets the connection.
    Reset,
    /// Waits for some time.
    Pause(Duration),
    /// Writes chunks for as long as they are taken, and counts the bytes.
    Flood(Arc<AtomicUsize>),
    /// Closes the connection after some time, without looking at what comes in it.
    CloseAfter(Duration),
}

/// Holds scripts until a test opens it.
#[derive(Clone)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    /// Waits until it is open.
    pub async fn pass(&self) {
        self.0.subscribe().wait_for(|open| *open).await.expect("the gate outlives its visitors");
    }
}

#[derive(Default)]
struct State {
    seen: Mutex<Vec<Seen>>,
    opened: AtomicUsize,
    /// Requests and closed connections so far, for those who wait for them.
    arrived: watch::Sender<usize>,
    closed: watch::Sender<usize>,
}

type Script = dyn Fn(&Seen) -> Vec<Step> + Send + Sync;

/// A scripted server on a port of its own.
pub struct Upstream {
    address: SocketAddr,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

impl Upstream {
    pub async fn start(script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), script).await
    }

    /// A server at an address where another one has been.
    pub async fn start_at(
        address: SocketAddr,
        script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let state = Arc::new(State::default());
        let accepting = tokio::spawn(accept(listener, Arc::clone(&state), Arc::new(script)));
        Self { address, state, accepting }
    }

    /// A server that answers everything with the same bytes.
    pub async fn always(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |_| vec![Step::Send(answer.clone())]).await
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// From now on connections are refused.
    pub async fn stop_listening(&self) {
        self.accepting.abort();
        super::patiently("the listener's end", async {
            while tokio::net::TcpStream::connect(self.address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// The only request so far, which may be about to arrive: prefill's can be behind decode's answer.
    pub async fn only(&self) -> Seen {
        self.arrived(1).await;
        let mut seen = self.seen();
        assert_eq!(seen.len(), 1, "one request");
        seen.remove(0)
    }

    /// Connections accepted so far.
    pub fn opened(&self) -> usize {
        self.state.opened.load(Ordering::SeqCst)
    }

    /// Waits until so many requests have arrived in all.
    pub async fn arrived(&self, count: usize) {
        let mut arrived = self.state.arrived.subscribe();
        super::patiently("a request at a server", arrived.wait_for(|n| *n >= count)).await.unwrap();
    }

    /// Waits until so many connections have been closed in all.
    pub async fn closed(&self, count: usize) {
        let mut closed = self.state.closed.subscribe();
        super::patiently("a closed connection", closed.wait_for(|n| *n >= count)).await.unwrap();
    }

    /// Connections closed so far.
    pub fn closed_now(&self) -> usize {
        *self.state.closed.borrow()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, state: Arc<State>, script: Arc<Script>) {
    // Connections end with the server.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let number = state.opened.fetch_add(1, Ordering::SeqCst);
        let (state, script) = (Arc::clone(&state), Arc::clone(&script));
        connections.spawn(async move {
            serve(stream, number, &state, &script).await;
            state.closed.send_modify(|closed| *closed += 1);
        });
    }
}

async fn serve(mut stream: TcpStream, connection: usize, state: &State, script: &Arc<Script>) {
    let mut buffer = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut buffer).await {
        if head.header("expect").is_some() {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.ok();
        }
        let (body, complete) = read_body(&mut stream, &mut buffer, &head).await;
        if !complete {
            return;
        }
        let seen = Seen { connection, head, body };
        let steps = script(&seen);
        state.seen.lock().unwrap().push(seen);
        state.arrived.send_modify(|arrived| *arrived += 1);
        for step in steps {
            if !take(step, &mut stream, &mut buffer).await {
                return;
            }
        }
    }
}

/// Returns whether the connection lives on.
async fn take(step: Step, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> bool {
    match step {
        Step::Send(bytes) => stream.write_all(&bytes).await.is_ok(),
        Step::Wait(gate) => tokio::select! {
            () = gate.pass() => true,
            _ = stream.read_buf(buffer) => false,
        },
        Step::Open(gate) => {
            gate.open();
            true
        }
        Step::Hang => {
            stream.read_buf(buffer).await.ok();
            false
        }
        Step::Close => false,
        Step::Pause(pause) => {
            tokio::time::sleep(pause).await;
            true
        }
        Step::Flood(written) => {
            // Or the kernel would take several megabytes that nobody has read.
            SockRef::from(&*stream).set_send_buffer_size(64 << 10).expect("SO_SNDBUF");
            let chunk = [b"10000\r\n", &[b'x'; 1 << 16][..], b"\r\n"].concat();
            while let Ok(count) = stream.write(&chunk).await {
                written.fetch_add(count, Ordering::SeqCst);
                if count < chunk.len() && stream.write_all(&chunk[count..]).await.is_err() {
                    break;
                }
            }
            false
        }
        Step::CloseAfter(pause) => {
            tokio::time::sleep(pause).await;
            false
        }
        Step::Reset => {
            SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
            false
        }
    }
}

/// A complete answer of JSON.
pub fn json(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into()
}

//! A server that performs the steps of a test for each request.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::http::{Head, read_body, read_head};

/// One request as a server received it.
#[derive(Debug, Clone)]
pub struct ReceivedRequest {
    /// The number of its connection, from 0.
    pub connection: usize,
    pub head: Head,
    pub body: Vec<u8>,
}

impl ReceivedRequest {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        self.head.start_line.split(' ').nth(1).expect("a target")
    }
}

/// One step of the script for a request.
#[derive(Clone)]
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits for a gate to open.
    Wait(Gate),
    /// Opens a gate, which tells a test that the steps before were performed.
    Open(Gate),
    /// Waits for the router to close the connection.
    Hang,
    /// Closes the connection.
    Close,
    /// Resets the connection.
    Reset,
    /// Sleeps.
    Pause(Duration),
    /// Writes chunks until the connection ends, and counts the bytes.
    Flood(Arc<AtomicUsize>),
    /// Closes the connection after some time, whatever arrives until then.
    CloseAfter(Duration),
    /// Closes the sending side, and reads until the router closes the connection.
    Linger,
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
    pub async fn wait(&self) {
        self.0.subscribe().wait_for(|open| *open).await.expect("the sender is kept by the gate");
    }
}

#[derive(Default)]
struct State {
    reads_bodies: bool,
    seen: Mutex<Vec<ReceivedRequest>>,
    opened: AtomicUsize,
    /// Counts of received requests and closed connections, to be waited for.
    arrived: watch::Sender<usize>,
    closed: watch::Sender<usize>,
}

type Script = dyn Fn(&ReceivedRequest) -> Vec<Step> + Send + Sync;

/// A scripted server on a free port.
pub struct ScriptedServer {
    address: SocketAddr,
    state: Arc<State>,
    accepting: JoinHandle<()>,
    /// Keeps the port of a server that refuses connections from being given to another server.
    reserved: Mutex<Option<TcpSocket>>,
}

impl ScriptedServer {
    pub async fn start(script: impl Fn(&ReceivedRequest) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), script).await
    }

    /// A server that performs its script when it has read a request's head. The body stays unread.
    pub async fn start_early(script: impl Fn(&ReceivedRequest) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::run("127.0.0.1:0".parse().expect("an address"), Arc::new(script), false).await
    }

    /// A server at the address of one that was dropped.
    pub async fn start_at(
        address: SocketAddr,
        script: impl Fn(&ReceivedRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        Self::run(address, Arc::new(script), true).await
    }

    async fn run(address: SocketAddr, script: Arc<Script>, reads_bodies: bool) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let state = Arc::new(State { reads_bodies, ..State::default() });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&state), script));
        Self { address, state, accepting, reserved: Mutex::default() }
    }

    /// A server that responds to every request with the same bytes.
    pub async fn always(response: impl Into<Vec<u8>>) -> Self {
        let response = response.into();
        Self::start(move |_| vec![Step::Send(response.clone())]).await
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn requests(&self) -> Vec<ReceivedRequest> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Refuses connections from now on.
    pub async fn stop_listening(&self) {
        self.accepting.abort();
        super::with_timeout("the listener's end", async {
            loop {
                let socket = TcpSocket::new_v4().expect("a socket");
                socket.set_reuseaddr(true).expect("SO_REUSEADDR");
                // Fails while the listener is open.
                if socket.bind(self.address).is_ok() {
                    break *self.reserved.lock().unwrap() = Some(socket);
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// The only request. Waits for it: prefill's may arrive after decode's response.
    pub async fn only_request(&self) -> ReceivedRequest {
        self.wait_for_requests(1).await;
        let mut seen = self.requests();
        assert_eq!(seen.len(), 1, "one request");
        seen.remove(0)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.state.opened.load(Ordering::SeqCst)
    }

    /// Waits until `count` requests have arrived in all.
    pub async fn wait_for_requests(&self, count: usize) {
        let mut arrived = self.state.arrived.subscribe();
        super::with_timeout("a request at a server", arrived.wait_for(|n| *n >= count)).await.unwrap();
    }

    /// Waits until `count` connections have been closed in all.
    pub async fn wait_closed(&self, count: usize) {
        let mut closed = self.state.closed.subscribe();
        super::with_timeout("a closed connection", closed.wait_for(|n| *n >= count)).await.unwrap();
    }

    /// Connections closed so far.
    pub fn closed_connections(&self) -> usize {
        *self.state.closed.borrow()
    }
}

impl Drop for ScriptedServer {
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
        let (body, complete) = match state.reads_bodies {
            true => read_body(&mut stream, &mut buffer, &head).await,
            false => (Vec::new(), true),
        };
        if !complete {
            return;
        }
        let seen = ReceivedRequest { connection, head, body };
        let steps = script(&seen);
        state.seen.lock().unwrap().push(seen);
        state.arrived.send_modify(|arrived| *arrived += 1);
        for step in steps {
            if !perform(step, &mut stream, &mut buffer).await {
                return;
            }
        }
    }
}

/// Returns whether the connection is still open.
async fn perform(step: Step, stream: &mut TcpStream, buffer: &mut Vec<u8>) -> bool {
    match step {
        Step::Send(bytes) => stream.write_all(&bytes).await.is_ok(),
        Step::Wait(gate) => tokio::select! {
            () = gate.wait() => true,
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
            // Otherwise the kernel buffers several megabytes that no one has read.
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
        Step::Linger => {
            stream.shutdown().await.ok();
            while stream.read(&mut [0; 4_096]).await.is_ok_and(|count| count > 0) {}
            false
        }
        Step::Reset => {
            SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
            false
        }
    }
}

/// The body of a response whose content does not matter.
pub const OK: &str = r#"{"text":"hi"}"#;

/// The head of an event stream. Its bytes follow as [`chunk`]s.
pub const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n";

/// A server that responds to every request with [`OK`].
pub async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", OK)).await
}

/// One chunk of a chunked body.
pub fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into()
}

/// A complete response with a JSON body.
pub fn json(status: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into()
}

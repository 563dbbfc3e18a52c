//! A backend of the `router` target: it answers every request with the same bytes, in any writes and with any
//! pauses, and may close the connection after it or refuse connections.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::time::{sleep, timeout};

use super::split_into_at_most;

/// The unread bytes that a connection holds: small, so that writers have to wait.
pub(super) const BUFFER_SIZE: usize = 4 << 10;
/// The most writes in which a side sends its text: each wakes several tasks, and costs an input's time.
pub(super) const MAX_WRITES: usize = 40;
/// How long a client waits for responses before it closes its half: longer than all timeouts of the router.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(120);

/// How the input becomes a response.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum ScriptFraming {
    /// The input is head and body, well-formed or not.
    Raw,
    /// The input is a body of type JSON, behind a head with its length.
    Length,
    /// The input is the body of a stream of events, sent in chunks.
    Chunked,
}

impl ScriptFraming {
    fn frame(self, text: &[u8], seed: u8) -> Vec<u8> {
        let head_of = |content_type| format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n");
        match self {
            Self::Raw => text.to_vec(),
            Self::Length => {
                let head = format!("{}Content-Length: {}\r\n\r\n", head_of("application/json"), text.len());
                [head.as_bytes(), text].concat()
            }
            Self::Chunked => {
                let head = format!("{}Transfer-Encoding: chunked\r\n\r\n", head_of("text/event-stream"));
                [head.as_bytes(), &chunks(text, seed), b"0\r\n\r\n"].concat()
            }
        }
    }
}

fn chunks(text: &[u8], seed: u8) -> Vec<u8> {
    // An empty chunk would end the body.
    let parts = split_into_at_most(MAX_WRITES, text, seed).into_iter().filter(|part| !part.is_empty());
    let chunk = |part: &[u8]| [format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat();
    parts.flat_map(chunk).collect()
}

/// What a backend does on each of its connections.
#[derive(Clone)]
pub(super) struct ScriptedBackend {
    /// Its response to every request.
    response: Arc<[u8]>,
    pub(super) framing: ScriptFraming,
    seed: u8,
    /// Between two writes of the response.
    pause: Duration,
    /// It closes the connection after its response.
    closes: bool,
    refuses_connections: bool,
}

impl ScriptedBackend {
    pub(super) fn new(text: &[u8], seed: u8, options: u8) -> Self {
        // None; within and beyond the wait for a stream's first event; beyond the stream's idle timeout.
        let pause = [0, 10, 150, 7_000][usize::from(options) % 4];
        let framing = [ScriptFraming::Raw, ScriptFraming::Length, ScriptFraming::Chunked, ScriptFraming::Raw];
        let framing = framing[usize::from(options >> 4) % 4];
        Self {
            response: framing.frame(text, seed.rotate_left(1)).into(),
            framing,
            seed,
            pause: Duration::from_millis(pause),
            closes: options & 4 != 0,
            refuses_connections: options & 8 != 0 && options & 4 != 0,
        }
    }

    /// Whether its response is well-formed, complete and soon.
    pub(super) fn is_sound(&self) -> bool {
        let is_soon = self.pause < Duration::from_secs(1);
        self.framing != ScriptFraming::Raw && !self.refuses_connections && is_soon
    }

    /// A connection to the backend.
    pub(super) fn connect(&self) -> io::Result<DuplexStream> {
        if self.refuses_connections {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (routers_end, backends_end) = duplex(BUFFER_SIZE);
        tokio::spawn(self.clone().serve(backends_end));
        Ok(routers_end)
    }

    async fn serve(self, socket: DuplexStream) {
        let mut socket = BufReader::new(socket);
        while read_request(&mut socket).await.is_some() {
            for part in split_into_at_most(MAX_WRITES, &self.response, self.seed) {
                // An error: the router closed the connection, as it may at any time.
                if socket.write_all(part).await.is_err() {
                    return;
                }
                if !self.pause.is_zero() {
                    sleep(self.pause).await;
                }
            }
            if self.closes {
                return;
            }
        }
    }

    /// What hyper's client reads of the response if it is sent at once: the whole body, if it is a success.
    pub(super) async fn success_read_by_hyper(&self) -> Option<Bytes> {
        let at_once = Self { seed: 0, pause: Duration::ZERO, ..self.clone() };
        let io = TokioIo::new(at_once.connect().ok()?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        tokio::spawn(connection);
        let request = Request::post("/").body(Full::new(Bytes::from_static(b"{}"))).ok()?;
        let response = timeout(RESPONSE_TIMEOUT, sender.send_request(request)).await.ok()?.ok()?;
        if !response.status().is_success() {
            return None;
        }
        let body = timeout(RESPONSE_TIMEOUT, response.into_body().collect()).await.ok()?.ok()?;
        Some(body.to_bytes())
    }
}

/// Reads a request of the router's: a head with a length, and the body.
async fn read_request(socket: &mut BufReader<DuplexStream>) -> Option<()> {
    let mut line = Vec::new();
    let mut length = 0;
    while line != b"\r\n" {
        line.clear();
        if socket.read_until(b'\n', &mut line).await.ok()? == 0 {
            return None;
        }
        // The router knows each body before it sends it, so a request is never chunked.
        let text = String::from_utf8_lossy(&line).to_ascii_lowercase();
        if let Some(value) = text.strip_prefix("content-length: ") {
            length = value.trim_end().parse().expect("the router writes a valid length");
        }
    }
    socket.read_exact(&mut vec![0; length]).await.ok()?;
    Some(())
}

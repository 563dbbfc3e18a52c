//! The client of a replay: each request is sent when the trace says, whatever became of those before.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use memchr::memmem::find;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::super::trace::Request;
use super::servers::Clock;
use super::text::{Dialect, body};

/// Real time that a response may take: longer than any queue of a run that is worth looking at.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(300);

/// Real time after which a connection is not used again: uvicorn, with which `mini_lb.py` listens, closes it
/// after 5 s, at the moment at which a request may be written.
const LONGEST_IDLE: Duration = Duration::from_secs(2);
/// Bytes of an error, and real time for each piece of its body.
const LONGEST_REFUSAL: usize = 4_096;
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A router's client.
#[derive(Clone)]
pub(super) struct Client {
    router: SocketAddr,
    /// Connections that wait for their next request, and since when.
    idle: Rc<RefCell<Vec<(Instant, TcpStream)>>>,
}

impl Client {
    pub(super) fn new(router: SocketAddr) -> Self {
        Self { router, idle: Rc::default() }
    }

    /// Sends a request and reads its response. Returns the model's time at its first byte of body.
    pub(super) async fn send(&self, body: String, dialect: Dialect, clock: Clock) -> io::Result<f64> {
        let length = body.len();
        let (router, path) = (self.router, dialect.path());
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {router}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        let idle = self.idle.borrow_mut().pop();
        let mut stream = match idle.filter(|(since, _)| since.elapsed() < LONGEST_IDLE) {
            Some((_, stream)) => stream,
            None => TcpStream::connect(router).await?,
        };
        stream.set_nodelay(true)?;
        stream.write_all((head + &body).as_bytes()).await?;
        drop(body);
        let (mut text, mut first) = (Vec::new(), None);
        loop {
            if stream.read_buf(&mut text).await? == 0 {
                return Err(io::Error::other("closed before the end"));
            }
            let Some(head_end) = find(&text, b"\r\n\r\n") else { continue };
            if !text.starts_with(b"HTTP/1.1 200") {
                return Err(io::Error::other(refusal(text, stream).await));
            }
            if find(&text[head_end..], b"data:").is_some() {
                first.get_or_insert_with(|| clock.now());
            }
            if find(&text[head_end..], b"[DONE]").is_some() && text.ends_with(b"0\r\n\r\n") {
                break;
            }
        }
        self.idle.borrow_mut().push((Instant::now(), stream));
        first.ok_or_else(|| io::Error::other("no event"))
    }
}

/// The first line and the body of a response that is an error, as far as they come.
async fn refusal(mut text: Vec<u8>, mut stream: TcpStream) -> String {
    while !text.ends_with(b"}") && text.len() < LONGEST_REFUSAL {
        match timeout(REFUSAL_TIMEOUT, stream.read_buf(&mut text)).await {
            Ok(Ok(1..)) => {}
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    format!("{}: {body}", head.lines().next().unwrap_or_default())
}

/// What became of a replay's requests.
pub(super) struct Replayed {
    /// By request: seconds of the model from when it was due to its first byte, or why it failed.
    pub(super) ttft: Vec<Result<f64, String>>,
    /// The greatest delay of the client itself, in seconds of the model.
    pub(super) late: f64,
}

/// Sends all requests at their time. `start` is when the trace starts.
pub(super) async fn replay(
    router: SocketAddr,
    requests: &[Request],
    dialect: Dialect,
    clock: Clock,
    start: f64,
) -> Replayed {
    let client = Client::new(router);
    let ttft = requests.iter().map(|_| Err("not sent".to_owned())).collect();
    let mut result = Replayed { ttft, late: 0.0 };
    let local = LocalSet::new();
    let sending = async {
        let mut running = JoinSet::new();
        for (index, request) in requests.iter().enumerate() {
            let body = body(index, request, dialect);
            let due = start + request.at;
            clock.until(due).await;
            result.late = result.late.max(clock.now() - due);
            let client = client.clone();
            running.spawn_local(async move {
                let response = timeout(RESPONSE_TIMEOUT, client.send(body, dialect, clock)).await;
                (index, response.map_err(io::Error::from).flatten().map(|first| first - due))
            });
            while let Some(done) = running.try_join_next() {
                result.add(done);
            }
        }
        while let Some(done) = running.join_next().await {
            result.add(done);
        }
    };
    local.run_until(sending).await;
    result
}

impl Replayed {
    fn add(&mut self, done: Result<(usize, io::Result<f64>), tokio::task::JoinError>) {
        if let Ok((index, response)) = done {
            self.ttft[index] = response.map_err(|error| error.to_string());
        }
    }
}

//! One keep-alive connection of the generator: send a request, read its answer.
//!
//! A connection that failed is not used again. Nothing is retried: a router's failure is what is looked for.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::answer::{Answer, Wrong};
use super::request::Request;
use super::tally::Tally;
use crate::canned::unix_nanos;

/// Longest time an answer may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// When the parts of an answer came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// The body's first byte.
    pub(super) first_byte: Instant,
    pub(super) end: Instant,
    pub(super) left_early: bool,
    pub(super) is_merged: bool,
}

fn told(error: io::Error) -> Wrong {
    Wrong(error.to_string())
}

pub(super) struct Connection {
    target: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) fn new(target: SocketAddr) -> Self {
        Self { target, stream: None, buffer: vec![0; 32 << 10] }
    }

    /// Sends `request` and reads its answer to its end, or to where this client leaves.
    pub(super) async fn exchange(
        &mut self,
        request: &Request,
        tally: &RefCell<Tally>,
    ) -> Result<Times, Wrong> {
        let mut stream = self.send(request).await.map_err(told)?;
        let mut answer = Answer::new(request.kind.is_stream());
        let mut first_byte = None;
        while !answer.is_done() {
            let count = self.read(&mut stream).await.map_err(told)?;
            let now = unix_nanos();
            answer
                .take(&self.buffer[..count], |stamp| tally.borrow_mut().token(now.saturating_sub(stamp)))?;
            if first_byte.is_none() && answer.has_body() {
                first_byte = Some(Instant::now());
            }
            if request.leave_after.is_some_and(|tokens| answer.tokens >= tokens) {
                let now = Instant::now();
                return Ok(Times {
                    first_byte: first_byte.unwrap_or(now),
                    end: now,
                    left_early: true,
                    is_merged: true,
                });
            }
        }
        let end = Instant::now();
        let is_merged = answer.check(request)?;
        if !answer.closes {
            self.stream = Some(stream);
        }
        Ok(Times { first_byte: first_byte.unwrap_or(end), end, left_early: false, is_merged })
    }

    async fn send(&mut self, request: &Request) -> io::Result<TcpStream> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        stream.write_all(&request.bytes).await?;
        Ok(stream)
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.target).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn read(&mut self, stream: &mut TcpStream) -> io::Result<usize> {
        let read = tokio::time::timeout(SILENCE, stream.read(&mut self.buffer)).await;
        match read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

/// A single request without a body, on a connection of its own: status and body.
///
/// # Errors
/// If there is no whole answer of a known length within half a minute.
pub async fn ask(target: SocketAddr, method: &str, path: &str) -> io::Result<(u16, String)> {
    let mut connection = Connection::new(target);
    let mut stream = connection.connect().await?;
    let head = format!("{method} {path} HTTP/1.1\r\nhost: {target}\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Answer::new(false);
    while !answer.is_done() {
        let count = connection.read(&mut stream).await?;
        answer.take(&connection.buffer[..count], |_| {}).map_err(|wrong| io::Error::other(wrong.0))?;
    }
    Ok(answer.into_text())
}

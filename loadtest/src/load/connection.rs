//! One keep-alive connection of the generator: send a request, read and check its response.
//!
//! A connection is not reused after an error. Nothing is retried: failures of the router are a result.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::measurements::Measurements;
use super::request::Request;
use super::response::{RequestError, ResponseReader};
use crate::canned::unix_nanos;

/// Longest time without a byte of a response. None of the scenarios has a longer pause.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Times of a response.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResponseTimes {
    /// First byte of the body.
    pub(super) first_byte: Instant,
    pub(super) end: Instant,
    pub(super) cancelled: bool,
    pub(super) is_merged: bool,
}

fn io_error(error: io::Error) -> RequestError {
    RequestError(error.to_string())
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

    /// Sends `request` and reads its response to its end, or to the point where this client disconnects.
    pub(super) async fn exchange(
        &mut self,
        request: &Request,
        measurements: &RefCell<Measurements>,
    ) -> Result<ResponseTimes, RequestError> {
        let mut stream = self.send(request).await.map_err(io_error)?;
        let mut response = ResponseReader::new(request.kind.is_stream());
        let mut first_byte = None;
        while !response.is_done() {
            let count = self.read(&mut stream).await.map_err(io_error)?;
            let now = unix_nanos();
            response.feed(&self.buffer[..count], |timestamp| {
                measurements.borrow_mut().token(now.saturating_sub(timestamp));
            })?;
            if first_byte.is_none() && response.has_body() {
                first_byte = Some(Instant::now());
            }
            if request.cancel_after.is_some_and(|tokens| response.tokens >= tokens) {
                let now = Instant::now();
                return Ok(ResponseTimes {
                    first_byte: first_byte.unwrap_or(now),
                    end: now,
                    cancelled: true,
                    is_merged: true,
                });
            }
        }
        let end = Instant::now();
        let is_merged = response.check(request)?;
        if !response.connection_close {
            self.stream = Some(stream);
        }
        Ok(ResponseTimes { first_byte: first_byte.unwrap_or(end), end, cancelled: false, is_merged })
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
        let read = tokio::time::timeout(READ_TIMEOUT, stream.read(&mut self.buffer)).await;
        match read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

/// Sends a single request without a body on a new connection and returns the status and the body.
///
/// # Errors
/// If no complete response arrives within half a minute.
pub async fn fetch(target: SocketAddr, method: &str, path: &str) -> io::Result<(u16, String)> {
    let mut connection = Connection::new(target);
    let mut stream = connection.connect().await?;
    let head = format!("{method} {path} HTTP/1.1\r\nhost: {target}\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut response = ResponseReader::new(false);
    while !response.is_done() {
        let count = connection.read(&mut stream).await?;
        response.feed(&connection.buffer[..count], |_| {}).map_err(|error| io::Error::other(error.0))?;
    }
    Ok(response.into_text())
}

//! A client that sends the bytes a test gives and shows the bytes that come.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http::{Head, read_body, read_head};
use super::patiently;

pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// One answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub head: Head,
    pub body: Vec<u8>,
    /// The body ended as its head announced.
    pub complete: bool,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.head.start_line.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status")
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// `code` of an error of the router's own.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().expect("a code").to_owned()
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the router listens");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        Self { stream, buffer: Vec::new() }
    }

    /// Sets the kernel's buffer for what comes.
    pub fn receives_at_most(&self, bytes: usize) {
        SockRef::from(&self.stream).set_recv_buffer_size(bytes).expect("SO_RCVBUF");
    }

    /// Leaves with a reset instead of a clean end.
    pub fn reset_when_dropped(&self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("the router reads");
    }

    /// Sends a request with a body of announced length.
    pub async fn start(&mut self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\nhost: router\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() || method != "GET" {
            head += &format!("content-length: {}\r\n", body.len());
        }
        self.send([head.as_bytes(), b"\r\n", body].concat()).await;
    }

    pub async fn get(&mut self, target: &str) -> Answer {
        self.start("GET", target, &[], b"").await;
        self.answer().await
    }

    pub async fn post(&mut self, target: &str, body: impl AsRef<[u8]>) -> Answer {
        self.start("POST", target, &[("content-type", "application/json")], body.as_ref()).await;
        self.answer().await
    }

    pub async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        self.rest(head).await
    }

    /// The answer to `head`, read to its end.
    pub async fn rest(&mut self, head: Head) -> Answer {
        let (body, complete) =
            patiently("an answer's body", read_body(&mut self.stream, &mut self.buffer, &head)).await;
        Answer { head, body, complete }
    }

    pub async fn head(&mut self) -> Head {
        self.head_or_end().await.expect("an answer before the connection's end")
    }

    /// `None` when the connection ends without an answer.
    pub async fn head_or_end(&mut self) -> Option<Head> {
        patiently("an answer's head", read_head(&mut self.stream, &mut self.buffer)).await
    }

    /// Reads body bytes, with their framing, until `wanted` is among them.
    pub async fn read_until(&mut self, wanted: &str) -> String {
        let read = async {
            while !String::from_utf8_lossy(&self.buffer).contains(wanted) {
                let count = self.stream.read_buf(&mut self.buffer).await.expect("the router writes");
                assert_ne!(count, 0, "the connection ended before {wanted:?}");
            }
        };
        patiently(wanted, read).await;
        String::from_utf8_lossy(&self.buffer).into_owned()
    }

    /// Waits for the router to close the connection; what it sent before that is dropped.
    pub async fn closed(&mut self) {
        let mut rest = Vec::new();
        patiently("the connection's end", self.stream.read_to_end(&mut rest)).await.ok();
    }

    /// Whether bytes are there that no answer accounts for.
    pub fn has_leftovers(&self) -> bool {
        !self.buffer.is_empty()
    }
}

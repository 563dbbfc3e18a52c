//! A client that sends exactly the bytes of a test and keeps every byte that it receives.

use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http::{Head, read_body, read_head};
use super::with_timeout;

pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// One response, read to its end.
#[derive(Debug)]
pub struct Response {
    pub head: Head,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing says, not with the connection.
    pub complete: bool,
}

impl Response {
    pub fn status(&self) -> u16 {
        self.head.start_line.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status")
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// The `code` of one of the router's own errors.
    pub fn error_code(&self) -> String {
        self.json()["error"]["code"].as_str().expect("a code").to_owned()
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the router listens");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        Self { stream, buffer: Vec::new() }
    }

    /// Bounds what the kernel buffers of unread responses.
    pub fn set_receive_buffer(&self, bytes: usize) {
        SockRef::from(&self.stream).set_recv_buffer_size(bytes).expect("SO_RCVBUF");
    }

    /// Makes dropping the client send a RST instead of a FIN.
    pub fn reset_on_drop(&self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("the router reads");
    }

    /// Whether the router still takes bytes.
    pub async fn try_send(&mut self, bytes: &[u8]) -> bool {
        with_timeout("the router to read", self.stream.write_all(bytes)).await.is_ok()
    }

    /// Sends a request with a `content-length`.
    pub async fn send_request(&mut self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\nhost: router\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() || method != "GET" {
            head += &format!("content-length: {}\r\n", body.len());
        }
        self.send([head.as_bytes(), b"\r\n", body].concat()).await;
    }

    pub async fn get(&mut self, target: &str) -> Response {
        self.send_request("GET", target, &[], b"").await;
        self.response().await
    }

    pub async fn post(&mut self, target: &str, body: impl AsRef<[u8]>) -> Response {
        self.send_request("POST", target, &[("content-type", "application/json")], body.as_ref()).await;
        self.response().await
    }

    pub async fn response(&mut self) -> Response {
        let head = self.head().await;
        self.finish_response(head).await
    }

    /// Reads the rest of the response that begins with `head`.
    pub async fn finish_response(&mut self, head: Head) -> Response {
        let (body, complete) =
            with_timeout("a response body", read_body(&mut self.stream, &mut self.buffer, &head)).await;
        Response { head, body, complete }
    }

    pub async fn head(&mut self) -> Head {
        self.head_or_eof().await.expect("a response before the connection's end")
    }

    /// `None` if the connection ends without a response.
    pub async fn head_or_eof(&mut self) -> Option<Head> {
        with_timeout("a response head", read_head(&mut self.stream, &mut self.buffer)).await
    }

    /// Reads body bytes, with their framing, until `wanted` is among them.
    pub async fn read_until(&mut self, wanted: &str) -> String {
        let read = async {
            while !String::from_utf8_lossy(&self.buffer).contains(wanted) {
                let count = self.stream.read_buf(&mut self.buffer).await.expect("the router writes");
                assert_ne!(count, 0, "the connection ended before {wanted:?}");
            }
        };
        with_timeout(wanted, read).await;
        String::from_utf8_lossy(&self.buffer).into_owned()
    }

    /// Waits for the router to close the connection. Discards what it sent before.
    pub async fn wait_closed(&mut self) {
        let mut rest = Vec::new();
        with_timeout("the connection's end", self.stream.read_to_end(&mut rest)).await.ok();
    }

    /// Whether bytes were received beyond the responses that were read.
    pub fn has_unread_bytes(&self) -> bool {
        !self.buffer.is_empty()
    }
}

//! Shared by the tests: raw requests over a socket, and responses as the bytes and chunks that arrived.

#![allow(dead_code)]

use std::{net::SocketAddr, time::Duration};

use loadtest::sim::{Sim, SimConfig, SimPair};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// No wait of a passing test takes longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How a response's body is delimited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length,
    Chunked(Vec<Vec<u8>>),
    None,
}

/// A response.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) framing: Framing,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Parses raw bytes; `None` if the response is not complete.
    pub(crate) fn parse(raw: &[u8]) -> Option<Self> {
        let end = raw.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(&raw[..end]).expect("the head is text");
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().expect("a status");
        let pair = |line: &str| {
            let (name, value) = line.split_once(':').expect("a header line");
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        let headers: Vec<(String, String)> = lines.map(pair).collect();
        let rest = &raw[end + 4..];
        let find = |name: &str| headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.clone());
        let (framing, body) = if find("transfer-encoding").as_deref() == Some("chunked") {
            let chunks = chunks(rest)?;
            (Framing::Chunked(chunks.clone()), chunks.concat())
        } else if let Some(length) = find("content-length") {
            let length: usize = length.parse().expect("a length");
            (Framing::Length, rest.get(..length)?.to_vec())
        } else {
            (Framing::None, rest.to_vec())
        };
        Some(Self { status, headers, framing, body })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The payloads of a stream's events. One with a name has it as its type.
    pub(crate) fn events(&self) -> Vec<String> {
        let text = self.text();
        let (events, rest) = text.rsplit_once("\n\n").expect("events end in an empty line");
        assert_eq!(rest, "");
        let payload = |event: &str| {
            let Some(named) = event.strip_prefix("event: ") else {
                return event.strip_prefix("data: ").expect("an event").to_owned();
            };
            let (name, data) = named.split_once("\ndata: ").expect("an event");
            assert!(data.contains(&format!("\"type\":\"{name}\"")), "{event}");
            data.to_owned()
        };
        events.split("\n\n").map(payload).collect()
    }
}

fn chunks(mut raw: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut list = Vec::new();
    loop {
        let end = raw.windows(2).position(|window| window == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..end]).ok()?, 16).expect("a chunk size");
        let data = raw.get(end + 2..end + 2 + size + 2)?;
        raw = &raw[end + 2 + size + 2..];
        if size == 0 {
            return Some(list);
        }
        list.push(data[..size].to_vec());
    }
}

/// What a connection received until it was closed or complete.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) raw: Vec<u8>,
    pub(crate) closed: bool,
}

/// An open exchange.
pub(crate) struct Exchange {
    pub(crate) stream: TcpStream,
    pub(crate) raw: Vec<u8>,
}

impl Exchange {
    pub(crate) async fn open(addr: SocketAddr, request: &[u8]) -> Self {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        Self { stream, raw: Vec::new() }
    }

    /// Reads once; false at the end of the connection.
    pub(crate) async fn read(&mut self) -> bool {
        matches!(self.stream.read_buf(&mut self.raw).await, Ok(1..))
    }

    /// Reads until the text has arrived.
    pub(crate) async fn until(&mut self, text: &str) {
        let seen = |raw: &[u8]| raw.windows(text.len()).any(|window| window == text.as_bytes());
        while !seen(&self.raw) {
            let open = timeout(PATIENCE, self.read()).await.unwrap_or_else(|_| panic!("waited for {text:?}"));
            assert!(open, "closed before {text:?}: {}", String::from_utf8_lossy(&self.raw));
        }
    }

    /// Reads to the end of the response.
    pub(crate) async fn response(&mut self) -> Response {
        loop {
            if let Some(response) = Response::parse(&self.raw) {
                return response;
            }
            let open = timeout(PATIENCE, self.read()).await.expect("a response in time");
            assert!(open, "closed before the end: {:?}", String::from_utf8_lossy(&self.raw));
        }
    }

    /// As [`Self::response`], for a task of its own.
    pub(crate) async fn into_response(mut self) -> Response {
        self.response().await
    }

    /// What arrives within `time`, which is expected not to complete a response.
    pub(crate) async fn wait(&mut self, time: Duration) -> Outcome {
        let closed = timeout(time, async { while self.read().await {} }).await.is_ok();
        Outcome { raw: self.raw.clone(), closed }
    }
}

/// A request's bytes.
pub(crate) fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let kind = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nhost: sim\r\n{kind}content-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    request("POST", path, body)
}

/// One request on a connection of its own.
pub(crate) async fn send(sim: &Sim, method: &str, path: &str, body: &str) -> Response {
    Exchange::open(sim.addr(), &request(method, path, body)).await.response().await
}

/// One body to both servers at the same time.
pub(crate) async fn both(pair: &SimPair, path: &str, body: &str) -> (Response, Response) {
    tokio::join!(send(&pair.prefill, "POST", path, body), send(&pair.decode, "POST", path, body))
}

/// A pair whose own timeouts are a hundredth of the real ones.
pub(crate) async fn quick_pair() -> SimPair {
    let quick = |config| SimConfig { time_scale: 0.01, ..config };
    SimPair::start(quick(SimConfig::prefill()), quick(SimConfig::decode())).await.unwrap()
}

/// Bootstrap fields of a pair, for the end of a body.
pub(crate) fn fields(pair: &SimPair, room: i64) -> String {
    let port = pair.prefill.bootstrap_port().unwrap();
    format!("\"bootstrap_host\":\"127.0.0.1\",\"bootstrap_port\":{port},\"bootstrap_room\":{room}")
}

/// A `/generate` body; `extra` precedes the bootstrap fields and ends in a comma.
pub(crate) fn generate(pair: &SimPair, room: i64, extra: &str) -> String {
    format!("{{\"text\":\"the of and to\",{extra}{}}}", fields(pair, room))
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

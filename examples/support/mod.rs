//! The HTTP client of the examples: hyper with one connection per request, and server-sent events.

#![allow(dead_code, reason = "each example uses its own part")]
#![allow(unreachable_pub, reason = "an example is a crate of its own")]

use std::error::Error;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Errors of an example are only printed.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Sends a request and waits for the response head. `base` is `http://host:port`.
pub async fn send(
    base: &str,
    method: &str,
    path: &str,
    body: impl Into<Bytes>,
) -> Result<Response<Incoming>> {
    let authority = base.strip_prefix("http://").ok_or("the base URL must begin with http://")?;
    let authority = authority.trim_end_matches('/');
    let address = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
    let socket = TokioIo::new(TcpStream::connect(address).await?);
    let (mut requests, connection) = hyper::client::conn::http1::handshake(socket).await?;
    // hyper does its I/O in this future. It ends with the connection, and an error in it shows up at the
    // request as well.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, authority)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body.into()))?;
    Ok(requests.send_request(request).await?)
}

/// Reads a response body to its end, as text.
pub async fn text(response: Response<Incoming>) -> Result<String> {
    let whole = response.into_body().collect().await?.to_bytes();
    Ok(String::from_utf8(whole.into())?)
}

/// A response that is a stream of server-sent events.
pub struct Events {
    body: Incoming,
    /// Received bytes after the last complete event.
    rest: Vec<u8>,
}

impl Events {
    pub fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), rest: Vec::new() }
    }

    /// The data of the next event; `None` after `[DONE]`.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.rest.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.rest.drain(..end + 2).collect();
                let event = String::from_utf8(event)?;
                let data = event.trim_end().strip_prefix("data: ").ok_or("an event without data")?;
                return Ok((data != "[DONE]").then(|| data.to_owned()));
            }
            let frame = self.body.frame().await.ok_or("the stream ended before [DONE]")??;
            self.rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        }
    }
}

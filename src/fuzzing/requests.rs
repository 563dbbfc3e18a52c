//! What a client sends, parsed by the router and by hyper's server.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::{sleep, timeout};

use super::{FuzzInput, split_into_at_most};
use crate::http1::{BodyTimeouts, ClientTimeouts, NextRequest, ServerConnection, Stream};
use crate::timer::Timer;

/// The most writes in which a client sends its text: each wakes both tasks, and costs an input's time.
const MAX_WRITES: usize = 40;
/// Longer than all timeouts.
const FOREVER: Duration = Duration::from_secs(3_600);
/// How long a client waits before it closes. The clock is paused and jumps, so this takes no time.
const CLOSE_DELAY: Duration = Duration::from_secs(120);
const BUFFER_SIZE: usize = 64 << 10;

/// A request as it was parsed.
#[derive(Debug, PartialEq)]
struct ParsedRequest {
    method: String,
    target: String,
    /// Sorted, in lower case, without `content-length`: hyper joins equal ones, and drops them beside chunked
    /// framing. A wrong length shows in the body.
    headers: Vec<(String, Vec<u8>)>,
    /// `None` if it is incomplete or malformed.
    body: Option<Vec<u8>>,
}

/// Anything a client may send: the requests in it do not depend on how it is split into writes, and hyper
/// finds the same ones, byte for byte. The router may reject what hyper accepts.
pub fn requests(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(async {
        let whole = parsed_by_router(input.text, 0).await;
        let in_writes = parsed_by_router(input.text, input.options[0]).await;
        assert_eq!(whole, in_writes);
        let by_hyper = parsed_by_hyper(input.text).await;
        assert!(by_hyper.starts_with(&whole), "{whole:?}\nhyper: {by_hyper:?}");
    });
}

/// Sends a text in several writes, and waits before it closes.
async fn send(mut socket: DuplexStream, text: Vec<u8>, seed: u8) {
    let (mut reader, mut writer) = tokio::io::split(&mut socket);
    let write = async {
        for part in split_into_at_most(MAX_WRITES, &text, seed) {
            if writer.write_all(part).await.is_err() {
                return;
            }
            // Lets the other side read this much before the next write.
            tokio::task::yield_now().await;
        }
        sleep(CLOSE_DELAY).await;
        let _ = writer.shutdown().await;
    };
    let mut responses = Vec::new();
    let _ = tokio::join!(write, reader.read_to_end(&mut responses));
}

/// The requests that the router parses, up to the first one that it rejects.
async fn parsed_by_router(text: &[u8], seed: u8) -> Vec<ParsedRequest> {
    let (client, socket) = duplex(BUFFER_SIZE);
    let sending = tokio::spawn(send(client, text.to_vec(), seed));
    let mut connection = ServerConnection::new(Stream::Memory(socket), None);
    let mut timer = Timer::default();
    let slow = BodyTimeouts { idle: FOREVER, whole: FOREVER };
    let timeouts = ClientTimeouts { head: FOREVER, idle: FOREVER, body: slow };
    let mut requests = Vec::new();
    while let NextRequest::Request(head, framing) =
        connection.next(&mut timer, timeouts, std::future::pending()).await
    {
        // The router answers with an error and closes, even if hyper accepts the request.
        if head.reject_reason.is_some() {
            break;
        }
        let line = |line: crate::http1::RawHeader<'_>| {
            (String::from_utf8_lossy(line.name).to_ascii_lowercase(), line.value.to_vec())
        };
        let headers: Vec<_> = head.headers.iter().map(line).collect();
        let headers = comparable(headers);
        let body = body(&mut connection).await;
        // Behind an incomplete body nothing can be parsed.
        let is_reusable = framing.keeps_alive && body.is_some();
        requests.push(ParsedRequest {
            method: head.method.to_string(),
            target: head.target.to_string(),
            headers,
            body,
        });
        if !is_reusable {
            break;
        }
    }
    // Ends the client's reading, for which the next line waits.
    drop(connection);
    sending.await.expect("the client does not panic");
    requests
}

fn comparable(mut headers: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
    headers.retain(|(name, _)| name != "content-length");
    headers.sort();
    headers
}

async fn body(connection: &mut ServerConnection) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = poll_fn(|cx| connection.poll_chunk(cx)).await.ok()? {
        body.extend_from_slice(&chunk);
    }
    Some(body)
}

/// The requests that hyper parses.
async fn parsed_by_hyper(text: &[u8]) -> Vec<ParsedRequest> {
    let (client, socket) = duplex(BUFFER_SIZE);
    let sending = tokio::spawn(send(client, text.to_vec(), 0));
    let requests = Arc::new(Mutex::new(Vec::new()));
    let service = service_fn(|request| record(request, &requests));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(FOREVER);
    let _ = timeout(FOREVER, builder.serve_connection(TokioIo::new(socket), service))
        .await
        .expect("the client closes the connection");
    sending.await.expect("the client does not panic");
    let mut requests = requests.lock().expect("no holder panics");
    std::mem::take(&mut *requests)
}

async fn record(
    request: Request<Incoming>,
    requests: &Mutex<Vec<ParsedRequest>>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let header = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
        (name.to_string(), value.as_bytes().to_vec())
    };
    let headers = comparable(head.headers.iter().map(header).collect());
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
    let request = ParsedRequest { method: head.method.to_string(), target, headers, body };
    requests.lock().expect("no holder panics").push(request);
    Ok(Response::new(Empty::new()))
}

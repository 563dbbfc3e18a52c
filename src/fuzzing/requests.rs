//! What a client sends, read by the router and by hyper's server.

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

use super::{Input, cut_at_most};
use crate::http1::{ClientTimeouts, NextRequest, ServerConnection, Stream};
use crate::timer::Timer;

/// Pieces of what a client sends: each wakes everybody.
const MAX_PIECES: usize = 40;
/// Longer than anything may take, and how long a client waits before it closes.
const FOREVER: Duration = Duration::from_secs(3_600);
const PATIENCE: Duration = Duration::from_secs(120);
const BUFFER: usize = 64 << 10;

/// A request as it was read.
#[derive(Debug, PartialEq)]
struct Read {
    method: String,
    target: String,
    /// In alphabetical order, with small letters, without the length: hyper keeps one of several that are the same, and
    /// none beside chunks. The body shows it.
    headers: Vec<(String, Vec<u8>)>,
    /// `None`: it had no end, or was none.
    body: Option<Vec<u8>>,
}

/// Anything a client may send: what requests there are in it does not depend on how it is cut, and hyper finds them too,
/// byte for byte. The router may refuse what hyper takes.
pub fn requests(data: &[u8]) {
    let Some(input) = Input::of(data) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without I/O").block_on(async {
        let whole = ours(input.text, 0).await;
        let pieces = ours(input.text, input.options[0]).await;
        assert_eq!(whole, pieces);
        let hypers = hypers(input.text).await;
        assert!(hypers.starts_with(&whole), "{whole:?}\nhyper: {hypers:?}");
    });
}

/// Sends a text, in pieces, and waits before it closes.
async fn send(mut socket: DuplexStream, text: Vec<u8>, cuts: u8) {
    let (mut reader, mut writer) = tokio::io::split(&mut socket);
    let write = async {
        for piece in cut_at_most(MAX_PIECES, &text, cuts) {
            if writer.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        sleep(PATIENCE).await;
        let _ = writer.shutdown().await;
    };
    let mut answers = Vec::new();
    let _ = tokio::join!(write, reader.read_to_end(&mut answers));
}

/// What the router reads, up to the first request that it refuses.
async fn ours(text: &[u8], cuts: u8) -> Vec<Read> {
    let (client, socket) = duplex(BUFFER);
    let sending = tokio::spawn(send(client, text.to_vec(), cuts));
    let mut connection = ServerConnection::new(Stream::Memory(socket));
    let mut timer = Timer::default();
    let patience = ClientTimeouts { head: FOREVER, idle: FOREVER };
    let mut requests = Vec::new();
    while let NextRequest::Request(head, manner) =
        connection.next(&mut timer, patience, std::future::pending()).await
    {
        if head.reject_reason.is_some() {
            break;
        }
        let line = |line: crate::http1::RawHeader<'_>| {
            (String::from_utf8_lossy(line.name).to_ascii_lowercase(), line.value.to_vec())
        };
        let headers: Vec<_> = head.fields.iter().map(line).collect();
        let headers = sorted(headers);
        let body = body(&mut connection).await;
        let goes_on = manner.keeps_alive && body.is_some();
        requests.push(Read {
            method: head.method.to_string(),
            target: head.target.to_string(),
            headers,
            body,
        });
        if !goes_on {
            break;
        }
    }
    drop(connection);
    sending.await.expect("the client does not panic");
    requests
}

fn sorted(mut headers: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
    headers.retain(|(name, _)| name != "content-length");
    headers.sort();
    headers
}

async fn body(connection: &mut ServerConnection) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(piece) = poll_fn(|cx| connection.poll_chunk(cx)).await.ok()? {
        body.extend_from_slice(&piece);
    }
    Some(body)
}

/// What hyper reads.
async fn hypers(text: &[u8]) -> Vec<Read> {
    let (client, socket) = duplex(BUFFER);
    let sending = tokio::spawn(send(client, text.to_vec(), 0));
    let requests = Arc::new(Mutex::new(Vec::new()));
    let service = service_fn(|request| note(request, &requests));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(FOREVER);
    let _ = timeout(FOREVER, builder.serve_connection(TokioIo::new(socket), service)).await.expect("an end");
    sending.await.expect("the client does not panic");
    let mut requests = requests.lock().expect("nobody panics");
    std::mem::take(&mut *requests)
}

async fn note(
    request: Request<Incoming>,
    requests: &Mutex<Vec<Read>>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let header = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
        (name.to_string(), value.as_bytes().to_vec())
    };
    let headers = sorted(head.headers.iter().map(header).collect());
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
    let read = Read { method: head.method.to_string(), target, headers, body };
    requests.lock().expect("nobody panics").push(read);
    Ok(Response::new(Empty::new()))
}

//! HTTP/2 towards clients, with either engine: hyper's.
//!
//! Each request is a task on the worker's thread. The limits of streams, windows and resets are set here;
//! hyper and h2 enforce them.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tracing::debug;

use super::hyper_server::service;
use super::open_requests::{IdleWait, OpenRequests};
use super::{ConnectionHandler, Origin};
use crate::http1::{ClientTimeouts, LINGER, MAX_HEAD, Stream};

/// Flow-control windows: of one request's body, and of the connection, which bounds its memory.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Most response bytes that are buffered per request for a client that does not read.
const MAX_SEND_BUFFER: usize = 64 << 10;
/// Requests that the client resets before they are accepted (rapid reset, CVE-2023-44487). More closes the
/// connection.
const MAX_EARLY_RESETS: usize = 20;
/// Requests that are reset because of the client's protocol errors. More closes the connection.
const MAX_CAUSED_RESETS: usize = 100;
/// A client that is silent for this long gets a PING, and has as long again to acknowledge it.
const PING_AFTER: Duration = Duration::from_secs(30);

/// Serves an HTTP/2 connection. When `closing` changes, it finishes the requests in flight and closes.
pub(super) async fn serve<H: ConnectionHandler>(
    stream: Stream,
    origin: Origin,
    handler: Arc<H>,
    max_streams: u32,
    timeouts: ClientTimeouts,
    mut closing: watch::Receiver<()>,
) {
    let requests = Arc::new(OpenRequests::new(timeouts.body));
    let service = service(&requests, &handler, origin);
    let connection = builder(max_streams).serve_connection(TokioIo::new(stream), service_fn(service));
    let mut connection = pin!(connection);
    let mut closed = pin!(closing.changed());
    let mut wait = IdleWait::new(&requests, timeouts);
    let mut is_closing = false;
    let end = std::future::poll_fn(|cx| {
        loop {
            if !is_closing && (closed.as_mut().poll(cx).is_ready() || requests.is_ending()) {
                is_closing = true;
                connection.as_mut().graceful_shutdown();
                wait.restart(LINGER);
            }
            // After the start of the shutdown, so that its GOAWAY goes out with this poll.
            if let Poll::Ready(done) = connection.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            match wait.poll(cx) {
                Poll::Pending => return Poll::Pending,
                // The client got a GOAWAY and has not closed the connection.
                Poll::Ready(_) if is_closing => return Poll::Ready(Ok(())),
                // The next round sends the GOAWAY.
                Poll::Ready(_) => requests.end(),
            }
        }
    });
    if let Err(error) = end.await {
        debug!("an HTTP/2 connection of a client ended: {error}");
    }
}

fn builder(max_streams: u32) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(max_streams)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_EARLY_RESETS)
        .max_local_error_reset_streams(MAX_CAUSED_RESETS)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_AFTER);
    builder
}

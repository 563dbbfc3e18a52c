//! One client connection that speaks HTTP/2: many requests at a time.
//!
//! Each request runs in a task of its own, on the worker's thread. What a client
//! may open, send ahead and take back is bounded here; hyper and h2 hold it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_LENGTH, COOKIE, HeaderMap, HeaderValue};
use hyper::http::response;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

use super::connection::LINGER;
use super::http1::ClientTimeouts;
use super::response::{ClientResponse, ClientResponseBody};
use super::service::{ClientTransport, Service};
use super::stream::ClientStream;
use crate::error::{BodyReadError, Error};
use crate::http1::{MAX_HEAD, RequestHead};
use crate::proxy::RequestBody;
use crate::timer::Timer;
use crate::wire::headers::REQUEST_ID;
use crate::wire::segments::SegmentedBytes;

/// What a client may send ahead of us: of one request's body, and in all. The latter bounds what a connection holds.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// What waits for a client that does not read, a request.
const MAX_SEND_BUFFER: usize = 64 << 10;
/// Requests that were taken back before we have looked at them. More is an attack, and ends the connection.
const MAX_EARLY_RESETS: usize = 20;
/// Requests that we have taken back because of what the client sent. More ends the connection.
const MAX_CAUSED_RESETS: usize = 100;
/// A client that has said nothing for this long is asked whether it is there, and has as long again to say so.
const PING_AFTER: Duration = Duration::from_secs(30);

/// Serves a connection to its end. It ends after the requests under way when `closing` changes.
pub(super) async fn serve(
    stream: ClientStream,
    service: Arc<Service>,
    max_streams: u32,
    patience: ClientTimeouts,
    mut closing: watch::Receiver<()>,
) {
    let streams = Arc::new(Streams::default());
    let peer = stream.socket().and_then(|socket| socket.peer_addr().ok());
    let answer = {
        let streams = Arc::clone(&streams);
        move |request: Request<Incoming>| {
            let (service, open) = (Arc::clone(&service), Open::begin(&streams));
            Box::pin(async move { Ok::<_, Infallible>(answer(request, &service, open, peer).await) })
        }
    };
    let connection = builder(max_streams).serve_connection(TokioIo::new(stream), service_fn(answer));
    let mut connection = pin!(connection);
    let mut closed = pin!(closing.changed());
    let mut wait = Waiter { streams: &streams, since: Instant::now(), limit: patience.idle };
    let mut timer = Timer::default();
    let mut is_closing = false;
    let end = std::future::poll_fn(|cx| {
        loop {
            if !is_closing && (closed.as_mut().poll(cx).is_ready() || streams.is_last_told()) {
                is_closing = true;
                connection.as_mut().graceful_shutdown();
                wait.restart(LINGER);
            }
            if let Poll::Ready(done) = connection.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            match wait.poll(&mut timer, cx) {
                Poll::Pending => return Poll::Pending,
                // It was told, and has not left.
                Poll::Ready(()) if is_closing => return Poll::Ready(Ok(())),
                Poll::Ready(()) => streams.tell_last(),
            }
        }
    });
    if let Err(error) = end.await {
        debug!("a client connection ended: {error}");
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

async fn answer(
    request: Request<Incoming>,
    service: &Service,
    open: Open,
    peer: Option<SocketAddr>,
) -> Response<OpenBody> {
    let (mut parts, body) = request.into_parts();
    join_cookies(&mut parts.headers);
    let head = RequestHead::of_http2(&parts);
    let head_only = head.method == Method::HEAD;
    let answer = service.answer(head, &mut Http2Client { body, peer }, &mut Timer::default()).await;
    let ClientResponse { head, mut body, .. } =
        answer.expect("a client that leaves takes its request with it");
    // HTTP/2 has a frame for that, which is sent when this connection is to have no more requests.
    if service.is_draining() {
        open.streams.tell_last();
    }
    let mut head = head.into_parts();
    // An id is made of what a header may hold.
    if let Some(id) = body.id().and_then(|id| HeaderValue::from_str(id.as_str()).ok()) {
        head.headers.insert(REQUEST_ID, id);
    }
    if head_only {
        empty(&mut head, &mut body);
    }
    Response::from_parts(head, OpenBody { body, _open: open })
}

/// hyper would send it after all. Its length is told, as over HTTP/1.1.
fn empty(head: &mut response::Parts, body: &mut ClientResponseBody) {
    if let Some(length) = body.size_hint().exact().filter(|length| *length > 0) {
        head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    }
    body.empty();
}

/// The body of an answer; its request is open until it is dropped.
struct OpenBody {
    body: ClientResponseBody,
    _open: Open,
}

impl Body for OpenBody {
    type Data = SegmentedBytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<SegmentedBytes>, Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A client, as far as one of its requests goes. When it leaves, or takes the request back, hyper drops all that is done
/// for it.
struct Http2Client {
    body: Incoming,
    peer: Option<SocketAddr>,
}

impl ClientTransport for Http2Client {
    fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    async fn cancel_on_disconnect<T: Send>(&mut self, answer: impl Future<Output = T> + Send) -> Option<T> {
        Some(answer.await)
    }
}

impl RequestBody for Http2Client {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyReadError>> {
        loop {
            let frame =
                ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose().map_err(BodyReadError::Http2)?;
            let Some(frame) = frame else { return Poll::Ready(Ok(None)) };
            // Trailers are of no use to a server.
            if let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) {
                return Poll::Ready(Ok(Some(data)));
            }
        }
    }

    fn content_length_hint(&self) -> u64 {
        self.body.size_hint().lower()
    }

    fn is_ended(&self) -> bool {
        self.body.is_end_stream()
    }

    /// hyper hands out what it has read.
    fn bytes_read(&self) -> u64 {
        0
    }

    async fn disconnected(&self) {
        std::future::pending().await
    }
}

/// Cookies may come one by one, and servers speak HTTP/1.1, where they must not (RFC 9113 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

/// The requests of one connection.
struct Streams {
    now: Mutex<Now>,
    /// The client is to be told that there will be no more.
    last_told: AtomicBool,
}

struct Now {
    open: usize,
    /// When the last one ended.
    since: Instant,
}

impl Default for Streams {
    fn default() -> Self {
        let now = Mutex::new(Now { open: 0, since: Instant::now() });
        Self { now, last_told: AtomicBool::new(false) }
    }
}

impl Streams {
    /// Only the worker's thread takes it, twice a request and when a timer goes off.
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_last(&self) {
        self.last_told.store(true, Relaxed);
    }

    fn is_last_told(&self) -> bool {
        self.last_told.load(Relaxed)
    }
}

/// A request under way, until this is dropped.
struct Open {
    streams: Arc<Streams>,
}

impl Open {
    fn begin(streams: &Arc<Streams>) -> Self {
        streams.now().open += 1;
        Self { streams: Arc::clone(streams) }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut now = self.streams.now();
        now.open -= 1;
        now.since = Instant::now();
    }
}

/// The wait for a request.
struct Waiter<'a> {
    streams: &'a Streams,
    since: Instant,
    limit: Duration,
}

impl Waiter<'_> {
    fn restart(&mut self, limit: Duration) {
        (self.since, self.limit) = (Instant::now(), limit);
    }

    /// Ends when there has been no request for too long. Nobody tells of a request's end, so the timer runs while
    /// there are any, too.
    fn poll(&self, timer: &mut Timer, cx: &mut Context<'_>) -> Poll<()> {
        let since = {
            let now = self.streams.now();
            if now.open > 0 { Instant::now() } else { now.since.max(self.since) }
        };
        timer.poll_until(since + self.limit, cx)
    }
}

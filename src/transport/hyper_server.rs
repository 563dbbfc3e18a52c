//! hyper towards clients: an HTTP/1.1 connection, and the conversion of requests and responses, which
//! [`http2`](super::http2) shares.
//!
//! A connection's requests run inside the connection's own future, as with the native engine.
//! `docs/ENGINES.md` says what hyper cannot do.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue};
use hyper::http::response;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;
use tracing::debug;

use super::open_requests::{IdleEnd, IdleWait, ObservedStream, OpenRequest, OpenRequests};
use super::{
    ClientResponse, ClientTransport, ConnectionHandler, Origin, RequestBody, RequestBodyError, ResponseBody,
};
use crate::http1::{
    self as codec, ClientTimeouts, HeadRejection, MAX_HEAD, MAX_HEADERS, RequestHead, Stream,
};
use crate::timer::Timer;
use crate::wire::headers::{REQUEST_ID, join_cookies};
use crate::wire::segments::SegmentedBytes;

/// Serves an HTTP/1.1 connection, and closes it as the native engine does.
pub(super) async fn serve<H: ConnectionHandler>(
    stream: Stream,
    origin: Origin,
    handler: Arc<H>,
    timeouts: ClientTimeouts,
    mut closing: watch::Receiver<()>,
) {
    let requests = Arc::new(OpenRequests::new(timeouts.body));
    let service = service(&requests, &handler, origin);
    // hyper has one timeout for an idle connection and for a slow head, and none for a client that does not
    // read.
    let stream = ObservedStream::new(stream, Arc::clone(&requests));
    let mut builder = http1::Builder::new();
    // Off: it would count an idle connection as a slow head (30 s by default). `IdleWait` distinguishes them.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    builder.max_headers(MAX_HEADERS).max_header_size(MAX_HEAD);
    let mut connection = builder.serve_connection(TokioIo::new(stream), service_fn(service));
    let mut closed = pin!(closing.changed());
    let mut wait = IdleWait::new(&requests, timeouts);
    let mut is_closing = false;
    let end = std::future::poll_fn(|cx| {
        loop {
            if !is_closing && (closed.as_mut().poll(cx).is_ready() || requests.is_ending()) {
                is_closing = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            // Without hyper's shutdown: it would close the socket before the client has read its last
            // response.
            if let Poll::Ready(done) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(done.map(|()| ConnectionEnd::Clean));
            }
            if requests.poll_discarded(is_closing, cx).is_ready() {
                continue;
            }
            match ready!(wait.poll(cx)) {
                IdleEnd::NoRequest if is_closing => return Poll::Ready(Ok(ConnectionEnd::Clean)),
                // The next iteration shuts it down.
                IdleEnd::NoRequest => requests.end(),
                IdleEnd::NotRead => return Poll::Ready(Ok(ConnectionEnd::Cut)),
                IdleEnd::NoHead(limit) => return Poll::Ready(Ok(ConnectionEnd::Rejected(limit))),
            }
        }
    });
    let end = end.await;
    let stream = connection.into_parts().io.into_inner().into_stream();
    match end {
        Ok(ConnectionEnd::Rejected(limit)) => {
            super::reject(stream, handler.reject(HeadRejection::Timeout(limit))).await;
        }
        Ok(ConnectionEnd::Cut) => {}
        // As with the native engine: a socket that is closed with unread bytes is reset.
        Ok(ConnectionEnd::Clean) if requests.is_cut_short() => codec::linger(stream).await,
        Ok(ConnectionEnd::Clean) => codec::close(stream).await,
        Err(error) => {
            debug!("an HTTP/1.1 connection of a client ended: {error}");
            if let Some(rejection) = rejection(&error) {
                // hyper has sent a response without a body; it is logged and counted as ours are.
                let _ = handler.reject(rejection);
                codec::linger(stream).await;
            } else if requests.is_http_10() {
                // Its response may have neither a length nor chunks.
                codec::reset(&stream);
            }
        }
    }
}

/// How a connection ended that did not fail.
enum ConnectionEnd {
    Clean,
    /// The client does not read its response.
    Cut,
    /// The rest of a head did not arrive within this time.
    Rejected(Duration),
}

/// The rejection of a head that hyper could not parse, if that ended the connection.
fn rejection(error: &hyper::Error) -> Option<HeadRejection> {
    if error.is_parse_too_large() {
        return Some(HeadRejection::TooLarge);
    }
    error.is_parse().then_some(HeadRejection::Malformed("its head is malformed"))
}

pub(super) type HandlerFuture<B> =
    Pin<Box<dyn Future<Output = Result<Response<OpenBody<B>>, Infallible>> + Send>>;

/// Answers each request of a connection with the handler.
pub(super) fn service<H: ConnectionHandler>(
    requests: &Arc<OpenRequests>,
    handler: &Arc<H>,
    origin: Origin,
) -> impl Fn(Request<Incoming>) -> HandlerFuture<H::Body> + use<H> {
    let (requests, handler) = (Arc::clone(requests), Arc::clone(handler));
    move |request| {
        let (handler, open) = (Arc::clone(&handler), OpenRequest::begin(&requests));
        Box::pin(async move { Ok(respond(request, &*handler, open, origin).await) })
    }
}

async fn respond<H: ConnectionHandler>(
    request: Request<Incoming>,
    handler: &H,
    open: OpenRequest,
    origin: Origin,
) -> Response<OpenBody<H::Body>> {
    let (mut parts, body) = request.into_parts();
    join_cookies(&mut parts.headers);
    let is_http2 = parts.version == Version::HTTP_2;
    open.set_http_10(parts.version == Version::HTTP_10);
    let head = RequestHead::from_parts(&parts);
    let head_only = head.method == Method::HEAD;
    let expects_continue = !is_http2 && parts.headers.contains_key(EXPECT);
    let mut client = HyperClient { body, has_ended: false, origin, expects_continue };
    let response = handler.respond(&mut client, head, &mut Timer::default()).await;
    let response = response.expect("hyper drops this future when the client closes the connection");
    let ClientResponse { head, mut body, closes } = response;
    let closes = closes || !client.is_discardable();
    let mut head = head.into_parts();
    let is_draining = handler.is_draining();
    if is_draining {
        // With HTTP/2 this sends GOAWAY.
        open.end_connection();
    }
    // HTTP/2 has no `Connection` header (RFC 9113, section 8.2.2), and the other streams of the connection
    // go on.
    if !is_http2 && (closes || is_draining) {
        head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    // Over HTTP/2 the stream is reset after the response, without an error (RFC 9113, section 8.1).
    if !is_http2 {
        open.discard(client, closes);
    }
    if let Some(id) = body.request_id().and_then(|id| HeaderValue::from_bytes(id).ok()) {
        head.headers.insert(REQUEST_ID, id);
    }
    // hyper would write it.
    if head_only {
        skip_body(&mut head, &mut body);
    }
    Response::from_parts(head, OpenBody { body, _open: open })
}

/// Keeps hyper from sending the body of a response to `HEAD`. Its length is sent, as by the native engine.
fn skip_body(head: &mut response::Parts, body: &mut impl ResponseBody) {
    if let Some(length) = body.size_hint().exact().filter(|length| *length > 0) {
        head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    }
    body.skip();
}

/// The body of a response; its request is open until it is dropped.
pub(super) struct OpenBody<B> {
    body: B,
    _open: OpenRequest,
}

impl<B: ResponseBody> Body for OpenBody<B> {
    type Data = SegmentedBytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<SegmentedBytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The client of one request. When it closes the connection or resets the stream, hyper drops the request's
/// future.
struct HyperClient {
    body: Incoming,
    /// hyper does not say so of a chunked body.
    has_ended: bool,
    origin: Origin,
    /// It waits for `100 Continue`, which hyper sends when the body is asked for.
    expects_continue: bool,
}

impl ClientTransport for HyperClient {
    fn origin(&self) -> Origin {
        self.origin
    }

    fn proxied_for(&self) -> Option<SocketAddr> {
        self.origin.proxied_for
    }

    async fn cancel_on_disconnect<T: Send>(&mut self, response: impl Future<Output = T> + Send) -> Option<T> {
        Some(response.await)
    }
}

impl RequestBody for HyperClient {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, RequestBodyError>> {
        self.expects_continue = false;
        loop {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose();
            let frame = frame.map_err(RequestBodyError::Hyper)?;
            self.has_ended = frame.is_none();
            let Some(frame) = frame else { return Poll::Ready(Ok(None)) };
            // Trailers are dropped, as by the native engine.
            if let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) {
                return Poll::Ready(Ok(Some(data)));
            }
        }
    }

    fn content_length_hint(&self) -> u64 {
        self.body.size_hint().lower()
    }

    fn is_ended(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }

    fn is_withheld(&self) -> bool {
        self.expects_continue
    }

    async fn disconnected(&mut self) {
        // It is noticed below hyper, by the connection's stream, and then this future is dropped.
        std::future::pending().await
    }
}

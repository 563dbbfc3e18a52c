//! The interface between the router and its HTTP engines: serving a client's connection, and sending requests
//! over a connection to a backend.
//!
//! There are two engines for HTTP/1.1: [`native`], our own ([`http1`](crate::http1)), the default, and
//! hyper's ([`hyper_server`], [`hyper_client`]). HTTP/2 is hyper's with either ([`http2`]). Which one
//! serves a connection is decided in this file and nowhere else.
//! Sockets are opened, accepted and negotiated elsewhere; nothing here knows a route or a backend.

mod backend_traffic;
mod http2;
mod hyper_client;
mod hyper_server;
mod native;
mod open_requests;
mod request_body;

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::Body;
use tokio::sync::watch;

use crate::http1::{
    BodyProgress, BodyReadError, ClientConnection, ClientTimeouts, ConnError, HeadRejection, OutgoingRequest,
    RequestHead, ResponseHead, SendError, Stream, WriteTiming,
};
use crate::timer::Timer;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::segments::SegmentedBytes;
use hyper_client::HyperConnection;

use request_body::MAX_DISCARDED;
pub(crate) use request_body::{BodyFailure, BodyReader, discard};

/// Which HTTP/1.1 implementation serves clients and calls backends. HTTP/2 is hyper's with either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Http1Engine {
    /// mini-lb's own codec: two thirds of hyper's CPU time for a small request, a sixth of its memory for a
    /// stream (`docs/ENGINES.md`).
    #[default]
    Native,
    /// hyper's `server::conn::http1` and `client::conn::http1`.
    Hyper,
}

impl Http1Engine {
    /// The engine's name, as `--http1-engine` takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Hyper => "hyper",
        }
    }

    /// Makes an HTTP/1.1 connection of a stream to a backend.
    pub(crate) fn connect(self, stream: Stream) -> Box<dyn BackendConnection> {
        match self {
            Self::Native => Box::new(ClientConnection::new(stream)),
            Self::Hyper => Box::new(HyperConnection::new(stream)),
        }
    }
}

/// The negotiated version of HTTP of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// A client's connection, with what was found out before its first request.
pub(crate) struct ClientStream {
    pub(crate) stream: Stream,
    pub(crate) protocol: Protocol,
    /// The client for whom a load balancer has connected, if it says so.
    pub(crate) proxied_for: Option<SocketAddr>,
}

impl ClientStream {
    /// A client that has connected itself, and speaks HTTP/1.1.
    pub(crate) fn http1(stream: Stream) -> Self {
        Self { stream, protocol: Protocol::Http1, proxied_for: None }
    }
}

/// Serves clients over byte streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transport {
    engine: Http1Engine,
    max_http2_streams: u32,
}

impl Transport {
    pub(crate) fn new(engine: Http1Engine, max_http2_streams: u32) -> Self {
        Self { engine, max_http2_streams }
    }

    /// Serves a client's connection to its end. When `closing` changes, it finishes the requests in flight
    /// and closes.
    pub(crate) async fn serve<H: ConnectionHandler>(
        self,
        client: ClientStream,
        handler: Arc<H>,
        timeouts: ClientTimeouts,
        closing: watch::Receiver<()>,
    ) {
        let ClientStream { stream, protocol, proxied_for } = client;
        // Boxed but for the default: tasks of native connections would be as large as hyper's state.
        match (protocol, self.engine) {
            (Protocol::Http1, Http1Engine::Native) => {
                native::serve(stream, proxied_for, &*handler, timeouts, closing).await;
            }
            (Protocol::Http1, Http1Engine::Hyper) => {
                let origin = Origin::of(&stream, proxied_for);
                Box::pin(hyper_server::serve(stream, origin, handler, timeouts, closing)).await;
            }
            (Protocol::Http2, _) => {
                let (origin, max_streams) = (Origin::of(&stream, proxied_for), self.max_http2_streams);
                Box::pin(http2::serve(stream, origin, handler, max_streams, timeouts, closing)).await;
            }
        }
    }
}

/// Answers the requests of clients' connections.
pub(crate) trait ConnectionHandler: Send + Sync + 'static {
    type Body: ResponseBody;

    /// Reads the request's body, if it is needed, and makes the response. What is left of the body is
    /// discarded after the response. `None`: the client has closed the connection.
    fn respond<C: ClientTransport>(
        &self,
        client: &mut C,
        head: RequestHead,
        timer: &mut Timer,
    ) -> impl Future<Output = Option<ClientResponse<Self::Body>>> + Send;

    /// Whether connections close after their current request.
    fn is_draining(&self) -> bool;

    /// Logs and counts a request whose head could not be read, and makes its response.
    fn reject(&self, rejection: HeadRejection) -> RejectionResponse;

    /// The first byte of decode's response was written to the client this long after it arrived.
    fn relayed(&self, time: Duration);
}

/// Where requests come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// The address that has connected. `None` if it is not known any more.
    peer: Option<SocketAddr>,
    /// The client for whom a load balancer has connected.
    proxied_for: Option<SocketAddr>,
}

impl Origin {
    fn of(stream: &Stream, proxied_for: Option<SocketAddr>) -> Self {
        Self { peer: stream.socket().and_then(|socket| socket.peer_addr().ok()), proxied_for }
    }

    /// The client's own address, if it has connected itself: what a load balancer says of another's proves
    /// nothing, since it may pass on what others have told it.
    pub(crate) fn direct_peer(self) -> Option<SocketAddr> {
        self.peer.filter(|_| self.proxied_for.is_none())
    }
}

/// The client of one request.
pub(crate) trait ClientTransport: RequestBody + Send {
    /// Where its requests come from. This may ask the kernel.
    fn origin(&self) -> Origin;

    /// The client for whom a load balancer has connected, if it says so.
    fn proxied_for(&self) -> Option<SocketAddr>;

    /// Waits for `response`, and drops it if the client closes the connection first: then `None`.
    fn cancel_on_disconnect<T: Send>(
        &mut self,
        response: impl Future<Output = T> + Send,
    ) -> impl Future<Output = Option<T>> + Send;
}

/// The body of a client's request.
pub(crate) trait RequestBody {
    /// The next chunk, which is not empty. `None` is the end.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, RequestBodyError>>;

    /// A lower bound of the unread bytes.
    fn content_length_hint(&self) -> u64;

    /// Whether the end is known to have been read.
    fn is_ended(&self) -> bool;

    /// Bytes read so far, returned or not. The body makes progress while this grows. Always 0 if each read is
    /// returned as a chunk, as hyper does.
    fn bytes_read(&self) -> u64 {
        0
    }

    /// What has arrived of the next chunk, which is not complete. The chunk will begin with it.
    fn unreturned(&self) -> &[u8] {
        &[]
    }

    /// Whether the client sends the body only after `100 Continue`, which it has not got.
    fn is_withheld(&self) -> bool;

    /// Whether the unread rest may be read and discarded, so that the connection stays usable. Not if it is
    /// long, or if the client may not send it at all.
    fn is_discardable(&self) -> bool {
        self.is_ended() || !self.is_withheld() && self.content_length_hint() <= MAX_DISCARDED
    }

    /// Waits until the client has closed the connection, without reading.
    fn disconnected(&mut self) -> impl Future<Output = ()> + Send;
}

/// Why the rest of a request's body could not be read.
#[derive(Debug)]
pub(crate) enum RequestBodyError {
    Http1(BodyReadError),
    Hyper(hyper::Error),
}

/// A response to a client.
pub(crate) struct ClientResponse<B> {
    pub(crate) head: ClientResponseHead,
    pub(crate) body: B,
    /// An HTTP/1 connection closes after it.
    pub(crate) closes: bool,
}

/// The body of a response to a client.
pub(crate) trait ResponseBody:
    Body<Data = SegmentedBytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Unpin + Send + 'static
{
    /// The request's id, for the `x-request-id` header.
    fn request_id(&self) -> Option<&[u8]>;

    /// When decode's first byte arrived, if the last frame starts with it. Returned once.
    fn take_first_byte(&mut self) -> Option<Instant>;

    /// Drops the body: only the head was asked for.
    fn skip(&mut self);
}

/// An error response to a request whose head could not be read; the connection ends with it.
pub(crate) struct RejectionResponse {
    pub(crate) status: StatusCode,
    pub(crate) json: String,
    pub(crate) request_id: String,
}

impl RejectionResponse {
    /// The response as bytes.
    fn to_http1(&self) -> String {
        let Self { status, json, request_id } = self;
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\
             x-request-id: {request_id}\r\n\r\n{json}",
            json.len(),
        )
    }
}

/// Closes a client's connection with an error response, before a request was read.
pub(crate) async fn reject(stream: Stream, response: RejectionResponse) {
    crate::http1::reject(stream, response.to_http1().as_bytes()).await;
}

/// A connection to a backend: one request at a time. It is polled by the task of the request that holds it,
/// so dropping it closes the socket, which is how a request is cancelled.
pub(crate) trait BackendConnection: Send {
    /// Whether an idle connection can take a request: the backend has neither closed it nor sent anything
    /// since.
    fn is_usable(&mut self) -> bool;

    /// Whether it may carry another request: the last one was written, and its response's body ended cleanly.
    fn is_reusable(&mut self) -> bool;

    /// Begins a request. [`poll_head`](Self::poll_head) writes it.
    fn begin(&mut self, request: OutgoingRequest);

    /// Writes the request, and waits for the head of its response.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, SendError>>;

    /// The next data of the response's body; `None` is its clean end.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>>;

    /// Waits for some of the body, or for the end of an empty one. [`poll_data`](Self::poll_data) still
    /// returns it.
    fn poll_body_started(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>>;

    /// How much of the body has arrived, returned or not.
    fn body_progress(&self) -> BodyProgress;

    /// Whether all of the body was returned.
    fn is_ended(&self) -> bool;

    fn write_timing(&self) -> WriteTiming;

    /// Bytes of a body with a `Content-Length` that were not returned yet.
    fn remaining(&self) -> Option<u64>;
}

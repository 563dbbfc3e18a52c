//! The native engine: adapts [`http1`](crate::http1)'s connections to [`transport`](super).

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use hyper::Method;
use tokio::sync::watch;

use super::{
    BackendConnection, BodyFailure, ClientResponse, ClientTransport, ConnectionHandler, Origin, RequestBody,
    RequestBodyError, ResponseBody,
};
use crate::http1::{
    self, BodyProgress, BodyTimeouts, ClientConnection, ClientTimeouts, ConnError, HeadSummary, Incomplete,
    NextRequest, OutgoingRequest, OutgoingResponse, RequestFraming, RequestHead, ResponseHead, SendError,
    ServerConnection, Stream, WriteOptions, WriteOutcome, WriteTiming,
};
use crate::timer::Timer;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::segments::SegmentedBytes;

/// How a connection goes on after a response.
enum AfterResponse {
    Next,
    /// With the next request, or with its end, when the rest of the request's body is discarded.
    Discard {
        keeps_alive: bool,
    },
    /// It closes, and the client was told.
    Close,
    /// It closes, but the client may still be sending, and must not lose its response.
    Linger,
    /// It is cut off: the client has closed it, or must see that its response is incomplete.
    Cut,
}

/// Serves the requests of a connection one after the other, and closes it.
pub(super) async fn serve<H: ConnectionHandler>(
    stream: Stream,
    proxied_for: Option<SocketAddr>,
    handler: &H,
    timeouts: ClientTimeouts,
    closing: watch::Receiver<()>,
) {
    let mut connection = ServerConnection::new(stream, proxied_for);
    // One for all waits of the connection: a timer costs 120 bytes and an entry in the runtime's wheel.
    let mut timer = Timer::default();
    // `changed` consumes a notification, and `is_ending` below must still see it.
    let mut watched = closing.clone();
    let mut end = pin!(async move { watched.changed().await.unwrap_or(()) });
    let after = loop {
        match connection.next(&mut timer, timeouts, end.as_mut()).await {
            NextRequest::Request(head, framing) => {
                let is_ending = || handler.is_draining() || closing.has_changed().unwrap_or(true);
                let mut after =
                    exchange(&mut connection, handler, head, framing, is_ending, &mut timer, timeouts).await;
                if let AfterResponse::Discard { keeps_alive } = after {
                    let body = timeouts.body;
                    after = discard_rest(&mut connection, keeps_alive, body, &mut timer, end.as_mut()).await;
                }
                match after {
                    AfterResponse::Next => {}
                    after => break after,
                }
            }
            NextRequest::Rejected(rejection) => {
                return super::reject(connection.into_stream(), handler.reject(rejection)).await;
            }
            // A TLS client that is still there must be able to tell this end from a cut (RFC 8446, section
            // 6.1).
            NextRequest::Closed | NextRequest::Idle | NextRequest::ShuttingDown => {
                break AfterResponse::Close;
            }
        }
    };
    match after {
        // The socket is dropped without an orderly close: the client must not take a part for the whole.
        AfterResponse::Next | AfterResponse::Discard { .. } | AfterResponse::Cut => {}
        AfterResponse::Close => http1::close(connection.into_stream()).await,
        AfterResponse::Linger => http1::linger(connection.into_stream()).await,
    }
}

/// Answers one request.
async fn exchange<H: ConnectionHandler>(
    connection: &mut ServerConnection,
    handler: &H,
    head: RequestHead,
    framing: RequestFraming,
    is_ending: impl Fn() -> bool,
    timer: &mut Timer,
    timeouts: ClientTimeouts,
) -> AfterResponse {
    let head_only = head.method == Method::HEAD;
    // Boxed, and so freed when the response starts: in the connection's own future its 3 KiB would be held
    // for as long as a stream lasts.
    let response = Box::pin(handler.respond(connection, head, timer)).await;
    let Some(response) = response else { return AfterResponse::Cut };
    // The unread rest of the request's body would be parsed as the next request.
    let is_cut_short = response.closes || !RequestBody::is_discardable(connection);
    let keep_alive = framing.keeps_alive && !is_cut_short && !is_ending();
    let options = WriteOptions { is_http_11: framing.is_http_11, head_only, keep_alive };
    let ClientResponse { head, body, .. } = response;
    let response = NativeResponse { head: Some(head), body };
    match connection.send(response, options, timer, timeouts, |time| handler.relayed(time)).await {
        WriteOutcome::KeptAlive | WriteOutcome::Last if !is_cut_short && !connection.is_body_ended() => {
            AfterResponse::Discard { keeps_alive: keep_alive }
        }
        WriteOutcome::KeptAlive => AfterResponse::Next,
        // Unread bytes would make the kernel reset the connection, and the client lose the response.
        WriteOutcome::Last if is_cut_short => AfterResponse::Linger,
        WriteOutcome::Last => AfterResponse::Close,
        WriteOutcome::Truncated => {
            http1::reset(connection.stream());
            AfterResponse::Cut
        }
        WriteOutcome::CutOff | WriteOutcome::Disconnected => AfterResponse::Cut,
    }
}

/// Discards the rest of a request's body after the response: the client may read that only when it has sent
/// everything, and a socket that is closed with unread bytes is reset.
async fn discard_rest(
    connection: &mut ServerConnection,
    keeps_alive: bool,
    timeouts: BodyTimeouts,
    timer: &mut Timer,
    end: Pin<&mut impl Future<Output = ()>>,
) -> AfterResponse {
    // A client that reads to the end of the connection need not send the rest to see it.
    if !keeps_alive && http1::half_close(connection.stream_mut()).await.is_err() {
        return AfterResponse::Cut;
    }
    let discarded = tokio::select! {
        discarded = super::discard(connection, timeouts, timer) => discarded,
        () = end => Ok(false),
    };
    match discarded {
        Ok(true) if keeps_alive => AfterResponse::Next,
        // Too long, too slow, or the router shuts down.
        Ok(_) | Err(BodyFailure::Timeout { .. }) => AfterResponse::Linger,
        Err(BodyFailure::Read(_)) => AfterResponse::Cut,
    }
}

/// A response as the native engine writes it. The head is dropped once written: streams live long.
struct NativeResponse<B> {
    head: Option<ClientResponseHead>,
    body: B,
}

impl<B: ResponseBody> OutgoingResponse for NativeResponse<B> {
    type Data = SegmentedBytes;

    fn write_head(&mut self, is_http_11: bool, into: &mut Vec<u8>) -> HeadSummary {
        let head = self.head.take().unwrap_or_default();
        head.write(is_http_11, into);
        if let Some(id) = self.body.request_id() {
            for part in [b"x-request-id: ", id, b"\r\n"] {
                into.extend_from_slice(part);
            }
        }
        HeadSummary {
            status: head.status(),
            has_content_length: head.has_length(),
            has_date: head.has_date(),
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<SegmentedBytes, Incomplete>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // The body has recorded its error; trailers are none of its frames.
        Poll::Ready(frame.map(|frame| match frame {
            Ok(frame) => Ok(frame.into_data().unwrap_or_default()),
            Err(_) => Err(Incomplete),
        }))
    }

    fn is_ended(&self) -> bool {
        self.body.is_end_stream()
    }

    fn exact_length(&self) -> Option<u64> {
        self.body.size_hint().exact()
    }

    fn skip_body(&mut self) {
        self.body.skip();
    }

    fn take_first_byte(&mut self) -> Option<Instant> {
        self.body.take_first_byte()
    }
}

impl RequestBody for ServerConnection {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, RequestBodyError>> {
        Self::poll_chunk(self, cx).map_err(RequestBodyError::Http1)
    }

    fn content_length_hint(&self) -> u64 {
        Self::content_length_hint(self)
    }

    fn is_ended(&self) -> bool {
        self.is_body_ended()
    }

    fn bytes_read(&self) -> u64 {
        self.body_bytes_read()
    }

    fn unreturned(&self) -> &[u8] {
        Self::unreturned(self)
    }

    fn is_withheld(&self) -> bool {
        self.is_body_withheld()
    }

    async fn disconnected(&mut self) {
        Self::disconnected(self).await;
    }
}

impl ClientTransport for ServerConnection {
    fn origin(&self) -> Origin {
        Origin::of(self.stream(), Self::proxied_for(self))
    }

    fn proxied_for(&self) -> Option<SocketAddr> {
        Self::proxied_for(self)
    }

    async fn cancel_on_disconnect<T: Send>(&mut self, response: impl Future<Output = T> + Send) -> Option<T> {
        let mut response = pin!(response);
        std::future::poll_fn(|cx| {
            // The response first: one that is ready goes out even if the client has closed its sending side.
            if let Poll::Ready(response) = response.as_mut().poll(cx) {
                return Poll::Ready(Some(response));
            }
            self.poll_disconnect(cx).map(|()| None)
        })
        .await
    }
}

impl BackendConnection for ClientConnection {
    fn is_usable(&mut self) -> bool {
        Self::is_usable(self)
    }

    fn is_reusable(&mut self) -> bool {
        Self::is_reusable(self)
    }

    fn begin(&mut self, request: OutgoingRequest) {
        Self::begin(self, request);
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, SendError>> {
        Self::poll_head(self, cx)
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        Self::poll_data(self, cx)
    }

    fn poll_body_started(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>> {
        Self::poll_body_started(self, cx)
    }

    fn body_progress(&self) -> BodyProgress {
        Self::body_progress(self)
    }

    fn is_ended(&self) -> bool {
        Self::is_ended(self)
    }

    fn write_timing(&self) -> WriteTiming {
        Self::write_timing(self)
    }

    fn remaining(&self) -> Option<u64> {
        Self::remaining(self)
    }
}

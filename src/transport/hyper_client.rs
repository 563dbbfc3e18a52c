//! hyper towards backends: a connection whose driver is polled by the request that holds it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::{error, io};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use super::BackendConnection;
use super::backend_traffic::{ObservedBackend, Traffic};
use crate::http1::{
    BodyProgress, ConnError, MAX_HEAD, MAX_HEADERS, MalformedMessage, OutgoingRequest, ResponseHead,
    SendError, Stream, WriteTiming, parse_outgoing_head,
};

type Io = TokioIo<ObservedBackend>;
type ResponseFuture = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

/// A connection to a backend, read and written by hyper.
pub(super) struct HyperConnection {
    sender: SendRequest<RequestFrames>,
    /// `None`: the connection has ended.
    driver: Option<Connection<Io, RequestFrames>>,
    response: Option<ResponseFuture>,
    body: Option<Incoming>,
    /// The body's first data, or its error, read ahead.
    first: Option<Result<Bytes, ConnError>>,
    was_used: bool,
    on_reused: bool,
    traffic: Arc<Traffic>,
}

impl HyperConnection {
    pub(super) fn new(stream: Stream) -> Self {
        let traffic = Arc::new(Traffic::default());
        let io: Io = TokioIo::new(ObservedBackend::new(stream, Arc::clone(&traffic)));
        let mut builder = Builder::new();
        builder.max_headers(MAX_HEADERS).max_header_size(MAX_HEAD);
        let mut handshake = Box::pin(builder.handshake(io));
        // HTTP/1 has no handshake: the future is ready at once, and `Builder` only makes it one for HTTP/2's
        // sake.
        let Poll::Ready(Ok((sender, driver))) =
            handshake.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        else {
            unreachable!("hyper's HTTP/1 handshake neither waits nor fails")
        };
        Self {
            sender,
            driver: Some(driver),
            response: None,
            body: None,
            first: None,
            was_used: false,
            on_reused: false,
            traffic,
        }
    }

    /// Reads and writes what can be read and written.
    fn drive(&mut self, cx: &mut Context<'_>) {
        // An error is reported to the response or to its body as well. A finished driver must not be polled
        // again.
        if let Some(driver) = &mut self.driver
            && Pin::new(driver).poll(cx).is_ready()
        {
            self.driver = None;
        }
    }

    /// Whether the connection is idle and open.
    fn is_idle(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.driver.is_some() && self.sender.is_ready() && self.traffic.is_writable()
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        // A poll for a frame makes hyper read at the driver's next poll: the second iteration finds it.
        for is_last in [false, true] {
            self.drive(cx);
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    // Trailers are dropped: SGLang sends none.
                    let data = frame.into_data().unwrap_or_default();
                    return Poll::Ready(Some(Ok(data)));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(conn_error(&error)))),
                Poll::Ready(None) => {
                    self.body = None;
                    return Poll::Ready(None);
                }
                Poll::Pending if is_last => {}
                Poll::Pending => continue,
            }
        }
        Poll::Pending
    }
}

impl BackendConnection for HyperConnection {
    fn is_usable(&mut self) -> bool {
        self.is_idle()
    }

    fn is_reusable(&mut self) -> bool {
        self.is_ended() && self.is_idle()
    }

    fn begin(&mut self, request: OutgoingRequest) {
        self.on_reused = std::mem::replace(&mut self.was_used, true);
        self.traffic.begin();
        let request = hyper_request(request, &self.traffic);
        self.response = Some(Box::pin(self.sender.send_request(request)));
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, SendError>> {
        self.drive(cx);
        let Some(response) = &mut self.response else { return Poll::Pending };
        let response = ready!(response.as_mut().poll(cx));
        self.response = None;
        let unanswered = !self.traffic.has_received();
        let failed = |cause| SendError { cause, unanswered };
        let lost = |error: hyper::Error| match conn_error(&error) {
            // The connection was lost when the request was written: that says more than its end.
            error @ (ConnError::Closed | ConnError::Io(_)) => {
                self.traffic.take_write_error().map_or(error, ConnError::Io)
            }
            error => error,
        };
        let (head, body) = response.map_err(|error| failed(lost(error)))?.into_parts();
        // The router never sends `Upgrade`: the native engine rejects it, too.
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            let cause = ConnError::Malformed(MalformedMessage("it switches protocols"));
            return Poll::Ready(Err(failed(cause)));
        }
        self.body = Some(body);
        // Data that arrived with the head counts as arrived, as with the native engine: retries and records
        // depend on it.
        if let Poll::Ready(Some(first)) = self.poll_frame(cx) {
            self.first = Some(first);
        }
        Poll::Ready(Ok(ResponseHead::from_parts(head)))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ConnError>>> {
        loop {
            let data = match self.first.take() {
                Some(first) => Some(first),
                None => ready!(self.poll_frame(cx)),
            };
            if !matches!(&data, Some(Ok(data)) if data.is_empty()) {
                return Poll::Ready(data);
            }
        }
    }

    fn poll_body_started(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnError>> {
        if self.first.is_none() {
            self.first = ready!(self.poll_data(cx)).transpose()?.map(Ok);
        }
        match self.first.take_if(|first| first.is_err()) {
            Some(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn body_progress(&self) -> BodyProgress {
        let is_all = self.body.as_ref().is_none_or(Body::is_end_stream);
        match &self.first {
            _ if is_all => BodyProgress::All,
            Some(Ok(_)) => BodyProgress::Some,
            _ => BodyProgress::None,
        }
    }

    fn is_ended(&self) -> bool {
        self.first.is_none() && self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn write_timing(&self) -> WriteTiming {
        WriteTiming { on_reused: self.on_reused, written_at: self.traffic.written_at() }
    }

    fn remaining(&self) -> Option<u64> {
        let first = self.first.as_ref().and_then(|first| first.as_ref().ok()).map_or(0, Bytes::len) as u64;
        Some(self.body.as_ref().map_or(Some(0), |body| body.size_hint().exact())? + first)
    }
}

/// Converts a request for hyper. Its head was written as text, once for both legs, and is parsed again here,
/// so that both engines take the same form of requests.
fn hyper_request(request: OutgoingRequest, traffic: &Arc<Traffic>) -> Request<RequestFrames> {
    let (text, body) = request.into_parts();
    let (head, length) = parse_outgoing_head(&text).expect("the router wrote this head");
    let mut pieces = VecDeque::with_capacity(body.pieces().len() + 1);
    pieces.extend([text.slice(length..)].into_iter().chain(body.pieces().iter().cloned()));
    // An empty frame would cost a write.
    pieces.retain(|piece| !piece.is_empty());
    let left = pieces.iter().map(Bytes::len).sum::<usize>() as u64;
    traffic.set_body_taken(left == 0);
    let mut request = Request::new(RequestFrames { pieces, left, traffic: Arc::clone(traffic) });
    *request.method_mut() = head.method;
    *request.uri_mut() = head.target.into();
    for header in head.headers.iter() {
        let (name, value) = (HeaderName::from_bytes(header.name), HeaderValue::from_bytes(header.value));
        if let (Ok(name), Ok(value)) = (name, value) {
            request.headers_mut().append(name, value);
        }
    }
    request
}

/// The body of a request, one frame for each piece.
struct RequestFrames {
    pieces: VecDeque<Bytes>,
    left: u64,
    traffic: Arc<Traffic>,
}

impl Body for RequestFrames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        self.left -= piece.as_ref().map_or(0, Bytes::len) as u64;
        self.traffic.set_body_taken(self.left == 0);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// The native engine's error for an error of hyper's.
fn conn_error(error: &hyper::Error) -> ConnError {
    if error.is_parse_too_large() {
        return ConnError::Malformed(MalformedMessage("its head is too long"));
    }
    if error.is_parse() {
        return ConnError::Malformed(MalformedMessage("its head is malformed"));
    }
    match error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>()) {
        // TLS reports its errors as invalid data, too.
        Some(source) if source.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            ConnError::Io(io::Error::new(source.kind(), source.to_string()))
        }
        Some(source) if source.kind() == io::ErrorKind::UnexpectedEof => ConnError::Closed,
        // These are the errors of hyper's chunked decoder.
        Some(source)
            if [io::ErrorKind::InvalidInput, io::ErrorKind::InvalidData].contains(&source.kind()) =>
        {
            ConnError::Malformed(MalformedMessage("its chunks are malformed"))
        }
        Some(source) => ConnError::Io(io::Error::new(source.kind(), source.to_string())),
        None => ConnError::Closed,
    }
}

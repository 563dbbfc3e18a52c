//! Responses to clients: relayed from a backend or the router's own, with a body that finishes the
//! request's record when it ends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, SizeHint};

use crate::admission::Permit;
use crate::error::{Error, ErrorFormat, OwnResponse};
use crate::observe::record::{Endpoint, Record, RequestId};
use crate::proxy::{Relay, UpstreamResponse};
use crate::transport::{ClientResponse, ResponseBody};
use crate::wire::client_response::ClientResponseHead;
use crate::wire::segments::SegmentedBytes;

/// The body of a response, and what is held until it has ended.
pub(crate) struct ClientResponseBody {
    body: Either<Box<Relay>, Full<SegmentedBytes>>,
    /// When decode's first byte arrived, if the last frame starts with it.
    first_byte: Option<Instant>,
    /// Bytes returned so far. Here and not in the record, which is not in the cache when a token comes.
    bytes_out: u64,
    /// The record keeps the end of the body.
    keeps_tail: bool,
    /// Of the limit of concurrent requests.
    _permit: Option<Permit>,
    /// Dropped after the body: it is finished when the legs have ended.
    record: Box<Record>,
}

/// The response of decode, or an error response of either server.
pub(crate) fn relayed(
    response: UpstreamResponse,
    permit: Option<Permit>,
    record: Box<Record>,
) -> ClientResponse<ClientResponseBody> {
    new(response.head, Either::Left(response.body), permit, record)
}

/// A response of the router's own.
pub(crate) fn own(response: OwnResponse, record: Box<Record>) -> ClientResponse<ClientResponseBody> {
    let (head, body) = response.into_parts();
    new(head.into(), Either::Right(body), None, record)
}

/// The response to a request that failed.
pub(crate) fn error(error: &Error, mut record: Box<Record>) -> ClientResponse<ClientResponseBody> {
    record.set_error(error);
    let format = match record.endpoint() {
        Endpoint::Messages => ErrorFormat::Anthropic,
        _ => ErrorFormat::OpenAi,
    };
    ClientResponse { closes: error.ends_connection(), ..own(error.to_response_in(format), record) }
}

fn new(
    head: ClientResponseHead,
    body: Either<Box<Relay>, Full<SegmentedBytes>>,
    permit: Option<Permit>,
    mut record: Box<Record>,
) -> ClientResponse<ClientResponseBody> {
    record.set_status(head.status().as_u16());
    let body = ClientResponseBody {
        body,
        first_byte: None,
        bytes_out: 0,
        keeps_tail: record.keeps_tail(),
        _permit: permit,
        record,
    };
    ClientResponse { head, body, closes: false }
}

impl ClientResponseBody {
    /// Records a frame that the body returns.
    fn record_frame(&mut self, frame: &Frame<SegmentedBytes>) {
        let Some(data) = frame.data_ref().filter(|data| !data.is_empty()) else { return };
        if self.bytes_out == 0 {
            self.first_byte = self.record.first_chunk_sent(self.body.is_end_stream());
        }
        self.bytes_out += data.len() as u64;
        if self.keeps_tail {
            self.record.keep_tail(data);
        }
    }
}

impl ResponseBody for ClientResponseBody {
    fn request_id(&self) -> Option<&[u8]> {
        self.record.request_id().map(RequestId::as_bytes)
    }

    fn take_first_byte(&mut self) -> Option<Instant> {
        self.first_byte.take()
    }

    fn skip(&mut self) {
        self.body = Either::Right(Full::default());
    }
}

impl Body for ClientResponseBody {
    type Data = SegmentedBytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<SegmentedBytes>, Error>>> {
        let mut is_keep_alive = false;
        let frame = match &mut self.body {
            Either::Left(relay) => {
                let frame = Pin::new(&mut **relay).poll_frame(cx);
                is_keep_alive = relay.take_keep_alive();
                frame
            }
            Either::Right(own) => Pin::new(own).poll_frame(cx).map_err(|never| match never {}),
        };
        match &frame {
            // A comment is no byte of the response, whose first one is timed.
            Poll::Ready(Some(Ok(_))) if is_keep_alive => {}
            Poll::Ready(Some(Ok(frame))) => self.record_frame(frame),
            Poll::Ready(Some(Err(error))) => self.record.set_error(error),
            Poll::Ready(None) | Poll::Pending => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ClientResponseBody {
    fn drop(&mut self) {
        self.record.set_bytes_out(self.bytes_out);
        // A body that said that it has ended is not polled for its end.
        if matches!(self.body, Either::Right(_)) || self.body.is_end_stream() {
            self.record.set_complete();
        } else if let Either::Left(relay) = &self.body
            && let Some(error) = relay.failure()
        {
            // The client closed the connection before the error could be sent.
            self.record.set_error(error);
        }
    }
}

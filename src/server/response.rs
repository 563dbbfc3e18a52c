//! An answer as connections take it: its head, and a body that knows when it has ended.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, SizeHint};

use crate::admission::Permit;
use crate::error::{Error, OwnResponse};
use crate::observe::record::{Record, RequestId};
use crate::proxy::{self, Relay};
use crate::wire::client_response::ClientResponseHead;
use crate::wire::segments::SegmentedBytes;

/// An answer: relayed from a server, or the router's own.
pub(crate) struct ClientResponse {
    pub(crate) head: ClientResponseHead,
    pub(crate) body: ClientResponseBody,
    /// There can be no other request on this connection, if it has one at a time.
    pub(crate) closes: bool,
}

/// The body of an answer, and what is held until it has ended.
pub(crate) struct ClientResponseBody {
    body: Either<Box<Relay>, Full<SegmentedBytes>>,
    /// When decode's first byte came that has just been handed out.
    first_came: Option<Instant>,
    /// The request's place among those that may be under way.
    _place: Option<Permit>,
    /// After the body: finished when the legs have ended.
    record: Box<Record>,
}

impl ClientResponse {
    pub(crate) fn relayed(
        answer: proxy::UpstreamResponse,
        place: Option<Permit>,
        record: Box<Record>,
    ) -> Self {
        Self::new(answer.head, Either::Left(answer.body), place, record, false)
    }

    pub(crate) fn own(reply: OwnResponse, record: Box<Record>) -> Self {
        let (head, body) = reply.into_parts();
        Self::new(head.into(), Either::Right(body), None, record, false)
    }

    /// The answer to a request that failed.
    pub(crate) fn error(error: &Error, mut record: Box<Record>) -> Self {
        record.failed(error);
        Self { closes: error.ends_connection(), ..Self::own(error.to_reply(), record) }
    }

    fn new(
        head: ClientResponseHead,
        body: Either<Box<Relay>, Full<SegmentedBytes>>,
        place: Option<Permit>,
        mut record: Box<Record>,
        closes: bool,
    ) -> Self {
        record.answered(head.status().as_u16());
        Self { head, body: ClientResponseBody { body, first_came: None, _place: place, record }, closes }
    }
}

impl ClientResponseBody {
    /// The request's name.
    pub(crate) fn id(&self) -> Option<&RequestId> {
        self.record.id()
    }

    /// When decode's first byte came, if it has been handed out since this was last asked.
    pub(crate) fn take_first_came(&mut self) -> Option<Instant> {
        self.first_came.take()
    }

    /// Nobody wants the body.
    pub(crate) fn empty(&mut self) {
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
        let frame = match &mut self.body {
            Either::Left(relay) => Pin::new(relay).poll_frame(cx),
            Either::Right(own) => Pin::new(own).poll_frame(cx).map_err(|never| match never {}),
        };
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                let is_last = self.body.is_end_stream();
                let came = self.record.gives(frame.data_ref().map_or(0, SegmentedBytes::len), is_last);
                self.first_came = self.first_came.or(came);
            }
            Poll::Ready(Some(Err(error))) => self.record.failed(error),
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

/// Nobody asks for the end of a body that has said that it is there.
impl Drop for ClientResponseBody {
    fn drop(&mut self) {
        if matches!(self.body, Either::Right(_)) || self.body.is_end_stream() {
            self.record.completed();
        } else if let Either::Left(relay) = &self.body
            && let Some(error) = relay.failure()
        {
            // The client left before it could be told.
            self.record.failed(error);
        }
    }
}

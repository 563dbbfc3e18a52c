//! A leg: the part of a request that runs on one of its two servers, from the connection to the end of the
//! response.
//!
//! A leg that is closed or dropped closes its connection, which SGLang takes as an abort. The connection
//! returns to its pool only after the body has ended, or if nothing was written to it. What an event of a leg
//! means for the request is decided in [`decision`](super::decision).

use std::mem::offset_of;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use tokio::time::Instant;

use super::decision::LegEvent;
use crate::error::{Cause, Error};
use crate::http1::{OutgoingRequest, ResponseHead, SendError};
use crate::observe::record::LegRecord;
use crate::upstream::{Backend, DialError, Lease, Outcome, Pools, Role};
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers;
use crate::wire::sse::{EventSplitter, EventTooLarge};
use crate::wire::stream_error;
use crate::wire::usage::UsageReader;

/// A kept-alive connection that ends without a byte counts as closed while it was idle if it ends within one
/// round trip of the request and this: the server's close was on its way when the request was written. The
/// margin is for a busy machine. A server that ends the connection later may have run the request.
const IDLE_CLOSE_MARGIN: Duration = Duration::from_millis(25);

/// Longest time that counts as an idle close, whatever the round trip was: a connect can be slow because a
/// packet was lost.
const MAX_IDLE_CLOSE_RACE: Duration = Duration::from_millis(100);

/// Largest event of a prefill server's stream that is searched for an error, which has a few hundred bytes.
const MAX_ERROR_EVENT: usize = 1 << 20;

/// Most reads of a body that is held or discarded before other requests of the worker get their turn. With
/// 64 KiB each they take about 0.5 ms; without a bound the runtime stops after 128.
const MAX_READS: usize = 16;

/// One leg. In this order, because a token that is relayed needs the first three fields, and among a thousand
/// streams each cache line that it needs is a miss.
#[repr(C)]
pub(super) struct Leg {
    connection: Connection,
    /// Data of the body was recorded.
    has_data: bool,
    usage_reading: UsageReading,
    /// The connection was idle before.
    is_reused: bool,
    /// The leg's outcome if the response is read to its end.
    outcome: Outcome,
    backend: Arc<Backend>,
    /// `None`: the leg is over.
    record: Option<LegRecord>,
    /// When the write of the request had to wait. What is written at once has the connection's own time.
    waited_at: Option<Instant>,
    head: Option<ResponseHead>,
    body: Reading,
    /// What the server says of the prompt.
    usage: UsageReader,
    failure: Option<Cause>,
    hidden_error: Option<HiddenError>,
}

enum Connection {
    /// Boxed: most legs find an idle connection.
    Opening(Pin<Box<dyn Future<Output = Result<Lease, DialError>> + Send>>),
    /// Open. Nothing was written yet.
    Open(Lease),
    /// The request is being written, or its response awaited.
    Sent(Lease),
    Responding(Lease),
    /// The body has been read to its end.
    Ended(Lease),
    Closed,
}

/// What happens to the response's body before it is relayed.
pub(super) enum Reading {
    /// Its first data is awaited, and stays in the connection.
    Peek,
    /// It is discarded, as prefill's.
    Discard(ErrorSearch),
    /// It is held for a merge.
    Hold(Box<HeldBody>),
}

/// A body that is held in memory.
pub(super) struct HeldBody {
    pieces: Vec<Bytes>,
    length: usize,
    limit: usize,
    /// At the limit reading pauses. Otherwise the body is too large.
    pauses: bool,
    errors: ErrorSearch,
}

/// What is read of a response that is relayed, to learn what a plain server says of the prompt.
#[derive(Clone, Copy, PartialEq, Eq)]
enum UsageReading {
    /// Nothing. Prefill's response is read besides, as it is discarded.
    Off,
    /// Each piece.
    Whole,
    /// The first piece of a stream: events of `/generate` say it from the first one on, and to search each
    /// would cost more than to relay it.
    FirstPiece,
    /// The first piece of a stream was read.
    Done,
}

/// The search for an error event in a stream.
pub(super) enum ErrorSearch {
    /// It has not begun: it is not known whether the body is a stream.
    Pending,
    Running(Box<EventSplitter>),
    /// The body is no stream, or an event of it is too large to be an error.
    Off,
}

/// An error inside a response with status 200: the status it should have had, and the JSON of the event.
struct HiddenError {
    status: StatusCode,
    json: Bytes,
}

/// A response that is held as a whole.
pub(super) struct HeldResponse {
    pub(super) head: ClientResponseHead,
    pub(super) body: Bytes,
}

impl Leg {
    /// The first bytes, which are all that a token needs.
    pub(super) const NEEDED_BY_A_TOKEN: usize = offset_of!(Self, is_reused);

    /// A leg that takes an idle connection, or opens a new one when it is polled.
    pub(super) fn new(pools: &Arc<Pools>, record: LegRecord, body: Reading) -> Self {
        let backend = Arc::clone(record.backend());
        let connection = match pools.take_idle(&backend) {
            Some(lease) => Connection::Open(lease),
            None => open(pools, &backend),
        };
        Self {
            connection,
            has_data: false,
            usage_reading: UsageReading::Off,
            is_reused: false,
            outcome: Outcome::Completed,
            backend,
            record: Some(record),
            waited_at: None,
            head: None,
            body,
            usage: UsageReader::default(),
            failure: None,
            hidden_error: None,
        }
    }

    pub(super) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// Whether it has a connection to which nothing was written. That one is open when it starts is no event.
    pub(super) fn is_connected(&self) -> bool {
        matches!(self.connection, Connection::Open(_))
    }

    /// Reads in the response what the server says of the prompt.
    pub(super) fn read_usage(&mut self) {
        self.usage_reading = UsageReading::Whole;
    }

    /// Looks whether the connection has been closed while the partner's was awaited.
    pub(super) fn check_connection(&mut self) -> Result<(), LegEvent> {
        let Connection::Open(lease) = &mut self.connection else { return Ok(()) };
        if lease.is_usable() {
            return Ok(());
        }
        if lease.is_reused() {
            return Err(LegEvent::Stale);
        }
        // A server that closes new connections takes none.
        self.set_failure(DialError::Io(std::io::ErrorKind::ConnectionAborted.into()).into());
        Err(LegEvent::ConnectFailed)
    }

    /// Opens a new connection in place of a stale one.
    pub(super) fn reconnect(&mut self, pools: &Arc<Pools>) {
        self.failure = None;
        if let Some(record) = &self.record {
            record.connection_was_stale();
        }
        self.connection = open(pools, &self.backend);
    }

    /// Begins to write the request, which goes on as the leg is polled.
    pub(super) fn send(&mut self, request: OutgoingRequest) {
        let Connection::Open(mut lease) = std::mem::replace(&mut self.connection, Connection::Closed) else {
            return;
        };
        self.is_reused = lease.is_reused();
        lease.begin(request);
        self.connection = Connection::Sent(lease);
    }

    /// The next event. There is none while the leg waits for its partner.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<LegEvent> {
        match &mut self.connection {
            Connection::Opening(opening) => {
                let opened = ready!(opening.as_mut().poll(cx));
                Poll::Ready(self.opened(opened))
            }
            Connection::Sent(lease) => {
                let Poll::Ready(head) = lease.poll_head(cx) else {
                    if self.waited_at.is_none() && lease.write_timing().written_at.is_none() {
                        self.waited_at = Some(Instant::now());
                    }
                    return Poll::Pending;
                };
                Poll::Ready(self.head_received(head))
            }
            Connection::Responding(_) => self.poll_body(cx),
            Connection::Open(_) | Connection::Ended(_) | Connection::Closed => Poll::Pending,
        }
    }

    fn opened(&mut self, opened: Result<Lease, DialError>) -> LegEvent {
        match opened {
            Ok(lease) => {
                self.connection = Connection::Open(lease);
                LegEvent::Connected
            }
            Err(error) => {
                self.set_failure(error.into());
                LegEvent::ConnectFailed
            }
        }
    }

    fn head_received(&mut self, result: Result<ResponseHead, SendError>) -> LegEvent {
        let head = match result {
            Ok(head) => head,
            Err(SendError { cause, unanswered: true }) if self.is_idle_close() => {
                self.failure = Some(cause.into());
                self.connection = Connection::Closed;
                return LegEvent::Stale;
            }
            Err(error) => {
                self.set_failure(error.cause.into());
                return LegEvent::Broken;
            }
        };
        let sent = std::mem::replace(&mut self.connection, Connection::Closed);
        if let (Connection::Sent(lease), Some(record)) = (sent, &mut self.record) {
            record.response_head_received(lease.write_timing(), lease.body_progress());
            self.connection = Connection::Responding(lease);
        }
        self.outcome = outcome(head.status);
        let (is_accepted, is_stream) = (head.status.is_success(), head.is_event_stream);
        if is_stream && self.usage_reading == UsageReading::Whole {
            self.usage_reading = UsageReading::FirstPiece;
        }
        if !is_accepted {
            // The status settles the outcome: closing the rest of an error response is no cancellation.
            self.set_outcome(self.outcome);
        } else if let Reading::Discard(errors) = &mut self.body {
            errors.begin(is_stream);
        } else if let Reading::Hold(held) = &mut self.body {
            held.errors.begin(is_stream);
            // Decode's events need not be complete to be merged, prefill's must.
            held.pauses = is_stream && self.backend.role() == Role::Decode;
            if headers::unreadable_encoding(&head.headers).is_some() {
                self.set_failure(Cause::Unmergeable("the response is compressed"));
                return LegEvent::Broken;
            }
        }
        self.head = Some(head);
        if is_accepted { LegEvent::Accepted { is_stream } } else { LegEvent::Refused }
    }

    /// Whether a connection that ended without a byte was closed as idle.
    fn is_idle_close(&self) -> bool {
        let Connection::Sent(lease) = &self.connection else { return false };
        let written = lease.write_timing().written_at.map(Instant::from_std);
        // Without either it could not be written at all.
        let limit = (lease.round_trip() + IDLE_CLOSE_MARGIN).min(MAX_IDLE_CLOSE_RACE);
        self.is_reused && written.or(self.waited_at).is_none_or(|at| at.elapsed() <= limit)
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<LegEvent> {
        let Connection::Responding(lease) = &mut self.connection else { return Poll::Pending };
        if matches!(self.body, Reading::Peek) {
            let started = ready!(lease.poll_body_started(cx));
            let is_empty = lease.is_ended();
            return Poll::Ready(match started {
                Ok(()) => {
                    self.data_received();
                    if is_empty { LegEvent::Ended } else { LegEvent::Data }
                }
                Err(error) => self.broken(error.into()),
            });
        }
        for read in 0.. {
            if read == MAX_READS {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // What is over the limit waits in the connection until the merge takes what is held.
            if self.is_full() {
                return Poll::Pending;
            }
            let Connection::Responding(lease) = &mut self.connection else { return Poll::Pending };
            match ready!(lease.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.data_received();
                    if let Some(event) = self.take(data) {
                        return Poll::Ready(event);
                    }
                }
                Some(Err(error)) => return Poll::Ready(self.broken(error.into())),
                None => break,
            }
        }
        // The end is reported once: the leg may wait for its partner after it.
        if let Connection::Responding(lease) = std::mem::replace(&mut self.connection, Connection::Closed) {
            self.connection = Connection::Ended(lease);
        }
        self.tell_usage();
        Poll::Ready(LegEvent::Ended)
    }

    /// Passes on what a prefill server has said in a response that has ended well.
    fn tell_usage(&self) {
        if let (Role::Prefill, true, Some(record)) = (self.backend.role(), self.is_accepted(), &self.record) {
            record.prefill_completed(self.usage.usage());
        }
    }

    fn broken(&mut self, cause: Cause) -> LegEvent {
        self.set_failure(cause);
        LegEvent::Broken
    }

    /// Records the first data of the body.
    fn data_received(&mut self) {
        if !std::mem::replace(&mut self.has_data, true)
            && let Some(record) = &self.record
        {
            record.body_received();
        }
    }

    /// Keeps or discards a piece of the body, and looks for an error in it.
    fn take(&mut self, data: Bytes) -> Option<LegEvent> {
        if self.backend.role() == Role::Prefill {
            self.usage.push(&data);
        }
        let errors = match &mut self.body {
            Reading::Peek => return None,
            Reading::Discard(errors) => errors,
            Reading::Hold(held) => {
                held.length += data.len();
                held.pieces.push(data.clone());
                if held.length > held.limit && !held.pauses {
                    let limit = held.limit;
                    return Some(self.broken(Cause::TooLarge { limit }));
                }
                &mut held.errors
            }
        };
        let error = errors.find(data)?;
        self.hidden_error = Some(error);
        // The rest of the stream stays unread, and the request has failed: closing aborts nothing.
        if self.backend.role() == Role::Prefill {
            self.disconnect(Outcome::Refused);
        }
        Some(LegEvent::ErrorEvent)
    }

    /// Whether a stream that is held has reached its limit.
    fn is_full(&self) -> bool {
        matches!(&self.body, Reading::Hold(held) if held.length > held.limit)
    }

    /// The next data of a body that is relayed.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let Connection::Responding(lease) = &mut self.connection else { return Poll::Ready(None) };
        let data = ready!(lease.poll_data(cx));
        match data {
            Some(Ok(data)) => {
                self.data_received();
                self.search_usage(&data);
                Poll::Ready(Some(Ok(data)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(self.fail_with(error.into())))),
            None => Poll::Ready(None),
        }
    }

    fn search_usage(&mut self, data: &[u8]) {
        match self.usage_reading {
            UsageReading::Off | UsageReading::Done => return,
            UsageReading::Whole => {}
            UsageReading::FirstPiece => self.usage_reading = UsageReading::Done,
        }
        self.usage.push(data);
    }

    /// Whether the response has a status of success, and no error was found in it.
    pub(super) fn is_accepted(&self) -> bool {
        self.status().is_some_and(|status| status.is_success())
    }

    /// Takes the response's head.
    pub(super) fn take_head(&mut self) -> ResponseHead {
        self.head.take().unwrap_or_default()
    }

    /// Takes what was held of the body.
    pub(super) fn take_held(&mut self) -> Vec<Bytes> {
        match std::mem::replace(&mut self.body, Reading::Peek) {
            Reading::Hold(held) => held.pieces,
            Reading::Peek | Reading::Discard(_) => Vec::new(),
        }
    }

    /// Drops what is held of the body, and discards the rest.
    pub(super) fn discard_held(&mut self) {
        self.body = match std::mem::replace(&mut self.body, Reading::Peek) {
            Reading::Hold(held) => Reading::Discard(held.errors),
            other => other,
        };
    }

    /// Bytes of the body that are held.
    pub(super) fn held_length(&self) -> usize {
        match &self.body {
            Reading::Hold(held) => held.length,
            Reading::Peek | Reading::Discard(_) => 0,
        }
    }

    /// The response that the server would have sent, had it failed before its head was out.
    pub(super) fn take_hidden_error(&mut self) -> HeldResponse {
        let mut head = ClientResponseHead::from(self.take_head());
        let Some(HiddenError { status, json }) = self.hidden_error.take() else {
            return HeldResponse { head, body: Bytes::new() };
        };
        head.set_status(status);
        head.set(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        head.set(CONTENT_LENGTH, HeaderValue::from(json.len()));
        HeldResponse { head, body: json }
    }

    /// The status of the response, or that of the error in it.
    pub(super) fn status(&self) -> Option<StatusCode> {
        let hidden = self.hidden_error.as_ref().map(|error| error.status);
        hidden.or(self.head.as_ref().map(|head| head.status))
    }

    /// Ends a leg whose body has ended: records the outcome and returns the connection to its pool.
    pub(super) fn park(&mut self) {
        if let (true, Outcome::Completed, Some(record)) =
            (self.usage_reading != UsageReading::Off, self.outcome, &self.record)
        {
            record.prefill_completed(self.usage.usage());
        }
        self.set_outcome(self.outcome);
        match std::mem::replace(&mut self.connection, Connection::Closed) {
            Connection::Responding(lease) | Connection::Ended(lease) => lease.park(),
            _ => {}
        }
        self.record = None;
    }

    /// Closes the leg: its server aborts. A connection to which nothing was written returns to its pool.
    pub(super) fn close(&mut self) {
        if self.record.is_none() {
            return;
        }
        self.record_write_time();
        if let Connection::Open(lease) = std::mem::replace(&mut self.connection, Connection::Closed) {
            lease.park();
        }
        self.record = None;
    }

    /// The error of a leg that has failed.
    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take().map(|cause| self.fail_with(cause))
    }

    /// Fails the leg for this reason, and makes the error of it.
    pub(super) fn fail_with(&mut self, cause: Cause) -> Error {
        self.disconnect(cause.outcome());
        Error::upstream(&self.backend, cause)
    }

    pub(super) fn set_failure(&mut self, cause: Cause) {
        self.disconnect(cause.outcome());
        self.failure = Some(cause);
    }

    /// Closes the connection of a leg that has failed.
    fn disconnect(&mut self, outcome: Outcome) {
        self.set_outcome(outcome);
        self.record_write_time();
        self.connection = Connection::Closed;
    }

    fn set_outcome(&mut self, outcome: Outcome) {
        if let Some(record) = &mut self.record {
            record.set_outcome(outcome);
        }
    }

    /// Records when the request was written, if no head ever said so.
    pub(super) fn record_write_time(&self) {
        if let (Connection::Sent(lease), Some(record)) = (&self.connection, &self.record) {
            record.request_written(lease.write_timing());
        }
    }

    /// Whether the body has been read to its end.
    pub(super) fn is_ended(&self) -> bool {
        match &self.connection {
            Connection::Responding(lease) => lease.is_ended(),
            _ => true,
        }
    }

    /// Unread bytes of a body with a `Content-Length`.
    pub(super) fn remaining(&self) -> Option<u64> {
        match &self.connection {
            Connection::Responding(lease) => lease.remaining(),
            _ => Some(0),
        }
    }

    /// The id of the request, for log lines after its end.
    pub(super) fn request_id(&self) -> Option<&str> {
        self.record.as_ref()?.request_id()
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.close();
    }
}

fn open(pools: &Arc<Pools>, backend: &Arc<Backend>) -> Connection {
    let (pools, backend) = (Arc::clone(pools), Arc::clone(backend));
    Connection::Opening(Box::pin(async move { pools.open(&backend).await }))
}

/// The outcome of a leg whose response is complete.
fn outcome(status: StatusCode) -> Outcome {
    match status {
        // SGLang returns 503 while it starts, shuts down, or is out of memory for KV cache. That is no fault
        // of the process, so it must not count towards ejection as other 5xx do.
        StatusCode::SERVICE_UNAVAILABLE => Outcome::Refused,
        status if status.is_server_error() => Outcome::ServerError,
        status if status.is_success() => Outcome::Completed,
        _ => Outcome::Refused,
    }
}

impl HeldBody {
    pub(super) fn new(limit: usize) -> Box<Self> {
        Box::new(Self { pieces: Vec::new(), length: 0, limit, pauses: false, errors: ErrorSearch::Pending })
    }
}

impl ErrorSearch {
    fn begin(&mut self, is_event_stream: bool) {
        *self = if is_event_stream {
            Self::Running(Box::new(EventSplitter::new(MAX_ERROR_EVENT)))
        } else {
            Self::Off
        };
    }

    fn find(&mut self, data: Bytes) -> Option<HiddenError> {
        let Self::Running(events) = self else { return None };
        events.push(data);
        match next_error(events) {
            Ok(error) => error,
            Err(EventTooLarge { .. }) => {
                *self = Self::Off;
                None
            }
        }
    }
}

fn next_error(events: &mut EventSplitter) -> Result<Option<HiddenError>, EventTooLarge> {
    while let Some(event) = events.next().transpose()? {
        if let Some(error) = stream_error::in_event(&event) {
            let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return Ok(Some(HiddenError { status, json: event.slice(error.json) }));
        }
    }
    Ok(None)
}

//! Reads the body of a client's request within its time limits, or discards it.
//!
//! How large a body may be, and what is in it, is for those who read it.

use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{RequestBody, RequestBodyError};
use crate::http1::BodyTimeouts;
use crate::timer::Timer;

/// Most bytes of a body that are read and discarded after the response. Closing with unread data makes the
/// kernel send a reset, which can reach the client before our response does; over 64 MiB a new connection is
/// cheaper.
pub(crate) const MAX_DISCARDED: u64 = 64 << 20;

/// Why a body was not read to its end.
#[derive(Debug)]
pub(crate) enum BodyFailure {
    Read(RequestBodyError),
    /// `what` did not arrive within the time limit.
    Timeout {
        what: &'static str,
        after: Duration,
    },
}

/// Reads one body.
pub(crate) struct BodyReader {
    timeouts: BodyTimeouts,
    /// When the first wait began: the clock is read only if there is one.
    since: Option<Instant>,
    /// When the present pause began.
    idle_since: Option<Instant>,
    /// Bytes that had arrived then.
    bytes_before: u64,
}

impl BodyReader {
    pub(crate) fn new(timeouts: BodyTimeouts) -> Self {
        Self { timeouts, since: None, idle_since: None, bytes_before: 0 }
    }

    /// Whether some of the body was waited for.
    pub(crate) fn has_waited(&self) -> bool {
        self.since.is_some()
    }

    /// The next chunk, or `None` at the end.
    pub(crate) fn poll_chunk(
        &mut self,
        request: &mut impl RequestBody,
        timer: &mut Timer,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, BodyFailure>> {
        if let Poll::Ready(chunk) = request.poll_chunk(cx) {
            self.idle_since = None;
            return Poll::Ready(chunk.map_err(BodyFailure::Read));
        }
        // A chunk is up to a whole body buffer (128 KiB), which a slow client fills in many reads: each byte
        // that arrives restarts the idle timeout, not only each chunk.
        let bytes_now = request.bytes_read();
        if bytes_now > self.bytes_before {
            (self.idle_since, self.bytes_before) = (None, bytes_now);
        }
        let idle_since = *self.idle_since.get_or_insert_with(Instant::now);
        let BodyTimeouts { idle, whole } = self.timeouts;
        // A client that drips a byte a second would otherwise hold what it has sent for as long as it likes.
        let (idle_end, whole_end) = (idle_since + idle, *self.since.get_or_insert(idle_since) + whole);
        ready!(timer.poll_until(idle_end.min(whole_end), cx));
        let (what, after) = match whole_end < idle_end {
            true => ("the whole request body", whole),
            false => ("more of the request body", idle),
        };
        Poll::Ready(Err(BodyFailure::Timeout { what, after }))
    }
}

/// Reads and discards the rest of a body, so that the connection stays usable. Returns whether its end was
/// reached; if not, it is longer than [`MAX_DISCARDED`].
pub(crate) async fn discard(
    request: &mut impl RequestBody,
    timeouts: BodyTimeouts,
    timer: &mut Timer,
) -> Result<bool, BodyFailure> {
    if request.is_ended() {
        return Ok(true);
    }
    let (mut reader, mut length) = (BodyReader::new(timeouts), 0);
    loop {
        match std::future::poll_fn(|cx| reader.poll_chunk(request, timer, cx)).await? {
            None => return Ok(true),
            Some(data) => length += data.len() as u64,
        }
        if length > MAX_DISCARDED {
            return Ok(false);
        }
    }
}

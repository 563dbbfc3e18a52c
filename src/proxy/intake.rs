//! Reads the body of a client's request: bounded in size and in its pauses, and scanned once, as it arrives.
//!
//! The bytes are kept as they arrived. What is in them is for [`wire`](crate::wire) to find and to change.

use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::error::Error;
use crate::http1::{HeaderId, RawHeaders};
use crate::timer::Timer;
use crate::transport::RequestBody;
use crate::wire::body::ClientBody;
use crate::wire::headers::unreadable_encoding;
use crate::wire::shape::{BodyInspector, BodyShape, Dialect, HashKey};

/// Most bytes of a rejected body that are read and discarded. Closing with unread data makes the kernel send
/// a reset, which can reach the client before our response does; over 64 MiB a new connection is cheaper.
const MAX_DISCARDED: usize = 64 << 20;

/// Reads a whole request body. The last value tells whether some of it was waited for, or all of it was there
/// with the head. A rejected body is read to its end as well, up to [`MAX_DISCARDED`].
pub(super) async fn read(
    headers: &RawHeaders,
    request: &mut impl RequestBody,
    dialect: Dialect,
    hash_key: Option<HashKey>,
    limit: usize,
    idle_timeout: Duration,
    timer: &mut Timer,
) -> Result<(ClientBody, BodyShape, bool), Error> {
    reject_early(headers, request, limit)?;
    let mut inspector = BodyInspector::new(dialect);
    if let Some(key) = hash_key {
        inspector = inspector.with_prompt(key);
    }
    let mut body = ClientBody::default();
    let mut rejection = encoding_error(headers);
    let (mut length, mut waited) = (0, false);
    while let Some(data) = next_chunk(request, timer, idle_timeout, &mut waited).await? {
        length += data.len();
        if length > limit {
            if length - limit > MAX_DISCARDED {
                return Err(Error::BodyTooLarge { limit, drained: false });
            }
            // Drained, so that the client reads the 413 instead of a reset, and can use the connection again.
            rejection = Some(Error::BodyTooLarge { limit, drained: true });
        }
        if rejection.is_some() {
            // Free what was kept: the rest may take as long as the client likes to send it.
            body = ClientBody::default();
            continue;
        }
        match inspector.feed(&data) {
            Ok(()) => body.push(data),
            Err(error) => rejection = Some(Error::InvalidBody(error)),
        }
    }
    match rejection {
        Some(error) => Err(error),
        None => Ok((body, inspector.finish().map_err(Error::InvalidBody)?, waited)),
    }
}

/// Rejects a body whose `Content-Length` is over the limit without reading it, if the client waits for our
/// decision (`Expect: 100-continue`, RFC 9110, section 10.1.1), or if it is too long to discard.
fn reject_early(headers: &RawHeaders, request: &impl RequestBody, limit: usize) -> Result<(), Error> {
    let excess = request.content_length_hint().saturating_sub(limit as u64);
    if excess > MAX_DISCARDED as u64 || (excess > 0 && headers.has(HeaderId::Expect)) {
        return Err(Error::BodyTooLarge { limit, drained: false });
    }
    Ok(())
}

fn encoding_error(headers: &RawHeaders) -> Option<Error> {
    let encoding = unreadable_encoding(headers)?;
    Some(Error::BodyEncoded { encoding: String::from_utf8_lossy(encoding).into_owned() })
}

/// Reads and discards a body, so that the connection stays usable. Returns whether its end was reached.
pub(crate) async fn discard(
    request: &mut impl RequestBody,
    idle_timeout: Duration,
    timer: &mut Timer,
) -> Result<bool, Error> {
    if request.is_ended() {
        return Ok(true);
    }
    let mut length = 0;
    while let Some(data) = next_chunk(request, timer, idle_timeout, &mut false).await? {
        length += data.len();
        if length > MAX_DISCARDED {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The next chunk of the body. Fails if no byte arrives within `idle_timeout`. Sets `waited` if the chunk was
/// not there at once.
async fn next_chunk(
    request: &mut impl RequestBody,
    timer: &mut Timer,
    idle_timeout: Duration,
    waited: &mut bool,
) -> Result<Option<Bytes>, Error> {
    let (mut deadline, mut bytes_before) = (None, request.bytes_read());
    std::future::poll_fn(|cx| {
        if let Poll::Ready(chunk) = request.poll_chunk(cx) {
            return Poll::Ready(chunk.map_err(Error::BodyRead));
        }
        *waited = true;
        // A chunk is up to a whole body buffer (128 KiB), which a slow client fills in many reads: each byte
        // that arrives restarts the timeout, not only each chunk.
        let bytes_now = request.bytes_read();
        if bytes_now > bytes_before {
            (deadline, bytes_before) = (None, bytes_now);
        }
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + idle_timeout);
        ready!(timer.poll_until(deadline, cx));
        let what = "more of the request body";
        Poll::Ready(Err(Error::RequestTimeout { what, after: idle_timeout }))
    })
    .await
}

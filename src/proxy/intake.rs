//! Reads a client's body: bounded in size and in its pauses, looked at once as it arrives, kept as it came.

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
use crate::wire::shape::{BodyInspector, BodyShape, Dialect};

/// How much of a body is read only to throw it away, so that the connection stays usable after a refusal.
const MAX_DISCARDED: usize = 64 << 20;

/// Reads a whole request body, and says whether it had to be waited for. When it is refused, the rest of it has been read as well, unless that would be
/// more than [`MAX_DISCARDED`].
pub(super) async fn read(
    fields: &RawHeaders,
    upload: &mut impl RequestBody,
    dialect: Dialect,
    limit: usize,
    idle_timeout: Duration,
    timer: &mut Timer,
) -> Result<(ClientBody, BodyShape, bool), Error> {
    refuse_early(fields, upload, limit)?;
    let mut inspector = BodyInspector::new(dialect);
    let mut kept = ClientBody::default();
    let mut refused = encoded(fields);
    let (mut length, mut waited) = (0, false);
    while let Some(data) = next_chunk(upload, timer, idle_timeout, &mut waited).await? {
        length += data.len();
        if length > limit {
            if length - limit > MAX_DISCARDED {
                return Err(Error::BodyTooLarge { limit, drained: false });
            }
            refused = Some(Error::BodyTooLarge { limit, drained: true });
        }
        if refused.is_some() {
            kept = ClientBody::default();
            continue;
        }
        match inspector.feed(&data) {
            Ok(()) => kept.push(data),
            Err(error) => refused = Some(Error::InvalidBody(error)),
        }
    }
    match refused {
        Some(error) => Err(error),
        None => Ok((kept, inspector.finish().map_err(Error::InvalidBody)?, waited)),
    }
}

/// Refuses a body whose announced length is over the limit, when reading it would be a waste: the client waits
/// for our word before it sends (`Expect: 100-continue`), or it is too long to be thrown away.
fn refuse_early(fields: &RawHeaders, upload: &impl RequestBody, limit: usize) -> Result<(), Error> {
    let over = upload.content_length_hint().saturating_sub(limit as u64);
    if over > MAX_DISCARDED as u64 || (over > 0 && fields.has(HeaderId::Expect)) {
        return Err(Error::BodyTooLarge { limit, drained: false });
    }
    Ok(())
}

fn encoded(fields: &RawHeaders) -> Option<Error> {
    let encoding = unreadable_encoding(fields)?;
    Some(Error::BodyEncoded { encoding: String::from_utf8_lossy(encoding).into_owned() })
}

/// Reads a body that nobody wants, so that the connection stays usable. Returns whether it came to its end.
pub(crate) async fn discard(
    upload: &mut impl RequestBody,
    idle_timeout: Duration,
    timer: &mut Timer,
) -> Result<bool, Error> {
    if upload.is_ended() {
        return Ok(true);
    }
    let mut length = 0;
    while let Some(data) = next_chunk(upload, timer, idle_timeout, &mut false).await? {
        length += data.len();
        if length > MAX_DISCARDED {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The body's next piece, if it comes within `idle_timeout`. Whether it had to be waited for is noted.
async fn next_chunk(
    upload: &mut impl RequestBody,
    timer: &mut Timer,
    idle_timeout: Duration,
    waited: &mut bool,
) -> Result<Option<Bytes>, Error> {
    let (mut waiting_until, mut seen) = (None, upload.bytes_read());
    std::future::poll_fn(|cx| {
        if let Poll::Ready(piece) = upload.poll_chunk(cx) {
            return Poll::Ready(piece.map_err(Error::BodyRead));
        }
        *waited = true;
        let now = upload.bytes_read();
        if now > seen {
            (waiting_until, seen) = (None, now);
        }
        let deadline = *waiting_until.get_or_insert_with(|| Instant::now() + idle_timeout);
        ready!(timer.poll_until(deadline, cx));
        let what = "more of the request body";
        Poll::Ready(Err(Error::RequestTimeout { what, after: idle_timeout }))
    })
    .await
}

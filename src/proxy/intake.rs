//! Reads a client's body: bounded in size and in its pauses, looked at once as it arrives, kept as it came.

use std::pin::{Pin, pin};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{EXPECT, HeaderMap};
use tokio::time::{Instant, Sleep, sleep};

use crate::error::Error;
use crate::wire::body::ClientBody;
use crate::wire::headers::unreadable_encoding;
use crate::wire::shape::{Dialect, Inspector, Shape};

/// How much of a body is read only to throw it away, so that the connection stays usable after a refusal.
const MAX_DISCARDED: usize = 64 << 20;

/// Reads a whole request body. When it is refused, the rest of it has been read as well, unless that would be
/// more than [`MAX_DISCARDED`].
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Incoming,
    dialect: Dialect,
    limit: usize,
    idle_timeout: Duration,
) -> Result<(ClientBody, Shape), Error> {
    refuse_early(headers, &body, limit)?;
    let mut inspector = Inspector::new(dialect);
    let mut kept = ClientBody::default();
    let mut refused = encoded(headers);
    let mut length = 0;
    let mut timer = pin!(sleep(idle_timeout));
    while let Some(frame) = next_frame(&mut body, timer.as_mut(), idle_timeout).await? {
        let Ok(data) = frame.into_data() else { continue };
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
            Err(error) => refused = Some(Error::BadBody(error)),
        }
    }
    match refused {
        Some(error) => Err(error),
        None => Ok((kept, inspector.finish().map_err(Error::BadBody)?)),
    }
}

/// Refuses a body whose announced length is over the limit, when reading it would be a waste: the client waits
/// for our word before it sends (`Expect: 100-continue`), or it is too long to be thrown away.
fn refuse_early(headers: &HeaderMap, body: &Incoming, limit: usize) -> Result<(), Error> {
    let over = body.size_hint().lower().saturating_sub(limit as u64);
    if over > MAX_DISCARDED as u64 || (over > 0 && headers.contains_key(EXPECT)) {
        return Err(Error::BodyTooLarge { limit, drained: false });
    }
    Ok(())
}

fn encoded(headers: &HeaderMap) -> Option<Error> {
    let encoding = unreadable_encoding(headers)?;
    Some(Error::BodyEncoded { encoding: String::from_utf8_lossy(encoding.as_bytes()).into_owned() })
}

/// Reads a body that nobody wants, so that the connection stays usable. Returns whether it came to its end.
pub(crate) async fn discard(mut body: Incoming, idle_timeout: Duration) -> Result<bool, Error> {
    if body.is_end_stream() {
        return Ok(true);
    }
    let mut timer = pin!(sleep(idle_timeout));
    let mut length = 0;
    while let Some(frame) = next_frame(&mut body, timer.as_mut(), idle_timeout).await? {
        length += frame.data_ref().map_or(0, Bytes::len);
        if length > MAX_DISCARDED {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The body's next frame, if it comes within `idle_timeout`. `timer` is one for the whole body: it is not set anew
/// for each frame, but only when it has gone off too early.
async fn next_frame(
    body: &mut Incoming,
    mut timer: Pin<&mut Sleep>,
    idle_timeout: Duration,
) -> Result<Option<Frame<Bytes>>, Error> {
    let mut waiting_until = None;
    std::future::poll_fn(|cx| {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
            return Poll::Ready(frame.transpose().map_err(Error::BodyRead));
        }
        let deadline = *waiting_until.get_or_insert_with(|| Instant::now() + idle_timeout);
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                let what = "more of the request's body";
                return Poll::Ready(Err(Error::RequestTimeout { what, after: idle_timeout }));
            }
            timer.as_mut().reset(deadline);
        }
    })
    .await
}

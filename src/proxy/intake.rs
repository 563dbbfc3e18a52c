//! Reads the body of a client's request: bounded in size and in its pauses, and scanned once, as it arrives.
//!
//! The bytes are kept as they arrived. What is in them is for [`wire`](crate::wire) to find and to change.
//! A body that cannot be accepted is an error at once; the rest of it is for
//! [`transport`](crate::transport) to discard, after the response.

use crate::error::Error;
use crate::http1::{BodyTimeouts, RawHeaders};
use crate::timer::Timer;
use crate::transport::{BodyReader, RequestBody};
use crate::wire::body::ClientBody;
use crate::wire::headers::unreadable_encoding;
use crate::wire::shape::{BodyInspector, BodyShape, Dialect};

/// Reads a whole request body. The last value tells whether some of it was waited for, or all of it was there
/// with the head.
pub(super) async fn read(
    headers: &RawHeaders,
    request: &mut impl RequestBody,
    dialect: Dialect,
    limit: usize,
    timeouts: BodyTimeouts,
    timer: &mut Timer,
) -> Result<(ClientBody, BodyShape, bool), Error> {
    if let Some(encoding) = unreadable_encoding(headers) {
        return Err(Error::BodyEncoded { encoding: String::from_utf8_lossy(encoding).into_owned() });
    }
    // Before a client that waits for it gets `100 Continue` (RFC 9110, section 10.1.1).
    if request.content_length_hint() > limit as u64 {
        return Err(Error::BodyTooLarge { limit });
    }
    let mut reader = BodyReader::new(timeouts);
    let mut scan = Scan { inspector: BodyInspector::new(dialect), ahead: 0 };
    let mut body = ClientBody::default();
    loop {
        let chunk = std::future::poll_fn(|cx| {
            let polled = reader.poll_chunk(request, timer, cx);
            if polled.is_pending() {
                scan.ahead(request.unreturned())?;
            }
            polled.map_err(Error::from)
        });
        let Some(data) = chunk.await? else { break };
        if body.len() + data.len() > limit {
            return Err(Error::BodyTooLarge { limit });
        }
        scan.chunk(&data)?;
        body.push(data);
    }
    let shape = scan.inspector.finish().map_err(Error::InvalidBody)?;
    Ok((body, shape, reader.has_waited()))
}

/// Scans a body in the order of its bytes.
struct Scan {
    inspector: BodyInspector,
    /// Bytes of the next chunk that were scanned before it was complete.
    ahead: usize,
}

impl Scan {
    /// Scans what has arrived of the next chunk. A chunk is up to a whole body buffer (128 KiB): a client
    /// that sends no JSON, and waits before it sends more, is told now.
    fn ahead(&mut self, arrived: &[u8]) -> Result<(), Error> {
        let fresh = arrived.get(self.ahead..).unwrap_or_default();
        self.ahead += fresh.len();
        self.feed(fresh)
    }

    fn chunk(&mut self, chunk: &[u8]) -> Result<(), Error> {
        let ahead = std::mem::take(&mut self.ahead);
        self.feed(chunk.get(ahead..).unwrap_or_default())
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.inspector.feed(bytes).map_err(Error::InvalidBody)
    }
}

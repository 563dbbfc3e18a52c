//! Reads the body of a client's request: bounded in size, time and memory, and scanned once, as it arrives.
//!
//! The bytes are kept as they arrived. What is in them is for [`wire`](crate::wire) to find and to change.
//! A body that cannot be accepted is an error at once; the rest of it is for
//! [`transport`](crate::transport) to discard, after the response.

use std::sync::Arc;

use crate::admission::{AdmissionHandle, Reservation};
use crate::error::Error;
use crate::http1::{BodyReadError, BodyTimeouts, RawHeaders, memory_of_body};
use crate::timer::Timer;
use crate::transport::{BodyReader, RequestBody, RequestBodyError};
use crate::wire::body::ClientBody;
use crate::wire::headers::unreadable_encoding;
use crate::wire::shape::{BodyInspector, BodyShape, Dialect, HashKey, InternalFields, MediaFinder};

/// A body of at most this size is read without waiting for memory, above the bound if need be: most come with
/// their head, and are in memory already.
pub(crate) const SMALL_BODY: usize = 16 << 10;
/// What a chunk costs besides its bytes: its handle (32 bytes), in a list that doubles when it is full. A
/// client that sends a byte at a time makes as many chunks.
pub(crate) const CHUNK_COST: usize = 64;
/// One part in this many of a body is reserved for the cost of its chunks, which is enough for 1 KiB each.
const CHUNK_COST_SHARE: usize = 16;

/// The bounds of one body.
pub(super) struct IntakeLimits<'a> {
    /// Largest body.
    pub(super) max: usize,
    pub(super) timeouts: BodyTimeouts,
    /// Where memory is reserved.
    pub(super) admission: &'a Arc<AdmissionHandle>,
    /// The prompt is hashed with it, if a policy looks at prompts or a load trace is written.
    pub(super) hash_key: Option<HashKey>,
    /// Its beginning is hashed with a key that is the same in every process besides.
    pub(super) stable_prefix: bool,
    pub(super) internal_fields: InternalFields,
    /// Images, audio and video are rejected: all encoders are down.
    pub(super) refuses_media: bool,
    /// A body that cannot be read is the server's to judge: it gets the same bytes.
    pub(super) is_lenient: bool,
}

/// A body that was read to its end.
pub(super) struct ReadBody {
    pub(super) body: ClientBody,
    pub(super) shape: BodyShape,
    /// Some of it was waited for; otherwise all of it was there with the head.
    pub(super) waited: bool,
    pub(super) reservation: Reservation,
}

/// Reads a whole request body. It is scanned if it is of a `dialect`.
pub(super) async fn read(
    headers: &RawHeaders,
    request: &mut impl RequestBody,
    dialect: Option<Dialect>,
    limits: IntakeLimits<'_>,
    timer: &mut Timer,
) -> Result<ReadBody, Error> {
    let encoding = unreadable_encoding(headers);
    if let Some(encoding) = encoding.filter(|_| !limits.is_lenient) {
        return Err(Error::BodyEncoded { encoding: String::from_utf8_lossy(encoding).into_owned() });
    }
    // Before a client that waits for it gets `100 Continue` (RFC 9110, section 10.1.1).
    let length = limits.check(request.content_length_hint())?;
    let mut memory = reserve(length, request, limits.admission).await?;
    let mut reader = BodyReader::new(limits.timeouts);
    let dialect = dialect.filter(|_| encoding.is_none());
    let inspector = dialect.map(|dialect| limits.inspector(dialect));
    // Boxed: few requests need it, and a second pass over the body.
    let media = dialect.filter(|_| limits.refuses_media).map(|dialect| Box::new(MediaFinder::new(dialect)));
    let mut scan = Scan { inspector, is_lenient: limits.is_lenient, media, ahead: 0 };
    let (mut body, mut chunks_cost) = (ClientBody::default(), 0);
    loop {
        let chunk = std::future::poll_fn(|cx| {
            let polled = reader.poll_chunk(request, timer, cx);
            if polled.is_pending() {
                scan.ahead(request.unreturned())?;
            }
            polled.map_err(Error::from)
        });
        let Some(data) = chunk.await? else { break };
        let length = limits.check((body.len() + data.len()) as u64)?;
        scan.chunk(&data)?;
        chunks_cost += CHUNK_COST;
        hold(length + chunks_cost, request, &mut memory).await?;
        body.push(data);
    }
    let shape = scan.finish()?;
    Ok(ReadBody { body, shape, waited: reader.has_waited(), reservation: memory })
}

impl IntakeLimits<'_> {
    fn inspector(&self, dialect: Dialect) -> BodyInspector {
        let mut inspector = BodyInspector::new(dialect).with_internal_fields(self.internal_fields);
        if let Some(key) = self.hash_key {
            inspector = inspector.with_prompt(key);
        }
        if self.stable_prefix {
            inspector = inspector.with_stable_prefix();
        }
        inspector
    }

    fn check(&self, length: u64) -> Result<usize, Error> {
        check_length(length, self.max, self.admission.controller().memory().limit())
    }
}

/// Rejects a body that is too large for this router, also if it were alone.
pub(crate) fn check_length(
    length: u64,
    max_payload_size: usize,
    max_buffered: usize,
) -> Result<usize, Error> {
    let (limit, option) = match max_payload_size <= max_buffered {
        true => (max_payload_size, "--max-payload-size"),
        false => (max_buffered, "--max-buffered-bytes"),
    };
    usize::try_from(length)
        .ok()
        .filter(|length| *length <= limit)
        .ok_or(Error::BodyTooLarge { limit, option })
}

/// Reserves memory for a body of known length, all of it: of many bodies that are read in part, each might
/// wait for what the others hold.
async fn reserve(
    length: usize,
    request: &mut impl RequestBody,
    admission: &Arc<AdmissionHandle>,
) -> Result<Reservation, Error> {
    let mut memory = Reservation::empty(admission);
    let bytes = memory_of_body(length) + length / CHUNK_COST_SHARE + SMALL_BODY / CHUNK_COST_SHARE;
    match length {
        ..=SMALL_BODY => memory.charge(bytes),
        _ => wait_for_memory(bytes, request, &mut memory).await?,
    }
    Ok(memory)
}

/// Reserves what a body takes beyond what is reserved, which is so for a body of unknown length.
async fn hold(bytes: usize, request: &mut impl RequestBody, memory: &mut Reservation) -> Result<(), Error> {
    // One that holds all there is has no one to wait for.
    let more = bytes.min(memory.limit()).saturating_sub(memory.bytes());
    match memory.bytes() {
        _ if more == 0 => {}
        _ if bytes <= SMALL_BODY => memory.charge(more),
        // It holds next to nothing, and may wait. What has arrived is in memory already.
        ..=SMALL_BODY => wait_for_memory(more, request, memory).await?,
        _ => memory.try_grow(more)?,
    }
    Ok(())
}

/// Waits for memory, unless the client closes the connection.
pub(crate) async fn wait_for_memory(
    bytes: usize,
    request: &mut impl RequestBody,
    memory: &mut Reservation,
) -> Result<(), Error> {
    tokio::select! {
        biased;
        grown = memory.grow(bytes) => Ok(grown?),
        () = request.disconnected() => {
            Err(Error::BodyRead(RequestBodyError::Http1(BodyReadError::Closed)))
        }
    }
}

/// Scans a body in the order of its bytes.
struct Scan {
    /// `None`: nothing is looked for, or no more, as the body is not what was expected.
    inspector: Option<BodyInspector>,
    is_lenient: bool,
    media: Option<Box<MediaFinder>>,
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
        let Some(inspector) = &mut self.inspector else { return Ok(()) };
        match inspector.feed(bytes) {
            Err(_) if self.is_lenient => self.inspector = None,
            scanned => scanned.map_err(Error::InvalidBody)?,
        }
        let Some(media) = &mut self.media else { return Ok(()) };
        media.feed(bytes);
        // At once: the rest of 50 MB need not be sent.
        if media.found() { Err(Error::NoEncoder) } else { Ok(()) }
    }

    fn finish(self) -> Result<BodyShape, Error> {
        let Some(inspector) = self.inspector else { return Ok(BodyShape::default()) };
        match inspector.finish() {
            Err(_) if self.is_lenient => Ok(BodyShape::default()),
            shape => shape.map_err(Error::InvalidBody),
        }
    }
}

//! Reads the body of a request that servers get as it is, at an endpoint that does not generate: bounded in
//! size, time and memory.
//!
//! Nobody looks into it. Generation requests are read by `proxy`, whose bounds these are, too.

use std::future::poll_fn;
use std::sync::Arc;

use crate::admission::{AdmissionHandle, Reservation};
use crate::error::Error;
use crate::http1::OutgoingBody;
use crate::proxy::RequestLimits;
use crate::proxy::intake::{CHUNK_COST, SMALL_BODY, check_length, wait_for_memory};
use crate::timer::Timer;
use crate::transport::{BodyReader, RequestBody};

/// Reads the whole body. Its memory is reserved until the reservation is dropped.
pub(super) async fn read(
    request: &mut impl RequestBody,
    limits: &RequestLimits,
    admission: &Arc<AdmissionHandle>,
    timer: &mut Timer,
) -> Result<(OutgoingBody, Reservation), Error> {
    let mut memory = Reservation::empty(admission);
    let most = limits.max_payload_size;
    let announced = check_length(request.content_length_hint(), most, memory.limit())?;
    reserve(announced, request, &mut memory).await?;
    let mut reader = BodyReader::new(limits.body_timeouts);
    let (mut pieces, mut length, mut held) = (Vec::new(), 0, 0);
    while let Some(chunk) = poll_fn(|cx| reader.poll_chunk(request, timer, cx)).await? {
        length = check_length(length as u64 + chunk.len() as u64, most, memory.limit())?;
        held += chunk.len() + CHUNK_COST;
        // One that holds all there is has no one to wait for.
        let more = held.min(memory.limit()).saturating_sub(memory.bytes());
        match held <= SMALL_BODY {
            true => memory.charge(more),
            false => memory.try_grow(more)?,
        }
        pieces.push(chunk);
    }
    Ok((OutgoingBody::new(pieces), memory))
}

/// Reserves memory for a body of known length, before it is read: of many bodies that are read in part, each
/// might wait for what the others hold.
async fn reserve(
    length: usize,
    request: &mut impl RequestBody,
    memory: &mut Reservation,
) -> Result<(), Error> {
    if length <= SMALL_BODY {
        memory.charge(length);
        return Ok(());
    }
    wait_for_memory(length, request, memory).await
}

//! The response for several samples that is no stream: the bodies of all copies, held until they are merged.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use hyper::header::{CONTENT_LENGTH, HeaderValue};

use super::super::exchange::UpstreamResponse;
use super::super::merge::{MAX_INLINE, join};
use super::super::relay::Relay;
use super::super::request::ReadRequest;
use super::copies::{Copies, CopyEvent};
use super::decision::{SampleAction, SampleDecision};
use crate::admission::{AdmissionHandle, Reservation};
use crate::error::{Cause, Error};
use crate::wire::client_response::ClientResponseHead;
use crate::wire::samples::merge_bodies;
use crate::wire::segments::SegmentedBytes;

/// The responses of all copies.
pub(super) struct WholeResponses {
    request: Arc<ReadRequest>,
    copies: Copies,
    decision: SampleDecision,
    /// The first copy's, which is that of the merged response.
    head: ClientResponseHead,
    /// By copy.
    bodies: Vec<Vec<Bytes>>,
    /// Of all bodies. Dropped after them.
    memory: Reservation,
}

impl WholeResponses {
    pub(super) fn new(request: &Arc<ReadRequest>, copies: Copies, admission: &Arc<AdmissionHandle>) -> Self {
        let count = copies.count();
        Self {
            request: Arc::clone(request),
            copies,
            decision: SampleDecision::new(count, false),
            head: ClientResponseHead::default(),
            bodies: vec![Vec::new(); count],
            memory: Reservation::empty(admission),
        }
    }

    /// Waits for all responses and merges them. The first that fails, or is an error, is the response
    /// instead: the others are dropped with this.
    pub(super) async fn collect(mut self) -> Result<UpstreamResponse, Error> {
        loop {
            let (copy, event) = poll_fn(|cx| self.copies.poll_event(cx)).await;
            match self.take(copy, event) {
                Ok(None) if self.decision.is_over() => return self.merge().await,
                Ok(None) => {}
                Ok(Some(response)) => {
                    self.copies.set_decisive(copy);
                    return Ok(response);
                }
                Err(error) => {
                    self.copies.set_decisive(copy);
                    return Err(error);
                }
            }
        }
    }

    /// Takes an event of a copy. Returns a response that is the client's as it is.
    fn take(&mut self, copy: usize, event: CopyEvent) -> Result<Option<UpstreamResponse>, Error> {
        let action = self.decision.on(copy, event.kind());
        match event {
            CopyEvent::Responded(response) if action == SampleAction::PassOn => return Ok(Some(response)),
            CopyEvent::Responded(response) => {
                let head = self.copies.accept(copy, response)?;
                if copy == 0 {
                    self.head = head;
                }
            }
            CopyEvent::Failed(error) => return Err(error),
            CopyEvent::Data(data) => self.hold(copy, &data)?,
            CopyEvent::Ended => {}
        }
        Ok(None)
    }

    /// Counts what it holds also above the bound of all requests, as a merge of logprobs does: it is under
    /// way.
    fn hold(&mut self, copy: usize, data: &SegmentedBytes) -> Result<(), Error> {
        let limit = self.request.limits.max_merge_size;
        self.memory.charge(data.len());
        if self.memory.bytes() > limit {
            return Err(self.copies.fail(copy, Cause::TooLarge { limit }));
        }
        self.bodies[copy].extend(data.slices().iter().cloned());
        Ok(())
    }

    async fn merge(mut self) -> Result<UpstreamResponse, Error> {
        let (dialect, is_small) = (self.request.dialect, self.memory.bytes() <= MAX_INLINE);
        let bodies = std::mem::take(&mut self.bodies);
        let merge = move || merge_bodies(dialect, bodies.into_iter().map(join).collect());
        let merged = if is_small {
            merge()
        } else {
            let merging = tokio::task::spawn_blocking(merge);
            merging.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
        };
        let body = merged.map_err(|reason| self.copies.error_of(0, Cause::Unmergeable(reason)))?;
        self.head.set(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let body = Relay::buffered(body).with_memory(Some(self.memory)).into();
        Ok(UpstreamResponse { head: self.head, body })
    }
}

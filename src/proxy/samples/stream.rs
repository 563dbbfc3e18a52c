//! The body of a stream for several samples: the events of all copies, as they come.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};

use super::super::relay::MergedStream;
use super::super::request::ReadRequest;
use super::copies::{Copies, CopyEvent};
use super::decision::{CopyEventKind, SampleAction, SampleDecision};
use crate::error::{Cause, Error};
use crate::wire::samples::{MergeProgress, StreamMergeError, StreamMerger};
use crate::wire::segments::SegmentedBytes;

/// From how many bytes on events are passed on before further ones are looked for.
const MAX_FRAME: usize = 64 << 10;

/// The events of all copies.
pub(super) struct SampleStream {
    copies: Copies,
    decision: SampleDecision,
    merger: StreamMerger,
    /// Whole events that were not returned yet.
    events: BytesMut,
    end: Option<End>,
}

/// What follows the last event.
enum End {
    Clean,
    Failed(Error),
}

impl SampleStream {
    pub(super) fn new(request: &Arc<ReadRequest>, copies: Copies, decision: SampleDecision) -> Self {
        let merger = StreamMerger::new(request.dialect, copies.count(), request.limits.max_merge_size);
        Self { copies, decision, merger, events: BytesMut::new(), end: None }
    }

    /// Takes an event of a copy.
    fn take(&mut self, copy: usize, event: CopyEvent) {
        let action = self.decision.on(copy, event.kind());
        let merged = match event {
            CopyEvent::Responded(response) if action == SampleAction::Fail => {
                Err(self.copies.error_of(copy, Cause::LateRefusal(response.head.status().as_u16())))
            }
            CopyEvent::Responded(response) => {
                self.copies.accept_stream(copy, response).map(|_| MergeProgress::Open)
            }
            CopyEvent::Failed(error) => Err(error),
            CopyEvent::Data(data) => self.push(copy, &data),
            CopyEvent::Ended => {
                let ended = self.merger.end(copy, &mut self.events);
                ended.map_err(|error| self.copies.fail(copy, cause_of(error)))
            }
        };
        match merged {
            // Its servers may have said `[DONE]`, and are still to end their responses.
            Ok(MergeProgress::Open | MergeProgress::Complete) if action != SampleAction::Complete => {}
            Ok(MergeProgress::Open | MergeProgress::Complete) => self.finish(copy, End::Clean),
            Ok(MergeProgress::Failed) => {
                self.decision.on(copy, CopyEventKind::ErrorEvent);
                self.finish(copy, End::Clean);
            }
            Err(error) => {
                self.decision.on(copy, CopyEventKind::Failed);
                self.finish(copy, End::Failed(error));
            }
        }
    }

    fn push(&mut self, copy: usize, data: &SegmentedBytes) -> Result<MergeProgress, Error> {
        let mut progress = MergeProgress::Open;
        for slice in data.slices() {
            let pushed = self.merger.push(copy, slice, &mut self.events);
            progress = pushed.map_err(|error| self.copies.fail(copy, cause_of(error)))?;
        }
        Ok(progress)
    }

    /// Drops all copies. Nothing follows but what was read, and this.
    fn finish(&mut self, copy: usize, end: End) {
        debug_assert!(self.decision.is_over(), "a stream ends once");
        if matches!(end, End::Failed(_)) {
            self.copies.set_decisive(copy);
        }
        self.copies.clear();
        self.end = Some(end);
    }
}

fn cause_of(error: StreamMergeError) -> Cause {
    match error {
        StreamMergeError::EventTooLarge(error) => Cause::TooLarge { limit: error.limit },
        StreamMergeError::Malformed(error) => Cause::Unmergeable(error.reason),
    }
}

impl MergedStream for SampleStream {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        while self.end.is_none() && self.events.len() < MAX_FRAME {
            let Poll::Ready((copy, event)) = self.copies.poll_event(cx) else { break };
            self.take(copy, event);
        }
        if !self.events.is_empty() {
            return Poll::Ready(Some(Ok(self.events.split().freeze())));
        }
        match self.end.replace(End::Clean) {
            Some(End::Failed(error)) => Poll::Ready(Some(Err(error))),
            Some(End::Clean) => Poll::Ready(None),
            None => {
                self.end = None;
                Poll::Pending
            }
        }
    }

    fn is_ended(&self) -> bool {
        self.events.is_empty() && matches!(self.end, Some(End::Clean))
    }
}

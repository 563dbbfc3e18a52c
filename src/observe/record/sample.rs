//! What is recorded of one sample: the attempts to have it generated, and the legs of the last one.
//!
//! Nearly every request has one sample, which is a part of its [`Record`](super::Record). One with several
//! (`n` > 1) has a [`CopyRecord`] for each, which completes nothing: when all of them have ended, the record
//! goes on with that of the copy that decided how the request ended, and the attempts of all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::timeline::{Phase, Timeline};
#[cfg(feature = "otel")]
use super::trace::Trace;
use super::{Attempt, Recorder, RequestId, RetryReason};
use crate::error::Error;
use crate::upstream::{Backend, Role, ServerPair};

/// The attempts of one sample.
pub(crate) struct SampleRecord {
    pub(super) recorder: Arc<Recorder>,
    /// Shared with the legs, which reach phases.
    pub(super) timeline: Arc<Timeline>,
    pub(super) pair: Option<ServerPair>,
    pub(super) attempts: u32,
    pub(super) retries: Vec<RetryReason>,
    /// Only of a copy.
    watch: Option<Arc<CopyWatch>>,
    #[cfg(feature = "otel")]
    pub(super) trace: Option<Box<Trace>>,
}

impl SampleRecord {
    pub(super) fn new(recorder: Arc<Recorder>, started_at: Instant) -> Self {
        Self {
            recorder,
            timeline: Arc::new(Timeline::new(started_at)),
            pair: None,
            attempts: 0,
            retries: Vec::new(),
            watch: None,
            #[cfg(feature = "otel")]
            trace: None,
        }
    }

    /// The id of the request.
    pub(crate) fn request_id(&self) -> Option<&RequestId> {
        self.timeline.request_id.as_ref()
    }

    /// Records that it is sent to a pair, for the first time or again.
    pub(crate) fn begin_attempt<'a>(&'a mut self, pair: &'a ServerPair) -> Attempt<'a> {
        self.attempts += 1;
        self.pair = Some(pair.clone());
        self.recorder.observers.iter().for_each(|observer| observer.pair_selected(pair));
        self.timeline.begin_attempt();
        if let Some(watch) = &self.watch {
            watch.selected(pair);
        }
        #[cfg(feature = "otel")]
        let trace_headers = match &mut self.trace {
            Some(trace) => trace.begin_attempt(pair, self.timeline.started_at.elapsed()),
            None => Default::default(),
        };
        Attempt {
            pair,
            timeline: &self.timeline,
            #[cfg(feature = "otel")]
            trace_headers,
        }
    }

    /// Records that a backend got it again, on a new connection in place of a stale one.
    pub(crate) fn add_resend(&mut self, backend: &Arc<Backend>) {
        self.retries.push(RetryReason::stale(backend));
    }

    /// Records that it will be sent to another pair because of this backend: of an error, or else of its
    /// status.
    pub(crate) fn add_retry(&mut self, backend: &Arc<Backend>, error: Option<&Error>) {
        self.retries.push(RetryReason::new(backend, error));
    }

    /// Goes on with the attempts of all copies, and the times and servers of the one that decided.
    pub(super) fn absorb(&mut self, copies: &CopiesRecord) {
        let mut ended = copies.lock();
        let decisive = ended.decisive;
        let Some(at) = ended.samples.iter().position(|(number, _)| *number == decisive) else { return };
        let (_, mut sample) = ended.samples.swap_remove(at);
        for phase in [Phase::BodyRead, Phase::FirstByteToClient] {
            // Those that are the client's, whatever servers do.
            if let Some(at) = self.timeline.moment_of(phase) {
                sample.timeline.mark_at(phase, at);
            }
        }
        for (_, other) in std::mem::take(&mut ended.samples) {
            sample.attempts += other.attempts;
            sample.retries.extend(other.retries);
            #[cfg(feature = "otel")]
            if let (Some(trace), Some(others)) = (&mut sample.trace, other.trace) {
                trace.legs.extend(others.legs);
            }
        }
        *self = sample;
    }
}

/// The records of all copies of one request, as they end.
pub(crate) struct CopiesRecord {
    pub(super) count: u32,
    ended: Mutex<EndedCopies>,
}

#[derive(Default)]
struct EndedCopies {
    /// With the number of the copy.
    samples: Vec<(usize, SampleRecord)>,
    /// The copy whose servers and times are those of the request.
    decisive: usize,
}

impl CopiesRecord {
    pub(super) fn new(count: u32) -> Arc<Self> {
        Arc::new(Self { count, ended: Mutex::default() })
    }

    /// The request ends as this copy did. Otherwise it has the times of the first one.
    pub(crate) fn set_decisive(&self, copy: usize) {
        self.lock().decisive = copy;
    }

    fn lock(&self) -> MutexGuard<'_, EndedCopies> {
        // Poisoning is ignored: no step in between can panic.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record of one copy, on the way. When it is dropped, its request has it.
pub(crate) struct CopyRecord {
    /// `None` only while it is dropped.
    sample: Option<SampleRecord>,
    watch: Arc<CopyWatch>,
    number: usize,
    of: Arc<CopiesRecord>,
}

impl CopyRecord {
    /// A copy of the request that `sample` is of.
    pub(super) fn new(sample: &SampleRecord, number: usize, of: &Arc<CopiesRecord>) -> Self {
        let mut timeline = Timeline::new(sample.timeline.started_at);
        timeline.request_id.clone_from(&sample.timeline.request_id);
        if let Some(at) = sample.timeline.moment_of(Phase::BodyRead) {
            timeline.mark_at(Phase::BodyRead, at);
        }
        let timeline = Arc::new(timeline);
        let watch = Arc::new(CopyWatch { timeline: Arc::clone(&timeline), pair: Mutex::default() });
        let sample = SampleRecord {
            recorder: Arc::clone(&sample.recorder),
            timeline,
            pair: None,
            attempts: 0,
            retries: Vec::new(),
            watch: Some(Arc::clone(&watch)),
            #[cfg(feature = "otel")]
            trace: sample.trace.as_deref().map(|trace| Box::new(trace.of_copy())),
        };
        Self { sample: Some(sample), watch, number, of: Arc::clone(of) }
    }

    pub(crate) fn sample(&mut self) -> &mut SampleRecord {
        self.sample.as_mut().expect("it is not dropped")
    }

    /// What can be seen of the copy from outside of its own future.
    pub(crate) fn watch(&self) -> Arc<CopyWatch> {
        Arc::clone(&self.watch)
    }
}

impl Drop for CopyRecord {
    fn drop(&mut self) {
        if let Some(sample) = self.sample.take() {
            self.of.lock().samples.push((self.number, sample));
        }
    }
}

/// How far a copy has come.
pub(crate) struct CopyWatch {
    timeline: Arc<Timeline>,
    /// Of the last attempt.
    pair: Mutex<Option<ServerPair>>,
}

impl CopyWatch {
    fn selected(&self, pair: &ServerPair) {
        *self.pair.lock().unwrap_or_else(PoisonError::into_inner) = Some(pair.clone());
    }

    fn pair(&self) -> Option<ServerPair> {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many bytes of the prompt its prefill server is not believed to have. `None` before it has one.
    pub(crate) fn missing_bytes(&self) -> Option<u64> {
        let pair = self.pair()?;
        let by = pair.selected_by(Role::Prefill);
        Some(by.prompt_bytes.saturating_sub(by.cached))
    }

    /// Whether its prefill server has the whole prompt: it has said so, or decode has begun.
    pub(crate) fn has_prompt(&self) -> bool {
        self.timeline.has_reached(Phase::PrefillEnd) || self.timeline.has_reached(Phase::DecodeByte)
    }

    /// The server of the leg that has failed, or else decode.
    pub(crate) fn server(&self) -> Option<Arc<Backend>> {
        let pair = self.pair()?;
        Some(Arc::clone(match self.timeline.failed_leg() {
            Some(Role::Prefill) => pair.prefill(),
            _ => pair.decode(),
        }))
    }
}

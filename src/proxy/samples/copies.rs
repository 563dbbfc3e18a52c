//! The copies of one request, polled together: when each is sent, and what it says.
//!
//! Each wake polls all copies, which are few (`--max-n`). What their events mean is for `decision`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Body;
use tokio::time::Instant;

use super::super::exchange::{AdmittedPair, UpstreamResponse};
use super::super::relay::Relay;
use super::super::request::{Proxy, ReadRequest, SamplePlan};
use super::decision::CopyEventKind;
use crate::admission::BackendCaps;
use crate::error::{Cause, Error};
use crate::http1::{MalformedMessage, RawHeaders};
use crate::observe::record::{CopiesRecord, CopyRecord, CopyWatch};
use crate::timer::Timer;
use crate::wire::client_response::ClientResponseHead;
use crate::wire::headers;
use crate::wire::segments::SegmentedBytes;
use crate::wire::shape::Prompt;

/// From how many bytes of a prompt that its prefill server is not believed to have the other copies wait
/// until it has them: sent at once, they would all compute the same. Of less than a block no policy knows who
/// has it, and no server takes long for it.
const MIN_AWAITED_BYTES: u64 = Prompt::BLOCK_BYTES as u64;

/// The longest wait for the first copy's prompt. It ends with the first copy's failure, and with decode's
/// first byte; this is for a prefill server that computes longer than prompts take.
const MAX_PROMPT_WAIT: Duration = Duration::from_secs(30);

/// How often a copy that waits for capacity looks for it beside the ends of its own request's copies, as the
/// head of the admission queue does.
const CAPACITY_RECHECK: Duration = Duration::from_millis(50);

/// What has happened to a copy.
pub(super) enum CopyEvent {
    /// The start of a response, whatever its status.
    Responded(UpstreamResponse),
    Failed(Error),
    Data(SegmentedBytes),
    Ended,
}

impl CopyEvent {
    pub(super) fn kind(&self) -> CopyEventKind {
        match self {
            Self::Responded(response) if response.head.status().is_success() => CopyEventKind::Accepted,
            Self::Responded(_) => CopyEventKind::Refused,
            Self::Failed(_) => CopyEventKind::Failed,
            Self::Data(_) => CopyEventKind::Data,
            Self::Ended => CopyEventKind::Ended,
        }
    }
}

/// The copies of one request.
pub(super) struct Copies {
    states: Vec<State>,
    /// The copy that is polled first: each in turn, so that a fast one does not hide the others.
    turn: usize,
    watches: Vec<Arc<CopyWatch>>,
    record: Arc<CopiesRecord>,
    /// `None` when all are sent: the request's body is dropped then.
    unsent: Option<Unsent>,
}

type Sending = dyn Future<Output = Result<UpstreamResponse, Error>> + Send;

enum State {
    Waiting,
    /// Until its response starts.
    Sent(Pin<Box<Sending>>),
    /// Its response has started, and is looked at.
    Responded,
    Responding(Box<Relay>),
    Ended,
}

/// What the copies are sent with.
struct Unsent {
    proxy: Proxy,
    request: Arc<ReadRequest>,
    /// Of those that wait, the last first.
    waiting: Vec<WaitingCopy>,
    /// The first copy's, if requests in flight are limited.
    admitted: Option<AdmittedPair>,
    /// When the first copy's prompt is waited for no more.
    prompt_deadline: Instant,
    timer: Timer,
}

struct WaitingCopy {
    plan: SamplePlan,
    record: CopyRecord,
}

impl Copies {
    pub(super) fn new(
        proxy: &Proxy,
        request: &Arc<ReadRequest>,
        admitted: Option<AdmittedPair>,
        (record, records): (Arc<CopiesRecord>, Vec<CopyRecord>),
        rids: Vec<Option<String>>,
        headers: &RawHeaders,
    ) -> Self {
        let watches = records.iter().map(CopyRecord::watch).collect::<Vec<_>>();
        let plan = |rid| SamplePlan::of_copy(request, rid, headers);
        let copies = records.into_iter().zip(rids);
        let waiting = copies.map(|(record, rid)| WaitingCopy { plan: plan(rid), record }).rev().collect();
        let unsent = Unsent {
            proxy: proxy.clone(),
            request: Arc::clone(request),
            waiting,
            admitted,
            prompt_deadline: Instant::now() + MAX_PROMPT_WAIT,
            timer: Timer::default(),
        };
        let states = watches.iter().map(|_| State::Waiting).collect();
        Self { states, turn: 0, watches, record, unsent: Some(unsent) }
    }

    pub(super) fn count(&self) -> usize {
        self.states.len()
    }

    /// The request ends as this copy does.
    pub(super) fn set_decisive(&self, copy: usize) {
        self.record.set_decisive(copy);
    }

    /// Drops all copies, which closes their legs.
    pub(super) fn clear(&mut self) {
        self.unsent = None;
        self.states.iter_mut().for_each(|state| *state = State::Ended);
    }

    /// Takes the response of a copy, whose body is polled from now on. Returns its head.
    pub(super) fn accept(
        &mut self,
        copy: usize,
        response: UpstreamResponse,
    ) -> Result<ClientResponseHead, Error> {
        let UpstreamResponse { head, body } = response;
        self.states[copy] = State::Responding(body.into_part());
        // The servers were asked for plain text.
        let is_readable = match &head {
            ClientResponseHead::Upstream(head) => headers::unreadable_encoding(&head.headers).is_none(),
            ClientResponseHead::Own(_) => true,
        };
        if !is_readable {
            return Err(self.fail(copy, Cause::Unmergeable("the response is compressed")));
        }
        Ok(head)
    }

    /// The same of a response that must be a stream.
    pub(super) fn accept_stream(
        &mut self,
        copy: usize,
        response: UpstreamResponse,
    ) -> Result<ClientResponseHead, Error> {
        let is_stream = matches!(&response.head, ClientResponseHead::Upstream(head) if head.is_event_stream);
        let head = self.accept(copy, response)?;
        if !is_stream {
            return Err(self.fail(copy, Cause::BadResponse(MalformedMessage("it is no stream of events"))));
        }
        Ok(head)
    }

    /// Fails a copy whose response has started, for a reason that was found in it.
    pub(super) fn fail(&mut self, copy: usize, cause: Cause) -> Error {
        match std::mem::replace(&mut self.states[copy], State::Ended) {
            State::Responding(mut body) => match body.fail(cause) {
                Ok(error) => error,
                // A body that is held as a whole has no legs any more.
                Err(cause) => self.error_of(copy, cause),
            },
            _ => self.error_of(copy, cause),
        }
    }

    /// An error of the server that has decided a copy's response.
    pub(super) fn error_of(&self, copy: usize, cause: Cause) -> Error {
        let server = self.watches[copy].server();
        server.map_or(Error::Internal, |server| Error::upstream(&server, cause))
    }

    /// The next event of any copy.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<(usize, CopyEvent)> {
        loop {
            if let Err((copy, error)) = self.send_waiting(cx) {
                return Poll::Ready((copy, CopyEvent::Failed(error)));
            }
            let held_back = self.awaits_prompt();
            for step in 0..self.count() {
                let copy = (self.turn + step) % self.count();
                if let Poll::Ready(event) = self.poll_copy(copy, cx) {
                    self.turn = copy + 1;
                    return Poll::Ready((copy, event));
                }
            }
            // What the first copy has just read may be what the others wait for.
            if !held_back || self.awaits_prompt() {
                return Poll::Pending;
            }
        }
    }

    /// Sends the copies that wait, as far as they may be sent now. The error is that of one of them.
    fn send_waiting(&mut self, cx: &mut Context<'_>) -> Result<(), (usize, Error)> {
        while let Some(copy) = self.next_waiting() {
            let awaits_prompt = copy > 0 && self.awaits_prompt();
            let is_alone = self.states.iter().all(|state| matches!(state, State::Waiting | State::Ended));
            let Some(unsent) = &mut self.unsent else { break };
            if awaits_prompt && unsent.timer.poll_until(unsent.prompt_deadline, cx).is_pending() {
                return Ok(());
            }
            let Some(admitted) = unsent.take_pair(copy, is_alone).map_err(|error| (copy, error))? else {
                // Only for its wake: whatever wakes the task, capacity is looked for again.
                let _ = unsent.timer.poll_until(Instant::now() + CAPACITY_RECHECK, cx);
                return Ok(());
            };
            let Some(next) = unsent.waiting.pop() else { break };
            self.states[copy] = State::Sent(unsent.send(next, admitted));
        }
        self.unsent = None;
        Ok(())
    }

    /// The number of the first copy that is not sent.
    fn next_waiting(&self) -> Option<usize> {
        let waiting = self.unsent.as_ref()?.waiting.len();
        (waiting > 0).then(|| self.count() - waiting)
    }

    /// Whether the other copies wait for the first one's prompt.
    fn awaits_prompt(&self) -> bool {
        let Some(unsent) = &self.unsent else { return false };
        let first = &self.watches[0];
        // It is selected when it is polled first.
        let is_long = first.missing_bytes().is_none_or(|bytes| bytes >= MIN_AWAITED_BYTES);
        let is_over = matches!(self.states[0], State::Ended) || Instant::now() >= unsent.prompt_deadline;
        is_long && !is_over && !first.has_prompt() && unsent.gains_by_prompt()
    }

    fn poll_copy(&mut self, copy: usize, cx: &mut Context<'_>) -> Poll<CopyEvent> {
        let event = match &mut self.states[copy] {
            State::Sent(sending) => match std::task::ready!(sending.as_mut().poll(cx)) {
                Ok(response) => CopyEvent::Responded(response),
                Err(error) => CopyEvent::Failed(error),
            },
            State::Responding(body) => match std::task::ready!(Pin::new(&mut **body).poll_frame(cx)) {
                Some(Ok(frame)) => CopyEvent::Data(frame.into_data().unwrap_or_default()),
                Some(Err(error)) => CopyEvent::Failed(error),
                None => CopyEvent::Ended,
            },
            State::Waiting | State::Responded | State::Ended => return Poll::Pending,
        };
        match event {
            CopyEvent::Responded(_) => self.states[copy] = State::Responded,
            // Its legs are released before another copy looks for capacity.
            CopyEvent::Failed(_) | CopyEvent::Ended => self.states[copy] = State::Ended,
            CopyEvent::Data(_) => {}
        }
        Poll::Ready(event)
    }
}

impl Unsent {
    /// Whether a prompt that one prefill server has is of use to other copies: they would go there as well.
    fn gains_by_prompt(&self) -> bool {
        self.proxy.fleet.now().keeps_prompts_together()
    }

    /// What the copy is admitted with: the outer `None` is not now.
    ///
    /// The request has been admitted, and its copies do not join the queue, where they could wait for
    /// requests that wait for it. A copy is sent while its servers have capacity; if they have none, whenever
    /// another copy of the request has ended. Each of those ends by itself, whether others are sent or not,
    /// so nothing waits in a circle. A request of which no copy runs keeps going, above the cap, as a retry
    /// does: else those that come later could take each place before it.
    fn take_pair(&mut self, copy: usize, is_alone: bool) -> Result<Option<Option<AdmittedPair>>, Error> {
        if copy == 0 {
            return Ok(Some(self.admitted.take()));
        }
        let admission = &self.proxy.admission;
        let caps = admission.controller().caps();
        if caps == BackendCaps::NONE {
            return Ok(Some(None));
        }
        let fleet = self.proxy.fleet.now();
        let acquire = |caps| fleet.acquire_pair(caps, admission).map_err(Error::NoServer);
        let permits = match acquire(caps)? {
            None if is_alone => acquire(BackendCaps::NONE)?,
            permits => permits,
        };
        Ok(permits.map(|permits| Some(AdmittedPair { permits, admission: Arc::clone(admission) })))
    }

    /// Sends a copy as any other request.
    fn send(&self, copy: WaitingCopy, admitted: Option<AdmittedPair>) -> Pin<Box<Sending>> {
        let (proxy, request) = (self.proxy.clone(), Arc::clone(&self.request));
        Box::pin(async move {
            let WaitingCopy { plan, mut record } = copy;
            let mut timer = Timer::default();
            proxy.dispatch(&request, &plan, admitted, None, record.sample(), &mut timer).await
        })
    }
}

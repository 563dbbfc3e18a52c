//! What a merge needs besides the legs: what prefill alone knows, called its lists here, read from its whole
//! response.
//!
//! How lists are found and spliced is for [`wire`](crate::wire); which response is merged with which, for
//! [`leg_pair`](super::leg_pair).

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::error::Error;
use crate::wire::logprobs::{Merge, PromptLogprobs};
use crate::wire::segments::SegmentedBytes;

/// Largest body that is parsed in the worker's own thread. Lists are parsed at 180 MB/s and more, so this
/// takes at most 1.5 ms; 90 MB took half a second, in which no other request of the worker went on.
pub(super) const MAX_INLINE: usize = 256 << 10;

/// Prefill's part of a merged response.
pub(super) struct PrefillLists {
    merge: Merge,
    /// Only late events of decode's stream need them.
    is_late: bool,
    state: State,
}

enum State {
    Awaited,
    Parsing(JoinHandle<Parsed>),
    /// Or the reason why the response has none.
    Parsed(Parsed),
    /// Prefill has failed beside decode's response, which may not need the lists.
    Failed(Error),
    /// They are in use.
    Taken,
}

type Parsed = Result<PromptLogprobs, &'static str>;

impl PrefillLists {
    pub(super) fn new(merge: Merge, is_late: bool) -> Self {
        Self { merge, is_late, state: State::Awaited }
    }

    pub(super) fn is_late(&self) -> bool {
        self.is_late
    }

    pub(super) fn is_awaited(&self) -> bool {
        matches!(self.state, State::Awaited)
    }

    /// Begins to read prefill's whole body.
    pub(super) fn begin(&mut self, pieces: Vec<Bytes>) {
        let (merge, is_small) = (self.merge, length(&pieces) <= MAX_INLINE);
        let read = move || PromptLogprobs::read(merge, &join(pieces)).map_err(|error| error.reason);
        self.state =
            if is_small { State::Parsed(read()) } else { State::Parsing(tokio::task::spawn_blocking(read)) };
    }

    /// Waits until the lists are read. An error says why there are none.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        if let State::Parsing(parsing) = &mut self.state {
            let parsed = ready!(Pin::new(parsing).poll(cx));
            self.state = State::Parsed(parsed.unwrap_or(Err("the response could not be parsed")));
        }
        match &self.state {
            State::Parsed(parsed) => Poll::Ready(parsed.as_ref().map(|_| ()).map_err(|reason| *reason)),
            State::Awaited | State::Parsing(_) | State::Failed(_) | State::Taken => Poll::Pending,
        }
    }

    /// The lists, once they are read.
    pub(super) fn into_lists(self) -> Option<PromptLogprobs> {
        match self.state {
            State::Parsed(parsed) => parsed.ok(),
            State::Awaited | State::Parsing(_) | State::Failed(_) | State::Taken => None,
        }
    }

    /// Keeps why there will be no lists, until decode's response needs them.
    pub(super) fn fail(&mut self, error: Error) {
        self.state = State::Failed(error);
    }

    /// Takes the lists, or why there are none. `None` while they are awaited.
    pub(super) fn take(&mut self) -> Option<Result<PromptLogprobs, Error>> {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Parsed(Ok(lists)) => Some(Ok(lists)),
            State::Failed(error) => Some(Err(error)),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Why there are no lists, if decode's response did without them.
    pub(super) fn into_failure(self) -> Option<Error> {
        match self.state {
            State::Failed(error) => Some(error),
            _ => None,
        }
    }
}

/// Splices the lists into decode's whole body.
pub(super) async fn splice(lists: PromptLogprobs, pieces: Vec<Bytes>) -> SegmentedBytes {
    let is_small = length(&pieces) <= MAX_INLINE;
    let splice = move || lists.splice_body(&join(pieces));
    if is_small {
        return splice();
    }
    tokio::task::spawn_blocking(splice)
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

fn length(pieces: &[Bytes]) -> usize {
    pieces.iter().map(Bytes::len).sum()
}

/// The pieces as one. Most bodies arrive with one read and are not copied.
pub(super) fn join(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 { pieces.remove(0) } else { pieces.concat().into() }
}

//! What an event of a copy means for its request: the only place that decides it.
//!
//! One response is made of all copies, so one failure fails all. As in `proxy::decision` there is no socket,
//! clock or async code here, so that all orders of events can be enumerated.

/// What has happened to a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CopyEventKind {
    /// The head of a 2xx response.
    Accepted,
    /// The head of any other response: a server's own error.
    Refused,
    /// The error of a copy without a response, or in the middle of one.
    Failed,
    /// A part of its body.
    Data,
    /// Its stream reports an error in an event.
    ErrorEvent,
    /// The clean end of its body.
    Ended,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SampleAction {
    /// Nothing but to take the event's bytes.
    Wait,
    /// Start the response, a stream, with this copy's head.
    Start,
    /// All copies have ended well: merge their bodies, or end the stream.
    Complete,
    /// The response is this copy's. All others are dropped.
    PassOn,
    /// The request has failed with this copy. All others are dropped. Before the response has started the
    /// client gets an error status; after that, an error event and the end of its connection.
    Fail,
    /// The client has the event; the stream ends as a server's does. All others are dropped.
    EndWithError,
}

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// It waits, or has no response yet.
    Sent,
    Responding,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    /// The client has received nothing.
    Deciding,
    /// The stream has started.
    Streaming,
    Over,
}

/// The state of a request's copies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct SampleDecision {
    is_stream: bool,
    copies: Vec<Phase>,
    stage: Stage,
}

impl SampleDecision {
    pub(super) fn new(copies: usize, is_stream: bool) -> Self {
        Self { is_stream, copies: vec![Phase::Sent; copies], stage: Stage::Deciding }
    }

    /// The client has got the head of a stream before any copy had one.
    pub(super) fn start_early(&mut self) {
        self.stage = Stage::Streaming;
    }

    /// Whether nothing may follow.
    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    /// Decides what follows from an event.
    pub(super) fn on(&mut self, copy: usize, event: CopyEventKind) -> SampleAction {
        match (self.stage, event) {
            (Stage::Over, _) | (_, CopyEventKind::Data) => SampleAction::Wait,
            (stage, CopyEventKind::Accepted) => {
                self.copies[copy] = Phase::Responding;
                // Not when all copies have a response: the first byte would wait for the last of them. What
                // another copy is refused with is an event then.
                if self.is_stream && stage == Stage::Deciding {
                    self.stage = Stage::Streaming;
                    return SampleAction::Start;
                }
                SampleAction::Wait
            }
            (_, CopyEventKind::Ended) => {
                self.copies[copy] = Phase::Ended;
                if self.copies.iter().any(|phase| *phase != Phase::Ended) {
                    return SampleAction::Wait;
                }
                self.end(SampleAction::Complete)
            }
            // A server's response is better than an error of the router's, if the client can still get it.
            (Stage::Deciding, CopyEventKind::Refused) => self.end(SampleAction::PassOn),
            (Stage::Streaming, CopyEventKind::Refused) | (_, CopyEventKind::Failed) => {
                self.end(SampleAction::Fail)
            }
            (_, CopyEventKind::ErrorEvent) => self.end(SampleAction::EndWithError),
        }
    }

    fn end(&mut self, action: SampleAction) -> SampleAction {
        self.stage = Stage::Over;
        action
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// What may happen to a copy that has come so far.
    fn possible(phase: Phase, is_stream: bool) -> Vec<CopyEventKind> {
        use CopyEventKind::{Accepted, Data, Ended, ErrorEvent, Failed, Refused};
        match phase {
            Phase::Sent => vec![Accepted, Refused, Failed],
            Phase::Responding if is_stream => vec![Data, ErrorEvent, Failed, Ended],
            Phase::Responding => vec![Data, Failed, Ended],
            Phase::Ended => vec![],
        }
    }

    /// What a client has received.
    #[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
    struct Client {
        /// Heads of responses.
        heads: u32,
        /// `[DONE]`, or the end of a body.
        clean_ends: u32,
        /// Error responses, error events and cut connections of the router's.
        failures: u32,
    }

    /// Does what `proxy::samples` does, and checks what holds after each step.
    fn step(decision: &mut SampleDecision, client: &mut Client, copy: usize, event: CopyEventKind) {
        let (was_over, had_head) = (decision.is_over(), client.heads > 0);
        let action = decision.on(copy, event);
        match action {
            SampleAction::Wait => {}
            SampleAction::Start => client.heads += 1,
            SampleAction::Complete if decision.is_stream => client.clean_ends += 1,
            SampleAction::Complete | SampleAction::PassOn => {
                client.heads += 1;
                client.clean_ends += 1;
            }
            SampleAction::Fail if had_head => client.failures += 1,
            SampleAction::Fail => {
                client.heads += 1;
                client.failures += 1;
            }
            SampleAction::EndWithError => client.clean_ends += 1,
        }
        let context = format!("{copy} {event:?} -> {action:?}: {decision:?} {client:?}");
        assert!(!was_over || action == SampleAction::Wait, "nothing follows the end: {context}");
        assert!(client.heads <= 1, "one response: {context}");
        assert!(client.clean_ends + client.failures <= 1, "one end: {context}");
        let is_ended = client.clean_ends + client.failures == 1;
        assert_eq!(decision.is_over(), is_ended, "over means that the response has ended: {context}");
        assert!(!is_ended || client.heads == 1, "no end without a response: {context}");
        assert!(action != SampleAction::PassOn || !had_head, "a status comes first: {context}");
        let ends_request =
            matches!(event, CopyEventKind::Refused | CopyEventKind::Failed | CopyEventKind::ErrorEvent);
        assert!(!ends_request || decision.is_over(), "one failure fails all: {context}");
        let all_ended = decision.copies.iter().all(|phase| *phase == Phase::Ended);
        assert_eq!(action == SampleAction::Complete, all_ended && !was_over, "{context}");
    }

    /// All orders of events of `copies` copies; returns how many states were seen.
    fn explore(copies: usize, is_stream: bool, is_early: bool) -> usize {
        let mut first = SampleDecision::new(copies, is_stream);
        let mut client = Client::default();
        if is_early {
            first.start_early();
            client.heads = 1;
        }
        let mut seen = HashSet::new();
        let mut open = vec![(first, client)];
        let mut ends = HashSet::new();
        while let Some((decision, client)) = open.pop() {
            if !seen.insert((decision.clone(), client.clone())) {
                continue;
            }
            let mut is_stuck = true;
            for copy in 0..copies {
                // Also after the end: what is dropped may have been about to say something.
                for event in possible(decision.copies[copy], is_stream) {
                    let (mut decision, mut client) = (decision.clone(), client.clone());
                    step(&mut decision, &mut client, copy, event);
                    is_stuck = false;
                    if !decision.is_over() || ends.insert(client.clone()) {
                        open.push((decision, client));
                    }
                }
            }
            assert!(!is_stuck || decision.is_over(), "no copy can go on: {decision:?}");
        }
        assert!(ends.iter().any(|client| client.clean_ends == 1) && ends.iter().any(|end| end.failures == 1));
        seen.len()
    }

    #[test]
    fn every_order_of_events_ends_in_one_response() {
        for copies in 2..=3 {
            let whole = explore(copies, false, false);
            let stream = explore(copies, true, false);
            let early = explore(copies, true, true);
            assert!(whole >= 9 && stream >= 9 && early >= 9, "{whole} {stream} {early}");
        }
    }

    #[test]
    fn a_stream_starts_with_the_first_copy_and_a_whole_response_with_the_last() {
        use CopyEventKind::{Accepted, Ended, Refused};
        let mut stream = SampleDecision::new(2, true);
        assert_eq!(stream.on(1, Accepted), SampleAction::Start);
        assert_eq!(stream.on(0, Refused), SampleAction::Fail, "the client has a status already");
        let mut whole = SampleDecision::new(2, false);
        assert_eq!(whole.on(1, Accepted), SampleAction::Wait);
        assert_eq!(whole.on(1, Ended), SampleAction::Wait);
        assert_eq!(whole.on(0, Refused), SampleAction::PassOn);
        let mut whole = SampleDecision::new(2, false);
        let events = [(0, Accepted), (1, Accepted), (0, Ended), (1, Ended)];
        let actions = events.map(|(copy, event)| whole.on(copy, event));
        assert_eq!(
            actions,
            [SampleAction::Wait, SampleAction::Wait, SampleAction::Wait, SampleAction::Complete]
        );
    }
}

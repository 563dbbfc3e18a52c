//! What one worker has counted: plain numbers, added up when somebody asks.

use std::time::Duration;

use super::histogram::{Histogram, Scale};
use crate::observe::record::{CompletedRequest, Endpoint, Phase, RequestEnd, RetryCause};
use crate::upstream::{IdMap, Role};

/// Of whole requests: 1 ms to 1,000 s.
pub(super) static TIMES: Scale<19> = Scale::micros([
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
]);
/// Of the router itself: 5 µs to 1 s.
pub(super) static SHORT_TIMES: Scale<14> =
    Scale::micros([5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 100_000, 1_000_000]);
/// Of a pair's phases: 5 ms to 60 s. There may be many pairs, so there are few bounds.
pub(super) static PHASE_TIMES: Scale<11> = Scale::micros([
    5_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 20_000_000, 60_000_000,
]);

/// Statuses that are counted by themselves; others only by their first digit.
const STATUSES: [u16; 19] =
    [200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 424, 429, 499, 500, 501, 502, 503, 504, 507];
/// The others, by their first digit.
const STATUS_CLASSES: [&str; 6] = ["other", "1xx", "2xx", "3xx", "4xx", "5xx"];
const STATUS_LABELS: usize = STATUSES.len() + STATUS_CLASSES.len();
/// The client left before it was sent a status. As nginx calls it.
pub(super) const CLIENT_LEFT: u16 = 499;

/// How the histogram of durations tells requests apart.
pub(super) const ENDINGS: [&str; 3] = ["success", "failure", "client_left"];

/// Why a request's legs were closed before their end.
pub(super) const CANCELLATIONS: [&str; 5] =
    ["client_left", "client_left_mid_answer", "prefill_failed", "decode_failed", "shutdown"];

/// By whether a stream was asked for.
type ByStreaming<T> = [T; 2];

#[derive(Default, Clone)]
pub(super) struct Counts {
    pub(super) requests: [ByStreaming<[u64; STATUS_LABELS]>; Endpoint::ALL.len()],
    pub(super) request_bytes: [u64; Endpoint::GENERATING],
    pub(super) response_bytes: [u64; Endpoint::GENERATING],
    pub(super) durations: [ByStreaming<[Histogram<19>; ENDINGS.len()]>; Endpoint::GENERATING],
    pub(super) first_bytes: [ByStreaming<Histogram<19>>; Endpoint::GENERATING],
    /// From the request's last byte to both legs written: on kept connections, and with a new one among them.
    pub(super) sending: [Histogram<14>; 2],
    /// From decode's first byte to its being written to the client.
    pub(super) relaying: Histogram<14>,
    pub(super) cancellations: [u64; CANCELLATIONS.len()],
    /// By role.
    pub(super) retries: [[u64; RetryCause::ALL.len()]; 2],
    /// By the role of the leg that ran on.
    pub(super) ran_on: [Histogram<14>; 2],
    /// By the code, of which there are as many as the program has. Few happen.
    pub(super) errors: Vec<(&'static str, u64)>,
    pub(super) pairs: IdMap<PairKey, Phases>,
}

/// The ids of a prefill and a decode server; `None` is all pairs that are not counted by themselves.
pub(super) type PairKey = Option<(u64, u64)>;

/// How long what takes on one pair.
#[derive(Default, Clone)]
pub(super) struct Phases {
    pub(super) prefill_head: Histogram<11>,
    pub(super) decode_byte: Histogram<11>,
    pub(super) gap: Histogram<11>,
}

impl Phases {
    fn observe(&mut self, request: &CompletedRequest<'_>) {
        let prefill = request.nanos_between(Phase::PrefillWritten, Phase::PrefillHead);
        let decode = request.nanos_between(Phase::DecodeWritten, Phase::DecodeByte);
        let gap = request.nanos_between(Phase::PrefillHead, Phase::DecodeByte);
        for (histogram, time) in
            [(&mut self.prefill_head, prefill), (&mut self.decode_byte, decode), (&mut self.gap, gap)]
        {
            if let Some(time) = time {
                histogram.observe_nanos(&PHASE_TIMES, time);
            }
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.prefill_head.add(&other.prefill_head);
        self.decode_byte.add(&other.decode_byte);
        self.gap.add(&other.gap);
    }
}

impl Counts {
    /// Counts a request. `pair` is what its pair is counted as.
    pub(super) fn request(&mut self, request: &CompletedRequest<'_>, pair: PairKey) {
        let (kind, streaming) = (request.kind(), usize::from(request.streaming()));
        let status = request.status().unwrap_or(CLIENT_LEFT);
        self.requests[kind as usize][streaming][status_place(status)] += 1;
        if let RequestEnd::Failed(code) = request.ending() {
            self.error(code);
        }
        if !kind.generates() {
            return;
        }
        self.request_bytes[kind as usize] += request.bytes_in();
        self.response_bytes[kind as usize] += request.bytes_out();
        let is_success = (200..300).contains(&status);
        if let Some(ending) = ending_place(request.ending(), is_success) {
            self.durations[kind as usize][streaming][ending].observe(&TIMES, request.took());
        }
        if is_success {
            self.first_bytes_of(request, streaming);
            if request.pair().is_some() {
                self.pairs.entry(pair).or_default().observe(request);
            }
        }
        self.legs(request);
    }

    /// Counts a request that has no head, as one for something else.
    pub(super) fn log_rejected_before_parse(&mut self, status: u16, code: &'static str) {
        self.requests[Endpoint::Other as usize][0][status_place(status)] += 1;
        self.error(code);
    }

    /// An answer without a byte is there when it has ended.
    fn first_bytes_of(&mut self, request: &CompletedRequest<'_>, streaming: usize) {
        let ended = || (request.ending() == RequestEnd::Complete).then(|| request.took());
        if let Some(time) = request.reached(Phase::ConnectionHandler).or_else(ended) {
            self.first_bytes[request.kind() as usize][streaming].observe(&TIMES, time);
        }
    }

    /// What became of the legs, whatever the client was answered.
    fn legs(&mut self, request: &CompletedRequest<'_>) {
        for fault in request.faults() {
            let role = fault.server.role();
            self.retries[role as usize][fault.cause as usize] += 1;
            self.cancellations[failed_place(role)] += 1;
        }
        for role in [Role::Prefill, Role::Decode] {
            if let Some(time) = request.ran_on(role) {
                self.ran_on[role as usize].observe(&SHORT_TIMES, time);
            }
        }
        if let Some(cause) = cancellation(request) {
            self.cancellations[cause] += 1;
        }
        // What an attempt that failed has taken is no time of the router's.
        if request.attempts() == 1
            && let Some(prefill) = request.nanos_between(Phase::BodyRead, Phase::PrefillWritten)
            && let Some(decode) = request.nanos_between(Phase::BodyRead, Phase::DecodeWritten)
        {
            let dialled = usize::from(request.has_dialled());
            self.sending[dialled].observe_nanos(&SHORT_TIMES, prefill.max(decode));
        }
    }

    pub(super) fn relayed(&mut self, time: Duration) {
        self.relaying.observe(&SHORT_TIMES, time);
    }

    fn error(&mut self, code: &'static str) {
        self.errors_of(code, 1);
    }

    fn errors_of(&mut self, code: &'static str, count: u64) {
        match self.errors.iter_mut().find(|(known, _)| *known == code) {
            Some((_, known)) => *known += count,
            None => self.errors.push((code, count)),
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        sum(
            self.requests.as_flattened_mut().as_flattened_mut(),
            other.requests.as_flattened().as_flattened(),
        );
        sum(&mut self.request_bytes, &other.request_bytes);
        sum(&mut self.response_bytes, &other.response_bytes);
        each(
            self.durations.as_flattened_mut().as_flattened_mut(),
            other.durations.as_flattened().as_flattened(),
        );
        each(self.first_bytes.as_flattened_mut(), other.first_bytes.as_flattened());
        each(&mut self.sending, &other.sending);
        self.relaying.add(&other.relaying);
        sum(&mut self.cancellations, &other.cancellations);
        sum(self.retries.as_flattened_mut(), other.retries.as_flattened());
        each(&mut self.ran_on, &other.ran_on);
        for (code, count) in &other.errors {
            self.errors_of(code, *count);
        }
        for (pair, phases) in &other.pairs {
            self.pairs.entry(*pair).or_default().add(phases);
        }
    }
}

fn sum(to: &mut [u64], from: &[u64]) {
    to.iter_mut().zip(from).for_each(|(sum, more)| *sum += more);
}

fn each<const N: usize>(to: &mut [Histogram<N>], from: &[Histogram<N>]) {
    to.iter_mut().zip(from).for_each(|(sum, more)| sum.add(more));
}

/// A server may answer with any number: the place among [`STATUS_LABELS`].
fn status_place(status: u16) -> usize {
    let class = || {
        let digit = usize::from(status / 100);
        STATUSES.len() + if digit < STATUS_CLASSES.len() { digit } else { 0 }
    };
    STATUSES.iter().position(|known| *known == status).unwrap_or_else(class)
}

/// What a status is called by its place.
pub(super) fn status_label(place: usize) -> String {
    match STATUSES.get(place) {
        Some(status) => status.to_string(),
        None => STATUS_CLASSES[place - STATUSES.len()].to_owned(),
    }
}

/// A place among [`ENDINGS`]; `None`: the router ended first.
fn ending_place(ending: RequestEnd, is_success: bool) -> Option<usize> {
    match ending {
        RequestEnd::Complete if is_success => Some(0),
        RequestEnd::Complete | RequestEnd::Failed(_) => Some(1),
        RequestEnd::ClientLeft => Some(2),
        RequestEnd::CutOff => None,
    }
}

/// The place among [`CANCELLATIONS`] of a leg that was closed because this one had failed.
fn failed_place(role: Role) -> usize {
    match role {
        Role::Prefill => 2,
        Role::Decode => 3,
    }
}

/// A place among [`CANCELLATIONS`], if a leg was closed before its end in the last attempt.
fn cancellation(request: &CompletedRequest<'_>) -> Option<usize> {
    request.pair()?;
    match (request.ending(), request.failed_leg()) {
        (RequestEnd::ClientLeft, _) => Some(usize::from(request.reached(Phase::ConnectionHandler).is_some())),
        (RequestEnd::CutOff, _) => Some(4),
        // Nothing was left to be cancelled of a prefill leg that had ended.
        (_, Some(Role::Decode)) if request.reached(Phase::PrefillEnd).is_some() => None,
        (_, Some(role)) => Some(failed_place(role)),
        (_, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_status_has_a_label_of_a_fixed_set() {
        let labels: std::collections::HashSet<String> =
            (0..=u16::MAX).map(|status| status_label(status_place(status))).collect();
        assert_eq!(labels.len(), STATUS_LABELS);
        for (status, label) in
            [(200, "200"), (502, "502"), (418, "4xx"), (206, "2xx"), (999, "other"), (0, "other")]
        {
            assert_eq!(status_label(status_place(status)), label);
        }
    }
}

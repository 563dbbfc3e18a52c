//! The counts of one worker: plain numbers, which a scrape sums.

use std::time::Duration;

use super::histogram::{BucketBounds, Histogram};
use super::selections::Selections;
use crate::observe::record::{CompletedRequest, Endpoint, Phase, RequestEnd, RetryCause, StatusClass};
use crate::upstream::{IdMap, Role, ServerPair};

/// BucketBounds for whole requests: 1 ms to 1,000 s, as a generation may take minutes.
pub(super) static REQUEST_BOUNDS: BucketBounds<19> = BucketBounds::micros([
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
/// BucketBounds for the router's own time: 5 µs to 1 s.
pub(super) static ROUTER_BOUNDS: BucketBounds<14> = BucketBounds::micros([
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 100_000, 1_000_000,
]);
/// BucketBounds for a pair's phases: 5 ms to 60 s. Few, because each is a series of each pair.
pub(super) static PHASE_BOUNDS: BucketBounds<11> = BucketBounds::micros([
    5_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 20_000_000, 60_000_000,
]);

/// Statuses with a counter of their own. A backend may respond with any number, so the others share one per
/// class.
const STATUSES: [u16; 19] =
    [200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 424, 429, 499, 500, 501, 502, 503, 504, 507];
/// The labels of all other statuses, by their first digit.
const STATUS_CLASSES: [&str; 6] = ["other", "1xx", "2xx", "3xx", "4xx", "5xx"];
const STATUS_LABELS: usize = STATUSES.len() + STATUS_CLASSES.len();
/// The client disconnected before it was sent a status: nginx's number for it, which HTTP does not define.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// The label `outcome` of a request's duration.
pub(super) const OUTCOMES: [&str; 3] = ["success", "failure", "client_left"];

/// The label `cause` of a leg that the router closed before its end.
pub(super) const CANCELLATION_CAUSES: [&str; 5] =
    ["client_left", "client_left_mid_answer", "prefill_failed", "decode_failed", "shutdown"];

/// By whether the client asked for a stream.
type ByStreaming<T> = [T; 2];

/// Counters and histograms, indexed by their labels: an observation is an addition at a known place.
#[derive(Default, Clone)]
pub(super) struct Counts {
    pub(super) requests: [ByStreaming<[u64; STATUS_LABELS]>; Endpoint::ALL.len()],
    pub(super) request_bytes: [u64; Endpoint::GENERATING],
    pub(super) response_bytes: [u64; Endpoint::GENERATING],
    /// Of the requests for several.
    pub(super) samples: u64,
    pub(super) durations: [ByStreaming<[Histogram<19>; OUTCOMES.len()]>; Endpoint::GENERATING],
    pub(super) times_to_first_byte: [ByStreaming<Histogram<19>>; Endpoint::GENERATING],
    /// From the request's last byte to both legs written: on reused connections, and with at least one opened
    /// for it.
    pub(super) send_times: [Histogram<14>; 2],
    /// From decode's first byte to its being written to the client.
    pub(super) relay_times: Histogram<14>,
    pub(super) cancellations: [u64; CANCELLATION_CAUSES.len()],
    /// By leg.
    pub(super) retries: [[u64; RetryCause::ALL.len()]; 2],
    /// By the role of the leg that was still running.
    pub(super) after_partner_failure: [Histogram<14>; 2],
    /// By code. A list, because a router sees few of the codes that there are.
    pub(super) errors: Vec<(&'static str, u64)>,
    pub(super) pairs: IdMap<PairKey, PairTimes>,
    pub(super) selections: Selections,
}

/// The ids of a prefill and a decode backend; `None` is the series that all other pairs share.
pub(super) type PairKey = Option<(u64, u64)>;

/// How long the phases of requests take on one pair.
#[derive(Default, Clone)]
pub(super) struct PairTimes {
    pub(super) prefill_head: Histogram<11>,
    pub(super) decode_byte: Histogram<11>,
    /// From prefill's head to decode's first byte: above all the transfer of the KV cache.
    pub(super) gap: Histogram<11>,
}

impl PairTimes {
    fn observe(&mut self, request: &CompletedRequest<'_>) {
        let prefill = request.nanos_between(Phase::PrefillWritten, Phase::PrefillHead);
        let decode = request.nanos_between(Phase::DecodeWritten, Phase::DecodeByte);
        // 0 if decode's first byte came first: prefill's response and the KV cache take different ways.
        let gap = request.nanos_between(Phase::PrefillHead, Phase::DecodeByte);
        for (histogram, nanos) in
            [(&mut self.prefill_head, prefill), (&mut self.decode_byte, decode), (&mut self.gap, gap)]
        {
            if let Some(nanos) = nanos {
                histogram.observe_nanos(&PHASE_BOUNDS, nanos);
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
    /// Counts a request that has ended. `pair` is the series of its pair.
    pub(super) fn count_request(&mut self, request: &CompletedRequest<'_>, pair: PairKey) {
        let (endpoint, streaming) = (request.endpoint(), usize::from(request.streaming()));
        let status = request.status().unwrap_or(CLIENT_CLOSED_REQUEST);
        self.requests[endpoint as usize][streaming][status_index(status)] += 1;
        // A backend's own error is counted by its status; codes are of the router's errors.
        if let RequestEnd::Failed(code) = request.end {
            self.count_errors(code, 1);
        }
        if !endpoint.generates() {
            return;
        }
        self.request_bytes[endpoint as usize] += request.bytes_in();
        self.response_bytes[endpoint as usize] += request.bytes_out();
        self.samples += request.samples().map_or(0, u64::from);
        if let Some(outcome) = outcome_index(request) {
            let durations = &mut self.durations[endpoint as usize][streaming];
            durations[outcome].observe(&REQUEST_BOUNDS, request.duration);
        }
        // Failures are fast or slow for reasons of their own, and would hide a change of what successes take.
        if request.status_class == StatusClass::Success {
            self.observe_first_byte(request, streaming);
            if request.pair().is_some() {
                self.pairs.entry(pair).or_default().observe(request);
            }
        }
        self.count_legs(request);
    }

    fn observe_first_byte(&mut self, request: &CompletedRequest<'_>, streaming: usize) {
        // A response with an empty body has no first byte, and is there when it has ended.
        let ended = || (request.end == RequestEnd::Complete).then_some(request.duration);
        if let Some(duration) = request.time_to(Phase::FirstByteToClient).or_else(ended) {
            let times = &mut self.times_to_first_byte[request.endpoint() as usize][streaming];
            times.observe(&REQUEST_BOUNDS, duration);
        }
    }

    /// Counts what became of the legs, whatever response the client got.
    fn count_legs(&mut self, request: &CompletedRequest<'_>) {
        for retry in request.retries() {
            let role = retry.backend.role();
            self.retries[role.leg()][retry.cause as usize] += 1;
            // Each attempt before the last one ended because of one leg, and the other was closed.
            if let Some(cause) = partner_failed_index(role) {
                self.cancellations[cause] += 1;
            }
        }
        for role in [Role::Prefill, Role::Decode] {
            if let Some(duration) = request.after_partner_failure(role) {
                self.after_partner_failure[role.leg()].observe(&ROUTER_BOUNDS, duration);
            }
        }
        if let Some(cause) = cancellation_index(request) {
            self.cancellations[cause] += 1;
        }
        // With retries, the time of the failed attempt is in it, which is not the router's own.
        if request.attempts() == 1
            && let Some(decode) = request.nanos_between(Phase::BodyRead, Phase::DecodeWritten)
            && let Some(prefill) = request
                .nanos_between(Phase::BodyRead, Phase::PrefillWritten)
                .or_else(|| request.pair().is_some_and(ServerPair::is_single).then_some(decode))
        {
            let opened = usize::from(request.has_opened_connection());
            // A request is sent when its second leg is.
            self.send_times[opened].observe_nanos(&ROUTER_BOUNDS, prefill.max(decode));
        }
    }

    pub(super) fn observe_relay(&mut self, duration: Duration) {
        self.relay_times.observe(&ROUTER_BOUNDS, duration);
    }

    fn count_errors(&mut self, code: &'static str, count: u64) {
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
        self.samples += other.samples;
        sum_histograms(
            self.durations.as_flattened_mut().as_flattened_mut(),
            other.durations.as_flattened().as_flattened(),
        );
        sum_histograms(self.times_to_first_byte.as_flattened_mut(), other.times_to_first_byte.as_flattened());
        sum_histograms(&mut self.send_times, &other.send_times);
        self.relay_times.add(&other.relay_times);
        sum(&mut self.cancellations, &other.cancellations);
        sum(self.retries.as_flattened_mut(), other.retries.as_flattened());
        sum_histograms(&mut self.after_partner_failure, &other.after_partner_failure);
        for (code, count) in &other.errors {
            self.count_errors(code, *count);
        }
        for (pair, times) in &other.pairs {
            self.pairs.entry(*pair).or_default().add(times);
        }
        self.selections.add(&other.selections);
    }
}

fn sum(to: &mut [u64], from: &[u64]) {
    to.iter_mut().zip(from).for_each(|(sum, more)| *sum += more);
}

fn sum_histograms<const N: usize>(to: &mut [Histogram<N>], from: &[Histogram<N>]) {
    to.iter_mut().zip(from).for_each(|(sum, more)| sum.add(more));
}

/// The index of a status among [`STATUS_LABELS`].
fn status_index(status: u16) -> usize {
    let class = || {
        let digit = usize::from(status / 100);
        STATUSES.len() + if digit < STATUS_CLASSES.len() { digit } else { 0 }
    };
    // A search that ends at its first element for most requests, as that is 200.
    STATUSES.iter().position(|known| *known == status).unwrap_or_else(class)
}

/// The label `status` of an index.
pub(super) fn status_label(index: usize) -> String {
    match STATUSES.get(index) {
        Some(status) => status.to_string(),
        None => STATUS_CLASSES[index - STATUSES.len()].to_owned(),
    }
}

/// An index of [`OUTCOMES`]. `None`: the router shut down first, which says nothing of how long requests
/// take.
fn outcome_index(request: &CompletedRequest<'_>) -> Option<usize> {
    match request.end {
        RequestEnd::Complete if request.status_class == StatusClass::Success => Some(0),
        RequestEnd::Complete | RequestEnd::Failed(_) => Some(1),
        RequestEnd::ClientDisconnected => Some(2),
        RequestEnd::Shutdown => None,
    }
}

/// The index of [`CANCELLATION_CAUSES`] of a leg that was closed because the leg of this role had failed. A
/// plain server's has no partner.
fn partner_failed_index(role: Role) -> Option<usize> {
    match role {
        Role::Prefill => Some(2),
        Role::Decode => Some(3),
        Role::Regular => None,
    }
}

/// An index of [`CANCELLATION_CAUSES`], if a leg of the last attempt was closed before its end.
fn cancellation_index(request: &CompletedRequest<'_>) -> Option<usize> {
    // Without a pair there were no legs.
    request.pair()?;
    match (request.end, request.failed_leg) {
        (RequestEnd::ClientDisconnected, _) => {
            // The first two causes: before the first byte, and after it.
            Some(usize::from(request.time_to(Phase::FirstByteToClient).is_some()))
        }
        (RequestEnd::Shutdown, _) => Some(4),
        // A prefill leg that had ended was not closed.
        (_, Some(Role::Decode)) if request.time_to(Phase::PrefillEnd).is_some() => None,
        (_, Some(role)) => partner_failed_index(role),
        (_, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_label_of_a_fixed_set() {
        let labels: std::collections::HashSet<String> =
            (0..=u16::MAX).map(|status| status_label(status_index(status))).collect();
        assert_eq!(labels.len(), STATUS_LABELS);
        for (status, label) in
            [(200, "200"), (502, "502"), (418, "4xx"), (206, "2xx"), (999, "other"), (0, "other")]
        {
            assert_eq!(status_label(status_index(status)), label);
        }
    }
}

//! The list of all metrics, and their samples as text. A test compares `docs/METRICS.md` with it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use super::counts::{
    CANCELLATION_CAUSES, Counts, OUTCOMES, PHASE_BOUNDS, PairKey, PairTimes, REQUEST_BOUNDS, ROUTER_BOUNDS,
    status_label,
};
use super::exposition::{Exposition, Family};
use super::histogram::Histogram;
use super::pairs::PairUrls;
use super::pods::PodMetrics;
use super::process::ProcessStats;
use super::queue::QueueMetrics;
use super::selections::{PromptBytes, SELECTION_BOUNDS, SelectionKey, Selections};
use crate::admission::AdmissionController;
use crate::observe::record::{Endpoint, RetryCause};
use crate::upstream::{Backend, Connections, EncoderRegistration, Encoders, Fleet, IdMap, Outcome, Role};

const STREAMING: [&str; 2] = ["false", "true"];
const CONNECTIONS: [&str; 2] = ["kept", "opened"];
/// The labels of the series that pairs without series of their own share.
const OTHER: &str = "other";

/// Defines a constant for each metric family.
macro_rules! families {
    ($($constant:ident $kind:ident $name:literal $help:literal;)*) => {
        $(const $constant: Family = Family { name: $name, kind: stringify!($kind), help: $help };)*
    };
}

families! {
    REQUESTS counter "mini_lb_requests_total"
        "Completed requests, by the status sent to the client. Status 499: the client disconnected before \
         it was sent one.";
    DURATION histogram "mini_lb_request_duration_seconds"
        "Generation requests: time from the request's head to the end of the response, or until the \
         client disconnected.";
    FIRST_BYTE histogram "mini_lb_time_to_first_byte_seconds"
        "Generation requests with a 2xx response: time from the request's head to the first byte of the \
         response body.";
    REQUEST_BYTES counter "mini_lb_request_bytes_total"
        "Bytes of generation requests' bodies, received from clients.";
    RESPONSE_BYTES counter "mini_lb_response_bytes_total"
        "Bytes of response bodies of generation requests, sent to clients.";
    SAMPLES counter "mini_lb_samples_total"
        "Samples of each prompt that completed requests for several (n over 1) have asked for: each is a request \
         of its own to the servers.";
    SELECTIONS counter "mini_lb_selections_total"
        "Servers that policies have selected for requests and retries, by the reason of the policy.";
    SELECTING histogram "mini_lb_selection_seconds"
        "Time in which both policies selected a pair. One in 16 selections is measured.";
    PROMPT_BYTES counter "mini_lb_backend_prompt_bytes_total"
        "Bytes of the prompts that the prefill backend was selected for; of whole bodies, if no policy needs \
         more.";
    MATCHED_BYTES counter "mini_lb_backend_matched_prompt_bytes_total"
        "Those of the bytes of prompts that the policy believed to be in the prefill backend's cache.";
    WORK gauge "mini_lb_backend_work_bytes"
        "Bytes of prompt that the prefill backend was given and has not computed yet, without those believed \
         to be in its cache, and 1 KiB for each request; of a decode backend, the prompts of its requests.";
    RANK_WORK gauge "mini_lb_backend_rank_work_bytes"
        "The same of each data-parallel rank, of backends with several that the router chooses among.";
    FOREIGN_WORK gauge "mini_lb_backend_foreign_work_bytes"
        "Bytes of prompt that wait on the prefill backend and that this router has not given to it, as the backend \
         tells; 0 without --load-poll-secs.";
    INDEX_ENTRIES gauge "mini_lb_prefix_index_entries"
        "Entries of the prefix index that tell of a live block of a prompt. Estimated from a sample of the index.";
    INDEX_CAPACITY gauge "mini_lb_prefix_index_capacity_entries" "How many entries the prefix index can hold.";
    INDEX_AGE gauge "mini_lb_prefix_index_age_ratio"
        "How old live entries of the prefix index are on average: 0 is new, 1 has just been evicted from the \
         cache of its server. Estimated from a sample of the index.";
    ERRORS counter "mini_lb_errors_total"
        "Requests that ended with an error of the router itself, as the response or in the middle of one, \
         by error code.";
    CANCELLED counter "mini_lb_cancellations_total"
        "Attempts in which the router closed a leg before its response had ended, so that the backend \
         aborts it, by cause.";
    RETRIES counter "mini_lb_retries_total"
        "Retries of generation requests, by the role of the backend that caused them and by cause.";
    RAN_ON histogram "mini_lb_leg_after_partner_failure_seconds"
        "How long a leg of this role was still running after its partner had failed, until it was closed.";
    SENDING histogram "mini_lb_router_send_seconds"
        "The router's own time: from the last byte of a generation request to its being written to both \
         backends, on reused connections or with at least one opened for it. Without retries, and only if \
         both backends responded.";
    RELAYING histogram "mini_lb_router_relay_seconds"
        "The router's own time: from decode's first byte to its being written to the client. Measured at \
         the first chunk of each response that is not merged.";
    PAIR_PREFILL histogram "mini_lb_pair_prefill_head_seconds"
        "Requests with a 2xx response: time from writing the request to prefill to the head of prefill's \
         response.";
    PAIR_DECODE histogram "mini_lb_pair_decode_first_byte_seconds"
        "Requests with a 2xx response: time from writing the request to decode to the first byte of \
         decode's response body.";
    PAIR_GAP histogram "mini_lb_pair_gap_seconds"
        "Requests with a 2xx response: time from the head of prefill's response to the first byte of \
         decode's response body; 0 if decode was first.";
    QUEUE_LENGTH gauge "mini_lb_queue_length" "Requests that wait in the admission queue.";
    QUEUE_LIMIT gauge "mini_lb_queue_limit" "How many requests may wait in the admission queue; 0 is none.";
    QUEUE_WAIT histogram "mini_lb_queue_wait_seconds"
        "Time that requests waited in the admission queue, whether they were admitted or not.";
    QUEUE_REFUSED counter "mini_lb_queue_refused_total"
        "Requests rejected by the admission queue or the rate limit, by reason.";
    BUFFERED gauge "mini_lb_buffered_bytes"
        "Bytes of memory that are reserved for the bodies of requests, or held for merges.";
    BUFFERED_LIMIT gauge "mini_lb_buffered_bytes_limit"
        "How many bytes may be reserved for the bodies of requests before further ones wait.";
    BACKENDS gauge "mini_lb_backends"
        "Backends that get new requests, and removed ones that still have requests in flight.";
    HEALTHY_BACKENDS gauge "mini_lb_healthy_backends"
        "Healthy backends that get new requests; without one of each role the router is not ready.";
    HEALTHY gauge "mini_lb_backend_healthy"
        "1 if the backend is healthy, 0 if it is not or was not probed yet.";
    DRAINING gauge "mini_lb_backend_draining"
        "1 if the backend finishes its requests and gets no new ones: it has answered a health check with 503, \
         or was removed; otherwise 0.";
    IN_FLIGHT gauge "mini_lb_backend_in_flight_requests" "Requests in flight on the backend.";
    LEGS counter "mini_lb_backend_legs_total"
        "Requests that have ended on the backend, by their outcome there.";
    PROMPT_TOKENS counter "mini_lb_backend_prompt_tokens_total"
        "Tokens of the prompts that the prefill backend has computed, as its responses say. Streams of the OpenAI \
         endpoints without include_usage do not.";
    CACHED_TOKENS counter "mini_lb_backend_cached_tokens_total"
        "Those of them that were in its cache, as its responses say. Those of the OpenAI endpoints do only with \
         --enable-cache-report.";
    OPENED counter "mini_lb_backend_connections_opened_total"
        "Connections opened to the backend, including those of health probes.";
    REUSED counter "mini_lb_backend_connections_reused_total"
        "Requests sent on a reused keep-alive connection to the backend.";
    IDLE gauge "mini_lb_backend_idle_connections" "Idle keep-alive connections to the backend.";
    ENCODER_UP gauge "mini_lb_encoder_up"
        "1 if the encoder is known to be healthy, 0 if it is not or was not probed yet.";
    ENCODER_REGISTRATIONS gauge "mini_lb_encoder_registrations"
        "Prefill servers by the state of the encoder's registration there: registered; refused, where the server is \
         not language-only or nobody listens; unreachable, after another failure; pending, while one of the two is \
         down.";
    POD_WATCH_UP gauge "mini_lb_kubernetes_watch_up"
        "1 while the Kubernetes API server sends the events of pods, 0 while the last known servers stay because it \
         does not.";
    PODS gauge "mini_lb_kubernetes_pods"
        "Pods by state: server, or refused for an error in their address or annotation. Pods that are not ready, or \
         are terminating, are not counted.";
    POD_LISTS counter "mini_lb_kubernetes_lists_total" "Complete lists of pods, of which each starts a watch.";
    POD_EVENTS counter "mini_lb_kubernetes_events_total" "Events of pods that a watch has brought.";
    POD_FAILURES counter "mini_lb_kubernetes_failures_total"
        "Lists and watches of pods that failed, by reason. After gone, which is usual, pods are listed again.";
    BUILD gauge "mini_lb_build_info" "Always 1, with the version as its label.";
    CPU counter "process_cpu_seconds_total" "User and system CPU time of the process.";
    START gauge "process_start_time_seconds" "Start time of the process, in seconds since the Unix epoch.";
    RESIDENT gauge "process_resident_memory_bytes" "Resident memory of the process.";
    VIRTUAL gauge "process_virtual_memory_bytes" "Virtual memory of the process.";
    FDS gauge "process_open_fds" "Open file descriptors of the process.";
    MAX_FDS gauge "process_max_fds" "Maximum number of open file descriptors.";
    THREADS gauge "process_threads" "Threads of the process.";
}

pub(super) fn render(
    counts: &Counts,
    tracked: &IdMap<(u64, u64), PairUrls>,
    (queue, admission): (&QueueMetrics, &AdmissionController),
    fleet: &Fleet,
    pod_metrics: &PodMetrics,
) -> String {
    let mut text = Exposition::default();
    requests(&mut text, counts);
    errors(&mut text, counts, fleet.roles());
    router(&mut text, counts);
    selections(&mut text, &counts.selections);
    prefix_index(&mut text, fleet);
    pairs(&mut text, &counts.pairs, tracked);
    admission_queue(&mut text, queue, admission);
    roles(&mut text, fleet);
    backends(&mut text, fleet, &counts.selections.prompts);
    encoders(&mut text, fleet.encoders());
    pods(&mut text, pod_metrics);
    text.family(&BUILD);
    text.value(&BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
    process(&mut text, ProcessStats::read());
    text.finish()
}

/// The endpoints that generate: the index of their counters, and their label.
fn generating() -> impl Iterator<Item = (usize, &'static str)> {
    Endpoint::ALL.iter().take(Endpoint::GENERATING).map(|endpoint| endpoint.as_str()).enumerate()
}

fn requests(text: &mut Exposition, counts: &Counts) {
    text.family(&REQUESTS);
    for (endpoint, by_streaming) in Endpoint::ALL.iter().zip(&counts.requests) {
        for (streaming, by_status) in STREAMING.iter().zip(by_streaming) {
            for (index, count) in by_status.iter().enumerate() {
                // All 550 series, most of them always 0, would be too many: a series appears with its first
                // request. That of successes is there from the start, so that `rate()` sees the first
                // request.
                if *count > 0 || (index == 0 && endpoint.generates()) {
                    let status = status_label(index);
                    let labels =
                        [("endpoint", endpoint.as_str()), ("status", &status), ("streaming", streaming)];
                    text.value(&REQUESTS, &labels, count);
                }
            }
        }
    }
    text.family(&DURATION);
    for (index, endpoint) in generating() {
        for (streaming, by_outcome) in STREAMING.iter().zip(&counts.durations[index]) {
            for (outcome, histogram) in OUTCOMES.iter().zip(by_outcome) {
                let labels = [("endpoint", endpoint), ("streaming", *streaming), ("outcome", *outcome)];
                text.histogram(&DURATION, &labels, &REQUEST_BOUNDS, histogram);
            }
        }
    }
    text.family(&FIRST_BYTE);
    for (index, endpoint) in generating() {
        for (streaming, histogram) in STREAMING.iter().zip(&counts.times_to_first_byte[index]) {
            let labels = [("endpoint", endpoint), ("streaming", *streaming)];
            text.histogram(&FIRST_BYTE, &labels, &REQUEST_BOUNDS, histogram);
        }
    }
    for (family, bytes) in
        [(&REQUEST_BYTES, &counts.request_bytes), (&RESPONSE_BYTES, &counts.response_bytes)]
    {
        text.family(family);
        for (index, endpoint) in generating() {
            text.value(family, &[("endpoint", endpoint)], bytes[index]);
        }
    }
    text.family(&SAMPLES);
    text.value(&SAMPLES, &[], counts.samples);
}

fn errors(text: &mut Exposition, counts: &Counts, roles: &[Role]) {
    text.family(&ERRORS);
    // Sorted: each worker meets codes in its own order, and scrapes should have one.
    let errors: BTreeMap<&str, u64> = counts.errors.iter().copied().collect();
    for (code, count) in errors {
        text.value(&ERRORS, &[("code", code)], count);
    }
    text.family(&CANCELLED);
    for (cause, count) in CANCELLATION_CAUSES.iter().zip(counts.cancellations) {
        text.value(&CANCELLED, &[("cause", cause)], count);
    }
    text.family(&RETRIES);
    for role in roles {
        for (cause, count) in RetryCause::ALL.iter().zip(counts.retries[role.leg()]) {
            text.value(&RETRIES, &[("role", role.as_str()), ("cause", cause.as_str())], count);
        }
    }
    text.family(&RAN_ON);
    for role in roles {
        text.histogram(
            &RAN_ON,
            &[("role", role.as_str())],
            &ROUTER_BOUNDS,
            &counts.after_partner_failure[role.leg()],
        );
    }
}

fn router(text: &mut Exposition, counts: &Counts) {
    text.family(&SENDING);
    for (connections, histogram) in CONNECTIONS.iter().zip(&counts.send_times) {
        text.histogram(&SENDING, &[("connections", connections)], &ROUTER_BOUNDS, histogram);
    }
    text.family(&RELAYING);
    text.histogram(&RELAYING, &[], &ROUTER_BOUNDS, &counts.relay_times);
}

fn pairs(text: &mut Exposition, counted: &IdMap<PairKey, PairTimes>, tracked: &IdMap<(u64, u64), PairUrls>) {
    let urls = |key: &PairKey| match key {
        Some(key) => tracked.get(key).map(|urls| (urls.prefill.as_str(), urls.decode.as_str())),
        None => Some((OTHER, OTHER)),
    };
    // Sorted, so that scrapes have the same order. A backend that was removed and added again at the same URL
    // has a new id, but the same labels: a series must not appear twice, so both are summed.
    let mut sorted: BTreeMap<(&str, &str), PairTimes> = BTreeMap::new();
    for (key, phases) in counted {
        if let Some(urls) = urls(key) {
            sorted.entry(urls).or_default().add(phases);
        }
    }
    type Part = fn(&PairTimes) -> &Histogram<11>;
    let families: [(&Family, Part); 3] = [
        (&PAIR_PREFILL, |phases| &phases.prefill_head),
        (&PAIR_DECODE, |phases| &phases.decode_byte),
        (&PAIR_GAP, |phases| &phases.gap),
    ];
    for (family, part) in families {
        text.family(family);
        for ((prefill, decode), phases) in &sorted {
            let labels = [("prefill", *prefill), ("decode", *decode)];
            text.histogram(family, &labels, &PHASE_BOUNDS, part(phases));
        }
    }
}

fn admission_queue(text: &mut Exposition, queue: &QueueMetrics, admission: &AdmissionController) {
    text.family(&QUEUE_LENGTH);
    text.value(&QUEUE_LENGTH, &[], admission.waiting());
    text.family(&QUEUE_LIMIT);
    text.value(&QUEUE_LIMIT, &[], admission.queue_size());
    text.family(&QUEUE_WAIT);
    text.histogram(&QUEUE_WAIT, &[], &REQUEST_BOUNDS, &queue.waits());
    text.family(&QUEUE_REFUSED);
    for (reason, count) in queue.rejected() {
        text.value(&QUEUE_REFUSED, &[("reason", reason)], count);
    }
    text.family(&BUFFERED);
    text.value(&BUFFERED, &[], admission.memory().reserved());
    text.family(&BUFFERED_LIMIT);
    text.value(&BUFFERED_LIMIT, &[], admission.memory().limit());
}

fn roles(text: &mut Exposition, fleet: &Fleet) {
    text.family(&BACKENDS);
    for role in fleet.roles() {
        let count = fleet.known_servers().filter(|server| server.role() == *role).count();
        text.value(&BACKENDS, &[("role", role.as_str())], count);
    }
    text.family(&HEALTHY_BACKENDS);
    for role in fleet.roles() {
        // `all` leaves out servers that drain: they do not make a role ready.
        let count = fleet.all().filter(|server| server.role() == *role && server.is_ready()).count();
        text.value(&HEALTHY_BACKENDS, &[("role", role.as_str())], count);
    }
}

fn selections(text: &mut Exposition, selections: &Selections) {
    text.family(&SELECTIONS);
    let label = |(role, policy, reason): &SelectionKey| (role.as_str(), *policy, reason.as_str());
    // Sorted: each worker meets them in its own order.
    let counts: BTreeMap<_, u64> =
        selections.reasons.iter().map(|(key, count)| (label(key), *count)).collect();
    for ((role, policy, reason), count) in counts {
        text.value(&SELECTIONS, &[("role", role), ("policy", policy), ("reason", reason)], count);
    }
    text.family(&SELECTING);
    text.histogram(&SELECTING, &[], &SELECTION_BOUNDS, &selections.times);
}

/// Left out if the policy has no index.
fn prefix_index(text: &mut Exposition, fleet: &Fleet) {
    let Some(usage) = fleet.prefix_index_usage() else { return };
    text.family(&INDEX_ENTRIES);
    text.value(&INDEX_ENTRIES, &[], usage.live_entries);
    text.family(&INDEX_CAPACITY);
    text.value(&INDEX_CAPACITY, &[], usage.capacity);
    text.family(&INDEX_AGE);
    text.value(&INDEX_AGE, &[], usage.mean_age);
}

fn backends(text: &mut Exposition, fleet: &Fleet, prompts: &IdMap<u64, PromptBytes>) {
    // A backend that was removed and added again while requests were in flight is in the list twice. A series
    // must not appear twice, so the first one, which gets the new requests, stands for both.
    let mut servers: BTreeMap<(&str, &str), &Backend> = BTreeMap::new();
    for server in fleet.known_servers() {
        servers.entry((server.role().as_str(), server.url())).or_insert(server);
    }
    // Once for each backend, as three families read its sharded counters.
    let connections: Vec<Connections> = servers.values().map(|server| server.connections()).collect();
    let mut each = |family: &Family, value: &dyn Fn(&Backend, &Connections) -> u64| {
        text.family(family);
        for (((role, url), server), connections) in servers.iter().zip(&connections) {
            text.value(family, &[("role", *role), ("backend", *url)], value(server, connections));
        }
    };
    each(&HEALTHY, &|backend, _| backend.is_ready().into());
    let is_removed = |server: &Backend| !fleet.all().any(|active| active.id() == server.id());
    each(&DRAINING, &|backend, _| (backend.is_draining() || is_removed(backend)).into());
    each(&IN_FLIGHT, &|backend, _| backend.in_flight() as u64);
    each(&OPENED, &|_, connections| connections.opened);
    each(&REUSED, &|_, connections| connections.reused);
    each(&IDLE, &|_, connections| connections.idle);
    each(&WORK, &|backend, _| backend.work());
    rank_work(text, &servers);
    told_tokens(text, &servers);
    text.family(&LEGS);
    for ((role, url), server) in &servers {
        for outcome in Outcome::ALL {
            let labels = [("role", *role), ("backend", *url), ("outcome", outcome.as_str())];
            text.value(&LEGS, &labels, server.ended(outcome));
        }
    }
    // Decode has none: it gets the whole KV cache in any case.
    servers.retain(|_, server| server.role() != Role::Decode);
    text.family(&FOREIGN_WORK);
    for ((role, url), server) in &servers {
        text.value(&FOREIGN_WORK, &[("role", *role), ("backend", *url)], server.foreign_work());
    }
    type Part = fn(&PromptBytes) -> u64;
    let families: [(&Family, Part); 2] =
        [(&PROMPT_BYTES, |prompts| prompts.total), (&MATCHED_BYTES, |prompts| prompts.matched)];
    for (family, part) in families {
        text.family(family);
        for ((role, url), server) in &servers {
            let bytes = prompts.get(&server.id()).map_or(0, part);
            text.value(family, &[("role", *role), ("backend", *url)], bytes);
        }
    }
}

fn rank_work(text: &mut Exposition, servers: &BTreeMap<(&str, &str), &Backend>) {
    text.family(&RANK_WORK);
    for ((role, url), server) in servers {
        for (rank, work) in server.work_by_rank().into_iter().enumerate() {
            text.value(
                &RANK_WORK,
                &[("role", *role), ("backend", *url), ("dp_rank", &rank.to_string())],
                work,
            );
        }
    }
}

/// What prefill servers say in their responses.
fn told_tokens(text: &mut Exposition, servers: &BTreeMap<(&str, &str), &Backend>) {
    type Told = fn(&Backend) -> u64;
    let families: [(&Family, Told); 2] =
        [(&PROMPT_TOKENS, Backend::told_prompt_tokens), (&CACHED_TOKENS, Backend::told_cached_tokens)];
    for (family, value) in families {
        text.family(family);
        for ((role, url), server) in servers.iter().filter(|(_, server)| server.role() != Role::Decode) {
            text.value(family, &[("role", *role), ("backend", *url)], value(server));
        }
    }
}

/// Without encoders the families have no samples.
fn encoders(text: &mut Exposition, encoders: &Encoders) {
    let all = encoders.all();
    text.family(&ENCODER_UP);
    for encoder in all.iter() {
        text.value(&ENCODER_UP, &[("encoder", encoder.url())], u64::from(encoder.is_up()));
    }
    text.family(&ENCODER_REGISTRATIONS);
    for encoder in all.iter() {
        let registrations = encoder.registrations();
        for state in EncoderRegistration::ALL {
            let count = registrations.iter().filter(|(_, registration)| *registration == state).count();
            let labels = [("encoder", encoder.url()), ("state", state.as_str())];
            text.value(&ENCODER_REGISTRATIONS, &labels, count);
        }
    }
}

/// Without service discovery the families have no samples.
fn pods(text: &mut Exposition, metrics: &PodMetrics) {
    let is_on = metrics.is_on.load(Relaxed);
    text.family(&POD_WATCH_UP);
    if is_on {
        text.value(&POD_WATCH_UP, &[], u64::from(metrics.is_watching.load(Relaxed)));
    }
    text.family(&PODS);
    for (state, count) in metrics.pods().into_iter().filter(|_| is_on) {
        text.value(&PODS, &[("state", state)], count);
    }
    for (family, count) in [(&POD_LISTS, &metrics.lists), (&POD_EVENTS, &metrics.events)] {
        text.family(family);
        if is_on {
            text.value(family, &[], count.load(Relaxed));
        }
    }
    text.family(&POD_FAILURES);
    for (reason, count) in metrics.failures().filter(|_| is_on) {
        text.value(&POD_FAILURES, &[("reason", reason)], count);
    }
}

fn process(text: &mut Exposition, process: ProcessStats) {
    let whole = |number: Option<u64>| number.map(|number| number as f64);
    for (family, value) in [
        (&CPU, process.cpu_seconds),
        (&START, process.start_seconds),
        (&RESIDENT, whole(process.resident_bytes)),
        (&VIRTUAL, whole(process.virtual_bytes)),
        (&FDS, whole(process.open_fds)),
        (&MAX_FDS, whole(process.max_fds)),
        (&THREADS, whole(process.threads)),
    ] {
        // Left out with its family: 0 would pass for a measurement.
        if let Some(value) = value {
            text.family(family);
            text.value(family, &[], value);
        }
    }
}

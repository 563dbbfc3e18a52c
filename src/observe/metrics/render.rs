//! The list of all metrics, and their values as text. `docs/METRICS.md` is compared with it.

use std::collections::BTreeMap;

use super::counts::{
    CANCELLATIONS, Counts, ENDINGS, PHASE_TIMES, PairKey, Phases, SHORT_TIMES, TIMES, status_label,
};
use super::histogram::Histogram;
use super::pairs::Urls;
use super::process::Process;
use super::queue::QueueMetrics;
use super::text::{Family, Text};
use crate::admission::AdmissionController;
use crate::observe::record::{Endpoint, RetryCause};
use crate::upstream::{Backend, Connections, Fleet, IdMap, Outcome, Role};

const ROLES: [Role; 2] = [Role::Prefill, Role::Decode];
const STREAMING: [&str; 2] = ["false", "true"];
const CONNECTIONS: [&str; 2] = ["kept", "opened"];
/// What stands for the servers of all pairs that have no series of their own.
const OTHER: &str = "other";

/// The families, each a constant and all of them a list.
macro_rules! families {
    ($($constant:ident $kind:ident $name:literal $help:literal;)*) => {
        $(const $constant: Family = Family { name: $name, kind: stringify!($kind), help: $help };)*
    };
}

families! {
    REQUESTS counter "mini_lb_requests_total"
        "Requests that have ended, by what was sent to the client. Status 499: the client left before it was sent one.";
    DURATION histogram "mini_lb_request_duration_seconds"
        "Generation requests: from the request's head to the end of its answer, or until the client left.";
    FIRST_BYTE histogram "mini_lb_time_to_first_byte_seconds"
        "Generation requests answered with a 2xx: from the request's head to the first byte of the answer's body.";
    REQUEST_BYTES counter "mini_lb_request_bytes_total" "Bytes of generation requests' bodies that came from clients.";
    RESPONSE_BYTES counter "mini_lb_response_bytes_total" "Bytes of bodies that were given to clients of generation requests.";
    ERRORS counter "mini_lb_errors_total"
        "Requests that ended with an error of the router's, as their answer or in the middle of it, by its code.";
    CANCELLED counter "mini_lb_cancellations_total"
        "Attempts of which the router closed a leg before its answer had ended, which tells the server to abort, by cause.";
    RETRIES counter "mini_lb_retries_total" "Generation requests sent again, by the server's role and what it did.";
    RAN_ON histogram "mini_lb_leg_after_partner_failure_seconds"
        "How long a leg of this role ran on after its partner had failed, until it was closed.";
    SENDING histogram "mini_lb_router_send_seconds"
        "The router's own time: from a generation request's last byte to its being written to both servers, on kept \
         connections or with one opened for it. Requests that were sent once and whose heads both came.";
    RELAYING histogram "mini_lb_router_relay_seconds"
        "The router's own time: from decode's first byte to its being written to the client. Measured at the first \
         piece of each answer that is not merged, not at the others.";
    PAIR_PREFILL histogram "mini_lb_pair_prefill_head_seconds"
        "Requests answered with a 2xx: from the request being written to prefill to the head of prefill's answer.";
    PAIR_DECODE histogram "mini_lb_pair_decode_first_byte_seconds"
        "Requests answered with a 2xx: from the request being written to decode to the first byte of decode's body.";
    PAIR_GAP histogram "mini_lb_pair_gap_seconds"
        "Requests answered with a 2xx: from the head of prefill's answer to the first byte of decode's body; 0 if decode was first.";
    QUEUE_LENGTH gauge "mini_lb_queue_length" "Requests that wait for their turn.";
    QUEUE_LIMIT gauge "mini_lb_queue_limit" "How many requests may wait for their turn; 0 is none.";
    QUEUE_WAIT histogram "mini_lb_queue_wait_seconds" "How long requests waited for their turn, whether it came or not.";
    QUEUE_REFUSED counter "mini_lb_queue_refused_total" "Requests that were refused instead of being served, by reason.";
    BACKENDS gauge "mini_lb_backends" "Servers that get requests, and those removed that have not finished theirs.";
    HEALTHY_BACKENDS gauge "mini_lb_healthy_backends"
        "Servers known to be healthy that get requests; without one of each role the router is not ready.";
    HEALTHY gauge "mini_lb_backend_healthy" "1 if the server is known to be healthy, 0 if it is not, or was never asked.";
    IN_FLIGHT gauge "mini_lb_backend_in_flight_requests" "Requests under way on the server.";
    LEGS counter "mini_lb_backend_legs_total" "Requests that have ended on the server, by how they ended there.";
    OPENED counter "mini_lb_backend_connections_opened_total" "Connections opened to the server, by health probes too.";
    REUSED counter "mini_lb_backend_connections_reused_total" "Requests that were sent on a kept connection to the server.";
    IDLE gauge "mini_lb_backend_idle_connections" "Kept connections to the server that no request uses.";
    BUILD gauge "mini_lb_build_info" "1, with the version.";
    CPU counter "process_cpu_seconds_total" "User and system CPU time of the process.";
    START gauge "process_start_time_seconds" "When the process started, since the epoch.";
    RESIDENT gauge "process_resident_memory_bytes" "Resident memory of the process.";
    VIRTUAL gauge "process_virtual_memory_bytes" "Virtual memory of the process.";
    FDS gauge "process_open_fds" "Open file descriptors of the process.";
    MAX_FDS gauge "process_max_fds" "How many file descriptors the process may have open.";
    THREADS gauge "process_threads" "Threads of the process.";
}

pub(super) fn render(
    counts: &Counts,
    named: &IdMap<(u64, u64), Urls>,
    (queue, gate): (&QueueMetrics, &AdmissionController),
    fleet: &Fleet,
) -> String {
    let mut text = Text::default();
    requests(&mut text, counts);
    endings(&mut text, counts);
    router(&mut text, counts);
    pairs(&mut text, &counts.pairs, named);
    waiting(&mut text, queue, gate);
    roles(&mut text, fleet);
    backends(&mut text, fleet);
    text.family(&BUILD);
    text.value(&BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
    process(&mut text, Process::read());
    text.finish()
}

fn generating() -> impl Iterator<Item = (usize, &'static str)> {
    Endpoint::ALL.iter().take(Endpoint::GENERATING).map(|kind| kind.as_str()).enumerate()
}

fn requests(text: &mut Text, counts: &Counts) {
    text.family(&REQUESTS);
    for (kind, by_streaming) in Endpoint::ALL.iter().zip(&counts.requests) {
        for (streaming, by_status) in STREAMING.iter().zip(by_streaming) {
            for (place, count) in by_status.iter().enumerate() {
                // What has not happened has no series, but for what everyone waits to see.
                if *count > 0 || (place == 0 && kind.generates()) {
                    let status = status_label(place);
                    let labels = [("endpoint", kind.as_str()), ("status", &status), ("streaming", streaming)];
                    text.value(&REQUESTS, &labels, count);
                }
            }
        }
    }
    text.family(&DURATION);
    for (kind, endpoint) in generating() {
        for (streaming, by_ending) in STREAMING.iter().zip(&counts.durations[kind]) {
            for (outcome, histogram) in ENDINGS.iter().zip(by_ending) {
                let labels = [("endpoint", endpoint), ("streaming", *streaming), ("outcome", *outcome)];
                text.histogram(&DURATION, &labels, &TIMES, histogram);
            }
        }
    }
    text.family(&FIRST_BYTE);
    for (kind, endpoint) in generating() {
        for (streaming, histogram) in STREAMING.iter().zip(&counts.first_bytes[kind]) {
            let labels = [("endpoint", endpoint), ("streaming", *streaming)];
            text.histogram(&FIRST_BYTE, &labels, &TIMES, histogram);
        }
    }
    for (family, bytes) in
        [(&REQUEST_BYTES, &counts.request_bytes), (&RESPONSE_BYTES, &counts.response_bytes)]
    {
        text.family(family);
        for (kind, endpoint) in generating() {
            text.value(family, &[("endpoint", endpoint)], bytes[kind]);
        }
    }
}

fn endings(text: &mut Text, counts: &Counts) {
    text.family(&ERRORS);
    let errors: BTreeMap<&str, u64> = counts.errors.iter().copied().collect();
    for (code, count) in errors {
        text.value(&ERRORS, &[("code", code)], count);
    }
    text.family(&CANCELLED);
    for (cause, count) in CANCELLATIONS.iter().zip(counts.cancellations) {
        text.value(&CANCELLED, &[("cause", cause)], count);
    }
    text.family(&RETRIES);
    for role in ROLES {
        for (cause, count) in RetryCause::ALL.iter().zip(counts.retries[role as usize]) {
            text.value(&RETRIES, &[("role", role.as_str()), ("cause", cause.as_str())], count);
        }
    }
    text.family(&RAN_ON);
    for role in ROLES {
        text.histogram(&RAN_ON, &[("role", role.as_str())], &SHORT_TIMES, &counts.ran_on[role as usize]);
    }
}

fn router(text: &mut Text, counts: &Counts) {
    text.family(&SENDING);
    for (connections, histogram) in CONNECTIONS.iter().zip(&counts.sending) {
        text.histogram(&SENDING, &[("connections", connections)], &SHORT_TIMES, histogram);
    }
    text.family(&RELAYING);
    text.histogram(&RELAYING, &[], &SHORT_TIMES, &counts.relaying);
}

fn pairs(text: &mut Text, counted: &IdMap<PairKey, Phases>, named: &IdMap<(u64, u64), Urls>) {
    let urls = |key: &PairKey| match key {
        Some(key) => named.get(key).map(|urls| (urls.prefill.as_str(), urls.decode.as_str())),
        None => Some((OTHER, OTHER)),
    };
    // In an order that stays. A server that came back at the same address has one series with what it was before.
    let mut sorted: BTreeMap<(&str, &str), Phases> = BTreeMap::new();
    for (key, phases) in counted {
        if let Some(urls) = urls(key) {
            sorted.entry(urls).or_default().add(phases);
        }
    }
    type Part = fn(&Phases) -> &Histogram<11>;
    let families: [(&Family, Part); 3] = [
        (&PAIR_PREFILL, |phases| &phases.prefill_head),
        (&PAIR_DECODE, |phases| &phases.decode_byte),
        (&PAIR_GAP, |phases| &phases.gap),
    ];
    for (family, part) in families {
        text.family(family);
        for ((prefill, decode), phases) in &sorted {
            let labels = [("prefill", *prefill), ("decode", *decode)];
            text.histogram(family, &labels, &PHASE_TIMES, part(phases));
        }
    }
}

fn waiting(text: &mut Text, queue: &QueueMetrics, gate: &AdmissionController) {
    text.family(&QUEUE_LENGTH);
    text.value(&QUEUE_LENGTH, &[], gate.waiting());
    text.family(&QUEUE_LIMIT);
    text.value(&QUEUE_LIMIT, &[], gate.queue_size());
    text.family(&QUEUE_WAIT);
    text.histogram(&QUEUE_WAIT, &[], &TIMES, &queue.waits());
    text.family(&QUEUE_REFUSED);
    for (reason, count) in queue.refused() {
        text.value(&QUEUE_REFUSED, &[("reason", reason)], count);
    }
}

fn roles(text: &mut Text, fleet: &Fleet) {
    text.family(&BACKENDS);
    for role in ROLES {
        let count = fleet.known_servers().filter(|server| server.role() == role).count();
        text.value(&BACKENDS, &[("role", role.as_str())], count);
    }
    text.family(&HEALTHY_BACKENDS);
    for role in ROLES {
        let count = fleet.all().filter(|server| server.role() == role && server.is_ready()).count();
        text.value(&HEALTHY_BACKENDS, &[("role", role.as_str())], count);
    }
}

fn backends(text: &mut Text, fleet: &Fleet) {
    // A server that was removed and added again before it had finished may be here twice: the same server.
    let mut servers: BTreeMap<(&str, &str), &Backend> = BTreeMap::new();
    for server in fleet.known_servers() {
        servers.entry((server.role().as_str(), server.url())).or_insert(server);
    }
    let connections: Vec<Connections> = servers.values().map(|server| server.connections()).collect();
    let mut each = |family: &Family, value: &dyn Fn(&Backend, &Connections) -> u64| {
        text.family(family);
        for (((role, url), server), connections) in servers.iter().zip(&connections) {
            text.value(family, &[("role", *role), ("backend", *url)], value(server, connections));
        }
    };
    each(&HEALTHY, &|server, _| server.is_ready().into());
    each(&IN_FLIGHT, &|server, _| server.in_flight() as u64);
    each(&OPENED, &|_, connections| connections.opened);
    each(&REUSED, &|_, connections| connections.reused);
    each(&IDLE, &|_, connections| connections.idle);
    text.family(&LEGS);
    for ((role, url), server) in &servers {
        for outcome in Outcome::ALL {
            let labels = [("role", *role), ("backend", *url), ("outcome", outcome.as_str())];
            text.value(&LEGS, &labels, server.ended(outcome));
        }
    }
}

fn process(text: &mut Text, process: Process) {
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
        if let Some(value) = value {
            text.family(family);
            text.value(family, &[], value);
        }
    }
}

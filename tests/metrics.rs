//! Metrics: exact counts in a scrape after known requests.

#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

mod kit;
#[path = "metrics/promtool.rs"]
mod promtool;
#[path = "metrics/scrape.rs"]
mod scrape;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::{Client, Gate, Router, ScriptedServer, Step, chunk, json};
use mini_lb::{MiniLbConfig, Outcome, RoundRobin};
use scrape::Scrape;

const BODY: &str = r#"{"text":"a"}"#;
const STREAMING: &str = r#"{"text":"a","stream":true}"#;
const ANSWER: &str = r#"{"text":"hi"}"#;
const EVENTS_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const EVENT: &str = "data: {\"text\":\"a\"}\n\n";

fn first_event() -> Step {
    Step::Send([EVENTS_HEAD.as_bytes(), &chunk(EVENT)].concat())
}

/// A router with an admin listener.
struct MonitoredRouter {
    router: Router,
    port: u16,
}

impl MonitoredRouter {
    async fn start(
        prefill: &[&ScriptedServer],
        decode: &[&ScriptedServer],
        options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
    ) -> Self {
        let port = scrape::free_port();
        let with_port = |config: MiniLbConfig| options(config.admin_address("127.0.0.1", port));
        Self { router: Router::start_with(prefill, decode, with_port).await, port }
    }

    async fn client(&self) -> Client {
        self.router.client().await
    }

    /// A scrape after `requests` requests have ended.
    async fn after(&self, requests: u64) -> Scrape {
        scrape::after(self.port, requests).await
    }
}

/// A server whose responses wait for the test.
struct GatedServer {
    server: ScriptedServer,
    gates: Arc<Mutex<Vec<Gate>>>,
}

impl GatedServer {
    async fn start(steps: impl Fn() -> Vec<Step> + Send + Sync + 'static) -> Self {
        let gates: Arc<Mutex<Vec<Gate>>> = Arc::default();
        let added = Arc::clone(&gates);
        let server = ScriptedServer::start(move |_| {
            let gate = Gate::new();
            added.lock().unwrap().push(gate.clone());
            [vec![Step::Wait(gate)], steps()].concat()
        })
        .await;
        Self { server, gates }
    }

    /// Sends the response to a request, counted from 1, once it has arrived and prefill has responded.
    async fn respond_after(&self, prefill: &ScriptedServer, router: &Router, request: usize) {
        self.server.wait_for_requests(request).await;
        let prefill = router.backend(prefill);
        kit::with_timeout("prefill's end", async {
            while prefill.ended(Outcome::Completed) < request as u64 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        self.gates.lock().unwrap()[request - 1].open();
    }
}

/// Two prefill servers of which one has the prompt after the first request.
#[tokio::test]
async fn selections_are_counted_by_reason_and_prompts_by_what_is_believed_cached() {
    let prefill = [
        ScriptedServer::always(json("200 OK", ANSWER)).await,
        ScriptedServer::always(json("200 OK", ANSWER)).await,
    ];
    let decode = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let monitored = MonitoredRouter::start(&[&prefill[0], &prefill[1]], &[&decode], |config| config).await;
    let text = "a long prompt ".repeat(1_000);
    let body = format!(r#"{{"text":"{text}"}}"#);
    // The closing quote is counted, too.
    let (bytes, whole_blocks) = (text.len() as u64 + 1, text.len() as u64 / 2_048);
    let mut client = monitored.client().await;
    for _ in 0..3 {
        client.send_request("POST", "/generate", &[], body.as_bytes()).await;
        assert_eq!(client.response().await.status(), 200);
    }
    let scrape = monitored.after(3).await;
    for (role, policy, reason, count) in [
        ("prefill", "cache_aware", "load", 1),
        ("prefill", "cache_aware", "prefix", 2),
        ("decode", "cache_aware", "only", 3),
    ] {
        let labels = [("role", role), ("policy", policy), ("reason", reason)];
        scrape.has("mini_lb_selections_total", &labels, count);
    }
    scrape.sums_to("mini_lb_selections_total", 6);
    scrape.sums_to("mini_lb_backend_prompt_bytes_total", 3 * bytes);
    scrape.sums_to("mini_lb_backend_matched_prompt_bytes_total", 2 * whole_blocks * 2_048);
    scrape.sums_to("mini_lb_prefix_index_entries", whole_blocks);
    assert!(scrape.get("mini_lb_prefix_index_capacity_entries", &[]) >= 3_072.0);
    assert!(scrape.get("mini_lb_prefix_index_age_ratio", &[]) < 0.01);
    scrape.sums_to("mini_lb_backend_work_bytes", 0);
}

/// One in 16 selections is timed, so that of 400 none is with a probability of 10^-11.
#[tokio::test]
async fn the_time_of_selections_is_measured() {
    let (prefill, decode) = (
        ScriptedServer::always(json("200 OK", ANSWER)).await,
        ScriptedServer::always(json("200 OK", ANSWER)).await,
    );
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let mut client = monitored.client().await;
    for _ in 0..400 {
        client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
        assert_eq!(client.response().await.status(), 200);
    }
    let count = monitored.after(400).await.get("mini_lb_selection_seconds_count", &[]);
    assert!((1.0..200.0).contains(&count), "{count}");
}

#[tokio::test]
async fn work_is_what_prefill_has_to_compute() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let text = "a".repeat(5_000);
    let mut client = monitored.client().await;
    let body = format!(r#"{{"text":"{text}"}}"#);
    client.send_request("POST", "/generate", &[], body.as_bytes()).await;
    decode.wait_for_requests(1).await;
    let scrape = monitored.after(0).await;
    let url = prefill.url();
    // And 1 KiB for the request itself.
    scrape.has(
        "mini_lb_backend_work_bytes",
        &[("role", "prefill"), ("backend", url.as_str())],
        5_001 + 1_024,
    );
    drop(client);
    monitored.after(1).await.sums_to("mini_lb_backend_work_bytes", 0);
}

#[tokio::test]
async fn successful_requests_are_counted() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = GatedServer::start(|| vec![Step::Send(json("200 OK", ANSWER))]).await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode.server], |config| config).await;
    let mut client = monitored.client().await;
    for (request, body) in [BODY, BODY, STREAMING].into_iter().enumerate() {
        let headers = [("content-type", "application/json")];
        client.send_request("POST", "/generate", &headers, body.as_bytes()).await;
        decode.respond_after(&prefill, &monitored.router, request + 1).await;
        assert_eq!(client.response().await.text(), ANSWER);
    }
    // hyper does not say when it has written a frame.
    let has_relay_times = !kit::skip_on_hyper("mini_lb_router_relay_seconds");
    let scrape = if has_relay_times {
        scrape::after_relaying(monitored.port, 3).await
    } else {
        monitored.after(3).await
    };
    let plain = [("endpoint", "generate"), ("streaming", "false")];
    let streaming = [("endpoint", "generate"), ("streaming", "true")];
    for (labels, count) in [(plain, 2), (streaming, 1)] {
        scrape.has("mini_lb_requests_total", &[&labels[..], &[("status", "200")]].concat(), count);
        let success = [&labels[..], &[("outcome", "success")]].concat();
        scrape.has("mini_lb_request_duration_seconds_count", &success, count);
        scrape.has("mini_lb_time_to_first_byte_seconds_count", &labels, count);
    }
    let generate = [("endpoint", "generate")];
    scrape.has("mini_lb_request_bytes_total", &generate, (2 * BODY.len() + STREAMING.len()) as u64);
    scrape.has("mini_lb_response_bytes_total", &generate, 3 * ANSWER.len() as u64);
    scrape.has("mini_lb_router_send_seconds_count", &[("connections", "opened")], 1);
    scrape.has("mini_lb_router_send_seconds_count", &[("connections", "kept")], 2);
    scrape.has("mini_lb_router_relay_seconds_count", &[], if has_relay_times { 3 } else { 0 });
    let (prefill_url, decode_url) = (prefill.url(), decode.server.url());
    let pair = [("prefill", prefill_url.as_str()), ("decode", decode_url.as_str())];
    for phase in ["prefill_head", "decode_first_byte", "gap"] {
        scrape.has(&format!("mini_lb_pair_{phase}_seconds_count"), &pair, 3);
    }
    for (role, url) in [("prefill", &prefill_url), ("decode", &decode_url)] {
        let server = [("role", role), ("backend", url.as_str())];
        scrape.has("mini_lb_backend_legs_total", &[&server[..], &[("outcome", "completed")]].concat(), 3);
        scrape.has("mini_lb_backend_connections_opened_total", &server, 1);
        scrape.has("mini_lb_backend_connections_reused_total", &server, 2);
        scrape.has("mini_lb_backend_idle_connections", &server, 1);
        scrape.has("mini_lb_backend_in_flight_requests", &server, 0);
        scrape.has("mini_lb_backend_healthy", &server, 1);
        scrape.has("mini_lb_healthy_backends", &[("role", role)], 1);
    }
    scrape.sums_to("mini_lb_cancellations_total", 0);
    scrape.sums_to("mini_lb_retries_total", 0);
    scrape.sums_to("mini_lb_errors_total", 0);
    scrape.sums_to("mini_lb_leg_after_partner_failure_seconds_count", 0);
    // Decode waited for prefill, which must not count as time of the router.
    let gap = scrape.get("mini_lb_pair_gap_seconds_sum", &pair);
    let relay = scrape.get("mini_lb_router_relay_seconds_sum", &[]);
    assert!(gap > 0.0 && (relay > 0.0) == has_relay_times && relay < 3.0, "{gap} {relay}");
}

#[tokio::test]
async fn stream_is_measured_at_its_first_byte() {
    let gate = Gate::new();
    let held = gate.clone();
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = ScriptedServer::start(move |_| {
        vec![
            first_event(),
            Step::Wait(held.clone()),
            Step::Send(chunk("data: [DONE]\n\n")),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let mut client = monitored.client().await;
    client.send_request("POST", "/v1/completions", &[], STREAMING.as_bytes()).await;
    let head = client.head().await;
    client.read_until("\"a\"").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.open();
    assert!(client.finish_response(head).await.complete);
    let scrape = monitored.after(1).await;
    let labels = [("endpoint", "completions"), ("streaming", "true")];
    scrape.has("mini_lb_requests_total", &[&labels[..], &[("status", "200")]].concat(), 1);
    if !kit::skip_on_hyper("mini_lb_router_relay_seconds") {
        scrape.has("mini_lb_router_relay_seconds_count", &[], 1);
    }
    let success = [&labels[..], &[("outcome", "success")]].concat();
    let first = scrape.get("mini_lb_time_to_first_byte_seconds_sum", &labels);
    let all = scrape.get("mini_lb_request_duration_seconds_sum", &success);
    assert!(all - first >= 0.3, "{first} s of {all} s");
    let bytes = (EVENT.len() + "data: [DONE]\n\n".len()) as u64;
    scrape.has("mini_lb_response_bytes_total", &[("endpoint", "completions")], bytes);
}

/// Much longer than it takes to close the other leg, also where the machine is busy.
const FAILS_AFTER: Duration = Duration::from_millis(600);

#[tokio::test]
async fn prefill_failure_and_its_cancelled_partner_are_counted() {
    let prefill = ScriptedServer::start(|_| vec![Step::Pause(FAILS_AFTER), Step::Close]).await;
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let response = monitored.client().await.post("/v1/chat/completions", STREAMING).await;
    assert_eq!((response.status(), response.error_code()), (502, "prefill_closed".to_owned()));
    let scrape = monitored.after(1).await;
    let labels = [("endpoint", "chat_completions"), ("streaming", "true")];
    scrape.has("mini_lb_requests_total", &[&labels[..], &[("status", "502")]].concat(), 1);
    let failure = [&labels[..], &[("outcome", "failure")]].concat();
    scrape.has("mini_lb_request_duration_seconds_count", &failure, 1);
    scrape.sums_to("mini_lb_time_to_first_byte_seconds_count", 0);
    scrape.has("mini_lb_errors_total", &[("code", "prefill_closed")], 1);
    scrape.has("mini_lb_cancellations_total", &[("cause", "prefill_failed")], 1);
    scrape.sums_to("mini_lb_cancellations_total", 1);
    scrape.has("mini_lb_leg_after_partner_failure_seconds_count", &[("role", "decode")], 1);
    scrape.sums_to("mini_lb_leg_after_partner_failure_seconds_count", 1);
    // Measured from the failure, not from the request.
    let ran_on = scrape.get("mini_lb_leg_after_partner_failure_seconds_sum", &[("role", "decode")]);
    assert!(ran_on > 0.0 && ran_on < FAILS_AFTER.as_secs_f64(), "{ran_on} s");
    let ended = |role: &str, server: &ScriptedServer, outcome: &str| {
        let url = server.url();
        scrape.get("mini_lb_backend_legs_total", &[("role", role), ("backend", &url), ("outcome", outcome)])
    };
    assert_eq!((ended("prefill", &prefill, "closed"), ended("decode", &decode, "cancelled")), (1.0, 1.0));
}

#[tokio::test]
async fn truncated_decode_response_is_counted() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = GatedServer::start(|| vec![first_event(), Step::Close]).await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode.server], |config| config).await;
    let mut client = monitored.client().await;
    client.send_request("POST", "/generate", &[], STREAMING.as_bytes()).await;
    decode.respond_after(&prefill, &monitored.router, 1).await;
    assert!(!client.response().await.complete);
    let scrape = monitored.after(1).await;
    let labels = [("endpoint", "generate"), ("streaming", "true")];
    scrape.has("mini_lb_requests_total", &[&labels[..], &[("status", "200")]].concat(), 1);
    let failure = [&labels[..], &[("outcome", "failure")]].concat();
    scrape.has("mini_lb_request_duration_seconds_count", &failure, 1);
    scrape.has("mini_lb_time_to_first_byte_seconds_count", &labels, 1);
    scrape.has("mini_lb_errors_total", &[("code", "decode_closed")], 1);
    // Prefill had completed: nothing was cancelled.
    scrape.sums_to("mini_lb_cancellations_total", 0);
    scrape.sums_to("mini_lb_leg_after_partner_failure_seconds_count", 0);
}

#[tokio::test]
async fn client_disconnects_are_counted() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = ScriptedServer::start(|seen| {
        let streams = String::from_utf8_lossy(&seen.body).contains("stream");
        if streams { vec![first_event(), Step::Hang] } else { vec![Step::Hang] }
    })
    .await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let mut client = monitored.client().await;
    client.send_request("POST", "/generate", &[], STREAMING.as_bytes()).await;
    client.read_until("\"a\"").await;
    drop(client);
    monitored.after(1).await;
    let mut client = monitored.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.wait_for_requests(2).await;
    drop(client);
    let scrape = monitored.after(2).await;
    for (streaming, status, cause) in
        [("true", "200", "client_left_mid_answer"), ("false", "499", "client_left")]
    {
        let labels = [("endpoint", "generate"), ("streaming", streaming)];
        scrape.has("mini_lb_requests_total", &[&labels[..], &[("status", status)]].concat(), 1);
        let left = [&labels[..], &[("outcome", "client_left")]].concat();
        scrape.has("mini_lb_request_duration_seconds_count", &left, 1);
        scrape.has("mini_lb_cancellations_total", &[("cause", cause)], 1);
    }
    scrape.sums_to("mini_lb_cancellations_total", 2);
    scrape.sums_to("mini_lb_errors_total", 0);
    scrape.sums_to("mini_lb_leg_after_partner_failure_seconds_count", 0);
}

#[tokio::test]
async fn a_request_for_several_samples_is_one_request_with_legs_of_each() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode], |config| config).await;
    let body = r#"{"text":"a","sampling_params":{"n":3}}"#;
    let response = monitored.client().await.post("/generate", body).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    let scrape = monitored.after(1).await;
    let request = [("endpoint", "generate"), ("status", "200"), ("streaming", "false")];
    scrape.has("mini_lb_requests_total", &request, 1);
    scrape.sums_to("mini_lb_requests_total", 1);
    scrape.has("mini_lb_samples_total", &[], 3);
    scrape.has("mini_lb_request_bytes_total", &[("endpoint", "generate")], body.len() as u64);
    scrape.has("mini_lb_response_bytes_total", &[("endpoint", "generate")], response.body.len() as u64);
    for (role, server) in [("prefill", &prefill), ("decode", &decode)] {
        let labels = [("role", role), ("backend", &*server.url()), ("outcome", "completed")];
        scrape.has("mini_lb_backend_legs_total", &labels, 3);
        scrape.sums_to("mini_lb_selections_total", 6);
    }
    // The router's own time would be that of one copy alone.
    scrape.sums_to("mini_lb_router_send_seconds_count", 0);
    scrape.sums_to("mini_lb_cancellations_total", 0);
}

#[tokio::test]
async fn retries_are_counted() {
    let busy = json("503 Service Unavailable", "{}");
    for (role, cause) in [("prefill", "connect"), ("decode", "status")] {
        let failing = ScriptedServer::always(busy.clone()).await;
        if cause == "connect" {
            failing.stop_listening().await;
        }
        let well = ScriptedServer::always(json("200 OK", ANSWER)).await;
        let partner = ScriptedServer::always(json("200 OK", ANSWER)).await;
        let both = [&failing, &well];
        let (prefill, decode): (&[&ScriptedServer], &[&ScriptedServer]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        let options = |config: MiniLbConfig| config.policy(RoundRobin::default).retry_on_status([503]);
        let monitored = MonitoredRouter::start(prefill, decode, options).await;
        assert_eq!(monitored.client().await.post("/generate", BODY).await.status(), 200, "{role}");
        let scrape = monitored.after(1).await;
        scrape.has("mini_lb_retries_total", &[("role", role), ("cause", cause)], 1);
        scrape.sums_to("mini_lb_retries_total", 1);
        scrape.has("mini_lb_cancellations_total", &[("cause", &format!("{role}_failed"))], 1);
        // The client got no error, and the time of the failed attempt is not the router's.
        scrape.sums_to("mini_lb_errors_total", 0);
        scrape.sums_to("mini_lb_router_send_seconds_count", 0);
    }
}

#[tokio::test]
async fn endpoint_label_has_a_fixed_set_of_values() {
    let server = ScriptedServer::always(json("200 OK", "{}")).await;
    let decode = ScriptedServer::always(json("200 OK", "{}")).await;
    let monitored = MonitoredRouter::start(&[&server], &[&decode], |config| config).await;
    let mut client = monitored.client().await;
    for (path, status) in [
        ("/health", 200),
        ("/ready", 200),
        ("/get_model_info", 200),
        ("/secret?token=1", 404),
        ("/pd_role_switch", 405),
        ("/generate", 405),
    ] {
        assert_eq!(client.get(path).await.status(), status, "{path}");
    }
    client.send("GET /health HTTP/1.1\r\n\r\n").await;
    assert_eq!(client.response().await.status(), 400);
    // Not even a request head.
    let mut stranger = monitored.client().await;
    stranger.send("\x16\x03\x01 hello\r\n\r\n").await;
    assert_eq!(stranger.response().await.status(), 400);
    let scrape = monitored.after(8).await;
    for (endpoint, status) in [
        ("health", "200"),
        ("ready", "200"),
        ("model_info", "200"),
        ("other", "404"),
        ("workers", "405"),
        ("generate", "405"),
    ] {
        let labels = [("endpoint", endpoint), ("status", status), ("streaming", "false")];
        scrape.has("mini_lb_requests_total", &labels, 1);
    }
    let refused = [("endpoint", "other"), ("status", "400"), ("streaming", "false")];
    scrape.has("mini_lb_requests_total", &refused, 2);
    scrape.has("mini_lb_errors_total", &[("code", "bad_request")], 2);
    scrape.has("mini_lb_errors_total", &[("code", "method_not_allowed")], 2);
    scrape.sums_to("mini_lb_cancellations_total", 0);
    assert!(!scrape.text().contains("secret"));
}

#[tokio::test]
async fn removed_backend_has_no_series() {
    let [prefill, before, after] = [(); 3].map(|()| ScriptedServer::always(json("200 OK", ANSWER)));
    let (prefill, before, after) = (prefill.await, before.await, after.await);
    let monitored = MonitoredRouter::start(&[&prefill], &[&before], |config| config).await;
    assert_eq!(monitored.client().await.post("/generate", BODY).await.status(), 200);
    assert!(monitored.after(1).await.text().contains(&before.url()));
    let decode = vec![after.url()];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), None)], decode, 60);
    monitored.router.reload(config).expect("a valid configuration");
    assert_eq!(monitored.client().await.post("/generate", BODY).await.status(), 200);
    let scrape = monitored.after(2).await;
    assert!(!scrape.text().contains(&before.url()), "{}", scrape.text());
    assert!(scrape.text().contains(&after.url()));
    scrape.has("mini_lb_backends", &[("role", "decode")], 1);
}

#[tokio::test]
async fn series_of_a_backend_that_was_removed_while_it_was_busy_end_with_its_last_request() {
    let [prefill, after] = [(); 2].map(|()| ScriptedServer::always(json("200 OK", ANSWER)));
    let (prefill, after) = (prefill.await, after.await);
    let before = GatedServer::start(|| vec![Step::Send(json("200 OK", ANSWER))]).await;
    let url = before.server.url();
    let monitored = MonitoredRouter::start(&[&prefill], &[&before.server], |config| config).await;
    let headers = [("content-type", "application/json")];
    let mut clients = [monitored.client().await, monitored.client().await];
    for client in &mut clients {
        client.send_request("POST", "/generate", &headers, BODY.as_bytes()).await;
    }
    before.server.wait_for_requests(2).await;
    let decode = vec![after.url()];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), None)], decode, 60);
    monitored.router.reload(config).expect("a valid configuration");
    let [mut first, mut second] = clients;
    // Its connection goes to the pool.
    before.gates.lock().unwrap()[0].open();
    let arrived = kit::with_timeout("one response", async {
        tokio::select! { _ = first.response() => 0, _ = second.response() => 1 }
    });
    let first_done = arrived.await;
    let scrape = monitored.after(1).await;
    scrape.has("mini_lb_backend_in_flight_requests", &[("role", "decode"), ("backend", &url)], 1);
    scrape.has("mini_lb_backend_draining", &[("role", "decode"), ("backend", &url)], 1);
    scrape.has("mini_lb_backends", &[("role", "decode")], 2);
    before.gates.lock().unwrap()[1].open();
    let last = if first_done == 0 { &mut second } else { &mut first };
    assert_eq!(last.response().await.text(), ANSWER);
    kit::with_timeout("the end of its series", async {
        while monitored.after(2).await.text().contains(&url) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    monitored.after(2).await.has("mini_lb_backends", &[("role", "decode")], 1);
}

#[tokio::test]
async fn backend_that_refuses_a_probe_is_shown_as_draining() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let probes = AtomicUsize::new(0);
    let leaving = ScriptedServer::start(move |seen| {
        let is_over = seen.target() == "/ready" && probes.fetch_add(1, Ordering::SeqCst) > 0;
        vec![Step::Send(json(if is_over { "503 Service Unavailable" } else { "200 OK" }, "{}"))]
    })
    .await;
    let monitored = MonitoredRouter::start(&[&prefill], &[&leaving], |config| {
        config.health_checks(true).health_check_interval(Duration::from_millis(30))
    })
    .await;
    let url = leaving.url();
    let labels = [("role", "decode"), ("backend", url.as_str())];
    let scrape = kit::with_timeout("a draining backend", async {
        loop {
            let scrape = monitored.after(0).await;
            if scrape.get("mini_lb_backend_draining", &labels) == 1.0 {
                return scrape;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    scrape.has("mini_lb_backend_healthy", &labels, 0);
    scrape.has("mini_lb_backend_draining", &[("role", "prefill"), ("backend", &prefill.url())], 0);
}

const RANK_WORK: &str = "mini_lb_backend_rank_work_bytes";

/// A prefill server with two ranks that never answers a request, and a router that knows it.
async fn router_with_ranks(decode: &ScriptedServer, answer: Step) -> (ScriptedServer, MonitoredRouter) {
    let prefill = ScriptedServer::start(move |seen| match seen.target() {
        "/server_info" => vec![Step::Send(json("200 OK", r#"{"dp_size":2}"#))],
        "/ready" => vec![Step::Send(json("200 OK", "{}"))],
        _ => vec![answer.clone()],
    })
    .await;
    let monitored = MonitoredRouter::start(&[&prefill], &[decode], |config| {
        let checked = config.health_checks(true).health_check_interval(Duration::from_secs(1));
        checked.encoder("http://127.0.0.1:1")
    })
    .await;
    kit::with_timeout("the ranks", async {
        while !monitored.after(0).await.text().contains(&format!("{RANK_WORK}{{")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    (prefill, monitored)
}

#[tokio::test]
async fn work_of_a_server_is_the_sum_of_its_ranks() {
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let (prefill, monitored) = router_with_ranks(&decode, Step::Hang).await;
    let (mut first, mut second) = (monitored.client().await, monitored.client().await);
    // The second goes to the rank that has nothing to do.
    for (client, letter, length, seen) in [(&mut first, "a", 3_000, 1), (&mut second, "b", 5_000, 2)] {
        let body = format!(r#"{{"text":"{}"}}"#, letter.repeat(length));
        client.send_request("POST", "/generate", &[], body.as_bytes()).await;
        kit::with_timeout("the request", async {
            while decode.requests().iter().filter(|seen| seen.target() == "/generate").count() < seen {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    let scrape = monitored.after(0).await;
    let url = prefill.url();
    let of_rank = |rank| scrape.get(RANK_WORK, &[("role", "prefill"), ("backend", &url), ("dp_rank", rank)]);
    let mut works = [of_rank("0"), of_rank("1")];
    works.sort_by(f64::total_cmp);
    assert_eq!(works, [3_001.0 + 1_024.0, 5_001.0 + 1_024.0]);
    scrape.has("mini_lb_backend_work_bytes", &[("role", "prefill"), ("backend", &url)], 10_050);
    scrape.has("mini_lb_backend_in_flight_requests", &[("role", "prefill"), ("backend", &url)], 2);
    drop((first, second));
    monitored.after(2).await.sums_to(RANK_WORK, 0);
}

/// A scrape that has at least one series of every metric.
async fn full_scrape() -> Scrape {
    let decode = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let answer = Step::Send(json("200 OK", ANSWER));
    let (_prefill, monitored) = router_with_ranks(&decode, answer).await;
    let mut client = monitored.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert_eq!(client.post("/generate", "[]").await.status(), 400);
    monitored.after(2).await
}

#[tokio::test]
async fn promtool_accepts_a_scrape() {
    let scrape = full_scrape().await;
    let Some(said) = promtool::run(&["check", "metrics"], scrape.text()) else { return };
    assert_eq!(said, "");
}

#[test]
fn promtool_accepts_the_alerts_and_they_fire() {
    let file = |path: &str| format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    for (what, path) in [("check", "docs/alerts.yaml"), ("test", "tests/metrics/alerts.yaml")] {
        let Some(said) = promtool::run(&[what, "rules", &file(path)], "") else { return };
        assert!(said.contains("SUCCESS") && !said.contains("FAILED"), "{said}");
    }
}

#[tokio::test]
async fn metrics_md_describes_every_metric() {
    let scrape = full_scrape().await;
    let documented = scrape::documented(include_str!("../docs/METRICS.md"));
    let mut described = scrape.described();
    // Both are sorted, as the document has its own order.
    described.sort();
    assert_eq!(documented, described);
}

#[tokio::test]
async fn alerts_and_dashboard_use_existing_metrics() {
    let described = full_scrape().await.described();
    for (file, at_least) in
        [(include_str!("../docs/alerts.yaml"), 8), (include_str!("../docs/grafana.json"), 25)]
    {
        let asked = scrape::metrics_in(file);
        assert!(asked.len() >= at_least, "{asked:?}");
        for name in &asked {
            let family = described.iter().any(|metric| metric.is_series(name));
            assert!(family, "{name} is no series");
        }
    }
    let dashboard: serde_json::Value =
        serde_json::from_str(include_str!("../docs/grafana.json")).expect("JSON");
    assert_eq!(dashboard["title"], "mini-lb");
}

#[test]
fn program_serves_metrics_on_its_prometheus_port() {
    scrape::check_built_program();
}

#[tokio::test]
async fn memory_of_request_bodies_is_shown() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = GatedServer::start(|| vec![Step::Send(json("200 OK", ANSWER))]).await;
    let bounded = |config: MiniLbConfig| {
        config.max_buffered_bytes(1 << 20).queue_timeout(std::time::Duration::from_millis(1))
    };
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode.server], bounded).await;
    let mut first = monitored.client().await;
    // With the cost of its chunks it takes everything.
    let large = format!(r#"{{"text":"{}"}}"#, "a".repeat(1_000_000));
    first.send_request("POST", "/generate", &[], large.as_bytes()).await;
    decode.server.wait_for_requests(1).await;
    assert_eq!(monitored.client().await.post("/generate", &large).await.status(), 503);
    let scrape = monitored.after(1).await;
    scrape.has("mini_lb_buffered_bytes", &[], 1 << 20);
    scrape.has("mini_lb_buffered_bytes_limit", &[], 1 << 20);
    scrape.has("mini_lb_errors_total", &[("code", "memory_limit")], 1);
    decode.respond_after(&prefill, &monitored.router, 1).await;
    assert_eq!(first.response().await.status(), 200);
    monitored.after(2).await.has("mini_lb_buffered_bytes", &[], 0);
}

#[tokio::test]
async fn queued_and_rejected_requests_are_counted() {
    let prefill = ScriptedServer::always(json("200 OK", ANSWER)).await;
    let decode = GatedServer::start(|| vec![Step::Send(json("200 OK", ANSWER))]).await;
    let one = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(1);
    let monitored = MonitoredRouter::start(&[&prefill], &[&decode.server], one).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = monitored.client().await;
        client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
        clients.push(client);
        decode.server.wait_for_requests(1).await;
    }
    monitored.router.wait_queued(1).await;
    assert_eq!(monitored.client().await.post("/generate", BODY).await.status(), 429);
    let scrape = monitored.after(1).await;
    scrape.has("mini_lb_queue_length", &[], 1);
    scrape.has("mini_lb_queue_limit", &[], 1);
    scrape.has("mini_lb_queue_refused_total", &[("reason", "full")], 1);
    scrape.has("mini_lb_errors_total", &[("code", "queue_full")], 1);
    for (number, client) in clients.iter_mut().enumerate() {
        decode.respond_after(&prefill, &monitored.router, number + 1).await;
        assert_eq!(client.response().await.status(), 200);
    }
    let scrape = monitored.after(3).await;
    scrape.has("mini_lb_queue_length", &[], 0);
    scrape.has("mini_lb_queue_wait_seconds_count", &[], 1);
}

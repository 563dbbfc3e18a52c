//! Health: probes, failures of requests, ejection and recovery, readiness.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, ReceivedRequest, Router, ScriptedServer, Step, json};
use mini_lb::{Backend, Choice, MiniLbConfig, Outcome, Policy, Random, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;
/// Short, so that tests need not wait.
const PROBE_INTERVAL: Duration = Duration::from_millis(30);
/// Longer than any test: only failed backends are probed again, at their own interval.
const LONG_INTERVAL: Duration = Duration::from_secs(3_600);

type Script = fn() -> Vec<Step>;

fn ok() -> Vec<Step> {
    vec![Step::Send(json("200 OK", "{}"))]
}

fn is_probe(seen: &ReceivedRequest) -> bool {
    ["/ready", "/health"].contains(&seen.target())
}

/// The query for a description of the server, which is neither a probe nor a user request.
fn is_info_query(seen: &ReceivedRequest) -> bool {
    ["/server_info", "/get_server_info"].contains(&seen.target())
}

/// The probes that a server has received.
fn probes(server: &ScriptedServer) -> Vec<ReceivedRequest> {
    server.requests().into_iter().filter(is_probe).collect()
}

/// A server with separate scripts for probes and requests.
async fn server(
    probe: impl Fn() -> Vec<Step> + Send + Sync + 'static,
    request: impl Fn() -> Vec<Step> + Send + Sync + 'static,
) -> ScriptedServer {
    ScriptedServer::start(move |seen| match seen {
        seen if is_probe(seen) => probe(),
        seen if is_info_query(seen) => ok(),
        _ => request(),
    })
    .await
}

async fn ok_server() -> ScriptedServer {
    server(ok, ok).await
}

fn requests(server: &ScriptedServer) -> usize {
    server.requests().iter().filter(|seen| !is_probe(seen) && !is_info_query(seen)).count()
}

async fn router(prefill: &[&ScriptedServer], decode: &[&ScriptedServer], interval: Duration) -> Router {
    checked_router(prefill, decode, |config| config.health_check_interval(interval)).await
}

async fn checked_router(
    prefill: &[&ScriptedServer],
    decode: &[&ScriptedServer],
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    Router::start_with(prefill, decode, |config| {
        options(config.health_checks(true).policy(RoundRobin::default))
    })
    .await
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    kit::with_timeout(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

async fn wait_health(router: &Router, server: &ScriptedServer, expected: bool) {
    let known = router.backend(server);
    wait_until("a change of health", || known.is_healthy() == expected).await;
}

/// Waits until the router is ready, which needs a successful probe of each role.
async fn wait_ready(router: &Router) {
    let mut client = router.client().await;
    kit::with_timeout("a ready router", async {
        while client.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn every_probe_is_get_ready_on_its_own_connection() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let _router = router(&[&prefill], &[&decode], PROBE_INTERVAL).await;
    for server in [&prefill, &decode] {
        server.wait_for_requests(4).await;
        assert!(probes(server).len() >= 3);
        for probe in probes(server) {
            assert_eq!(probe.head.start_line, "GET /ready HTTP/1.1");
            assert_eq!(probe.head.header("host"), Some(&server.url()["http://".len()..]));
        }
        for (number, seen) in server.requests().iter().enumerate() {
            assert_eq!(seen.connection, number);
        }
    }
}

#[tokio::test]
async fn probe_falls_back_to_health_where_ready_is_404_and_is_rarer_there() {
    let old = ScriptedServer::start(|seen| match seen.target() {
        "/health" => ok(),
        _ => vec![Step::Send(json("404 Not Found", "{}"))],
    })
    .await;
    let decode = ok_server().await;
    let router = router(&[&old], &[&decode], PROBE_INTERVAL).await;
    wait_ready(&router).await;
    let begun = Instant::now();
    wait_until("four probes", || probes(&old).len() >= 4).await;
    // At least one whole interval lies between the second and the fourth.
    assert!(begun.elapsed() >= 10 * PROBE_INTERVAL, "{:?}", begun.elapsed());
    let asked: Vec<String> = probes(&old).iter().map(|seen| seen.target().to_owned()).collect();
    // The fallback is remembered.
    assert_eq!(asked[..4], ["/ready", "/health", "/health", "/health"]);
}

#[tokio::test]
async fn router_is_ready_with_a_healthy_backend_of_each_role() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&decode], PROBE_INTERVAL).await;
    wait_ready(&router).await;
    decode.stop_listening().await;
    wait_health(&router, &decode, false).await;
    let response = router.client().await.get("/ready").await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "not_ready"));
    assert!(response.text().contains("no decode server"), "{}", response.text());
    // Liveness is not affected.
    assert_eq!(router.client().await.get("/health").await.status(), 200);

    let _back = ScriptedServer::start_at(decode.address(), |_| ok()).await;
    wait_ready(&router).await;
}

#[tokio::test]
async fn router_is_not_ready_before_the_first_probe_succeeds() {
    let prefill = ok_server().await;
    let silent = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let router = router(&[&prefill], &[&silent], PROBE_INTERVAL).await;
    silent.wait_for_requests(1).await;
    assert_eq!(router.client().await.get("/ready").await.status(), 503);
    // It has not failed yet.
    assert!(router.backend(&silent).is_healthy());
}

#[tokio::test]
async fn backend_that_was_never_healthy_is_ejected_after_one_failure() {
    let (prefill, spare) = (ok_server().await, ok_server().await);
    let starting = server(|| vec![Step::Send(json("503 Service Unavailable", "{}"))], ok).await;
    let router = router(&[&prefill], &[&starting, &spare], LONG_INTERVAL).await;
    wait_health(&router, &starting, false).await;
    let mut client = router.client().await;
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&starting), requests(&spare)), (0, 10));
}

#[tokio::test]
async fn three_failed_probes_eject_and_two_good_ones_restore() {
    // Success, 2 failures, success, 3 failures, success, a failure, then successes.
    const TURNS: [bool; 11] = [true, false, false, true, false, false, false, true, false, true, true];
    let probes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&probes);
    // Each response waits until the test has read the state.
    let gates: Arc<Vec<Gate>> = Arc::new((0..=TURNS.len()).map(|_| Gate::new()).collect());
    let held = Arc::clone(&gates);
    let script = move || {
        let turn = counted.fetch_add(1, Ordering::SeqCst);
        let status = if *TURNS.get(turn).unwrap_or(&true) { "200 OK" } else { "500 Internal Server Error" };
        let gate = held[turn.min(TURNS.len())].clone();
        vec![Step::Wait(gate), Step::Send(json(status, "{}"))]
    };
    let (prefill, decode) = (ok_server().await, server(script, ok).await);
    let router = router(&[&prefill], &[&decode], Duration::from_millis(1)).await;
    let mut seen = Vec::new();
    for (turn, gate) in gates.iter().enumerate() {
        wait_until("the next probe", || probes.load(Ordering::SeqCst) > turn).await;
        seen.push(router.backend(&decode).is_healthy());
        gate.open();
    }
    // The state before each probe completes.
    let well = [true, true, true, true, true, true, true, false, false, false, false, true];
    assert_eq!(seen, well);
}

#[tokio::test]
async fn probe_timeout_is_a_failure() {
    let (prefill, silent) = (ok_server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let router = checked_router(&[&prefill], &[&silent], |config| {
        config.health_check_interval(PROBE_INTERVAL).health_check_timeout(Duration::from_millis(50))
    })
    .await;
    wait_health(&router, &silent, false).await;
    silent.wait_closed(1).await;
}

#[tokio::test]
async fn recovered_backend_gets_requests_within_5_s() {
    for role in ["prefill", "decode"] {
        let (partner, spare, leaving) = (ok_server().await, ok_server().await, ok_server().await);
        let both = [&spare, &leaving];
        let (prefill, decode): (&[&ScriptedServer], &[&ScriptedServer]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        // The default interval must not matter.
        let router = checked_router(prefill, decode, |config| config).await;
        wait_ready(&router).await;
        leaving.stop_listening().await;
        let mut client = router.client().await;
        // No client error: a request that could not be sent goes to the other backend.
        for _ in 0..20 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
        }
        assert!(!router.backend(&leaving).is_healthy(), "{role}");

        let back = ScriptedServer::start_at(leaving.address(), |_| ok()).await;
        let since = Instant::now();
        while requests(&back) == 0 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
            assert!(since.elapsed() < Duration::from_secs(5), "{role}");
        }
    }
}

/// A server that responds to its first probe only, so that afterwards requests alone affect its health.
async fn probed_once(request: Script) -> ScriptedServer {
    let probes = AtomicUsize::new(0);
    server(move || if probes.fetch_add(1, Ordering::SeqCst) == 0 { ok() } else { vec![Step::Hang] }, request)
        .await
}

/// A pair whose server of `role` runs this script for requests while its partner hangs.
async fn failing_pair(role: &str, request: Script) -> (ScriptedServer, ScriptedServer, Router) {
    let (failing, partner) = (probed_once(request).await, server(ok, || vec![Step::Hang]).await);
    let (prefill, decode) = if role == "prefill" { (&failing, &partner) } else { (&partner, &failing) };
    let router = router(&[prefill], &[decode], LONG_INTERVAL).await;
    wait_ready(&router).await;
    (failing, partner, router)
}

fn respond_with(status: &str) -> Vec<Step> {
    vec![Step::Send(json(status, "{}"))]
}

#[tokio::test]
async fn three_failed_requests_eject_the_failing_backend_only() {
    let failures: [(Outcome, Script); 3] = [
        (Outcome::Closed, || vec![Step::Close]),
        (Outcome::Closed, || vec![Step::Reset]),
        (Outcome::BadResponse, || vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
    ];
    for (outcome, failure) in failures {
        for role in ["prefill", "decode"] {
            let (failing, partner, router) = failing_pair(role, failure).await;
            let known = [router.backend(&failing), router.backend(&partner)];
            let mut client = router.client().await;
            // If all backends of a role are ejected, all are used.
            for count in 1..=4 {
                assert_eq!(known[0].is_healthy(), count <= 3, "{role} {outcome:?} before {count}");
                client.post("/generate", BODY).await;
                router.wait_idle().await;
                assert_eq!((requests(&failing), known[0].ended(outcome)), (count, count as u64));
            }
            assert!(known[1].is_healthy(), "{role} {outcome:?}");
            assert_eq!(known[1].ended(Outcome::Cancelled), 4, "{role} {outcome:?}");
        }
    }
}

#[tokio::test]
async fn error_statuses_do_not_eject_a_backend() {
    let refusals: [(Outcome, Script); 6] = [
        (Outcome::Refused, || respond_with("400 Bad Request")),
        (Outcome::Refused, || respond_with("401 Unauthorized")),
        (Outcome::Refused, || respond_with("429 Too Many Requests")),
        (Outcome::Refused, || respond_with("503 Service Unavailable")),
        (Outcome::ServerError, || respond_with("500 Internal Server Error")),
        (Outcome::ServerError, || respond_with("502 Bad Gateway")),
    ];
    for (outcome, refusal) in refusals {
        for role in ["prefill", "decode"] {
            let (failing, _partner, router) = failing_pair(role, refusal).await;
            let mut client = router.client().await;
            for _ in 0..5 {
                client.post("/generate", BODY).await;
            }
            router.wait_idle().await;
            let known = router.backend(&failing);
            assert!(known.is_healthy() && known.ended(outcome) == 5, "{role} {outcome:?}");
        }
    }
}

#[tokio::test]
async fn failed_requests_bring_the_next_probe_forward() {
    let failures: [Script; 2] = [|| respond_with("500 Internal Server Error"), || vec![Step::Close]];
    for failure in failures {
        let (failing, partner) = (server(ok, failure).await, server(ok, || vec![Step::Hang]).await);
        let router = router(&[&failing], &[&partner], LONG_INTERVAL).await;
        wait_ready(&router).await;
        for count in 1..=2 {
            assert_eq!((probes(&failing).len(), probes(&partner).len()), (count, 1));
            router.client().await.post("/generate", BODY).await;
            wait_until("the next probe", || probes(&failing).len() > count).await;
        }
    }
}

#[tokio::test]
async fn probes_after_failed_requests_have_a_least_distance() {
    let failing = server(ok, || respond_with("500 Internal Server Error")).await;
    let partner = server(ok, || vec![Step::Hang]).await;
    let router = router(&[&failing], &[&partner], LONG_INTERVAL).await;
    wait_ready(&router).await;
    let (mut client, begun) = (router.client().await, Instant::now());
    for _ in 0..200 {
        client.post("/generate", BODY).await;
    }
    let most = 2 + begun.elapsed().as_millis() / 100;
    assert!(probes(&failing).len() as u128 <= most, "{} probes, {most}", probes(&failing).len());
    assert!(router.backend(&failing).is_healthy());
}

/// A server that answers probes with 503 while the flag is set, and requests always.
async fn leaving_server(leaves: &Arc<AtomicBool>) -> ScriptedServer {
    let leaves = Arc::clone(leaves);
    let probe = move || {
        if leaves.load(Ordering::SeqCst) { respond_with("503 Service Unavailable") } else { ok() }
    };
    server(probe, ok).await
}

async fn status_of(router: &Router, server: &ScriptedServer) -> String {
    let workers = router.client().await.get("/workers").await.json();
    let workers = workers["workers"].as_array().expect("a list").clone();
    let entry = workers.into_iter().find(|entry| entry["url"] == server.url()).expect("an entry");
    entry["status"].as_str().expect("a text").to_owned()
}

#[tokio::test]
async fn one_probe_refused_with_503_takes_a_backend_out_until_probes_succeed() {
    for role in ["prefill", "decode"] {
        let leaves = Arc::new(AtomicBool::new(false));
        let (leaving, spare, partner) = (leaving_server(&leaves).await, ok_server().await, ok_server().await);
        let both = [&leaving, &spare];
        let (prefill, decode): (&[&ScriptedServer], &[&ScriptedServer]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        let router = router(prefill, decode, PROBE_INTERVAL).await;
        for server in [&leaving, &spare, &partner] {
            wait_until("a probe", || !probes(server).is_empty()).await;
        }
        wait_ready(&router).await;
        let before = probes(&leaving).len();
        leaves.store(true, Ordering::SeqCst);
        // Requests complete meanwhile, and change nothing.
        let mut client = router.client().await;
        kit::with_timeout("a change of health", async {
            while router.backend(&leaving).is_healthy() {
                assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
            }
        })
        .await;
        assert_eq!(status_of(&router, &leaving).await, "draining", "{role}");
        let seen = requests(&leaving);
        for _ in 0..20 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
        }
        assert_eq!(requests(&leaving), seen, "{role}");
        wait_until("more probes", || probes(&leaving).len() > before + 5).await;
        assert_eq!(status_of(&router, &leaving).await, "draining", "{role}");

        leaves.store(false, Ordering::SeqCst);
        wait_health(&router, &leaving, true).await;
        kit::with_timeout("a request", async {
            while requests(&leaving) == seen {
                assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
            }
        })
        .await;
    }
}

#[tokio::test]
async fn draining_backend_is_used_while_no_other_is_left_and_stays_draining() {
    let leaves = Arc::new(AtomicBool::new(false));
    let (prefill, leaving) = (ok_server().await, leaving_server(&leaves).await);
    let router = router(&[&prefill], &[&leaving], PROBE_INTERVAL).await;
    wait_ready(&router).await;
    leaves.store(true, Ordering::SeqCst);
    wait_health(&router, &leaving, false).await;
    let mut client = router.client().await;
    for count in 1..=20 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        assert_eq!((requests(&leaving), router.backend(&leaving).is_healthy()), (count, false));
    }
    assert_eq!(client.get("/ready").await.status(), 503);
    assert_eq!(status_of(&router, &leaving).await, "draining");
}

#[tokio::test]
async fn backend_that_is_down_is_tried_before_one_that_drains() {
    let leaves = Arc::new(AtomicBool::new(false));
    let failing = Arc::new(AtomicBool::new(false));
    let fails = Arc::clone(&failing);
    let probe = move || {
        if fails.load(Ordering::SeqCst) { respond_with("500 Internal Server Error") } else { ok() }
    };
    let (prefill, down, leaving) =
        (ok_server().await, server(probe, ok).await, leaving_server(&leaves).await);
    let router = router(&[&prefill], &[&down, &leaving], PROBE_INTERVAL).await;
    for server in [&down, &leaving] {
        wait_until("a probe", || !probes(server).is_empty()).await;
    }
    wait_ready(&router).await;
    leaves.store(true, Ordering::SeqCst);
    failing.store(true, Ordering::SeqCst);
    wait_health(&router, &leaving, false).await;
    wait_health(&router, &down, false).await;
    let mut client = router.client().await;
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&down), requests(&leaving)), (10, 0));
}

#[tokio::test]
async fn completed_requests_do_not_hide_failed_probes() {
    let up = Arc::new(AtomicBool::new(true));
    let is_up = Arc::clone(&up);
    let probe = move || {
        if is_up.load(Ordering::SeqCst) { ok() } else { respond_with("500 Internal Server Error") }
    };
    let (prefill, decode) = (ok_server().await, server(probe, ok).await);
    let router = router(&[&prefill], &[&decode], PROBE_INTERVAL).await;
    wait_ready(&router).await;
    up.store(false, Ordering::SeqCst);
    let mut client = router.client().await;
    kit::with_timeout("the ejection", async {
        while router.backend(&decode).is_healthy() {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
        }
    })
    .await;
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert!(!router.backend(&decode).is_healthy());
}

#[tokio::test]
async fn client_disconnects_do_not_eject_a_backend() {
    let (silent, _partner, router) = failing_pair("decode", || vec![Step::Hang]).await;
    for count in 1..=5 {
        let mut client = router.client().await;
        client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
        wait_until("the request", || requests(&silent) == count).await;
        drop(client);
        router.wait_idle().await;
    }
    let known = router.backend(&silent);
    assert!(known.is_healthy() && known.ended(Outcome::Cancelled) == 5);
}

/// Picks the first candidate.
struct First;

impl Policy for First {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[0]
    }
}

#[tokio::test]
async fn no_policy_sees_an_unhealthy_backend() {
    let policies: [fn(MiniLbConfig) -> MiniLbConfig; 3] = [
        |config| config.policy(|| First),
        |config| config.policy(|| Random),
        |config| config.policy(RoundRobin::default),
    ];
    for policy in policies {
        let unwell = server(|| respond_with("503 Service Unavailable"), ok).await;
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let router = checked_router(&[&prefill], &[&unwell, &decode], policy).await;
        wait_ready(&router).await;
        wait_health(&router, &unwell, false).await;
        let mut client = router.client().await;
        for _ in 0..20 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
        }
        assert_eq!((requests(&unwell), requests(&decode)), (0, 20));
    }
}

#[tokio::test]
async fn without_health_checks_nothing_is_probed_or_ejected() {
    let (prefill, broken) = (ok_server().await, server(ok, || vec![Step::Close]).await);
    let router = checked_router(&[&prefill], &[&broken], |config| config.health_checks(false)).await;
    let mut client = router.client().await;
    for _ in 0..5 {
        assert_eq!(client.post("/generate", BODY).await.status(), 502);
    }
    assert!(router.backend(&broken).is_healthy());
    assert_eq!(client.get("/ready").await.status(), 200);
    assert!(!prefill.requests().iter().chain(&broken.requests()).any(is_probe));
}

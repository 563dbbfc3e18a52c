//! Which servers are healthy, by probes and by what requests show, and what follows from it.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, Router, Seen, Step, Upstream, json};
use mini_lb::{Backend, Choice, MiniLbConfig, Outcome, Policy, Random, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;
/// So that a test does not have to wait.
const OFTEN: Duration = Duration::from_millis(30);
/// Only what has failed is asked again in this time.
const NEVER: Duration = Duration::from_secs(3_600);

type Script = fn() -> Vec<Step>;

fn ok() -> Vec<Step> {
    vec![Step::Send(json("200 OK", "{}"))]
}

fn is_probe(seen: &Seen) -> bool {
    ["/ready", "/health"].contains(&seen.target())
}

/// The question what a server is, which is neither a probe nor a request.
fn is_question(seen: &Seen) -> bool {
    ["/server_info", "/get_server_info"].contains(&seen.target())
}

/// The probes that a server has seen, without the question what it is.
fn probes(server: &Upstream) -> Vec<Seen> {
    server.seen().into_iter().filter(is_probe).collect()
}

/// A server that answers probes and requests by different scripts.
async fn server(
    probe: impl Fn() -> Vec<Step> + Send + Sync + 'static,
    request: impl Fn() -> Vec<Step> + Send + Sync + 'static,
) -> Upstream {
    Upstream::start(move |seen| match seen {
        seen if is_probe(seen) => probe(),
        seen if is_question(seen) => ok(),
        _ => request(),
    })
    .await
}

async fn well() -> Upstream {
    server(ok, ok).await
}

fn requests(server: &Upstream) -> usize {
    server.seen().iter().filter(|seen| !is_probe(seen) && !is_question(seen)).count()
}

async fn router(prefill: &[&Upstream], decode: &[&Upstream], interval: Duration) -> Router {
    checking(prefill, decode, |config| config.health_check_interval(interval)).await
}

async fn checking(
    prefill: &[&Upstream],
    decode: &[&Upstream],
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    Router::start_with(prefill, decode, |config| {
        options(config.health_checks(true).policy(RoundRobin::default))
    })
    .await
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    kit::patiently(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

async fn healthy(router: &Router, server: &Upstream, expected: bool) {
    let known = router.knows(server);
    until("a change of health", || known.is_healthy() == expected).await;
}

/// Waits until each of the servers has been asked and has answered.
async fn probed(router: &Router) {
    let mut client = router.client().await;
    kit::patiently("a ready router", async {
        while client.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn every_server_is_asked_for_ready_on_a_connection_of_its_own() {
    let (prefill, decode) = (well().await, well().await);
    let _router = router(&[&prefill], &[&decode], OFTEN).await;
    for server in [&prefill, &decode] {
        server.arrived(4).await;
        assert!(probes(server).len() >= 3);
        for probe in probes(server) {
            assert_eq!(probe.head.start_line, "GET /ready HTTP/1.1");
            assert_eq!(probe.head.header("host"), Some(&server.url()["http://".len()..]));
        }
        for (number, seen) in server.seen().iter().enumerate() {
            assert_eq!(seen.connection, number);
        }
    }
}

#[tokio::test]
async fn where_there_is_no_ready_health_is_asked_for() {
    let old = Upstream::start(|seen| match seen.target() {
        "/health" => ok(),
        _ => vec![Step::Send(json("404 Not Found", "{}"))],
    })
    .await;
    let decode = well().await;
    let router = router(&[&old], &[&decode], OFTEN).await;
    probed(&router).await;
    until("four probes", || probes(&old).len() >= 4).await;
    let asked: Vec<String> = probes(&old).iter().map(|seen| seen.target().to_owned()).collect();
    // What was learnt is kept.
    assert_eq!(asked[..4], ["/ready", "/health", "/health", "/health"]);
}

#[tokio::test]
async fn the_router_is_ready_with_a_healthy_server_of_each_role() {
    let (prefill, decode) = (well().await, well().await);
    let router = router(&[&prefill], &[&decode], OFTEN).await;
    probed(&router).await;
    decode.stop_listening().await;
    healthy(&router, &decode, false).await;
    let answer = router.client().await.get("/ready").await;
    assert_eq!((answer.status(), answer.code().as_str()), (503, "not_ready"));
    assert!(answer.text().contains("no decode server"), "{}", answer.text());
    // That it runs is another question.
    assert_eq!(router.client().await.get("/health").await.status(), 200);

    let _back = Upstream::start_at(decode.address(), |_| ok()).await;
    probed(&router).await;
}

#[tokio::test]
async fn a_router_whose_servers_never_answered_is_not_ready() {
    let prefill = well().await;
    let silent = Upstream::start(|_| vec![Step::Hang]).await;
    let router = router(&[&prefill], &[&silent], OFTEN).await;
    silent.arrived(1).await;
    assert_eq!(router.client().await.get("/ready").await.status(), 503);
    // Nothing is known against it yet.
    assert!(router.knows(&silent).is_healthy());
}

#[tokio::test]
async fn a_server_that_was_never_well_gets_no_requests_after_one_failure() {
    let (prefill, spare) = (well().await, well().await);
    let starting = server(|| vec![Step::Send(json("503 Service Unavailable", "{}"))], ok).await;
    let router = router(&[&prefill], &[&starting, &spare], NEVER).await;
    healthy(&router, &starting, false).await;
    let mut client = router.client().await;
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&starting), requests(&spare)), (0, 10));
}

#[tokio::test]
async fn three_failed_probes_in_a_row_take_a_server_out_and_two_good_ones_bring_it_back() {
    // By its turn: well, 2 failures, well, 3 failures, well, a failure, well for good.
    const TURNS: [bool; 11] = [true, false, false, true, false, false, false, true, false, true, true];
    let probes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&probes);
    // The next answer waits for the test to have looked.
    let gates: Arc<Vec<Gate>> = Arc::new((0..=TURNS.len()).map(|_| Gate::new()).collect());
    let held = Arc::clone(&gates);
    let script = move || {
        let turn = counted.fetch_add(1, Ordering::SeqCst);
        let status = if *TURNS.get(turn).unwrap_or(&true) { "200 OK" } else { "500 Internal Server Error" };
        let gate = held[turn.min(TURNS.len())].clone();
        vec![Step::Wait(gate), Step::Send(json(status, "{}"))]
    };
    let (prefill, decode) = (well().await, server(script, ok).await);
    let router = router(&[&prefill], &[&decode], Duration::from_millis(1)).await;
    let mut seen = Vec::new();
    for (turn, gate) in gates.iter().enumerate() {
        until("the next probe", || probes.load(Ordering::SeqCst) > turn).await;
        seen.push(router.knows(&decode).is_healthy());
        gate.open();
    }
    // Before each probe is answered.
    let well = [true, true, true, true, true, true, true, false, false, false, false, true];
    assert_eq!(seen, well);
}

#[tokio::test]
async fn a_probe_that_is_not_answered_in_time_is_a_failure() {
    let (prefill, silent) = (well().await, Upstream::start(|_| vec![Step::Hang]).await);
    let router = checking(&[&prefill], &[&silent], |config| {
        config.health_check_interval(OFTEN).health_check_timeout(Duration::from_millis(50))
    })
    .await;
    healthy(&router, &silent, false).await;
    silent.closed(1).await;
}

#[tokio::test]
async fn a_server_gets_requests_within_5_s_of_being_back() {
    for role in ["prefill", "decode"] {
        let (partner, spare, leaving) = (well().await, well().await, well().await);
        let both = [&spare, &leaving];
        let (prefill, decode): (&[&Upstream], &[&Upstream]) =
            if role == "prefill" { (&both, &[&partner]) } else { (&[&partner], &both) };
        // The default interval: it must not matter.
        let router = checking(prefill, decode, |config| config).await;
        probed(&router).await;
        leaving.stop_listening().await;
        let mut client = router.client().await;
        // Nobody notices: a request that could not be sent goes to the other server.
        for _ in 0..20 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
        }
        assert!(!router.knows(&leaving).is_healthy(), "{role}");

        let back = Upstream::start_at(leaving.address(), |_| ok()).await;
        let since = Instant::now();
        while requests(&back) == 0 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200, "{role}");
            assert!(since.elapsed() < Duration::from_secs(5), "{role}");
        }
    }
}

/// A server that is probed once with success. Later probes are not answered, so that only requests count.
async fn probed_once(request: Script) -> Upstream {
    let probes = AtomicUsize::new(0);
    server(move || if probes.fetch_add(1, Ordering::SeqCst) == 0 { ok() } else { vec![Step::Hang] }, request)
        .await
}

/// A pair of which the server of `role` does this with requests, and its partner waits.
async fn failing_pair(role: &str, request: Script) -> (Upstream, Upstream, Router) {
    let (failing, partner) = (probed_once(request).await, server(ok, || vec![Step::Hang]).await);
    let (prefill, decode) = if role == "prefill" { (&failing, &partner) } else { (&partner, &failing) };
    let router = router(&[prefill], &[decode], NEVER).await;
    probed(&router).await;
    (failing, partner, router)
}

fn refusing(status: &str) -> Vec<Step> {
    vec![Step::Send(json(status, "{}"))]
}

#[tokio::test]
async fn three_requests_that_fail_take_a_server_out_and_its_partner_stays() {
    let failures: [(Outcome, Script); 4] = [
        (Outcome::Closed, || vec![Step::Close]),
        (Outcome::Closed, || vec![Step::Reset]),
        (Outcome::BadResponse, || vec![Step::Send(b"SSH-2.0-x\r\n\r\n".to_vec()), Step::Hang]),
        (Outcome::ServerError, || refusing("500 Internal Server Error")),
    ];
    for (outcome, failure) in failures {
        for role in ["prefill", "decode"] {
            let (failing, partner, router) = failing_pair(role, failure).await;
            let known = [router.knows(&failing), router.knows(&partner)];
            let mut client = router.client().await;
            // With all servers of a role out, all are tried.
            for count in 1..=4 {
                assert_eq!(known[0].is_healthy(), count <= 3, "{role} {outcome:?} before {count}");
                client.post("/generate", BODY).await;
                router.idle().await;
                assert_eq!((requests(&failing), known[0].ended(outcome)), (count, count as u64));
            }
            assert!(known[1].is_healthy(), "{role} {outcome:?}");
            assert_eq!(known[1].ended(Outcome::Cancelled), 4, "{role} {outcome:?}");
        }
    }
}

#[tokio::test]
async fn refusals_are_no_failures_of_a_server() {
    let refusals: [Script; 4] = [
        || refusing("400 Bad Request"),
        || refusing("401 Unauthorized"),
        || refusing("429 Too Many Requests"),
        || refusing("503 Service Unavailable"),
    ];
    for refusal in refusals {
        for role in ["prefill", "decode"] {
            let (failing, _partner, router) = failing_pair(role, refusal).await;
            let mut client = router.client().await;
            for _ in 0..5 {
                client.post("/generate", BODY).await;
            }
            router.idle().await;
            let known = router.knows(&failing);
            assert!(known.is_healthy() && known.ended(Outcome::Refused) == 5, "{role}");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_says_nothing_of_a_server() {
    let (silent, _partner, router) = failing_pair("decode", || vec![Step::Hang]).await;
    for count in 1..=5 {
        let mut client = router.client().await;
        client.start("POST", "/generate", &[], BODY.as_bytes()).await;
        until("the request", || requests(&silent) == count).await;
        drop(client);
        router.idle().await;
    }
    let known = router.knows(&silent);
    assert!(known.is_healthy() && known.ended(Outcome::Cancelled) == 5);
}

/// The first of what it is given.
struct First;

impl Policy for First {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[0]
    }
}

#[tokio::test]
async fn every_policy_is_spared_the_unhealthy() {
    let policies: [fn(MiniLbConfig) -> MiniLbConfig; 3] = [
        |config| config.policy(|| First),
        |config| config.policy(|| Random),
        |config| config.policy(RoundRobin::default),
    ];
    for policy in policies {
        let unwell = server(|| refusing("503 Service Unavailable"), ok).await;
        let (prefill, decode) = (well().await, well().await);
        let router = checking(&[&prefill], &[&unwell, &decode], policy).await;
        probed(&router).await;
        healthy(&router, &unwell, false).await;
        let mut client = router.client().await;
        for _ in 0..20 {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
        }
        assert_eq!((requests(&unwell), requests(&decode)), (0, 20));
    }
}

#[tokio::test]
async fn without_health_checks_nobody_is_asked_and_nobody_left_out() {
    let (prefill, broken) = (well().await, server(ok, || vec![Step::Close]).await);
    let router = checking(&[&prefill], &[&broken], |config| config.health_checks(false)).await;
    let mut client = router.client().await;
    for _ in 0..5 {
        assert_eq!(client.post("/generate", BODY).await.status(), 502);
    }
    assert!(router.knows(&broken).is_healthy());
    assert_eq!(client.get("/ready").await.status(), 200);
    assert!(!prefill.seen().iter().chain(&broken.seen()).any(is_probe));
}

//! A configuration that changes while the router serves.

mod kit;

use std::time::Duration;

use kit::{Gate, Router, ScriptedServer, Step, json};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;

async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

fn config(prefill: &[&ScriptedServer], decode: &[&ScriptedServer]) -> MiniLbConfig {
    let prefill = prefill.iter().map(|server| (server.url(), Some(kit::BOOTSTRAP_PORT))).collect();
    let decode = decode.iter().map(|server| server.url()).collect();
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).health_checks(false)
}

#[tokio::test]
async fn a_server_in_both_configurations_keeps_its_connection_and_its_counts() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.wait_idle().await;
    let known = router.backend(&decode);
    router.reload(config(&[&prefill], &[&decode])).expect("a valid configuration");
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert!(std::sync::Arc::ptr_eq(&known, &router.backend(&decode)));
    prefill.wait_for_requests(2).await;
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
}

#[tokio::test]
async fn new_requests_go_to_new_servers_and_open_ones_finish_on_the_old() {
    let (prefill, after) = (ok_server().await, ok_server().await);
    let gate = Gate::new();
    let held = gate.clone();
    let before = ScriptedServer::start(move |_| {
        vec![Step::Wait(held.clone()), Step::Send(json("200 OK", r#"{"from":"before"}"#))]
    })
    .await;
    let router = Router::start(&[&prefill], &[&before]).await;
    let mut early = router.client().await;
    early.send_request("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    before.wait_for_requests(1).await;
    router.reload(config(&[&prefill], &[&after])).expect("a valid configuration");
    assert_eq!(router.client().await.post("/generate", BODY).await.text(), "{}");
    assert_eq!((before.requests().len(), after.requests().len()), (1, 1));
    gate.open();
    assert_eq!(early.response().await.text(), r#"{"from":"before"}"#);
}

#[tokio::test]
async fn a_bad_configuration_changes_nothing() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let error = router.reload(config(&[&prefill], &[&prefill])).expect_err("a server in two roles");
    assert!(error.to_string().contains("each server may be named once"), "{error}");
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn an_added_server_is_health_checked() {
    let (prefill, decode, late) = (ok_server().await, ok_server().await, ok_server().await);
    let checked = |config: MiniLbConfig| config.health_checks(true);
    let router = Router::start_with(&[&prefill], &[&decode], checked).await;
    router.reload(checked(config(&[&prefill], &[&decode, &late]))).expect("a valid configuration");
    late.wait_for_requests(1).await;
    assert_eq!(late.requests()[0].target(), "/ready");
}

#[tokio::test]
async fn a_reload_reports_what_has_changed() {
    let (prefill, decode, other) = (ok_server().await, ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let quiet = |config: MiniLbConfig| config.shutdown_lame_duck(Duration::ZERO).worker_threads(1);
    let same = router.reload(quiet(config(&[&prefill], &[&decode]))).expect("a valid configuration");
    assert_eq!(same.to_string(), "nothing has changed");
    let new = quiet(config(&[&prefill], &[&other])).policy(RoundRobin::default).max_merge_size(1);
    let changed = router.reload(new.worker_threads(7)).expect("a valid configuration");
    assert_eq!((changed.servers_added, changed.servers_removed), (1, 1));
    assert_eq!(changed.changed, ["prefill-policy", "decode-policy", "max-merge-size"]);
    assert_eq!(changed.needs_restart, ["worker-threads"]);
    let said =
        "servers +1 -1, prefill-policy, decode-policy, max-merge-size; needs a restart: worker-threads";
    assert_eq!(changed.to_string(), said);
}

#[tokio::test]
async fn a_request_keeps_the_limits_that_it_began_with() {
    let (prefill, gate) = (ok_server().await, Gate::new());
    let held = gate.clone();
    let decode =
        ScriptedServer::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", "{}"))])
            .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut early = router.client().await;
    early.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.wait_for_requests(1).await;
    let prefill_urls = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
    let hasty = MiniLbConfig::new("127.0.0.1", 30_000, prefill_urls, vec![decode.url()], 1);
    router.reload(hasty.health_checks(false)).expect("a valid configuration");
    // By its end the early one has taken longer than that too.
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 504);
    gate.open();
    assert_eq!(early.response().await.status(), 200);
}

#[tokio::test]
async fn a_new_connection_has_the_new_timeouts_and_an_old_one_its_own() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut old = router.client().await;
    assert_eq!(old.get("/health").await.status(), 200);
    let hasty = config(&[&prefill], &[&decode]).client_idle_timeout(Duration::from_millis(1));
    router.reload(hasty).expect("a valid configuration");
    router.client().await.wait_closed().await;
    assert_eq!(old.get("/health").await.status(), 200);
}

#[tokio::test]
async fn health_check_options_change_for_present_servers() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let watched =
        |every: Duration| config(&[&prefill], &[&decode]).health_checks(true).health_check_interval(every);
    router.reload(watched(Duration::from_secs(3_600))).expect("a valid configuration");
    decode.wait_for_requests(1).await;
    router.reload(watched(Duration::from_millis(1))).expect("a valid configuration");
    decode.wait_for_requests(10).await;
    router.reload(watched(Duration::from_millis(1)).health_checks(false)).expect("a valid configuration");
    // A probe may still be in flight, and take its time where the machine is busy.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let probes = decode.requests().len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(decode.requests().len(), probes);
}

#[tokio::test]
async fn the_times_of_a_shutdown_are_those_of_the_last_configuration() {
    let (prefill, decode) = (ok_server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let mut router = Router::start(&[&prefill], &[&decode]).await;
    let mut open = router.client().await;
    open.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.wait_for_requests(1).await;
    let hasty = config(&[&prefill], &[&decode]).shutdown_lame_duck(Duration::ZERO);
    router.reload(hasty.shutdown_grace_period(Duration::ZERO)).expect("a valid configuration");
    // With the grace period that it was started with, this would take 180 s.
    router.begin_shutdown();
    router.wait_shutdown().await;
}

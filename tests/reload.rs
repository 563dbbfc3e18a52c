//! A configuration that changes while the router serves.

mod kit;

use std::time::Duration;

use kit::{Gate, Router, Step, Upstream, json};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;

async fn server() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

fn config(prefill: &[&Upstream], decode: &[&Upstream]) -> MiniLbConfig {
    let prefill = prefill.iter().map(|server| (server.url(), Some(kit::BOOTSTRAP_PORT))).collect();
    let decode = decode.iter().map(|server| server.url()).collect();
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).health_checks(false)
}

#[tokio::test]
async fn a_server_in_both_configurations_keeps_its_connection_and_its_counts() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.idle().await;
    let known = router.knows(&decode);
    router.reload(config(&[&prefill], &[&decode])).expect("a good configuration");
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert!(std::sync::Arc::ptr_eq(&known, &router.knows(&decode)));
    prefill.arrived(2).await;
    assert_eq!((prefill.opened(), decode.opened()), (1, 1));
}

#[tokio::test]
async fn new_requests_go_to_new_servers_and_open_ones_finish_on_the_old() {
    let (prefill, after) = (server().await, server().await);
    let gate = Gate::new();
    let held = gate.clone();
    let before = Upstream::start(move |_| {
        vec![Step::Wait(held.clone()), Step::Send(json("200 OK", r#"{"from":"before"}"#))]
    })
    .await;
    let router = Router::start(&[&prefill], &[&before]).await;
    let mut early = router.client().await;
    early.start("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    before.arrived(1).await;
    router.reload(config(&[&prefill], &[&after])).expect("a good configuration");
    assert_eq!(router.client().await.post("/generate", BODY).await.text(), "{}");
    assert_eq!((before.seen().len(), after.seen().len()), (1, 1));
    gate.open();
    assert_eq!(early.answer().await.text(), r#"{"from":"before"}"#);
}

#[tokio::test]
async fn a_bad_configuration_changes_nothing() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let error = router.reload(config(&[&prefill], &[&prefill])).expect_err("a server in two roles");
    assert!(error.to_string().contains("is given twice"), "{error}");
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn an_added_server_is_health_checked() {
    let (prefill, decode, late) = (server().await, server().await, server().await);
    let checked = |config: MiniLbConfig| config.health_checks(true);
    let router = Router::start_with(&[&prefill], &[&decode], checked).await;
    router.reload(checked(config(&[&prefill], &[&decode, &late]))).expect("a good configuration");
    late.arrived(1).await;
    assert_eq!(late.seen()[0].target(), "/ready");
}

#[tokio::test]
async fn a_reload_reports_what_has_changed() {
    let (prefill, decode, other) = (server().await, server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let quiet = |config: MiniLbConfig| config.shutdown_lame_duck(Duration::ZERO).worker_threads(1);
    let same = router.reload(quiet(config(&[&prefill], &[&decode]))).expect("a good configuration");
    assert_eq!(same.to_string(), "nothing has changed");
    let new = quiet(config(&[&prefill], &[&other])).policy(RoundRobin::default).max_merge_size(1);
    let changed = router.reload(new.worker_threads(7)).expect("a good configuration");
    assert_eq!((changed.servers_added, changed.servers_removed), (1, 1));
    assert_eq!(changed.changed, ["prefill-policy", "decode-policy", "max-merge-size"]);
    assert_eq!(changed.needs_restart, ["worker-threads"]);
    let said =
        "servers +1 -1, prefill-policy, decode-policy, max-merge-size; needs a restart: worker-threads";
    assert_eq!(changed.to_string(), said);
}

#[tokio::test]
async fn a_request_keeps_the_limits_that_it_began_with() {
    let (prefill, gate) = (server().await, Gate::new());
    let held = gate.clone();
    let decode =
        Upstream::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", "{}"))]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut early = router.client().await;
    early.start("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.arrived(1).await;
    let prefill_urls = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
    let hasty = MiniLbConfig::new("127.0.0.1", 30_000, prefill_urls, vec![decode.url()], 1);
    router.reload(hasty.health_checks(false)).expect("a good configuration");
    // The early request takes longer than the new timeout, too.
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 504);
    gate.open();
    assert_eq!(early.answer().await.status(), 200);
}

#[tokio::test]
async fn a_new_connection_has_the_new_timeouts_and_an_old_one_its_own() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut old = router.client().await;
    assert_eq!(old.get("/health").await.status(), 200);
    let hasty = config(&[&prefill], &[&decode]).client_idle_timeout(Duration::from_millis(1));
    router.reload(hasty).expect("a good configuration");
    router.client().await.closed().await;
    assert_eq!(old.get("/health").await.status(), 200);
}

#[tokio::test]
async fn health_check_options_change_for_present_servers() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let watched =
        |every: Duration| config(&[&prefill], &[&decode]).health_checks(true).health_check_interval(every);
    router.reload(watched(Duration::from_secs(3_600))).expect("a good configuration");
    decode.arrived(1).await;
    router.reload(watched(Duration::from_millis(1))).expect("a good configuration");
    decode.arrived(10).await;
    router.reload(watched(Duration::from_millis(1)).health_checks(false)).expect("a good configuration");
    // A check may be in progress still, so the end is awaited; going on, there would be one each millisecond.
    kit::patiently("the end of health checks", async {
        let mut checks = usize::MAX;
        while checks != decode.seen().len() {
            checks = decode.seen().len();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_shutdown_takes_the_times_of_the_last_configuration() {
    let (prefill, decode) = (server().await, Upstream::start(|_| vec![Step::Hang]).await);
    let mut router = Router::start(&[&prefill], &[&decode]).await;
    let mut open = router.client().await;
    open.start("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.arrived(1).await;
    let hasty = config(&[&prefill], &[&decode]).shutdown_lame_duck(Duration::ZERO);
    router.reload(hasty.shutdown_grace_period(Duration::ZERO)).expect("a good configuration");
    // With the grace period that it was started with, this would take 180 s.
    router.shut_down();
    router.ended().await;
}

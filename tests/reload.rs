//! Servers that change while the router serves.

mod kit;

use kit::{Gate, Router, Step, Upstream, json};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;

async fn server() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

fn config(prefill: &[&Upstream], decode: &[&Upstream]) -> MiniLbConfig {
    let prefill = prefill.iter().map(|server| (server.url(), Some(kit::BOOTSTRAP_PORT))).collect();
    let decode = decode.iter().map(|server| server.url()).collect();
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60)
}

#[tokio::test]
async fn a_server_that_stays_keeps_its_connection_and_its_counts() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    router.idle().await;
    let known = router.knows(&decode);
    router.reload(config(&[&prefill], &[&decode])).expect("a good configuration");
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert!(std::sync::Arc::ptr_eq(&known, &router.knows(&decode)));
    assert_eq!((prefill.opened(), decode.opened()), (1, 1));
}

#[tokio::test]
async fn requests_go_to_new_servers_and_open_ones_finish_on_the_old() {
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
async fn a_server_that_comes_later_is_probed() {
    let (prefill, decode, late) = (server().await, server().await, server().await);
    let checked = |config: MiniLbConfig| config.health_checks(true);
    let router = Router::start_with(&[&prefill], &[&decode], checked).await;
    router.reload(config(&[&prefill], &[&decode, &late])).expect("a good configuration");
    late.arrived(1).await;
    assert_eq!(late.seen()[0].target(), "/ready");
}

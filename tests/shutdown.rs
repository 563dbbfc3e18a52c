//! Shutdown: the lame-duck time, draining, and the grace period.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, chunk, ok_server};

const BODY: &str = r#"{"text":"a"}"#;

#[tokio::test]
async fn shutdown_finishes_open_streams_and_takes_no_new_connection() {
    let last = Gate::new();
    let gate = last.clone();
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(move |_| {
        vec![
            Step::Send(STREAM_HEAD.into()),
            Step::Send(chunk("data: 1\n\n")),
            Step::Wait(gate.clone()),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let mut router = Router::start(&[&prefill], &[&decode]).await;
    let address = router.address();
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    router.begin_shutdown();
    let give_up = Instant::now() + kit::TIMEOUT;
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        assert!(Instant::now() < give_up, "still accepting");
        tokio::task::yield_now().await;
    }
    last.open();
    client.read_until("0\r\n\r\n").await;
    router.wait_shutdown().await;
}

#[tokio::test]
async fn streams_are_cut_off_after_the_grace_period() {
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(|_| vec![Step::Send(STREAM_HEAD.into()), Step::Hang]).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.shutdown_grace_period(Duration::from_millis(200))
    })
    .await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    router.wait_shutdown().await;
    client.wait_closed().await;
    decode.wait_closed(1).await;
}

/// Waits until `/ready` reports the shutdown.
async fn draining(client: &mut Client) -> kit::Response {
    let give_up = Instant::now() + kit::TIMEOUT;
    loop {
        let response = client.get("/ready").await;
        if response.status() == 503 {
            return response;
        }
        assert!(Instant::now() < give_up, "still ready");
    }
}

#[tokio::test]
async fn lame_duck_serves_requests_but_is_not_ready() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let mut router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.shutdown_lame_duck(Duration::from_secs(600))
    })
    .await;
    let (mut asking, mut kept) = (router.client().await, router.client().await);
    assert_eq!(kept.post("/generate", BODY).await.status(), 200);
    router.begin_shutdown();
    let response = draining(&mut asking).await;
    assert_eq!(response.error_code(), "not_ready");
    assert!(response.text().contains("shutting down"), "{}", response.text());
    // New and open connections serve one more request, whose response announces the close.
    for mut client in [router.client().await, kept] {
        let response = client.post("/generate", BODY).await;
        assert_eq!((response.status(), response.text()), (200, OK));
        assert_eq!(response.head.header("connection"), Some("close"));
        client.wait_closed().await;
    }
}

#[tokio::test]
async fn lame_duck_ends_after_its_time() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let time = Duration::from_millis(300);
    let mut router =
        Router::start_with(&[&prefill], &[&decode], |config| config.shutdown_lame_duck(time)).await;
    let mut idle = router.client().await;
    assert_eq!(idle.get("/ready").await.status(), 200);
    let begun = Instant::now();
    router.begin_shutdown();
    router.wait_shutdown().await;
    assert!(begun.elapsed() >= time, "{:?}", begun.elapsed());
    idle.wait_closed().await;
}

//! How the router ends: what it tells, what it still takes, and what it lets finish.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, Router, Step, Upstream, json};

const OK: &str = r#"{"text":"hi"}"#;
const BODY: &str = r#"{"text":"a"}"#;
const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n";

async fn answering() -> Upstream {
    Upstream::always(json("200 OK", OK)).await
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into()
}

#[tokio::test]
async fn a_shutdown_lets_open_streams_finish_and_takes_no_new_connection() {
    let last = Gate::new();
    let gate = last.clone();
    let prefill = answering().await;
    let decode = Upstream::start(move |_| {
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
    client.start("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    router.shut_down();
    let give_up = Instant::now() + kit::PATIENCE;
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        assert!(Instant::now() < give_up, "still accepting");
        tokio::task::yield_now().await;
    }
    last.open();
    client.read_until("0\r\n\r\n").await;
    router.ended().await;
}

#[tokio::test]
async fn a_shutdown_cuts_streams_off_when_the_grace_period_is_over() {
    let prefill = answering().await;
    let decode = Upstream::start(|_| vec![Step::Send(STREAM_HEAD.into()), Step::Hang]).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.shutdown_grace_period(Duration::from_millis(200))
    })
    .await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    router.ended().await;
    client.closed().await;
    decode.closed(1).await;
}

/// Waits until the router has begun to end.
async fn draining(client: &mut Client) -> kit::Answer {
    let give_up = Instant::now() + kit::PATIENCE;
    loop {
        let answer = client.get("/ready").await;
        if answer.status() == 503 {
            return answer;
        }
        assert!(Instant::now() < give_up, "still ready");
    }
}

#[tokio::test]
async fn in_the_lame_duck_time_all_goes_on_but_the_router_says_that_it_ends() {
    let (prefill, decode) = (answering().await, answering().await);
    let mut router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.shutdown_lame_duck(Duration::from_secs(600))
    })
    .await;
    let (mut asking, mut kept) = (router.client().await, router.client().await);
    assert_eq!(kept.post("/generate", BODY).await.status(), 200);
    router.shut_down();
    let answer = draining(&mut asking).await;
    assert_eq!(answer.code(), "not_ready");
    assert!(answer.text().contains("shutting down"), "{}", answer.text());
    // New connections are taken, and old ones are good for one more request: whoever has one is told in time.
    for mut client in [router.client().await, kept] {
        let answer = client.post("/generate", BODY).await;
        assert_eq!((answer.status(), answer.text()), (200, OK));
        assert_eq!(answer.head.header("connection"), Some("close"));
        client.closed().await;
    }
}

#[tokio::test]
async fn the_lame_duck_time_ends_by_itself() {
    let (prefill, decode) = (answering().await, answering().await);
    let time = Duration::from_millis(300);
    let mut router =
        Router::start_with(&[&prefill], &[&decode], |config| config.shutdown_lame_duck(time)).await;
    let mut idle = router.client().await;
    assert_eq!(idle.get("/ready").await.status(), 200);
    let begun = Instant::now();
    router.shut_down();
    router.ended().await;
    assert!(begun.elapsed() >= time, "{:?}", begun.elapsed());
    idle.closed().await;
}

//! Streams over time: silence, a steady pace, and a client that does not read.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, Router, Step, Upstream, json};

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const STREAM: &str = r#"{"text":"a","stream":true}"#;

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into()
}

async fn prefill() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

#[tokio::test]
async fn a_stream_that_falls_silent_ends_with_an_event_and_without_a_clean_end() {
    let prefill = prefill().await;
    let decode =
        Upstream::start(|_| vec![Step::Send([HEAD.as_bytes(), &chunk("data: 1\n\n")].concat()), Step::Hang])
            .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.stream_idle_timeout(Duration::from_millis(300))
    })
    .await;
    let start = Instant::now();
    let answer = router.client().await.post("/generate", STREAM).await;
    assert!(!answer.complete && answer.status() == 200);
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.contains("data: 1\n\n") && text.contains(r#""code":"decode_timeout""#), "{text}");
    assert!(start.elapsed() >= Duration::from_millis(300));
    decode.closed(1).await;
}

#[tokio::test]
async fn a_stream_with_a_steady_pace_may_go_on_for_longer_than_it_may_be_silent() {
    let prefill = prefill().await;
    let decode = Upstream::start(|_| {
        let pieces =
            (0..10).flat_map(|_| [Step::Pause(Duration::from_millis(100)), Step::Send(chunk("data: 1\n\n"))]);
        let steps = [Step::Send(HEAD.into())].into_iter().chain(pieces);
        steps.chain([Step::Send(b"0\r\n\r\n".to_vec())]).collect()
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        // Less than the stream takes, a second, and much more than a pause.
        config.stream_idle_timeout(Duration::from_millis(800))
    })
    .await;
    let answer = router.client().await.post("/generate", STREAM).await;
    assert!(answer.complete);
    assert_eq!(answer.text(), "data: 1\n\n".repeat(10));
}

#[tokio::test]
async fn the_first_piece_of_a_stream_has_the_time_of_a_request() {
    let prefill = prefill().await;
    let decode = Upstream::start(|_| {
        let late = Step::Pause(Duration::from_millis(700));
        // One write: the time between two would count as silence.
        let all = [&chunk("data: 1\n\n")[..], b"0\r\n\r\n"].concat();
        vec![Step::Send(HEAD.into()), late, Step::Send(all)]
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.stream_idle_timeout(Duration::from_millis(200))
    })
    .await;
    assert!(router.client().await.post("/generate", STREAM).await.complete);
}

/// What the router may hold for a client that does not read.
const ROUTER: usize = 1 << 20;
/// What the kernel may hold on top: the buffers of four sockets, each twice what was asked for.
const KERNEL: usize = 4 * 2 * BUFFER;
const BUFFER: usize = 64 << 10;

#[tokio::test]
async fn a_client_that_does_not_read_stalls_decode() {
    let (prefill, written) = (prefill().await, Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&written);
    let decode =
        Upstream::start(move |_| vec![Step::Send(HEAD.into()), Step::Flood(Arc::clone(&counter))]).await;
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.socket_buffer_size(BUFFER)).await;
    let mut client = router.client().await;
    client.receives_at_most(BUFFER);
    client.start("POST", "/generate", &[], STREAM.as_bytes()).await;
    client.head().await;
    // Silence is what is tested: half a second without a byte means that decode is stalled.
    let mut before = 0;
    kit::patiently("a stalled decode", async {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = written.load(Ordering::SeqCst);
            if now == before {
                break;
            }
            before = now;
        }
    })
    .await;
    assert!(before < ROUTER + KERNEL, "{before} bytes were taken from decode");
    drop(client);
    decode.closed(1).await;
}

#[tokio::test]
async fn a_client_that_leaves_closes_both_legs_within_100_ms() {
    for stream in [false, true] {
        for (begun, reset) in [(false, false), (false, true), (true, false), (true, true)] {
            // Time is what is tested, and this machine may be busy: a slow run gets two more chances.
            let mut took = Vec::new();
            while took.last().is_none_or(|last| *last >= Duration::from_millis(100)) {
                assert!(took.len() < 3, "stream {stream}, begun {begun}, reset {reset}: {took:?}");
                took.push(leaves(stream, begun, reset).await);
            }
        }
    }
}

/// How long it takes until both legs of a request are closed whose client has left.
async fn leaves(stream: bool, begun: bool, reset: bool) -> Duration {
    let gate = Gate::new();
    let held = gate.clone();
    let prefill = Upstream::start(|_| vec![Step::Hang]).await;
    let decode = Upstream::start(move |_| {
        let kind = if stream { HEAD } else { "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" };
        let head = [kind.as_bytes(), &chunk("data: 1\n\n")].concat();
        if begun { vec![Step::Send(head), Step::Wait(held.clone())] } else { vec![Step::Hang] }
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], STREAM.as_bytes()).await;
    prefill.arrived(1).await;
    decode.arrived(1).await;
    if begun {
        client.head().await;
        client.read_until("data: 1").await;
    }
    if reset {
        client.reset_when_dropped();
    }
    let start = Instant::now();
    drop(client);
    prefill.closed(1).await;
    decode.closed(1).await;
    start.elapsed()
}

//! Streams over time: idle timeout, backpressure, and client disconnects.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, Router, ScriptedServer, Step, chunk, json};

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const STREAM: &str = r#"{"text":"a","stream":true}"#;

async fn prefill() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

#[tokio::test]
async fn silent_stream_ends_with_an_error_event_and_is_truncated() {
    let prefill = prefill().await;
    let decode = ScriptedServer::start(|_| {
        vec![Step::Send([HEAD.as_bytes(), &chunk("data: 1\n\n")].concat()), Step::Hang]
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.stream_idle_timeout(Duration::from_millis(300))
    })
    .await;
    let start = Instant::now();
    let response = router.client().await.post("/generate", STREAM).await;
    assert!(!response.complete && response.status() == 200);
    let text = String::from_utf8_lossy(&response.body).into_owned();
    assert!(text.contains("data: 1\n\n") && text.contains(r#""code":"decode_timeout""#), "{text}");
    assert!(start.elapsed() >= Duration::from_millis(300));
    decode.wait_closed(1).await;
}

#[tokio::test]
async fn steady_stream_outlives_the_idle_timeout() {
    let prefill = prefill().await;
    let decode = ScriptedServer::start(|_| {
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
    let response = router.client().await.post("/generate", STREAM).await;
    assert!(response.complete);
    assert_eq!(response.text(), "data: 1\n\n".repeat(10));
}

#[tokio::test]
async fn first_event_is_bound_by_the_request_timeout_only() {
    let prefill = prefill().await;
    let decode = ScriptedServer::start(|_| {
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

/// The most that the router may buffer for a client that does not read.
const ROUTER: usize = 1 << 20;
/// What the kernel may buffer on top: four sockets, each twice the size that was set.
const KERNEL: usize = 4 * 2 * BUFFER;
const BUFFER: usize = 64 << 10;

#[tokio::test]
async fn unread_stream_applies_backpressure_to_decode() {
    let (prefill, written) = (prefill().await, Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&written);
    let decode =
        ScriptedServer::start(move |_| vec![Step::Send(HEAD.into()), Step::Flood(Arc::clone(&counter))])
            .await;
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.socket_buffer_size(BUFFER)).await;
    let mut client = router.client().await;
    client.set_receive_buffer(BUFFER);
    client.send_request("POST", "/generate", &[], STREAM.as_bytes()).await;
    client.head().await;
    // Half a second without a byte written means that decode is stalled.
    let mut before = 0;
    kit::with_timeout("a stalled decode", async {
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
    decode.wait_closed(1).await;
}

#[tokio::test]
async fn client_disconnect_closes_both_legs_within_100_ms() {
    for stream in [false, true] {
        for (begun, reset) in [(false, false), (false, true), (true, false), (true, true)] {
            // A slow run is repeated twice: the machine may be busy.
            let mut took = Vec::new();
            while took.last().is_none_or(|last| *last >= Duration::from_millis(100)) {
                assert!(took.len() < 3, "stream {stream}, begun {begun}, reset {reset}: {took:?}");
                took.push(leaves(stream, begun, reset).await);
            }
        }
    }
}

/// The time from a client disconnect until both legs are closed.
async fn leaves(stream: bool, begun: bool, reset: bool) -> Duration {
    let gate = Gate::new();
    let held = gate.clone();
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(move |_| {
        let kind = if stream { HEAD } else { "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" };
        let head = [kind.as_bytes(), &chunk("data: 1\n\n")].concat();
        if begun { vec![Step::Send(head), Step::Wait(held.clone())] } else { vec![Step::Hang] }
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], STREAM.as_bytes()).await;
    prefill.wait_for_requests(1).await;
    decode.wait_for_requests(1).await;
    if begun {
        client.head().await;
        client.read_until("data: 1").await;
    }
    if reset {
        client.reset_on_drop();
    }
    let start = Instant::now();
    drop(client);
    prefill.wait_closed(1).await;
    decode.wait_closed(1).await;
    start.elapsed()
}

#[tokio::test]
async fn chunk_sizes_may_be_padded_or_extended_in_every_chunk() {
    const COUNT: usize = 6_000;
    let padded = [("a   ", true), ("a;ext=1", false), ("a ; e=\"1\"", false), ("00a", true)];
    for (size, on_hyper) in padded {
        if !on_hyper && kit::skip_on_hyper("its bound of chunk extensions is for the whole body") {
            continue;
        }
        let chunks = format!("{size}\r\ndata: 12\n\n\r\n").repeat(COUNT);
        let response = format!("{HEAD}{chunks}0\r\n\r\n");
        let (prefill, decode) = (prefill().await, ScriptedServer::always(response).await);
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = router.client().await;
        let response = client.post("/generate", STREAM).await;
        assert!(response.complete && response.text() == "data: 12\n\n".repeat(COUNT), "{size:?}");
        // The same of a request.
        let body = format!("{size}\r\n          \r\n").repeat(COUNT);
        let last = format!("{:x}\r\n{STREAM}\r\n0\r\n\r\n", STREAM.len());
        let head = "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n";
        client.send([head, &body, &last].concat()).await;
        assert!(client.response().await.complete, "{size:?}");
        assert_eq!(decode.requests()[1].json()["stream"], true);
    }
}

const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// A router that sends a comment into a stream after 200 ms of silence.
async fn router_with_keepalive(prefill: &ScriptedServer, decode: &ScriptedServer) -> Router {
    Router::start_with(&[prefill], &[decode], |config| config.stream_keepalive(Duration::from_millis(200)))
        .await
}

#[tokio::test]
async fn silent_stream_gets_comments_between_its_events() {
    let prefill = prefill().await;
    let pause = Step::Pause(Duration::from_millis(700));
    let decode = ScriptedServer::start(move |_| {
        let send = |bytes: Vec<u8>| Step::Send(bytes);
        vec![
            send([HEAD.as_bytes(), &chunk("data: 1\n\n")].concat()),
            pause.clone(),
            // Half an event: no comment may come behind it.
            send(chunk("data: 2")),
            pause.clone(),
            send([&chunk("\n\n")[..], b"0\r\n\r\n"].concat()),
        ]
    })
    .await;
    let router = router_with_keepalive(&prefill, &decode).await;
    let response = router.client().await.post("/generate", STREAM).await;
    assert!(response.complete);
    let (before, after) = response.text().split_once("data: 2\n\n").expect("the event is whole");
    assert!(before.matches(KEEP_ALIVE).count() >= 2, "{before}");
    assert_eq!(before.replace(KEEP_ALIVE, ""), "data: 1\n\n");
    assert_eq!(after, "");
}

#[tokio::test]
async fn stream_has_no_comments_by_default_nor_in_an_encoded_body() {
    let prefill = prefill().await;
    for (head, keepalive) in [
        (HEAD.to_owned(), Duration::ZERO),
        (HEAD.replace("\r\n\r\n", "\r\ncontent-encoding: gzip\r\n\r\n"), Duration::from_millis(100)),
        (HEAD.replace("transfer-encoding: chunked", "content-length: 18"), Duration::from_millis(100)),
    ] {
        let is_chunked = head.contains("chunked");
        let decode = ScriptedServer::start(move |_| {
            let event = |text: &str| if is_chunked { chunk(text) } else { text.into() };
            let end: &[u8] = if is_chunked { b"0\r\n\r\n" } else { b"" };
            vec![
                Step::Send([head.as_bytes(), &event("data: 1\n\n")].concat()),
                Step::Pause(Duration::from_millis(500)),
                Step::Send([&event("data: 2\n\n")[..], end].concat()),
            ]
        })
        .await;
        let router =
            Router::start_with(&[&prefill], &[&decode], |config| config.stream_keepalive(keepalive)).await;
        let response = router.client().await.post("/generate", STREAM).await;
        assert!(response.complete);
        assert_eq!(response.text(), "data: 1\n\ndata: 2\n\n");
    }
}

/// A decode server that responds after a second.
async fn late_decode(response: Vec<u8>) -> ScriptedServer {
    let steps = [Step::Pause(Duration::from_secs(1)), Step::Send(response)];
    ScriptedServer::start(move |_| steps.to_vec()).await
}

#[tokio::test]
async fn head_of_a_stream_goes_out_when_the_keepalive_is_due() {
    let prefill = prefill().await;
    let events = [HEAD.as_bytes(), &chunk("data: 1\n\n"), b"0\r\n\r\n"].concat();
    let decode = late_decode(events).await;
    let router = router_with_keepalive(&prefill, &decode).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], STREAM.as_bytes()).await;
    let start = Instant::now();
    let head = client.head().await;
    assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!(head.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let response = client.finish_response(head).await;
    assert!(response.complete);
    assert!(response.text().starts_with(KEEP_ALIVE), "{}", response.text());
    assert_eq!(response.text().replace(KEEP_ALIVE, ""), "data: 1\n\n");
    // What does not ask for a stream waits for decode's head.
    let response = client.post("/generate", r#"{"text":"a"}"#).await;
    assert!(!response.text().contains(KEEP_ALIVE));
}

#[tokio::test]
async fn refusal_after_an_early_head_is_an_error_event() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = late_decode(json("400 Bad Request", r#"{"message":"too long"}"#)).await;
    let router = router_with_keepalive(&prefill, &decode).await;
    let response = router.client().await.post("/generate", STREAM).await;
    assert_eq!((response.status(), response.complete), (200, false));
    let text = String::from_utf8_lossy(&response.body).into_owned();
    assert!(text.contains(KEEP_ALIVE) && text.contains(r#""code":"decode_refused""#), "{text}");
    prefill.wait_closed(1).await;
}

#[tokio::test]
async fn merged_stream_with_an_early_head_has_prefills_lists() {
    let lists = r#"{"meta_info":{"input_token_logprobs":[[null,1,null],[-0.5,2,null]]}}"#;
    let prefill = late_decode(json("200 OK", lists)).await;
    let event = "data: {\"text\":\"a\",\"meta_info\":{\"input_token_logprobs\":[]}}\n\n";
    let events = [HEAD.as_bytes(), &chunk(event), b"0\r\n\r\n"].concat();
    let decode = ScriptedServer::always(events).await;
    let router = router_with_keepalive(&prefill, &decode).await;
    let body = r#"{"text":"a","stream":true,"return_logprob":true,"logprob_start_len":0}"#;
    let response = router.client().await.post("/generate", body).await;
    assert!(response.complete && response.text().starts_with(KEEP_ALIVE), "{}", response.text());
    assert!(response.text().contains("[[null,1,null],[-0.5,2,null]]"), "{}", response.text());
}

//! The load generator against servers on real sockets: what it counts, what it measures, which errors it
//! detects.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use loadtest::canned::{Canned, Plan, Role};
use loadtest::load::{Load, Mix, Mode, Report, Request, RequestKind, Until, fetch};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const ANYWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn canned(role: Role, plan: Plan) -> Canned {
    Canned::start(role, ANYWHERE.into(), plan).expect("a free port")
}

fn decode(tokens: u32) -> Canned {
    canned(Role::Decode, Plan { tokens, ..Plan::default() })
}

async fn count(load: Load, count: u64) -> Report {
    Load { until: Until::Count(count), ..load }.run().await.expect("a run")
}

fn load(target: SocketAddr, kind: RequestKind, connections: usize, tokens: u32) -> Load {
    Load::new(target, Request::new(target, kind, 300, tokens), connections, Duration::from_millis(300))
}

#[tokio::test]
async fn closed_loop_sends_each_request_once_on_few_connections() {
    let server = decode(64);
    let report = count(load(server.addr(), RequestKind::Chat, 4, 64), 100).await;
    assert_eq!((report.requests, report.errors), (100, 0));
    assert_eq!((server.counts().requests, server.counts().connections), (100, 4));
    assert_eq!(report.latency.count, 100);
    assert!(report.latency.p50 <= report.latency.p99 && report.latency.p99 <= report.latency.max);
}

#[tokio::test]
async fn a_large_body_is_sent_completely() {
    let server = decode(64);
    let target = server.addr();
    let load = Load::new(target, Request::new(target, RequestKind::Chat, 1 << 20, 64), 2, Duration::ZERO);
    let report = count(load, 6).await;
    assert_eq!((report.requests, report.errors), (6, 0));
    assert_eq!(server.counts().bytes, 6 << 20);
}

#[tokio::test]
async fn streamed_tokens_are_counted_and_timed() {
    let server = decode(20);
    let report = count(load(server.addr(), RequestKind::ChatStream, 2, 20), 10).await;
    assert_eq!((report.requests, report.errors, report.tokens), (10, 0, 200));
    assert_eq!(report.token_delay.count, 200);
    assert!(report.token_delay.max < 5e6, "a stamp was read wrongly: {:?}", report.token_delay);
}

#[tokio::test]
async fn pacing_delays_the_end_of_a_stream_and_not_its_first_byte() {
    let plan = Plan { tokens: 10, interval: Duration::from_millis(50), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let report = count(load(server.addr(), RequestKind::ChatStream, 1, 10), 1).await;
    assert_eq!((report.errors, report.tokens), (0, 10));
    // The histogram keeps three digits; 1 % is more than enough.
    assert!(report.latency.p50 >= 495_000.0, "{:?}", report.latency);
    assert!(report.first_byte.p50 <= report.latency.p50 / 2.0, "{:?}", report.first_byte);
}

#[tokio::test]
async fn a_stream_with_too_few_tokens_counts_as_an_error() {
    let server = decode(20);
    let report = count(load(server.addr(), RequestKind::ChatStream, 1, 21), 3).await;
    assert_eq!((report.requests, report.errors), (0, 3));
    assert_eq!(report.first_error.as_deref(), Some("20 tokens instead of 21"));
}

#[tokio::test]
async fn responses_without_merged_logprobs_are_counted() {
    let (prefill, decode) = (canned(Role::Prefill, Plan::default()), decode(1));
    for kind in [RequestKind::Logprobs, RequestKind::LogprobStream] {
        // Only prefill's own responses have the lists that a router must merge.
        let unmerged = async |server: &Canned| {
            let report = count(load(server.addr(), kind, 1, 1), 2).await;
            assert_eq!((report.requests, report.errors), (2, 0), "{kind:?}");
            report.unmerged
        };
        assert_eq!((unmerged(&prefill).await, unmerged(&decode).await), (0, 2), "{kind:?}");
    }
}

#[tokio::test]
async fn refused_connections_count_as_errors() {
    let listener = TcpListener::bind(SocketAddr::from(ANYWHERE)).await.expect("a free port");
    let unused = listener.local_addr().expect("a bound address");
    drop(listener);
    let report = count(load(unused, RequestKind::Chat, 1, 1), 2).await;
    assert_eq!((report.requests, report.errors), (0, 2));
}

#[tokio::test]
async fn clients_that_disconnect_on_purpose_are_not_counted_as_errors() {
    let plan = Plan { tokens: 16, interval: Duration::from_millis(1), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let target = server.addr();
    let load = Load { requests: Mix::soak(target, 16), ..load(target, RequestKind::Chat, 1, 16) };
    let report = count(load, 20).await;
    assert_eq!((report.requests, report.errors, report.cancelled), (20, 0, 2));
    assert_eq!(server.counts().connections, 3, "who left comes back on a new connection");
}

/// Responds immediately, but for a stall of length `stall` that begins 50 ms after the first request has
/// arrived.
async fn stalling(stall: Duration) -> SocketAddr {
    const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 25\r\n\r\n\"finish_reason\":\"length\" ";
    let listener = TcpListener::bind(SocketAddr::from(ANYWHERE)).await.expect("a free port");
    let addr = listener.local_addr().expect("a bound address");
    let first = Arc::new(OnceLock::new());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let first = Arc::clone(&first);
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {
                    let now = Instant::now();
                    let begin = *first.get_or_init(|| now) + Duration::from_millis(50);
                    if now > begin && now < begin + stall {
                        tokio::time::sleep(begin + stall - now).await;
                    }
                    if stream.write_all(RESPONSE).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

/// A stall of 200 ms in a run of 400 ms: half of the requests were due during the stall, and waited for 100
/// ms on average.
#[tokio::test]
async fn open_loop_latency_includes_the_wait_of_requests_that_were_due_during_a_stall() {
    let addr = stalling(Duration::from_millis(200)).await;
    let mut load = load(addr, RequestKind::Chat, 1, 1);
    (load.mode, load.until) = (Mode::Open { rate: 500.0 }, Until::Count(200));
    let report = load.run().await.expect("a run");
    assert_eq!((report.requests, report.errors), (200, 0));
    assert!(report.latency.p90 > 100_000.0, "requests that had to wait are missing: {:?}", report.latency);
    assert!(report.latency.p50 > 1_000.0, "{:?}", report.latency);
}

/// The same stall in a closed loop affects one request.
#[tokio::test]
async fn closed_loop_latency_includes_a_stall_once() {
    let addr = stalling(Duration::from_millis(200)).await;
    let mut load = load(addr, RequestKind::Chat, 1, 1);
    load.until = Until::Time(Duration::from_millis(400));
    let report = load.run().await.expect("a run");
    assert!(report.latency.max > 100_000.0 && report.latency.p90 < 50_000.0, "{:?}", report.latency);
}

#[tokio::test]
async fn open_loop_keeps_its_rate() {
    let server = decode(1);
    let mut load = load(server.addr(), RequestKind::Chat, 8, 1);
    (load.mode, load.until) = (Mode::Open { rate: 500.0 }, Until::Count(150));
    let started = Instant::now();
    let report = load.run().await.expect("a run");
    // The last one is due after 149 intervals of 2 ms.
    assert!(started.elapsed() >= Duration::from_millis(298));
    assert_eq!((report.requests, report.errors), (150, 0));
}

#[tokio::test]
async fn the_warm_up_is_not_counted() {
    // Tokens arrive after 600, 1,200 and 1,800 ms. Measuring starts and ends 300 ms away from each.
    let plan = Plan { tokens: 2, interval: Duration::from_millis(600), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let mut load = load(server.addr(), RequestKind::ChatStream, 1, 2);
    (load.warmup, load.until) = (Duration::from_millis(900), Until::Time(Duration::from_millis(600)));
    let report = load.run().await.expect("a run");
    assert_eq!((report.requests, report.tokens), (1, 1), "the first token came before");
}

#[tokio::test]
async fn a_new_plan_takes_effect_and_resets_the_counters() {
    let server = decode(64);
    count(load(server.addr(), RequestKind::Chat, 1, 64), 3).await;
    assert_eq!(server.counts().requests, 3);
    let plan = Plan { tokens: 5, ..Plan::default() };
    let (status, body) = fetch(server.addr(), "PUT", &plan.target()).await.expect("a response");
    assert_eq!((status, body.as_str()), (200, r#"{"connections":0,"requests":0,"bytes":0}"#));
    assert_eq!(count(load(server.addr(), RequestKind::ChatStream, 1, 5), 2).await.tokens, 10);
    let (_, body) = fetch(server.addr(), "GET", "/canned").await.expect("a response");
    assert!(body.starts_with(r#"{"connections":1,"requests":2,"#), "{body}");
}

#[tokio::test]
async fn probes_get_a_response_and_are_not_counted() {
    let server = decode(64);
    for path in ["/ready", "/health", "/get_server_info", "/v1/models"] {
        assert_eq!(fetch(server.addr(), "GET", path).await.expect("a response").0, 200, "{path}");
    }
    assert_eq!(server.counts().requests, 0);
}

/// Head and body of a request of `size` bytes that ends with a room, or without one.
fn large(size: usize, room: Option<u64>) -> Vec<u8> {
    let room =
        room.map(|room| format!(r#","bootstrap_port":8998,"bootstrap_room":{room}"#)).unwrap_or_default();
    let body = format!(r#"{{"text":"{}"{room}}}"#, "x".repeat(size));
    let length = body.len();
    format!("POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

async fn send(server: &Canned, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr()).await.expect("a server");
    stream.write_all(bytes).await.expect("a server that reads");
    stream
}

/// Whether a response begins within `time`.
async fn responds(stream: &mut TcpStream, time: Duration) -> bool {
    let mut first = [0; 12];
    let read = tokio::time::timeout(time, stream.read_exact(&mut first)).await;
    read.is_ok_and(|read| read.is_ok() && &first == b"HTTP/1.1 200")
}

const SOON: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_millis(150);

#[tokio::test]
async fn decode_of_a_pair_waits_until_prefill_has_read_the_room() {
    let plan = Plan { paired: true, ..Plan::default() };
    let [prefill, decode] = Canned::pair(ANYWHERE.into(), ANYWHERE.into(), plan).expect("free ports");
    let body = large(1 << 20, Some(77));
    let mut waiting = send(&decode, &body).await;
    let mut other = send(&prefill, &large(1 << 20, Some(78))).await;
    assert!(responds(&mut other, SOON).await, "prefill does not wait for decode");
    let (last, rest) = body.split_last().expect("a body");
    let mut slow = send(&prefill, rest).await;
    assert!(!responds(&mut waiting, MOMENT).await, "prefill lacks a byte of this room");
    slow.write_all(&[*last]).await.expect("a server that reads");
    assert!(responds(&mut waiting, SOON).await);
    // Prefill read this room before.
    assert!(responds(&mut send(&decode, &large(1 << 20, Some(78))).await, SOON).await);
}

#[tokio::test]
async fn decode_does_not_wait_without_a_room_or_outside_of_a_pair() {
    let plan = Plan { paired: true, ..Plan::default() };
    let [_prefill, decode] = Canned::pair(ANYWHERE.into(), ANYWHERE.into(), plan).expect("free ports");
    assert!(responds(&mut send(&decode, &large(1 << 20, None)).await, SOON).await);
    assert!(responds(&mut send(&decode, &large(1 << 10, Some(1))).await, SOON).await, "a small body");
    decode.plan(Plan::default());
    assert!(responds(&mut send(&decode, &large(1 << 20, Some(2))).await, SOON).await);
}

#[tokio::test]
async fn prefill_delay_applies_to_prefill_only() {
    let plan = Plan { prefill_delay: Duration::from_millis(500), ..Plan::default() };
    let (prefill, decode) = (canned(Role::Prefill, plan), canned(Role::Decode, plan));
    let late = count(load(prefill.addr(), RequestKind::Chat, 1, 1), 1).await;
    let at_once = count(load(decode.addr(), RequestKind::Chat, 1, 1), 1).await;
    assert!(late.first_byte.p50 >= 499_000.0, "{late:?}");
    assert!(at_once.first_byte.p50 < 250_000.0, "{at_once:?}");
}

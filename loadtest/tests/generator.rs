//! The generator against servers on real sockets: what it counts, what it times, what it does not let pass.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use loadtest::canned::{Canned, Plan, Role};
use loadtest::load::{Kind, Load, Mix, Mode, Report, Request, Until, ask};
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

fn load(target: SocketAddr, kind: Kind, connections: usize, tokens: u32) -> Load {
    Load::new(target, Request::new(target, kind, 300, tokens), connections, Duration::from_millis(300))
}

#[tokio::test]
async fn closed_loop_sends_each_request_once_on_few_connections() {
    let server = decode(64);
    let report = count(load(server.addr(), Kind::Chat, 4, 64), 100).await;
    assert_eq!((report.requests, report.errors), (100, 0));
    assert_eq!((server.seen().requests, server.seen().connections), (100, 4));
    assert_eq!(report.latency.count, 100);
    assert!(report.latency.p50 <= report.latency.p99 && report.latency.p99 <= report.latency.max);
}

#[tokio::test]
async fn large_body_is_sent_whole() {
    let server = decode(64);
    let target = server.addr();
    let load = Load::new(target, Request::new(target, Kind::Chat, 1 << 20, 64), 2, Duration::ZERO);
    let report = count(load, 6).await;
    assert_eq!((report.requests, report.errors), (6, 0));
    assert_eq!(server.seen().bytes, 6 << 20);
}

#[tokio::test]
async fn tokens_of_streams_are_counted_and_timed() {
    let server = decode(20);
    let report = count(load(server.addr(), Kind::ChatStream, 2, 20), 10).await;
    assert_eq!((report.requests, report.errors, report.tokens), (10, 0, 200));
    assert_eq!(report.token_delay.count, 200);
    assert!(report.token_delay.max < 5e6, "a stamp was read wrongly: {:?}", report.token_delay);
}

#[tokio::test]
async fn paced_stream_takes_its_time_and_its_first_byte_does_not() {
    let plan = Plan { tokens: 10, interval: Duration::from_millis(50), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let report = count(load(server.addr(), Kind::ChatStream, 1, 10), 1).await;
    assert_eq!((report.errors, report.tokens), (0, 10));
    // Three digits are kept of each: 1 % of half a second.
    assert!(report.latency.p50 >= 495_000.0, "{:?}", report.latency);
    assert!(report.first_byte.p50 <= report.latency.p50 / 2.0, "{:?}", report.first_byte);
}

#[tokio::test]
async fn too_few_tokens_are_errors() {
    let server = decode(20);
    let report = count(load(server.addr(), Kind::ChatStream, 1, 21), 3).await;
    assert_eq!((report.requests, report.errors), (0, 3));
    assert_eq!(report.first_error.as_deref(), Some("20 tokens instead of 21"));
}

#[tokio::test]
async fn logprobs_that_were_not_merged_are_noticed() {
    let (prefill, decode) = (canned(Role::Prefill, Plan::default()), decode(1));
    for kind in [Kind::Logprobs, Kind::LogprobStream] {
        // Prefill's own answers have the lists that a router is to merge; decode's do not.
        let unmerged = async |server: &Canned| {
            let report = count(load(server.addr(), kind, 1, 1), 2).await;
            assert_eq!((report.requests, report.errors), (2, 0), "{kind:?}");
            report.unmerged
        };
        assert_eq!((unmerged(&prefill).await, unmerged(&decode).await), (0, 2), "{kind:?}");
    }
}

#[tokio::test]
async fn refused_connections_are_errors() {
    let listener = TcpListener::bind(SocketAddr::from(ANYWHERE)).await.expect("a free port");
    let nobody = listener.local_addr().expect("a bound address");
    drop(listener);
    let report = count(load(nobody, Kind::Chat, 1, 1), 2).await;
    assert_eq!((report.requests, report.errors), (0, 2));
}

#[tokio::test]
async fn clients_of_a_day_leave_and_are_not_errors() {
    let plan = Plan { tokens: 16, interval: Duration::from_millis(1), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let target = server.addr();
    let load = Load { requests: Mix::day(target, 16), ..load(target, Kind::Chat, 1, 16) };
    let report = count(load, 20).await;
    assert_eq!((report.requests, report.errors, report.left_early), (20, 0, 2));
    assert_eq!(server.seen().connections, 3, "who left comes back on a new connection");
}

/// Answers at once, but for one pause of `stall` in which it answers nobody, 50 ms after the first request came.
async fn stalling(stall: Duration) -> SocketAddr {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 25\r\n\r\n\"finish_reason\":\"length\" ";
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
                    if stream.write_all(ANSWER).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

/// A stall of 200 ms in 400: half of the requests of an open loop were due in it, and waited 100 ms on average.
#[tokio::test]
async fn open_loop_counts_what_a_stall_did_to_requests_that_were_due() {
    let addr = stalling(Duration::from_millis(200)).await;
    let mut load = load(addr, Kind::Chat, 1, 1);
    (load.mode, load.until) = (Mode::Open { rate: 500.0 }, Until::Count(200));
    let report = load.run().await.expect("a run");
    assert_eq!((report.requests, report.errors), (200, 0));
    assert!(report.latency.p90 > 100_000.0, "requests that had to wait are missing: {:?}", report.latency);
    assert!(report.latency.p50 > 1_000.0, "{:?}", report.latency);
}

/// The same in a closed loop: one request saw it.
#[tokio::test]
async fn closed_loop_sees_a_stall_once() {
    let addr = stalling(Duration::from_millis(200)).await;
    let mut load = load(addr, Kind::Chat, 1, 1);
    load.until = Until::Time(Duration::from_millis(400));
    let report = load.run().await.expect("a run");
    assert!(report.latency.max > 100_000.0 && report.latency.p90 < 50_000.0, "{:?}", report.latency);
}

#[tokio::test]
async fn open_loop_keeps_its_rate() {
    let server = decode(1);
    let mut load = load(server.addr(), Kind::Chat, 8, 1);
    (load.mode, load.until) = (Mode::Open { rate: 500.0 }, Until::Count(150));
    let started = Instant::now();
    let report = load.run().await.expect("a run");
    // The last of them is due after 149 intervals of 2 ms.
    assert!(started.elapsed() >= Duration::from_millis(298));
    assert_eq!((report.requests, report.errors), (150, 0));
}

#[tokio::test]
async fn warmup_is_not_counted() {
    // Tokens come after 600, 1,200 and 1,800 ms: what is measured begins and ends 300 ms away from each.
    let plan = Plan { tokens: 2, interval: Duration::from_millis(600), ..Plan::default() };
    let server = canned(Role::Decode, plan);
    let mut load = load(server.addr(), Kind::ChatStream, 1, 2);
    (load.warmup, load.until) = (Duration::from_millis(900), Until::Time(Duration::from_millis(600)));
    let report = load.run().await.expect("a run");
    assert_eq!((report.requests, report.tokens), (1, 1), "the first token came before");
}

#[tokio::test]
async fn plan_is_set_and_counters_start_anew_on_request() {
    let server = decode(64);
    count(load(server.addr(), Kind::Chat, 1, 64), 3).await;
    assert_eq!(server.seen().requests, 3);
    let plan = Plan { tokens: 5, ..Plan::default() };
    let (status, body) = ask(server.addr(), "PUT", &plan.target()).await.expect("an answer");
    assert_eq!((status, body.as_str()), (200, r#"{"connections":0,"requests":0,"bytes":0}"#));
    assert_eq!(count(load(server.addr(), Kind::ChatStream, 1, 5), 2).await.tokens, 10);
    let (_, body) = ask(server.addr(), "GET", "/canned").await.expect("an answer");
    assert!(body.starts_with(r#"{"connections":1,"requests":2,"#), "{body}");
}

#[tokio::test]
async fn probes_are_answered_and_not_counted() {
    let server = decode(64);
    for path in ["/ready", "/health", "/get_server_info", "/v1/models"] {
        assert_eq!(ask(server.addr(), "GET", path).await.expect("an answer").0, 200, "{path}");
    }
    assert_eq!(server.seen().requests, 0);
}

/// The head and the body of a request of `size` bytes that ends with a room, or without one.
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

/// Whether an answer begins within `time`.
async fn answers(stream: &mut TcpStream, time: Duration) -> bool {
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
    assert!(answers(&mut other, SOON).await, "prefill waits for nobody");
    let (last, rest) = body.split_last().expect("a body");
    let mut slow = send(&prefill, rest).await;
    assert!(!answers(&mut waiting, MOMENT).await, "prefill lacks a byte of this room");
    slow.write_all(&[*last]).await.expect("a server that reads");
    assert!(answers(&mut waiting, SOON).await);
    // Prefill was first here.
    assert!(answers(&mut send(&decode, &large(1 << 20, Some(78))).await, SOON).await);
}

#[tokio::test]
async fn decode_waits_neither_without_a_room_nor_unless_it_is_paired() {
    let plan = Plan { paired: true, ..Plan::default() };
    let [_prefill, decode] = Canned::pair(ANYWHERE.into(), ANYWHERE.into(), plan).expect("free ports");
    assert!(answers(&mut send(&decode, &large(1 << 20, None)).await, SOON).await);
    assert!(answers(&mut send(&decode, &large(1 << 10, Some(1))).await, SOON).await, "a small body");
    decode.plan(Plan::default());
    assert!(answers(&mut send(&decode, &large(1 << 20, Some(2))).await, SOON).await);
}

#[tokio::test]
async fn late_prefill_is_late_and_decode_is_not() {
    let plan = Plan { prefill_delay: Duration::from_millis(500), ..Plan::default() };
    let (prefill, decode) = (canned(Role::Prefill, plan), canned(Role::Decode, plan));
    let late = count(load(prefill.addr(), Kind::Chat, 1, 1), 1).await;
    let at_once = count(load(decode.addr(), Kind::Chat, 1, 1), 1).await;
    assert!(late.first_byte.p50 >= 499_000.0, "{late:?}");
    assert!(at_once.first_byte.p50 < 250_000.0, "{at_once:?}");
}

//! The bound of memory for request bodies: at the bound further bodies wait, and what is under way goes on.

mod kit;

use std::time::Duration;

use kit::{Client, Gate, Router, RouterProcess, ScriptedServer, Step, json, with_timeout};
use mini_lb::MiniLbConfig;
use tokio::task::JoinSet;
use tokio::time::Instant;

const SMALL: &str = r#"{"text":"a"}"#;
const LIMIT: usize = 1 << 20;
/// Over soon, so that a test waits for it.
const SHORT: Duration = Duration::from_millis(300);
/// Longer than any test.
const LONG: Duration = Duration::from_secs(60);

/// A body of exactly this size.
fn body(size: usize) -> String {
    format!(r#"{{"text":"{}"}}"#, "a".repeat(size - 11))
}

struct Setup {
    /// Opens when responses are to be sent.
    gate: Gate,
    prefill: ScriptedServer,
    decode: ScriptedServer,
    router: Router,
}

async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

async fn gated_server(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", "{}"))]).await
}

impl Setup {
    async fn start(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Self {
        let gate = Gate::new();
        let (prefill, decode) = (ok_server().await, gated_server(&gate).await);
        let bounded = |config: MiniLbConfig| config.max_buffered_bytes(LIMIT).queue_timeout(LONG);
        let router = Router::start_with(&[&prefill], &[&decode], |config| options(bounded(config))).await;
        Self { gate, prefill, decode, router }
    }

    /// Sends a request whose body may not be read to its end.
    async fn send(&self, body: &str) -> Client {
        let mut client = self.router.client().await;
        client.send_request("POST", "/generate", &[], body.as_bytes()).await;
        client
    }
}

#[tokio::test]
async fn bodies_wait_at_the_bound_and_are_served_when_memory_is_returned() {
    let setup = Setup::start(|config| config.worker_threads(2)).await;
    let mut clients = Vec::new();
    // Two of them fit. What the kernel takes of the others is not the router's.
    for _ in 0..5 {
        clients.push(setup.send(&body(400 << 10)).await);
    }
    setup.decode.wait_for_requests(2).await;
    // A small one need not wait.
    clients.push(setup.send(SMALL).await);
    setup.decode.wait_for_requests(3).await;
    let sizes: Vec<usize> = setup.decode.requests().iter().map(|seen| seen.body.len()).collect();
    assert_eq!(sizes.iter().filter(|size| **size < 1_000).count(), 1, "{sizes:?}");
    let held = setup.router.buffered_bytes();
    assert!((800 << 10..LIMIT + (16 << 10)).contains(&held), "{held}");
    setup.gate.open();
    for mut client in clients {
        assert_eq!(client.response().await.status(), 200);
    }
    setup.router.wait_buffered(0).await;
}

#[tokio::test]
async fn bodies_of_64_kib_wait_for_the_buffers_that_hold_them() {
    let setup = Setup::start(|config| config).await;
    let mut clients = Vec::new();
    // Each takes a buffer of 128 KiB and the cost of its chunks, so seven fit.
    for _ in 0..10 {
        clients.push(setup.send(&body(64 << 10)).await);
    }
    setup.decode.wait_for_requests(7).await;
    let held = setup.router.buffered_bytes();
    assert!((7 * (128 << 10)..LIMIT).contains(&held), "{held}");
    setup.gate.open();
    for mut client in clients {
        assert_eq!(client.response().await.status(), 200);
    }
    // Also those that waited, whose first bytes came with their heads.
    assert!(setup.decode.requests().iter().all(|seen| seen.body.len() > 64 << 10));
    setup.router.wait_buffered(0).await;
}

#[tokio::test]
async fn a_body_that_waits_too_long_gets_503_and_its_connection_stays_usable() {
    let setup = Setup::start(|config| config.queue_timeout(SHORT)).await;
    let mut first = setup.send(&body(900 << 10)).await;
    setup.decode.wait_for_requests(1).await;
    let begun = Instant::now();
    // Its body is withheld: it is not asked for either.
    let mut second = setup.router.client().await;
    second.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 900000\r\n\r\n").await;
    let response = second.response().await;
    assert!(begun.elapsed() >= SHORT, "{:?}", begun.elapsed());
    assert_eq!((response.status(), response.error_code()), (503, "memory_limit".into()));
    assert_eq!(response.head.header("retry-after"), Some("1"));
    let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.ends_with("1048576 bytes (--max-buffered-bytes)"), "{message}");
    let mut careful = setup.router.client().await;
    careful
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 900000\r\n\r\n")
        .await;
    assert_eq!(careful.response().await.status(), 503, "no 100 before there is memory");
    setup.gate.open();
    assert_eq!(first.response().await.status(), 200);
    second.send(vec![b'x'; 900_000]).await;
    assert_eq!(second.post("/generate", body(900 << 10)).await.status(), 200);
}

#[tokio::test]
async fn a_chunked_body_that_grows_at_the_bound_gets_503_at_once() {
    let setup = Setup::start(|config| config).await;
    let mut first = setup.send(&body(900 << 10)).await;
    setup.decode.wait_for_requests(1).await;
    let mut growing = setup.router.client().await;
    growing.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    growing.send("9\r\n{\"text\":\"\r\n").await;
    let begun = Instant::now();
    // It holds what others may need: it must not wait for more.
    for _ in 0..20 {
        growing.send(format!("{:x}\r\n{}\r\n", 10 << 10, "a".repeat(10 << 10))).await;
    }
    let response = growing.response().await;
    assert_eq!((response.status(), response.error_code()), (503, "memory_limit".into()));
    assert!(begun.elapsed() < LONG / 4, "{:?}", begun.elapsed());
    growing.send("0\r\n\r\n").await;
    setup.gate.open();
    assert_eq!(first.response().await.status(), 200);
    assert_eq!(growing.post("/generate", SMALL).await.status(), 200);
    setup.router.wait_buffered(0).await;
}

#[tokio::test]
async fn a_chunked_body_that_holds_next_to_nothing_waits() {
    let setup = Setup::start(|config| config).await;
    // With the cost of its chunks it takes everything.
    let mut first = setup.send(&body(LIMIT)).await;
    setup.decode.wait_for_requests(1).await;
    let mut waiting = setup.router.client().await;
    waiting.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let text = body(20 << 10);
    waiting.send(format!("{:x}\r\n{text}\r\n0\r\n\r\n", text.len())).await;
    setup.gate.open();
    assert_eq!(first.response().await.status(), 200);
    assert_eq!(waiting.response().await.status(), 200);
}

#[tokio::test]
async fn a_body_larger_than_the_bound_gets_413() {
    let setup = Setup::start(|config| config).await;
    setup.gate.open();
    let mut client = setup.send(&body(LIMIT + 1)).await;
    let response = client.response().await;
    assert_eq!((response.status(), response.error_code()), (413, "body_too_large".into()));
    assert!(response.text().contains("1048576 bytes (--max-buffered-bytes)"), "{}", response.text());
    assert_eq!(client.post("/generate", body(LIMIT)).await.status(), 200);
}

#[tokio::test]
async fn memory_of_a_client_that_leaves_is_returned() {
    let setup = Setup::start(|config| config).await;
    let _first = setup.send(&body(600 << 10)).await;
    setup.decode.wait_for_requests(1).await;
    let held = setup.router.buffered_bytes();
    // In the middle of its body.
    let mut leaving = setup.router.client().await;
    leaving.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 100000\r\n\r\n{\"text\":\"").await;
    with_timeout("the reservation", async {
        while setup.router.buffered_bytes() == held {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    drop(leaving);
    setup.router.wait_buffered(held).await;
    if kit::skip_on_hyper("it does not read, and so sees no disconnect, while a body is not asked for") {
        return;
    }
    // While it waits: the next one, which fits, is behind it.
    let mut leaving = setup.router.client().await;
    leaving.send("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 900000\r\n\r\n{\"text\":\"").await;
    let _next = setup.send(&body(200 << 10)).await;
    drop(leaving);
    setup.decode.wait_for_requests(2).await;
}

#[tokio::test]
async fn a_raised_bound_holds_for_those_who_wait() {
    let setup = Setup::start(|config| config).await;
    let _first = setup.send(&body(900 << 10)).await;
    setup.decode.wait_for_requests(1).await;
    let _second = setup.send(&body(900 << 10)).await;
    let (prefill, decode) = (setup.prefill.url(), setup.decode.url());
    let prefill = vec![(prefill, Some(kit::BOOTSTRAP_PORT))];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode], 60);
    let config = config.worker_threads(1).health_checks(false).max_buffered_bytes(2 * LIMIT);
    setup.router.reload(config).unwrap();
    setup.decode.wait_for_requests(2).await;
}

/// Peak resident memory of a process, in bytes.
fn peak_memory(process: &RouterProcess) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}

const LARGE: usize = 2 << 20;

/// Sends a large body. Returns whether it was served; if not, there was no memory for it.
async fn is_served(mut client: Client) -> bool {
    let response = client.post("/generate", body(LARGE)).await;
    match response.status() {
        200 => true,
        status => {
            assert_eq!((status, response.error_code()), (503, "memory_limit".into()));
            false
        }
    }
}

#[tokio::test]
async fn many_large_bodies_at_once_take_no_more_memory_than_the_bound() {
    const CLIENTS: usize = 32;
    const BOUND: usize = 16 << 20;
    let gate = Gate::new();
    let (prefill, decode) = (ok_server().await, gated_server(&gate).await);
    let bound = BOUND.to_string();
    let args = ["--max-buffered-bytes", &bound, "--queue-timeout-secs", "2", "--log-level", "warn"];
    let process = RouterProcess::between(&prefill, &decode, &args).await;
    let before = peak_memory(&process);
    // With its chunks' cost each takes 2.125 MiB: 7 fit. The others are refused while these go on.
    let mut posts = JoinSet::new();
    for _ in 0..CLIENTS {
        posts.spawn(is_served(process.client().await));
    }
    for _ in 0..CLIENTS - BOUND / (LARGE + LARGE / 16) {
        let served = with_timeout("a refusal", posts.join_next()).await.unwrap().unwrap();
        assert!(!served, "a response before decode's");
    }
    gate.open();
    while let Some(served) = with_timeout("a response", posts.join_next()).await {
        assert!(served.unwrap(), "what was under way goes on");
    }
    // Once more, with servers that respond.
    for _ in 0..CLIENTS {
        posts.spawn(is_served(process.client().await));
    }
    let mut served = 0;
    while let Some(is_served) = with_timeout("a response", posts.join_next()).await {
        served += usize::from(is_served.unwrap());
    }
    assert!(served > 0);
    // Besides the bodies: socket buffers of the engine, and what the allocator keeps.
    let grown = peak_memory(&process) - before;
    assert!(grown < BOUND * 3, "{} MiB more than at the start", grown >> 20);
    println!(
        "peak: {} MiB, at the start {} MiB; {served} of the second wave served",
        (before + grown) >> 20,
        before >> 20
    );
}

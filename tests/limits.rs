//! Limits: concurrent requests, the queue, the rate, requests per backend.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, Router, ScriptedServer, Step, json};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;

/// A server that responds at once.
async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

/// A server that holds the response to request n until gate n opens.
async fn gated_server(gates: &[Gate]) -> ScriptedServer {
    let gates = gates.to_vec();
    ScriptedServer::start(move |seen| {
        let number = seen.head.header("x-number").map_or(0, |number| number.parse::<usize>().unwrap());
        vec![Step::Wait(gates[number].clone()), Step::Send(json("200 OK", &format!(r#"{{"n":{number}}}"#)))]
    })
    .await
}

fn gates(count: usize) -> Vec<Gate> {
    (0..count).map(|_| Gate::new()).collect()
}

/// Sends request n, whose response waits for gate n.
async fn send_numbered(router: &Router, number: usize) -> Client {
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[("x-number", &number.to_string())], BODY.as_bytes()).await;
    client
}

fn retry_after(response: &kit::Response) -> u64 {
    response.head.header("retry-after").expect("a Retry-After").parse().expect("seconds")
}

async fn request_numbers(server: &ScriptedServer) -> Vec<usize> {
    let number = |seen: &kit::ReceivedRequest| seen.head.header("x-number").unwrap().parse().unwrap();
    server.requests().iter().map(number).collect()
}

#[tokio::test]
async fn queued_requests_start_in_arrival_order_across_workers() {
    const WAITING: usize = 8;
    let gates = gates(WAITING + 2);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(2).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    // Connections go to the two worker threads in turn.
    let mut clients = vec![send_numbered(&router, 0).await];
    decode.wait_for_requests(1).await;
    clients.push(send_numbered(&router, 1).await);
    decode.wait_for_requests(2).await;
    for number in 2..WAITING + 2 {
        clients.push(send_numbered(&router, number).await);
        router.wait_queued(number - 1).await;
    }
    prefill.wait_for_requests(2).await;
    assert_eq!((decode.requests().len(), prefill.requests().len()), (2, 2));
    for (number, mut client) in clients.into_iter().enumerate() {
        gates[number].open();
        assert_eq!(client.response().await.text(), format!(r#"{{"n":{number}}}"#));
        let begun = (number + 3).min(WAITING + 2);
        decode.wait_for_requests(begun).await;
        assert_eq!(request_numbers(&decode).await, (0..begun).collect::<Vec<_>>());
    }
    router.wait_queued(0).await;
}

#[tokio::test]
async fn permit_is_held_until_a_streams_last_byte() {
    let (begun, done) = (Gate::new(), Gate::new());
    let (held_begun, held_done) = (begun.clone(), done.clone());
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(move |_| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        vec![
            Step::Send(format!("{head}9\r\ndata: 1\n\n\r\n").into()),
            Step::Wait(held_begun.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n".to_vec()),
            Step::Wait(held_done.clone()),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let router = Router::start_with(&[&prefill], &[&decode], |c| c.max_concurrent_requests(1)).await;
    let mut first = router.client().await;
    first.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    first.read_until("data: 1").await;
    let mut second = router.client().await;
    second.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    router.wait_queued(1).await;
    begun.open();
    first.read_until("data: 2").await;
    assert_eq!(decode.requests().len(), 1);
    done.open();
    decode.wait_for_requests(2).await;
    second.read_until("data: 2").await;
}

#[tokio::test]
async fn full_queue_is_429_and_the_connection_stays_usable() {
    let gates = gates(2);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let mut second = send_numbered(&router, 1).await;
    router.wait_queued(1).await;

    let mut refused = router.client().await;
    let large = format!(r#"{{"text":"{}"}}"#, "a".repeat(300_000));
    for body in [BODY, &large] {
        let response = refused.post("/generate", body).await;
        assert_eq!((response.status(), response.error_code()), (429, "queue_full".into()));
        assert_eq!(retry_after(&response), 1);
        assert_eq!(response.head.header("connection"), None);
    }
    // Only generation is limited.
    assert_eq!(refused.get("/health").await.status(), 200);
    assert_eq!(refused.get("/v1/models").await.status(), 200);
    for gate in &gates {
        gate.open();
    }
    assert_eq!((first.response().await.status(), second.response().await.status()), (200, 200));
    assert_eq!(refused.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn expect_100_continue_is_not_answered_for_a_rejected_request() {
    let gates = gates(1);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(0);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let _first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let mut careful = router.client().await;
    careful
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n")
        .await;
    let response = careful.response().await;
    assert_eq!((response.status(), response.error_code()), (429, "queue_full".into()));
    assert_eq!(response.head.header("connection"), Some("close"));
    careful.wait_closed().await;
}

#[tokio::test]
async fn queue_timeout_is_503() {
    let gates = gates(2);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let timeout = Duration::from_millis(200);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_timeout(timeout);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let begun = Instant::now();
    let mut second = send_numbered(&router, 1).await;
    let response = second.response().await;
    assert!(begun.elapsed() >= timeout, "{:?}", begun.elapsed());
    assert_eq!((response.status(), response.error_code()), (503, "queue_timeout".into()));
    assert_eq!(retry_after(&response), 1);
    router.wait_queued(0).await;
    gates[0].open();
    gates[1].open();
    assert_eq!(first.response().await.status(), 200);
    assert_eq!(second.post("/generate", BODY).await.status(), 200);
    assert_eq!(decode.requests().len(), 2);
}

/// What a client has sent of its body when it disconnects.
const SENT_BEFORE_DISCONNECT: [&str; 4] = ["", r#"{"te"#, BODY, "more than is read"];

#[tokio::test]
async fn client_disconnect_frees_its_queue_slot() {
    for sent in SENT_BEFORE_DISCONNECT {
        for reset in [false, true] {
            let gates = gates(2);
            let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
            let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(1);
            let router = Router::start_with(&[&prefill], &[&decode], limited).await;
            let mut first = send_numbered(&router, 0).await;
            decode.wait_for_requests(1).await;

            let mut leaving = router.client().await;
            let large = "a".repeat(60_000);
            let (length, sent) =
                if sent.len() > BODY.len() { (1_000_000, large.as_str()) } else { (BODY.len(), sent) };
            leaving
                .send(format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {length}\r\n\r\n{sent}"))
                .await;
            router.wait_queued(1).await;
            if reset {
                leaving.reset_on_drop();
            }
            drop(leaving);
            router.wait_queued(0).await;

            let mut next = send_numbered(&router, 1).await;
            router.wait_queued(1).await;
            gates[0].open();
            gates[1].open();
            assert_eq!((first.response().await.status(), next.response().await.status()), (200, 200));
            assert_eq!(request_numbers(&decode).await, [0, 1], "{} bytes, reset {reset}", sent.len());
        }
    }
}

#[tokio::test]
async fn client_disconnect_admits_the_next_request() {
    let gates = gates(2);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let router = Router::start_with(&[&prefill], &[&decode], |c| c.max_concurrent_requests(1)).await;
    let first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let mut second = send_numbered(&router, 1).await;
    router.wait_queued(1).await;
    drop(first);
    gates[1].open();
    assert_eq!(second.response().await.status(), 200);
}

#[tokio::test]
async fn body_timeout_starts_when_the_request_is_admitted() {
    let gates = gates(2);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let limited = |config: MiniLbConfig| {
        config.max_concurrent_requests(1).request_body_idle_timeout(Duration::from_secs(1))
    };
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let mut second = router.client().await;
    second.send("POST /generate HTTP/1.1\r\nhost: r\r\nx-number: 1\r\ncontent-length: 12\r\n\r\n").await;
    router.wait_queued(1).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    gates[0].open();
    gates[1].open();
    assert_eq!(first.response().await.status(), 200);
    router.wait_queued(0).await;
    second.send(BODY).await;
    assert_eq!(second.response().await.status(), 200);
}

#[tokio::test]
async fn failed_request_releases_its_permit() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(0);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut client = router.client().await;
    for _ in 0..3 {
        assert_eq!(client.post("/generate", "no JSON").await.status(), 400);
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    decode.stop_listening().await;
    drop(decode);
    let mut client = router.client().await;
    for _ in 0..3 {
        assert_eq!(client.post("/generate", BODY).await.status(), 502);
    }
}

#[tokio::test]
async fn rate_limit_allows_a_burst_of_one_second() {
    const RATE: u32 = 20;
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let limited = |config: MiniLbConfig| config.rate_limit(RATE).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut clients = [router.client().await, router.client().await];
    let begun = Instant::now();
    let (mut admitted, mut turn) = (0, 0);
    while begun.elapsed() < Duration::from_secs(2) {
        turn += 1;
        let response = clients[turn % 2].post("/generate", BODY).await;
        match response.status() {
            200 => admitted += 1,
            429 => {
                assert_eq!((response.error_code(), retry_after(&response)), ("rate_limited".into(), 1));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            other => panic!("{other}"),
        }
    }
    let most = f64::from(RATE) * (1.0 + begun.elapsed().as_secs_f64()) + 1.0;
    assert!(f64::from(admitted) <= most, "{admitted} of {most}");
    // A busy machine may miss a few tokens of the bucket.
    assert!(admitted >= RATE * 2, "{admitted}");
    assert_eq!(decode.requests().len(), admitted as usize);
    assert_eq!(clients[0].get("/health").await.status(), 200);
}

#[tokio::test]
async fn full_backends_are_skipped_and_requests_queue_if_all_are_full() {
    let gates = gates(5);
    let prefill = ok_server().await;
    let decode = [gated_server(&gates).await, gated_server(&gates).await];
    let limited = |config: MiniLbConfig| config.max_in_flight_per_decode(2).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode[0], &decode[1]], limited).await;
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(send_numbered(&router, number).await);
    }
    // Without the limit, random choice would mostly send three of four to one.
    decode[0].wait_for_requests(2).await;
    decode[1].wait_for_requests(2).await;
    let mut fifth = send_numbered(&router, 4).await;
    router.wait_queued(1).await;
    assert_eq!(router.backend(&decode[0]).in_flight() + router.backend(&decode[1]).in_flight(), 4);
    let done = request_numbers(&decode[1]).await[0];
    gates[done].open();
    clients[done].response().await;
    decode[1].wait_for_requests(3).await;
    assert_eq!(decode[0].requests().len(), 2);
    gates[4].open();
    assert_eq!(fifth.response().await.text(), r#"{"n":4}"#);
}

#[tokio::test]
async fn prefill_permit_is_released_when_its_own_response_ends() {
    let (prefill_gates, decode_gates) = (gates(2), gates(2));
    let (prefill, decode) = (gated_server(&prefill_gates).await, gated_server(&decode_gates).await);
    let limited = |config: MiniLbConfig| config.max_in_flight_per_prefill(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = send_numbered(&router, 0).await;
    decode.wait_for_requests(1).await;
    let mut second = send_numbered(&router, 1).await;
    router.wait_queued(1).await;
    prefill_gates[0].open();
    // While decode still serves the first.
    decode.wait_for_requests(2).await;
    prefill_gates[1].open();
    decode_gates[0].open();
    decode_gates[1].open();
    assert_eq!((first.response().await.status(), second.response().await.status()), (200, 200));
}

#[tokio::test]
async fn unreachable_role_is_not_queued_for() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    decode.stop_listening().await;
    let limited = |config: MiniLbConfig| config.max_in_flight_per_decode(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    // A retry has no other backend.
    let response = router.client().await.post("/generate", BODY).await;
    assert_eq!((response.status(), response.error_code()), (502, "decode_connect".into()));
    router.wait_idle().await;
}

#[tokio::test]
async fn reload_changes_limits_while_requests_wait() {
    let gates = gates(4);
    let (prefill, decode) = (ok_server().await, gated_server(&gates).await);
    let config = || {
        let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 60)
    };
    let router = Router::start_with_config(config().max_concurrent_requests(1)).await;
    let mut clients = vec![send_numbered(&router, 0).await];
    decode.wait_for_requests(1).await;
    clients.push(send_numbered(&router, 1).await);
    clients.push(send_numbered(&router, 2).await);
    router.wait_queued(2).await;
    router.reload(config().max_concurrent_requests(2)).expect("a valid configuration");
    decode.wait_for_requests(2).await;
    router.wait_queued(1).await;
    router.reload(config()).expect("a valid configuration");
    decode.wait_for_requests(3).await;
    router.reload(config().max_concurrent_requests(3)).expect("a valid configuration");
    clients.push(send_numbered(&router, 3).await);
    router.wait_queued(1).await;
    for (gate, client) in gates.iter().zip(&mut clients) {
        gate.open();
        assert_eq!(client.response().await.status(), 200);
    }
}

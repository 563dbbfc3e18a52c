//! How many requests may be under way, who waits, and what those get who may not.

mod kit;

use std::time::{Duration, Instant};

use kit::{Client, Gate, Router, Step, Upstream, json};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;

/// A server that answers at once.
async fn quick() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

/// A server that holds its answers until each one's gate is open: the n-th request's is the n-th.
async fn held(gates: &[Gate]) -> Upstream {
    let gates = gates.to_vec();
    Upstream::start(move |seen| {
        let number = seen.head.header("x-number").map_or(0, |number| number.parse::<usize>().unwrap());
        vec![Step::Wait(gates[number].clone()), Step::Send(json("200 OK", &format!(r#"{{"n":{number}}}"#)))]
    })
    .await
}

fn gates(count: usize) -> Vec<Gate> {
    (0..count).map(|_| Gate::new()).collect()
}

/// Sends the request that waits for the gate with this number.
async fn ask(router: &Router, number: usize) -> Client {
    let mut client = router.client().await;
    client.start("POST", "/generate", &[("x-number", &number.to_string())], BODY.as_bytes()).await;
    client
}

fn retry_after(answer: &kit::Answer) -> u64 {
    answer.head.header("retry-after").expect("a Retry-After").parse().expect("seconds")
}

async fn numbers(server: &Upstream) -> Vec<usize> {
    let number = |seen: &kit::Seen| seen.head.header("x-number").unwrap().parse().unwrap();
    server.seen().iter().map(number).collect()
}

#[tokio::test]
async fn requests_over_the_limit_begin_in_the_order_in_which_they_came_whichever_worker_has_them() {
    const WAITING: usize = 8;
    let gates = gates(WAITING + 2);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(2).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    // Connections go to the two workers in turn.
    let mut clients = vec![ask(&router, 0).await];
    decode.arrived(1).await;
    clients.push(ask(&router, 1).await);
    decode.arrived(2).await;
    for number in 2..WAITING + 2 {
        clients.push(ask(&router, number).await);
        router.queued(number - 1).await;
    }
    prefill.arrived(2).await;
    assert_eq!((decode.seen().len(), prefill.seen().len()), (2, 2));
    for (number, mut client) in clients.into_iter().enumerate() {
        gates[number].open();
        assert_eq!(client.answer().await.text(), format!(r#"{{"n":{number}}}"#));
        let begun = (number + 3).min(WAITING + 2);
        decode.arrived(begun).await;
        assert_eq!(numbers(&decode).await, (0..begun).collect::<Vec<_>>());
    }
    router.queued(0).await;
}

#[tokio::test]
async fn the_place_is_held_to_the_end_of_a_streams_last_byte() {
    let (begun, done) = (Gate::new(), Gate::new());
    let (held_begun, held_done) = (begun.clone(), done.clone());
    let prefill = quick().await;
    let decode = Upstream::start(move |_| {
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
    first.start("POST", "/generate", &[], BODY.as_bytes()).await;
    first.read_until("data: 1").await;
    let mut second = router.client().await;
    second.start("POST", "/generate", &[], BODY.as_bytes()).await;
    router.queued(1).await;
    begun.open();
    first.read_until("data: 2").await;
    assert_eq!(decode.seen().len(), 1);
    done.open();
    decode.arrived(2).await;
    second.read_until("data: 2").await;
}

#[tokio::test]
async fn a_full_queue_is_429_and_the_connection_stays_usable() {
    let gates = gates(2);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = ask(&router, 0).await;
    decode.arrived(1).await;
    let mut second = ask(&router, 1).await;
    router.queued(1).await;

    let mut refused = router.client().await;
    let large = format!(r#"{{"text":"{}"}}"#, "a".repeat(300_000));
    for body in [BODY, &large] {
        let answer = refused.post("/generate", body).await;
        assert_eq!((answer.status(), answer.code()), (429, "queue_full".into()));
        assert_eq!(retry_after(&answer), 1);
        assert_eq!(answer.head.header("connection"), None);
    }
    // What does not generate is never limited.
    assert_eq!(refused.get("/health").await.status(), 200);
    assert_eq!(refused.get("/v1/models").await.status(), 200);
    for gate in &gates {
        gate.open();
    }
    assert_eq!((first.answer().await.status(), second.answer().await.status()), (200, 200));
    assert_eq!(refused.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn a_body_that_waits_for_our_word_is_not_asked_for_in_vain() {
    let gates = gates(1);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(0);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let _first = ask(&router, 0).await;
    decode.arrived(1).await;
    let mut careful = router.client().await;
    careful
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n")
        .await;
    let answer = careful.answer().await;
    assert_eq!((answer.status(), answer.code()), (429, "queue_full".into()));
    assert_eq!(answer.head.header("connection"), Some("close"));
    careful.closed().await;
}

#[tokio::test]
async fn a_wait_that_is_too_long_is_503() {
    let gates = gates(2);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let timeout = Duration::from_millis(200);
    let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_timeout(timeout);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = ask(&router, 0).await;
    decode.arrived(1).await;
    let begun = Instant::now();
    let mut second = ask(&router, 1).await;
    let answer = second.answer().await;
    assert!(begun.elapsed() >= timeout, "{:?}", begun.elapsed());
    assert_eq!((answer.status(), answer.code()), (503, "queue_timeout".into()));
    assert_eq!(retry_after(&answer), 1);
    router.queued(0).await;
    gates[0].open();
    gates[1].open();
    assert_eq!(first.answer().await.status(), 200);
    assert_eq!(second.post("/generate", BODY).await.status(), 200);
    assert_eq!(decode.seen().len(), 2);
}

/// What a client has sent when it leaves the queue.
const LEFT_WITH: [&str; 4] = ["", r#"{"te"#, BODY, "more than is read"];

#[tokio::test]
async fn a_client_that_leaves_the_queue_frees_its_place_in_it() {
    for sent in LEFT_WITH {
        for reset in [false, true] {
            let gates = gates(2);
            let (prefill, decode) = (quick().await, held(&gates).await);
            let limited = |config: MiniLbConfig| config.max_concurrent_requests(1).queue_size(1);
            let router = Router::start_with(&[&prefill], &[&decode], limited).await;
            let mut first = ask(&router, 0).await;
            decode.arrived(1).await;

            let mut leaver = router.client().await;
            let large = "a".repeat(60_000);
            let (length, sent) =
                if sent.len() > BODY.len() { (1_000_000, large.as_str()) } else { (BODY.len(), sent) };
            leaver
                .send(format!("POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: {length}\r\n\r\n{sent}"))
                .await;
            router.queued(1).await;
            if reset {
                leaver.reset_when_dropped();
            }
            drop(leaver);
            router.queued(0).await;

            let mut next = ask(&router, 1).await;
            router.queued(1).await;
            gates[0].open();
            gates[1].open();
            assert_eq!((first.answer().await.status(), next.answer().await.status()), (200, 200));
            assert_eq!(numbers(&decode).await, [0, 1], "{} bytes, reset {reset}", sent.len());
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_it_is_answered_lets_the_next_begin() {
    let gates = gates(2);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let router = Router::start_with(&[&prefill], &[&decode], |c| c.max_concurrent_requests(1)).await;
    let first = ask(&router, 0).await;
    decode.arrived(1).await;
    let mut second = ask(&router, 1).await;
    router.queued(1).await;
    drop(first);
    gates[1].open();
    assert_eq!(second.answer().await.status(), 200);
}

#[tokio::test]
async fn a_slow_body_begins_to_be_timed_when_it_is_its_turn() {
    let gates = gates(2);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let limited = |config: MiniLbConfig| {
        config.max_concurrent_requests(1).request_body_idle_timeout(Duration::from_secs(1))
    };
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = ask(&router, 0).await;
    decode.arrived(1).await;
    let mut second = router.client().await;
    second.send("POST /generate HTTP/1.1\r\nhost: r\r\nx-number: 1\r\ncontent-length: 12\r\n\r\n").await;
    router.queued(1).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    gates[0].open();
    gates[1].open();
    assert_eq!(first.answer().await.status(), 200);
    router.queued(0).await;
    second.send(BODY).await;
    assert_eq!(second.answer().await.status(), 200);
}

#[tokio::test]
async fn a_request_that_fails_gives_its_place_back() {
    let (prefill, decode) = (quick().await, quick().await);
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
async fn a_rate_lets_a_seconds_worth_begin_at_once_and_then_so_many_a_second() {
    const RATE: u32 = 20;
    let (prefill, decode) = (quick().await, quick().await);
    let limited = |config: MiniLbConfig| config.rate_limit(RATE).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut clients = [router.client().await, router.client().await];
    let begun = Instant::now();
    let (mut admitted, mut turn) = (0, 0);
    while begun.elapsed() < Duration::from_secs(2) {
        turn += 1;
        let answer = clients[turn % 2].post("/generate", BODY).await;
        match answer.status() {
            200 => admitted += 1,
            429 => {
                assert_eq!((answer.code(), retry_after(&answer)), ("rate_limited".into(), 1));
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            other => panic!("{other}"),
        }
    }
    let most = f64::from(RATE) * (1.0 + begun.elapsed().as_secs_f64()) + 1.0;
    assert!(f64::from(admitted) <= most, "{admitted} of {most}");
    // A machine that is busy may miss a few tokens.
    assert!(admitted >= RATE * 2, "{admitted}");
    assert_eq!(decode.seen().len(), admitted as usize);
    assert_eq!(clients[0].get("/health").await.status(), 200);
}

#[tokio::test]
async fn full_servers_are_left_out_and_if_all_are_full_requests_wait() {
    let gates = gates(5);
    let prefill = quick().await;
    let decode = [held(&gates).await, held(&gates).await];
    let limited = |config: MiniLbConfig| config.max_in_flight_per_decode(2).worker_threads(2);
    let router = Router::start_with(&[&prefill], &[&decode[0], &decode[1]], limited).await;
    let mut clients = Vec::new();
    for number in 0..4 {
        clients.push(ask(&router, number).await);
    }
    // At random, three of four would mostly go to one.
    decode[0].arrived(2).await;
    decode[1].arrived(2).await;
    let mut fifth = ask(&router, 4).await;
    router.queued(1).await;
    assert_eq!(router.knows(&decode[0]).in_flight() + router.knows(&decode[1]).in_flight(), 4);
    let done = numbers(&decode[1]).await[0];
    gates[done].open();
    clients[done].answer().await;
    decode[1].arrived(3).await;
    assert_eq!(decode[0].seen().len(), 2);
    gates[4].open();
    assert_eq!(fifth.answer().await.text(), r#"{"n":4}"#);
}

#[tokio::test]
async fn a_prefill_servers_seat_is_free_when_its_own_answer_has_ended() {
    let (prefill_gates, decode_gates) = (gates(2), gates(2));
    let (prefill, decode) = (held(&prefill_gates).await, held(&decode_gates).await);
    let limited = |config: MiniLbConfig| config.max_in_flight_per_prefill(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    let mut first = ask(&router, 0).await;
    decode.arrived(1).await;
    let mut second = ask(&router, 1).await;
    router.queued(1).await;
    prefill_gates[0].open();
    // Decode still has the first.
    decode.arrived(2).await;
    prefill_gates[1].open();
    decode_gates[0].open();
    decode_gates[1].open();
    assert_eq!((first.answer().await.status(), second.answer().await.status()), (200, 200));
}

#[tokio::test]
async fn a_role_without_servers_is_not_waited_for() {
    let (prefill, decode) = (quick().await, quick().await);
    decode.stop_listening().await;
    let limited = |config: MiniLbConfig| config.max_in_flight_per_decode(1);
    let router = Router::start_with(&[&prefill], &[&decode], limited).await;
    // A retry has nowhere else to go.
    let answer = router.client().await.post("/generate", BODY).await;
    assert_eq!((answer.status(), answer.code()), (502, "decode_connect".into()));
    router.idle().await;
}

#[tokio::test]
async fn limits_change_while_requests_wait() {
    let gates = gates(4);
    let (prefill, decode) = (quick().await, held(&gates).await);
    let config = || {
        let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 60)
    };
    let router = Router::serve(config().max_concurrent_requests(1)).await;
    let mut clients = vec![ask(&router, 0).await];
    decode.arrived(1).await;
    clients.push(ask(&router, 1).await);
    clients.push(ask(&router, 2).await);
    router.queued(2).await;
    router.reload(config().max_concurrent_requests(2)).expect("a good configuration");
    decode.arrived(2).await;
    router.queued(1).await;
    router.reload(config()).expect("a good configuration");
    decode.arrived(3).await;
    router.reload(config().max_concurrent_requests(3)).expect("a good configuration");
    clients.push(ask(&router, 3).await);
    router.queued(1).await;
    for (gate, client) in gates.iter().zip(&mut clients) {
        gate.open();
        assert_eq!(client.answer().await.status(), 200);
    }
}

//! Connections to servers: kept, counted, closed, and never used for two answers at once.

mod kit;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, Router, Step, Upstream, json};

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
async fn ten_thousand_requests_on_one_connection_open_one_connection_a_server() {
    let chunked = [STREAM_HEAD.as_bytes(), &chunk("data: 1\n\n"), b"0\r\n\r\n"].concat();
    let sized = json("200 OK", OK);
    let empty = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec();
    let answers = [chunked, sized, empty];
    let turn = AtomicUsize::new(0);
    let next = move |_: &_| {
        let turn = turn.fetch_add(1, Ordering::SeqCst);
        vec![Step::Send(answers[turn % answers.len()].clone())]
    };
    let (prefill, decode) = (answering().await, Upstream::start(next).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for _ in 0..10_000 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        // A prefill answer that is late by a hair would still hold its connection when the next request comes.
        router.idle().await;
    }
    assert_eq!((prefill.opened(), decode.opened()), (1, 1));
    assert_eq!((prefill.seen().len(), decode.seen().len()), (10_000, 10_000));
}

#[tokio::test]
async fn each_worker_has_its_own_clients_and_connections() {
    let (prefill, decode) = (answering().await, answering().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.worker_threads(2)).await;
    // The second connection goes to the worker that has none yet.
    let mut clients = [router.client().await, router.client().await];
    for _ in 0..20 {
        for client in &mut clients {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
            router.idle().await;
        }
    }
    assert_eq!((prefill.opened(), decode.opened()), (2, 2));
}

#[tokio::test]
async fn idle_connections_are_closed_before_sglang_closes_them() {
    let (prefill, decode) = (answering().await, answering().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    router.client().await.post("/generate", BODY).await;
    let start = Instant::now();
    prefill.closed(1).await;
    decode.closed(1).await;
    let idle = start.elapsed();
    assert!(Duration::from_secs(3) < idle && idle < Duration::from_secs(5), "{idle:?}");
}

#[tokio::test]
async fn a_connection_that_the_server_closed_while_idle_is_not_used() {
    let closing = || Upstream::start(|_| vec![Step::Send(json("200 OK", OK)), Step::Close]);
    let (prefill, decode) = (closing().await, closing().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for count in 1..=20 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        prefill.closed(count).await;
        decode.closed(count).await;
    }
    assert_eq!((prefill.opened(), decode.opened()), (20, 20));
}

#[tokio::test]
async fn a_broken_answer_ends_its_connection_and_the_next_request_is_clean() {
    let turn = AtomicUsize::new(0);
    let prefill = answering().await;
    let decode = Upstream::start(move |_| {
        if turn.fetch_add(1, Ordering::SeqCst) == 0 {
            return vec![
                Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort".to_vec()),
                Step::Close,
            ];
        }
        vec![Step::Send(json("200 OK", OK))]
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], BODY.as_bytes()).await;
    if let Some(head) = client.head_or_end().await {
        assert!(!client.rest(head).await.complete, "a short body must not look complete");
    }
    assert_eq!(router.client().await.post("/generate", BODY).await.text(), OK);
    assert_eq!(decode.opened(), 2);
}

/// More than one answer to a request, at once or late: nobody else gets it.
#[tokio::test]
async fn what_comes_behind_an_answer_is_for_nobody() {
    let surplus = json("200 OK", r#"{"text":"stolen"}"#);
    for at_once in [true, false] {
        for role in ["prefill", "decode"] {
            let (later, written) = (Gate::new(), Gate::new());
            let (gate, done, surplus) = (later.clone(), written.clone(), surplus.clone());
            let talkative = Upstream::start(move |_| {
                let answer = json("200 OK", OK);
                if at_once {
                    return vec![Step::Send([answer, surplus.clone()].concat())];
                }
                let late = [Step::Wait(gate.clone()), Step::Send(surplus.clone()), Step::Open(done.clone())];
                [vec![Step::Send(answer)], late.to_vec()].concat()
            })
            .await;
            let partner = answering().await;
            let (prefill, decode) =
                if role == "prefill" { (&talkative, &partner) } else { (&partner, &talkative) };
            let router = Router::start(&[prefill], &[decode]).await;
            let mut client = router.client().await;
            assert_eq!(client.post("/generate", BODY).await.text(), OK, "{role}");
            router.idle().await;
            later.open();
            if !at_once {
                // The router reads an idle connection only when it wants to use it: the bytes must be there by then.
                kit::patiently("more than one answer", written.pass()).await;
            }
            for _ in 0..3 {
                assert_eq!(client.post("/generate", BODY).await.text(), OK, "{role}");
                router.idle().await;
            }
            // Each such connection was closed with its answer.
            assert!(talkative.opened() > 1, "{role}");
        }
    }
}

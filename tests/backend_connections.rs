//! Connections to backends: pooled, counted, closed, and never used for two responses at once.

mod kit;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json, ok_server};

const BODY: &str = r#"{"text":"a"}"#;

#[tokio::test]
async fn ten_thousand_requests_reuse_one_connection_per_backend() {
    let chunked = [STREAM_HEAD.as_bytes(), &chunk("data: 1\n\n"), b"0\r\n\r\n"].concat();
    let sized = json("200 OK", OK);
    let empty = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec();
    let responses = [chunked, sized, empty];
    let turn = AtomicUsize::new(0);
    let next = move |_: &_| {
        let turn = turn.fetch_add(1, Ordering::SeqCst);
        vec![Step::Send(responses[turn % responses.len()].clone())]
    };
    let (prefill, decode) = (ok_server().await, ScriptedServer::start(next).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for _ in 0..10_000 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        // A late prefill response would still hold its connection when the next request arrives.
        router.wait_idle().await;
    }
    assert_eq!((prefill.connections(), decode.connections()), (1, 1));
    assert_eq!((prefill.requests().len(), decode.requests().len()), (10_000, 10_000));
}

#[tokio::test]
async fn each_worker_thread_has_its_own_pool() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.worker_threads(2)).await;
    // The second connection goes to the worker thread that has none.
    let mut clients = [router.client().await, router.client().await];
    for _ in 0..20 {
        for client in &mut clients {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
            router.wait_idle().await;
        }
    }
    assert_eq!((prefill.connections(), decode.connections()), (2, 2));
}

#[tokio::test]
async fn idle_connections_are_closed_before_sglang_closes_them() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    router.client().await.post("/generate", BODY).await;
    let start = Instant::now();
    prefill.wait_closed(1).await;
    decode.wait_closed(1).await;
    let idle = start.elapsed();
    assert!(Duration::from_secs(3) < idle && idle < Duration::from_secs(5), "{idle:?}");
}

#[tokio::test]
async fn idle_connection_closed_by_the_backend_is_not_reused() {
    let closing = || ScriptedServer::start(|_| vec![Step::Send(json("200 OK", OK)), Step::Close]);
    let (prefill, decode) = (closing().await, closing().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for count in 1..=20 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        prefill.wait_closed(count).await;
        decode.wait_closed(count).await;
    }
    assert_eq!((prefill.connections(), decode.connections()), (20, 20));
}

#[tokio::test]
async fn truncated_response_closes_its_connection_only() {
    let turn = AtomicUsize::new(0);
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(move |_| {
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
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    if let Some(head) = client.head_or_eof().await {
        assert!(!client.finish_response(head).await.complete, "a short body must not look complete");
    }
    assert_eq!(router.client().await.post("/generate", BODY).await.text(), OK);
    assert_eq!(decode.connections(), 2);
}

/// A second response to one request, sent with the first or later, must not reach the next client.
#[tokio::test]
async fn bytes_after_a_response_reach_no_client() {
    let surplus = json("200 OK", r#"{"text":"stolen"}"#);
    for at_once in [true, false] {
        for role in ["prefill", "decode"] {
            let (later, written) = (Gate::new(), Gate::new());
            let (gate, done, surplus) = (later.clone(), written.clone(), surplus.clone());
            let talkative = ScriptedServer::start(move |_| {
                let response = json("200 OK", OK);
                if at_once {
                    return vec![Step::Send([response, surplus.clone()].concat())];
                }
                let late = [Step::Wait(gate.clone()), Step::Send(surplus.clone()), Step::Open(done.clone())];
                [vec![Step::Send(response)], late.to_vec()].concat()
            })
            .await;
            let partner = ok_server().await;
            let (prefill, decode) =
                if role == "prefill" { (&talkative, &partner) } else { (&partner, &talkative) };
            let router = Router::start(&[prefill], &[decode]).await;
            let mut client = router.client().await;
            assert_eq!(client.post("/generate", BODY).await.text(), OK, "{role}");
            router.wait_idle().await;
            later.open();
            if !at_once {
                // The router reads an idle connection only when it wants to use it: the bytes must be there
                // by then.
                kit::with_timeout("more than one answer", written.wait()).await;
            }
            for _ in 0..3 {
                assert_eq!(client.post("/generate", BODY).await.text(), OK, "{role}");
                router.wait_idle().await;
            }
            // Each of these connections was closed, not reused.
            assert!(talkative.connections() > 1, "{role}");
        }
    }
}

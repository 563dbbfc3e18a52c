//! Merges of prompt logprobs as a load on the router; what is merged is tested on recordings.

mod kit;

use std::time::{Duration, Instant};

use kit::{Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json};

/// Prefill's lists, as large as those of a prompt with 100,000 tokens and their alternatives.
fn lists() -> Vec<u8> {
    let entry = r#"[-1.2345678901234567,123456,null]"#;
    let lists = vec![entry; 600_000].join(",");
    json("200 OK", &format!(r#"{{"text":"","meta_info":{{"input_token_logprobs":[{lists}]}}}}"#))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_merge_leaves_the_worker_to_other_requests() {
    let large = lists();
    let length = large.len();
    let prefill = ScriptedServer::start(move |seen| match seen.json()["text"].as_str() {
        Some("large") => vec![Step::Send(large.clone())],
        _ => vec![Step::Send(json("200 OK", OK))],
    })
    .await;
    let decoded = r#"{"text":"a","meta_info":{"input_token_logprobs":[]}}"#;
    let decode = ScriptedServer::always(json("200 OK", decoded)).await;
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.worker_threads(1)).await;
    // Parsed in the worker's own thread, the lists hold a small request for more than half of the time. Any
    // pause of a busy machine lengthens a try, so one good try of three is enough.
    for chance in 1.. {
        let (slowest, took) = slowest_small_request(&router, length).await;
        if slowest < took / 4 {
            return;
        }
        assert!(chance < 3, "a small request took {slowest:?} of the merge's {took:?}");
    }
}

/// The time of the slowest of the small requests beside a large merge, and that of the merge.
async fn slowest_small_request(router: &Router, length: usize) -> (Duration, Duration) {
    let (mut client, mut small) = (router.client().await, router.client().await);
    let merged = tokio::spawn(async move {
        let body = r#"{"text":"large","return_logprob":true,"logprob_start_len":0}"#;
        let start = Instant::now();
        (client.post("/generate", body).await, start.elapsed())
    });
    let mut slowest = Duration::ZERO;
    while !merged.is_finished() {
        let start = Instant::now();
        assert_eq!(small.post("/generate", r#"{"text":"small"}"#).await.status(), 200);
        slowest = slowest.max(start.elapsed());
    }
    let (response, took) = merged.await.expect("a merged response");
    assert_eq!(response.status(), 200);
    assert!(response.body.len() > length / 2, "{} bytes", response.body.len());
    (slowest, took)
}

#[tokio::test]
async fn what_a_merge_holds_counts_as_buffered_until_its_end() {
    let large = lists();
    let length = large.len();
    let prefill = ScriptedServer::always(large).await;
    let now = Gate::new();
    let opened = now.clone();
    let decode = ScriptedServer::start(move |_| {
        let decoded = r#"{"text":"a","meta_info":{"input_token_logprobs":[]}}"#;
        vec![Step::Wait(opened.clone()), Step::Send(json("200 OK", decoded))]
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    let merged = tokio::spawn(async move {
        client.post("/generate", r#"{"text":"a","return_logprob":true,"logprob_start_len":0}"#).await
    });
    // The response's head is not part of what is held.
    kit::with_timeout("prefill's response to be held", async {
        while router.buffered_bytes() < length - 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    now.open();
    assert_eq!(merged.await.expect("a response").status(), 200);
    router.wait_buffered(0).await;
}

#[tokio::test]
async fn error_event_of_decode_ends_the_wait_for_prefill() {
    for (path, body) in [
        ("/generate", r#"{"text":"a","stream":true,"return_logprob":true,"logprob_start_len":0}"#),
        ("/v1/completions", r#"{"prompt":"a","stream":true,"echo":true,"logprobs":1}"#),
    ] {
        // Prefill waits for a transfer that has failed.
        let prefill = ScriptedServer::start(|_| vec![Step::Send(STREAM_HEAD.into()), Step::Hang]).await;
        let event = "data: {\"error\":{\"message\":\"Decode transfer failed\",\"code\":500}}\n\n";
        let events =
            [STREAM_HEAD.as_bytes(), &chunk(event), &chunk("data: [DONE]\n\n"), b"0\r\n\r\n"].concat();
        let decode = ScriptedServer::always(events).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        // Else only the end of the request's time, half an hour, would end it.
        let response = router.client().await.post(path, body).await;
        assert!(response.complete, "{path}");
        assert_eq!(response.text(), format!("{event}data: [DONE]\n\n"), "{path}");
        prefill.wait_closed(1).await;
    }
}

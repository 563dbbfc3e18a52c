//! A simulated pair with faults: a leg that never arrives, dies or is dropped, fields that the real servers
//! cannot handle, aborts. SGLang's own timeouts are scaled to a hundredth.

mod common;

use std::time::{Duration, Instant};

use common::{Exchange, both, eventually, fields, generate, post, quick_pair, send};
use loadtest::sim::{Sim, SimConfig, SimPair};
use serde_json::Value;

/// Long enough to see that nothing arrives, much shorter than the scaled 300 s.
const WATCH: Duration = Duration::from_millis(300);

/// Asserts that an exchange stays open and silent.
async fn hangs(exchange: &mut Exchange) {
    let outcome = exchange.wait(WATCH).await;
    assert!(!outcome.closed && outcome.raw.is_empty(), "{}", String::from_utf8_lossy(&outcome.raw));
}

async fn open(sim: &Sim, body: &str) -> Exchange {
    Exchange::open(sim.addr(), &post("/generate", body)).await
}

fn message(response: &common::Response) -> String {
    response.json()["message"].as_str().unwrap_or_else(|| panic!("{}", response.text())).to_owned()
}

/// The finish reason of a stream that consists of one event and the end.
fn abort_of(response: &common::Response) -> Value {
    assert_eq!(response.status, 200);
    let events = response.events();
    assert_eq!((events.len(), events[1].as_str()), (2, "[DONE]"));
    serde_json::from_str::<Value>(&events[0]).unwrap()["meta_info"]["finish_reason"].clone()
}

fn within(begin: Instant, least: f64) {
    let took = begin.elapsed().as_secs_f64();
    assert!(took >= least && took < least + 5.0, "took {took} s, not {least} s");
}

#[tokio::test]
async fn prefill_alone_fails_after_its_bootstrap_timeout() {
    let pair = quick_pair().await;
    let begin = Instant::now();
    let response = send(&pair.prefill, "POST", "/generate", &generate(&pair, 9, "\"rid\":\"r\",")).await;
    within(begin, 3.0);
    assert_eq!(response.status, 500);
    let expected = "Prefill bootstrap failed for request rank=0 req.rid='r' req.bootstrap_room=9 with exception \
                    KVTransferError(bootstrap_room=9): Request 9 timed out after 300.0s in KVPoll.Bootstrapping";
    assert_eq!(message(&response), expected);
}

#[tokio::test]
async fn decode_alone_fails_after_its_waiting_timeout_with_and_without_a_stream() {
    let pair = quick_pair().await;
    let begin = Instant::now();
    let (plain, stream) = tokio::join!(
        async { send(&pair.decode, "POST", "/generate", &generate(&pair, 9, "")).await },
        async { send(&pair.decode, "POST", "/generate", &generate(&pair, 10, "\"stream\":true,")).await }
    );
    within(begin, 3.0);
    assert_eq!(plain.status, 500);
    assert!(message(&plain).starts_with("Decode transfer failed for request rank=0 decode_req.req.rid='"));
    let abort = abort_of(&stream);
    assert_eq!((abort["type"].as_str(), abort["status_code"].as_u64()), (Some("abort"), Some(500)));
}

#[tokio::test]
async fn a_late_leg_still_meets_its_partner() {
    let pair = quick_pair().await;
    for (room, prefill_first) in [(1, true), (2, false)] {
        let (first, second) =
            if prefill_first { (&pair.prefill, &pair.decode) } else { (&pair.decode, &pair.prefill) };
        let body = generate(&pair, room, "");
        let mut early = open(first, &body).await;
        hangs(&mut early).await;
        assert_eq!(send(second, "POST", "/generate", &body).await.status, 200);
        assert_eq!(early.response().await.status, 200);
    }
}

#[tokio::test]
async fn a_wrong_bootstrap_port_fails_decode_and_leaves_prefill_waiting() {
    let pair = quick_pair().await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = unused.local_addr().unwrap().port();
    drop(unused);
    let fields = format!("\"bootstrap_host\":\"127.0.0.1\",\"bootstrap_port\":{port},\"bootstrap_room\":12");
    let body = format!("{{\"text\":\"a\",\"rid\":\"r\",{fields}}}");
    let mut prefill = open(&pair.prefill, &body).await;
    let begin = Instant::now();
    let decode = send(&pair.decode, "POST", "/generate", &body).await;
    within(begin, 0.14);
    assert_eq!(decode.status, 500);
    let expected = "Decode handshake failed for request rank=0 decode_req.req.rid='r' \
                    decode_req.req.bootstrap_room=12 with exception KVTransferError(bootstrap_room=12): Aborted by \
                    AbortReq.";
    assert_eq!(message(&decode), expected);
    hangs(&mut prefill).await;
}

#[tokio::test]
async fn decode_fails_when_the_bootstrap_port_is_an_api_port() {
    let pair = quick_pair().await;
    let port = pair.prefill.addr().port();
    let body = format!(
        "{{\"text\":\"a\",\"bootstrap_host\":\"127.0.0.1\",\"bootstrap_port\":{port},\"bootstrap_room\":12}}"
    );
    let decode = send(&pair.decode, "POST", "/generate", &body).await;
    assert!(message(&decode).starts_with("Decode handshake failed"));
}

#[tokio::test]
async fn decode_fails_when_prefill_dies_and_works_with_its_successor_on_the_same_address() {
    let pair = quick_pair().await;
    let mut decode = open(&pair.decode, &generate(&pair, 1, "")).await;
    hangs(&mut decode).await;
    let (addr, bootstrap) = (pair.prefill.addr(), pair.prefill.bootstrap_port());
    let begin = Instant::now();
    pair.prefill.shutdown().await;
    let failed = decode.response().await;
    within(begin, 0.1);
    assert_eq!(failed.status, 500);
    let port = bootstrap.unwrap();
    let why = format!("Lost connection with prefill instance (bootstrap_addr: 127.0.0.1:{port})");
    assert!(message(&failed).ends_with(&why), "{}", failed.text());

    let again = SimConfig { addr: Some(addr), bootstrap_port: bootstrap, ..SimConfig::prefill() };
    let pair = SimPair { prefill: Sim::start(again).await.unwrap(), decode: pair.decode };
    let (prefill, decode) = both(&pair, "/generate", &generate(&pair, 2, "")).await;
    assert_eq!((prefill.status, decode.status), (200, 200));
}

#[tokio::test]
async fn a_list_on_a_single_prompt_closes_the_connection_without_a_response() {
    let pair = quick_pair().await;
    let bodies = [
        ("/generate", r#"{"text":"a","bootstrap_room":[5]}"#),
        ("/generate", r#"{"input_ids":[1,2],"bootstrap_host":["h"],"bootstrap_room":5}"#),
        ("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"a"}],"bootstrap_room":[5]}"#),
        ("/v1/completions", r#"{"prompt":"a","bootstrap_port":[1],"bootstrap_room":5}"#),
    ];
    for sim in [&pair.prefill, &pair.decode] {
        for (path, body) in bodies {
            let outcome = Exchange::open(sim.addr(), &post(path, body)).await.wait(common::PATIENCE).await;
            assert!(outcome.closed && outcome.raw.is_empty(), "{}", String::from_utf8_lossy(&outcome.raw));
        }
        assert_eq!(sim.stats().crashes, bodies.len() as u64);
    }
}

#[tokio::test]
async fn a_list_that_is_shorter_than_the_batch_is_an_internal_error() {
    let pair = quick_pair().await;
    let response =
        send(&pair.decode, "POST", "/generate", r#"{"text":["a","b"],"bootstrap_room":[5]}"#).await;
    assert_eq!((response.status, response.text().as_str()), (500, "Internal Server Error"));
}

#[tokio::test]
async fn room_zero_and_several_samples_hang_decode_and_not_prefill() {
    let pair = quick_pair().await;
    let two = r#""sampling_params":{"n":2},"#;
    for (room, extra) in [(0, ""), (5, two)] {
        let body = generate(&pair, room, extra);
        let mut decode = open(&pair.decode, &body).await;
        assert_eq!(send(&pair.prefill, "POST", "/generate", &body).await.status, 200);
        hangs(&mut decode).await;
    }
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"n":2,"#;
    let body = format!("{chat}{}}}", fields(&pair, 6));
    let mut decode = Exchange::open(pair.decode.addr(), &post("/v1/chat/completions", &body)).await;
    let prefill = send(&pair.prefill, "POST", "/v1/chat/completions", &body).await;
    assert_eq!(prefill.json()["choices"].as_array().unwrap().len(), 2);
    hangs(&mut decode).await;
}

#[tokio::test]
async fn a_room_that_is_used_twice_gets_one_response_and_counts_as_a_crash() {
    let pair = quick_pair().await;
    let body = generate(&pair, 5, "");
    let mut first = open(&pair.decode, &body).await;
    eventually("the room is in use", || pair.decode.stats().in_flight == 1).await;
    let mut second = open(&pair.decode, &body).await;
    eventually("the second is seen", || pair.decode.stats().crashes == 1).await;
    assert_eq!(send(&pair.prefill, "POST", "/generate", &body).await.status, 200);
    assert_eq!(first.response().await.status, 200);
    hangs(&mut second).await;
}

#[tokio::test]
async fn a_room_can_be_used_again_after_its_request() {
    let pair = quick_pair().await;
    for _ in 0..3 {
        let (prefill, decode) = both(&pair, "/generate", &generate(&pair, 5, "")).await;
        assert_eq!((prefill.status, decode.status), (200, 200));
    }
    assert_eq!((pair.prefill.stats().crashes, pair.decode.stats().crashes), (0, 0));
}

#[tokio::test]
async fn legs_with_different_prompts_are_counted_as_a_mismatch() {
    let pair = quick_pair().await;
    let (one, other) = (generate(&pair, 5, ""), generate(&pair, 5, "").replace("the of", "to be"));
    let (prefill, decode) = tokio::join!(
        send(&pair.prefill, "POST", "/generate", &one),
        send(&pair.decode, "POST", "/generate", &other)
    );
    assert_eq!((prefill.status, decode.status), (200, 200));
    assert_eq!(pair.decode.stats().mismatches, 1);
    let (_, right) = both(&pair, "/generate", &other).await;
    assert_ne!(right.json()["text"], decode.json()["text"]);
    assert_eq!(pair.decode.stats().mismatches, 1);
}

#[tokio::test]
async fn the_fake_bootstrap_host_responds_without_a_partner() {
    let pair = quick_pair().await;
    let body = r#"{"text":"a","bootstrap_host":"2.2.2.2","bootstrap_port":1,"bootstrap_room":5}"#;
    assert_eq!(send(&pair.decode, "POST", "/generate", body).await.status, 200);
    assert_eq!(pair.decode.stats().mismatches, 1);
}

#[tokio::test]
async fn decode_fails_when_prefill_notices_that_its_client_disconnected() {
    let slow = SimConfig { prefill_time: Duration::from_secs(3600), time_scale: 0.1, ..SimConfig::prefill() };
    let pair = SimPair::start(slow, SimConfig::decode()).await.unwrap();
    let body = generate(&pair, 5, "\"stream\":true,");
    let mut decode = open(&pair.decode, &body).await;
    let prefill = open(&pair.prefill, &body.replace("\"stream\":true", "\"stream\":false")).await;
    eventually("prefill works", || pair.prefill.stats().in_flight == 1).await;
    let begin = Instant::now();
    drop(prefill);
    let abort = abort_of(&decode.response().await);
    within(begin, 0.35);
    assert_eq!(abort["status_code"], 500);
    assert_eq!(pair.prefill.stats().aborted, 1);
    assert_eq!(pair.prefill.stats().in_flight, 0);
}

#[tokio::test]
async fn a_prefill_leg_transfers_until_its_disconnect_is_noticed() {
    let config = SimConfig { time_scale: 10.0, ..SimConfig::prefill() };
    let pair = SimPair::start(config, SimConfig::decode()).await.unwrap();
    let body = generate(&pair, 5, "");
    let prefill = open(&pair.prefill, &body).await;
    eventually("prefill waits", || pair.prefill.stats().in_flight == 1).await;
    drop(prefill);
    eventually("the connection is gone", || pair.prefill.stats().connections_open == 0).await;
    assert_eq!(send(&pair.decode, "POST", "/generate", &body).await.status, 200);
}

#[tokio::test]
async fn the_disconnect_of_a_stream_reader_aborts_the_generation() {
    let slow = SimConfig { inter_token: Duration::from_secs(3600), time_scale: 0.1, ..SimConfig::decode() };
    let pair = SimPair::start(SimConfig::prefill(), slow).await.unwrap();
    let body = generate(&pair, 5, "\"stream\":true,");
    let mut decode = open(&pair.decode, &body).await;
    send(&pair.prefill, "POST", "/generate", &body).await;
    decode.until("data: ").await;
    let begin = Instant::now();
    drop(decode);
    eventually("the generation ends", || pair.decode.stats().in_flight == 0).await;
    within(begin, 0.15);
    assert_eq!(pair.decode.stats().aborted, 1);
}

#[tokio::test]
async fn abort_request_ends_a_waiting_request_immediately() {
    let pair = quick_pair().await;
    let body = |room| generate(&pair, room, &format!("\"rid\":\"rid-{room}\","));
    for (sim, room, stage) in
        [(&pair.decode, 19, "Decode transfer"), (&pair.prefill, 21, "Prefill bootstrap")]
    {
        let mut waiting = open(sim, &body(room)).await;
        eventually("it waits", || sim.stats().in_flight == 1).await;
        let abort = send(sim, "POST", "/abort_request", &format!("{{\"rid\":\"rid-{room}\"}}")).await;
        assert_eq!((abort.status, abort.text().as_str()), (200, ""));
        let response = waiting.response().await;
        assert_eq!(response.status, 500);
        let message = message(&response);
        assert!(message.starts_with(&format!("{stage} failed")), "{message}");
        assert!(message.ends_with("Aborted by AbortReq."), "{message}");
        assert_eq!(sim.stats().in_flight, 0);
    }
    let mut stream = open(&pair.decode, &body(20).replacen('{', "{\"stream\":true,", 1)).await;
    eventually("it waits", || pair.decode.stats().in_flight == 1).await;
    send(&pair.decode, "POST", "/abort_request", r#"{"abort_all":true}"#).await;
    let abort = abort_of(&stream.response().await);
    assert!(abort["message"].as_str().unwrap().ends_with("Aborted by AbortReq."));
}

#[tokio::test]
async fn abort_request_truncates_a_response_that_has_begun() {
    let slow = SimConfig { inter_token: Duration::from_secs(3600), ..SimConfig::decode() };
    let pair = SimPair::start(SimConfig::prefill(), slow).await.unwrap();
    let body = |room, stream| generate(&pair, room, &format!("\"rid\":\"r{room}\",\"stream\":{stream},"));
    let mut streamed = open(&pair.decode, &body(1, true)).await;
    let mut whole = open(&pair.decode, &body(2, false)).await;
    for room in [1, 2] {
        assert_eq!(send(&pair.prefill, "POST", "/generate", &body(room, false)).await.status, 200);
    }
    streamed.until("data: ").await;
    let running = async || {
        let loads = send(&pair.decode, "GET", "/v1/loads", "").await.json();
        loads["loads"][0]["num_running_reqs"].as_u64().unwrap()
    };
    while running().await < 2 {}
    for rid in ["r1", "r2"] {
        send(&pair.decode, "POST", "/abort_request", &format!("{{\"rid\":\"{rid}\"}}")).await;
    }
    let events = streamed.response().await.events();
    let last: Value = serde_json::from_str(&events[1]).unwrap();
    assert_eq!((events.len(), events[2].as_str()), (3, "[DONE]"));
    let whole = whole.response().await;
    assert_eq!(whole.status, 200);
    for response in [last, whole.json()] {
        assert_eq!(response["meta_info"]["finish_reason"]["type"], "abort");
        assert_eq!(response["meta_info"]["completion_tokens"], 1);
    }
}

#[tokio::test]
async fn aborting_decode_fails_a_prefill_that_is_computing() {
    let slow = SimConfig { prefill_time: Duration::from_secs(3600), ..SimConfig::prefill() };
    let pair = SimPair::start(slow, SimConfig::decode()).await.unwrap();
    let body = generate(&pair, 5, "\"rid\":\"x\",");
    let mut prefill = open(&pair.prefill, &body).await;
    let mut decode = open(&pair.decode, &body).await;
    let mut working = 0;
    while working == 0 {
        let loads = send(&pair.prefill, "GET", "/v1/loads", "").await.json();
        working = loads["loads"][0]["disaggregation"]["prefill_inflight_queue_reqs"].as_u64().unwrap();
    }
    send(&pair.decode, "POST", "/abort_request", r#"{"rid":"x"}"#).await;
    assert_eq!(decode.response().await.status, 500);
    let response = prefill.response().await;
    assert_eq!(response.status, 500);
    assert!(message(&response).starts_with("Prefill transfer failed"));
}

#[tokio::test]
async fn a_request_id_in_flight_is_rejected_until_its_request_ends() {
    let pair = quick_pair().await;
    let body = |room| generate(&pair, room, "\"rid\":\"x\",");
    let mut first = open(&pair.decode, &body(1)).await;
    eventually("it waits", || pair.decode.stats().in_flight == 1).await;
    let second = send(&pair.decode, "POST", "/generate", &body(2)).await;
    assert_eq!(second.status, 400);
    assert_eq!(second.json()["error"]["message"], "Duplicate request ID detected: x");
    send(&pair.prefill, "POST", "/generate", &body(1)).await;
    assert_eq!(first.response().await.status, 200);
    let (_, third) = both(&pair, "/generate", &body(3)).await;
    assert_eq!(third.status, 200);
}

#[tokio::test]
async fn a_server_that_stops_truncates_its_streams() {
    let slow = SimConfig { inter_token: Duration::from_secs(3600), ..SimConfig::decode() };
    let pair = SimPair::start(SimConfig::prefill(), slow).await.unwrap();
    let body = generate(&pair, 5, "\"stream\":true,");
    let mut decode = open(&pair.decode, &body).await;
    send(&pair.prefill, "POST", "/generate", &body).await;
    decode.until("data: ").await;
    pair.decode.shutdown().await;
    let outcome = decode.wait(common::PATIENCE).await;
    assert!(outcome.closed);
    assert!(!outcome.raw.ends_with(b"0\r\n\r\n"), "the last chunk stays away");
}

#[tokio::test]
async fn bodies_of_the_wrong_type_are_rejected() {
    let pair = quick_pair().await;
    for body in ["{\"text\":", "[1,2]", "{\"text\":5}", "{}", "{\"text\":\"a\",\"bootstrap_room\":\"x\"}"] {
        assert_eq!(send(&pair.decode, "POST", "/generate", body).await.status, 400, "{body}");
    }
    let body = r#"{"text":"a","sampling_params":{"nope":1}}"#;
    let unknown = send(&pair.decode, "POST", "/generate", body).await;
    assert_eq!(unknown.status, 400);
    assert!(
        unknown.json()["error"]
            .as_str()
            .unwrap()
            .starts_with("unknown field `nope`, expected one of `max_new_t")
    );
    assert_eq!(send(&pair.decode, "PUT", "/generate", "{}").await.status, 400);
    assert_eq!(send(&pair.decode, "DELETE", "/generate", "").await.status, 405);
}

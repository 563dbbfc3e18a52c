//! A simulated pair without faults: text, tokens, pace, cache, keep-alive, tools.

mod common;

use std::time::{Duration, Instant};

use common::{Exchange, both, eventually, fields, generate, post, quick_pair, send};
use loadtest::sim::{Sim, SimConfig, SimPair, hash_text, text};
use serde_json::{Value, json};

const PROMPT: &str = "the of and to";

async fn pair() -> SimPair {
    SimPair::default_start().await.unwrap()
}

/// A chat body for a pair; `extra` ends in a comma.
fn chat(pair: &SimPair, room: i64, extra: &str) -> String {
    let message = r#""model":"m","messages":[{"role":"user","content":"the of"}]"#;
    format!("{{{message},{extra}{}}}", fields(pair, room))
}

#[tokio::test]
async fn decode_returns_the_text_of_the_prompt_and_prefill_its_first_token() {
    let pair = pair().await;
    let body = generate(&pair, 1, r#""sampling_params":{"max_new_tokens":9},"#);
    let (prefill, decode) = both(&pair, "/generate", &body).await;
    let hash = hash_text(PROMPT);
    assert_eq!(decode.json()["text"], text::output_text(hash, 9));
    assert_eq!(prefill.json()["text"], text::output_text(hash, 1));
    assert_eq!(decode.json()["meta_info"]["completion_tokens"], 9);
    assert_eq!(prefill.json()["meta_info"]["finish_reason"], json!({"type": "length", "length": 0}));
}

#[tokio::test]
async fn generate_streams_are_cumulative_and_end_with_the_whole_text() {
    let pair = pair().await;
    let body = generate(&pair, 1, r#""stream":true,"sampling_params":{"max_new_tokens":20},"#);
    let (_, decode) = both(&pair, "/generate", &body).await;
    let events = decode.events();
    assert_eq!(events.len(), 21);
    let mut before = String::new();
    for (at, event) in events[..20].iter().enumerate() {
        let event: Value = serde_json::from_str(event).unwrap();
        let now = event["text"].as_str().unwrap();
        assert!(now.starts_with(&before) && now.len() > before.len());
        assert_eq!(event["output_ids"].as_array().unwrap().len(), at + 1);
        now.clone_into(&mut before);
    }
    assert_eq!(before, text::output_text(hash_text(PROMPT), 20));
}

#[tokio::test]
async fn incremental_streams_have_only_new_tokens() {
    let decode = SimConfig { incremental_output: true, ..SimConfig::decode() };
    let pair = SimPair::start(SimConfig::prefill(), decode).await.unwrap();
    let body = generate(&pair, 1, r#""stream":true,"sampling_params":{"max_new_tokens":5},"#);
    let (_, decode) = both(&pair, "/generate", &body).await;
    let events = decode.events();
    let texts = events[..5].iter().map(|event| {
        let event: Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["output_ids"].as_array().unwrap().len(), 1);
        event["text"].as_str().unwrap().to_owned()
    });
    assert_eq!(texts.collect::<String>(), text::output_text(hash_text(PROMPT), 5));
}

#[tokio::test]
async fn the_deltas_of_a_chat_stream_add_up_to_the_complete_response() {
    let pair = pair().await;
    let (_, whole) = both(&pair, "/v1/chat/completions", &chat(&pair, 1, "\"max_tokens\":12,")).await;
    let (_, stream) =
        both(&pair, "/v1/chat/completions", &chat(&pair, 2, "\"max_tokens\":12,\"stream\":true,")).await;
    let delta = |event: &String| {
        let event: Value = serde_json::from_str(event).unwrap_or_default();
        event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
    };
    let streamed: String = stream.events().iter().map(delta).collect();
    assert!(!streamed.is_empty());
    assert_eq!(whole.json()["choices"][0]["message"]["content"], streamed);
    assert_eq!(whole.json()["usage"]["completion_tokens"], 12);
    assert_eq!(whole.json()["model"], "m");
}

#[tokio::test]
async fn a_scalar_room_on_a_batch_counts_up_on_both_sides() {
    let pair = pair().await;
    let batch = format!(r#"{{"text":["a","b","c"],{}}}"#, fields(&pair, 40));
    let single = format!(r#"{{"text":"c",{}}}"#, fields(&pair, 42));
    // Prefill gets the third prompt alone, with the room that decode must derive for it in its batch.
    let (decode, prefill) = tokio::join!(send(&pair.decode, "POST", "/generate", &batch), async {
        let third = send(&pair.prefill, "POST", "/generate", &single).await;
        let rest = format!(r#"{{"text":["a","b"],{}}}"#, fields(&pair, 40));
        send(&pair.prefill, "POST", "/generate", &rest).await;
        third
    });
    assert_eq!((decode.status, prefill.status), (200, 200));
    assert_eq!(decode.json().as_array().unwrap().len(), 3);
    assert_eq!(pair.decode.stats().mismatches, 0);
}

#[tokio::test]
async fn prompt_logprobs_come_from_prefill_and_are_deterministic() {
    let pair = pair().await;
    let extra = r#""return_logprob":true,"logprob_start_len":1,"sampling_params":{"max_new_tokens":4},"#;
    let (prefill, decode) = both(&pair, "/generate", &generate(&pair, 1, extra)).await;
    let (prefill, decode) = (prefill.json(), decode.json());
    let hash = hash_text(PROMPT);
    let input = prefill["meta_info"]["input_token_logprobs"].as_array().unwrap();
    assert_eq!(input.len(), 3);
    assert_eq!(input[0][0], Value::Null);
    assert_eq!(input[2][0], text::input_logprob(hash, 3));
    assert_eq!(decode["meta_info"]["input_token_logprobs"], json!([]));
    let output = decode["meta_info"]["output_token_logprobs"].as_array().unwrap();
    assert_eq!(output.len(), 4);
    assert_eq!(output[3][0], text::output_logprob(hash, 3));
    assert_eq!(output[3][1], text::token_id(hash, 3));
}

#[tokio::test]
async fn tokens_arrive_at_the_configured_pace() {
    let prefill = SimConfig { prefill_time: Duration::from_millis(60), ..SimConfig::prefill() };
    let decode = SimConfig {
        first_token: Duration::from_millis(80),
        inter_token: Duration::from_millis(40),
        ..SimConfig::decode()
    };
    let pair = SimPair::start(prefill, decode).await.unwrap();
    let body = generate(&pair, 1, r#""stream":true,"sampling_params":{"max_new_tokens":4},"#);
    let begin = Instant::now();
    let prefill =
        tokio::spawn(Exchange::open(pair.prefill.addr(), &post("/generate", &body)).await.into_response());
    let mut decode = Exchange::open(pair.decode.addr(), &post("/generate", &body)).await;
    decode.until("data: ").await;
    assert!(begin.elapsed() >= Duration::from_millis(140), "{:?}", begin.elapsed());
    decode.response().await;
    assert!(begin.elapsed() >= Duration::from_millis(260), "{:?}", begin.elapsed());
    assert_eq!(prefill.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_late_prefill_response_does_not_delay_decode() {
    let prefill = SimConfig { prefill_response_delay: Duration::from_secs(3600), ..SimConfig::prefill() };
    let pair = SimPair::start(prefill, SimConfig::decode()).await.unwrap();
    let body = generate(&pair, 1, "");
    let _prefill = Exchange::open(pair.prefill.addr(), &post("/generate", &body)).await;
    assert_eq!(send(&pair.decode, "POST", "/generate", &body).await.status, 200);
    assert_eq!(pair.prefill.stats().in_flight, 1);
}

#[tokio::test]
async fn a_null_port_selects_the_bootstrap_port_of_the_decode_server() {
    let pair = pair().await;
    let body = r#"{"text":"a","bootstrap_host":"127.0.0.1","bootstrap_port":null,"bootstrap_room":5}"#;
    let (prefill, decode) = both(&pair, "/generate", body).await;
    assert_eq!((prefill.status, decode.status), (200, 200));
}

#[tokio::test]
async fn an_ipv6_bootstrap_host_in_brackets_is_accepted() {
    let addr = Some("[::1]:0".parse().unwrap());
    let Ok(pair) = SimPair::start(SimConfig { addr, ..SimConfig::prefill() }, SimConfig::decode()).await
    else {
        return; // This machine has no IPv6.
    };
    let port = pair.prefill.bootstrap_port().unwrap();
    let body =
        format!(r#"{{"text":"a","bootstrap_host":"[::1]","bootstrap_port":{port},"bootstrap_room":5}}"#);
    let (prefill, decode) = both(&pair, "/generate", &body).await;
    assert_eq!((prefill.status, decode.status), (200, 200));
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_the_keep_alive_timeout() {
    let config = SimConfig { keep_alive: Duration::from_millis(200), ..SimConfig::default() };
    let sim = Sim::start(config).await.unwrap();
    let begin = Instant::now();
    let mut exchange = Exchange::open(sim.addr(), &common::request("GET", "/ready", "")).await;
    exchange.response().await;
    let outcome = exchange.wait(common::PATIENCE).await;
    assert!(outcome.closed);
    let idle = begin.elapsed();
    assert!(idle >= Duration::from_millis(200) && idle < Duration::from_secs(5), "{idle:?}");
    assert_eq!(sim.stats().connections_opened, 1);
    eventually("the connection is counted as closed", || sim.stats().connections_open == 0).await;
}

#[tokio::test]
async fn the_default_keep_alive_timeout_is_five_seconds() {
    assert_eq!(SimConfig::default().keep_alive, Duration::from_secs(5));
    assert_eq!(SimConfig::default().time_scale, 1.0);
}

#[tokio::test]
async fn flush_cache_fails_while_requests_run_and_can_wait_for_them() {
    let pair = pair().await;
    let body = generate(&pair, 1, "");
    let mut prefill = Exchange::open(pair.prefill.addr(), &post("/generate", &body)).await;
    eventually("prefill waits", || pair.prefill.stats().in_flight == 1).await;
    let refused = send(&pair.prefill, "POST", "/flush_cache", "").await;
    assert_eq!((refused.status, refused.text().as_str()), (400, "Flush cache failed.\n"));
    let patient = common::request("POST", "/flush_cache?timeout=30.0", "");
    let mut patient = Exchange::open(pair.prefill.addr(), &patient).await;
    assert_eq!(send(&pair.decode, "POST", "/generate", &body).await.status, 200);
    prefill.response().await;
    assert_eq!(patient.response().await.status, 200);
    assert_eq!(send(&pair.prefill, "GET", "/flush_cache", "").await.status, 200);
}

#[tokio::test]
async fn loads_reports_the_queue_of_each_waiting_leg() {
    let pair = quick_pair().await;
    let body = generate(&pair, 1, "");
    let _decode = Exchange::open(pair.decode.addr(), &post("/generate", &body)).await;
    let mut queued = 0;
    while queued == 0 {
        let loads = send(&pair.decode, "GET", "/v1/loads", "").await.json();
        queued = loads["loads"][0]["disaggregation"]["decode_transfer_queue_reqs"].as_u64().unwrap();
    }
    assert_eq!(queued, 1);
    let loads = send(&pair.prefill, "GET", "/v1/loads", "").await.json();
    assert_eq!(loads["loads"][0]["disaggregation"]["prefill_bootstrap_queue_reqs"], 0);
}

#[tokio::test]
async fn health_takes_a_second_and_is_503_while_draining() {
    let sim = Sim::start(SimConfig { time_scale: 0.1, ..SimConfig::default() }).await.unwrap();
    let begin = Instant::now();
    assert_eq!(send(&sim, "GET", "/health", "").await.status, 200);
    assert!(begin.elapsed() >= Duration::from_millis(100));
    assert_eq!(send(&sim, "GET", "/ready", "").await.status, 200);
    sim.drain();
    assert_eq!(send(&sim, "GET", "/health", "").await.status, 503);
    assert_eq!(send(&sim, "GET", "/ready", "").await.status, 503);
    assert_eq!(send(&sim, "GET", "/ping", "").await.status, 200);
}

#[tokio::test]
async fn terminated_server_serves_until_a_poll_finds_no_request_then_is_silent_and_gone() {
    // Polls every 3 s, silent for 0.9 s. The response takes longer than a busy machine is late.
    let slow = SimConfig { time_scale: 0.6, first_token: Duration::from_secs(4), ..SimConfig::default() };
    let sim = Sim::start(slow).await.unwrap();
    let (addr, begin) = (sim.addr(), Instant::now());
    let body = r#"{"text":"the of","sampling_params":{"max_new_tokens":1}}"#;
    let request = async move |method: &str, path: &str, body: &str| {
        Exchange::open(addr, &common::request(method, path, body)).await.response().await.status
    };
    let mut kept = Exchange::open(addr, &common::request("GET", "/ready", "")).await;
    assert_eq!(kept.response().await.status, 200);
    let ending = tokio::spawn(sim.terminate());
    while request("GET", "/ready", "").await != 503 {}
    assert_eq!(request("GET", "/health", "").await, 503);
    assert_eq!(request("GET", "/v1/models", "").await, 200);
    // The poll after 3 s finds it.
    assert_eq!(request("POST", "/generate", body).await, 200);
    assert_eq!(request("GET", "/ready", "").await, 503);
    tokio::time::sleep_until((begin + Duration::from_millis(6_300)).into()).await;
    let mut late = Exchange::open(addr, &post("/generate", body)).await;
    let outcome = late.wait(common::PATIENCE).await;
    assert_eq!((outcome.closed, outcome.raw), (true, Vec::new()));
    ending.await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(6_900), "{:?}", begin.elapsed());
    let gone = tokio::net::TcpStream::connect(addr).await.unwrap_err();
    assert_eq!(gone.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn every_endpoint_but_health_requires_the_api_key() {
    let config = SimConfig { api_key: Some("k".to_owned()), time_scale: 0.001, ..SimConfig::default() };
    let sim = Sim::start(config).await.unwrap();
    assert_eq!(send(&sim, "GET", "/v1/models", "").await.status, 401);
    assert_eq!(send(&sim, "GET", "/health", "").await.status, 200);
    assert_eq!(send(&sim, "GET", "/ready", "").await.status, 200);
    for (key, status) in [("k", 200), ("x", 401)] {
        let request = format!("GET /v1/models HTTP/1.1\r\nhost: sim\r\nauthorization: Bearer {key}\r\n\r\n");
        assert_eq!(Exchange::open(sim.addr(), request.as_bytes()).await.response().await.status, status);
    }
}

const TOOLS: &str = r#""tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"city":{"type":"string"},"days":{"type":"integer"}}}}}],"tool_choice":"required","#;

#[tokio::test]
async fn a_required_tool_is_called_with_valid_json_arguments() {
    let pair = pair().await;
    let (prefill, decode) = both(&pair, "/v1/chat/completions", &chat(&pair, 1, TOOLS)).await;
    let choice = &decode.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((call["type"].as_str(), call["function"]["name"].as_str()), (Some("function"), Some("f")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["city"].is_string() && arguments["days"].is_i64());
    assert_eq!(prefill.status, 200);

    let body = chat(&pair, 2, &format!("{TOOLS}\"stream\":true,"));
    let (_, stream) = both(&pair, "/v1/chat/completions", &body).await;
    let mut streamed = String::new();
    for event in stream.events() {
        let event: Value = serde_json::from_str(&event).unwrap_or_default();
        let part = &event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"];
        streamed.push_str(part.as_str().unwrap_or_default());
    }
    assert_eq!(serde_json::from_str::<Value>(&streamed).unwrap(), arguments);
}

#[tokio::test]
async fn requests_are_recorded_as_they_were_sent() {
    let pair = pair().await;
    let body = generate(&pair, 77, "\"unknown\":{\"a\":[1, 2]},");
    both(&pair, "/generate?x=1", &body).await;
    let seen = pair.decode.recorded_requests();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].method.as_str(), seen[0].path_and_query.as_str()), ("POST", "/generate?x=1"));
    assert_eq!(seen[0].body, body.as_bytes());
    assert_eq!(seen[0].room, Some(77));
    assert_eq!(seen[0].header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn a_prompt_of_eight_mebibytes_is_accepted() {
    let config = SimConfig { context_length: 1 << 22, ..SimConfig::default() };
    let pair = SimPair::start(config.clone(), config).await.unwrap();
    let words = "word ".repeat((8 << 20) / 5);
    let body = format!(r#"{{"text":"{words}",{}}}"#, fields(&pair, 3));
    let (prefill, decode) = both(&pair, "/generate", &body).await;
    assert_eq!((prefill.status, decode.status), (200, 200), "{}", decode.text());
    assert_eq!(decode.json()["meta_info"]["prompt_tokens"], (8 << 20) / 5);
}

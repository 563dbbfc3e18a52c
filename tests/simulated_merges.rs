//! Merged responses of a simulated pair, compared with those of a simulated server that is not disaggregated,
//! with SGLang's front end in Python and in Rust.

mod kit;

use kit::{Client, Router};
use loadtest::sim::{Sim, SimConfig, SimPair};
use mini_lb::MiniLbConfig;
use serde_json::{Value, json};

const GENERATE: [&str; 9] = [
    r#"{"text":"the of and to","return_logprob":true,"logprob_start_len":0"#,
    r#"{"text":"the of and to","return_logprob":true,"logprob_start_len":-5"#,
    r#"{"text":"the of and to","return_logprob":true,"logprob_start_len":1,"top_logprobs_num":2,"token_ids_logprob":[10,20]"#,
    r#"{"text":"the of and to","return_logprob":true,"token_ids_logprob":[10,20],"return_text_in_logprobs":true"#,
    r#"{"text":["the of","and to","a"],"return_logprob":true,"logprob_start_len":0,"top_logprobs_num":2"#,
    r#"{"text":["the of","and to","a"],"return_logprob":[true,false,true],"logprob_start_len":[0,-1,1],"top_logprobs_num":[2,0,1]"#,
    r#"{"text":["the of"],"return_logprob":[true],"logprob_start_len":[0],"token_ids_logprob":[[1]]"#,
    r#"{"text":"the of and to","return_routed_experts":true"#,
    r#"{"text":["the of","and"],"return_routed_experts":true,"routed_experts_start_len":1,"return_logprob":true,"logprob_start_len":0"#,
];

const COMPLETIONS: [&str; 4] = [
    r#"{"prompt":"the of and to","echo":true,"logprobs":2"#,
    r#"{"prompt":["the of","and to"],"echo":true,"logprobs":1"#,
    r#"{"prompt":"the of and to","echo":true,"logprobs":1,"return_routed_experts":true"#,
    r#"{"prompt":"the of and","return_routed_experts":true"#,
];

const CHAT: [&str; 2] = [
    r#"{"messages":[{"role":"user","content":"the of and to"}],"return_routed_experts":true"#,
    r#"{"messages":[{"role":"user","content":"a"}],"return_routed_experts":true,"logprobs":true,"top_logprobs":2"#,
];

/// All requests, each with and without a stream.
fn requests() -> Vec<(&'static str, String)> {
    let generate =
        GENERATE.map(|start| ("/generate", format!(r#"{start},"sampling_params":{{"max_new_tokens":5}}"#)));
    let completions = COMPLETIONS.map(|start| ("/v1/completions", format!(r#"{start},"max_tokens":5"#)));
    let chat = CHAT.map(|start| ("/v1/chat/completions", format!(r#"{start},"max_tokens":5"#)));
    let all = generate.into_iter().chain(completions).chain(chat);
    all.flat_map(|(target, start)| {
        ["false", "true"].map(|stream| (target, format!(r#"{start},"stream":{stream}}}"#)))
    })
    .collect()
}

/// What does not depend on ids and times. The items of a streamed batch come in any order.
fn comparable(response: &str) -> Vec<Value> {
    let data = |event: &str| event.strip_prefix("data: ").filter(|data| *data != "[DONE]").map(parse);
    let mut values: Vec<Value> = if response.starts_with("data: ") {
        response.split("\n\n").filter_map(data).collect()
    } else {
        match parse(response) {
            Value::Array(items) => items,
            item => vec![item],
        }
    };
    values.iter_mut().for_each(keep_comparable);
    values.sort_by_key(|value| (value["index"].as_u64(), value["choices"][0]["index"].as_u64()));
    values
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn keep_comparable(value: &mut Value) {
    let object = value.as_object_mut().expect("an object");
    object.retain(|name, _| {
        ["text", "output_ids", "index", "choices", "sglext", "usage", "meta_info"].contains(&name.as_str())
    });
    let Some(info) = object.get_mut("meta_info").and_then(Value::as_object_mut) else { return };
    for name in ["prefill_finished_time", "storage_prefetch_wait", "storage_staging_wait"] {
        if let Some(time) = info.get_mut(name) {
            *time = json!(time.is_number());
        }
    }
    let is_kept = |name: &str| {
        ["input_", "output_", "routed", "prefill_", "storage_", "completion_"]
            .iter()
            .any(|start| name.starts_with(start))
    };
    info.retain(|name, _| is_kept(name));
}

async fn merged_as_by_a_regular_server(rust_front_end: bool) {
    let config = || SimConfig { rust_front_end, ..SimConfig::default() };
    let pair = SimPair::start(config(), config()).await.expect("free ports");
    let single = Sim::start(config()).await.expect("a free port");
    let prefill = vec![(pair.prefill.url(), pair.prefill.bootstrap_port())];
    let config =
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![pair.decode.url()], 60).worker_threads(1);
    let router = Router::start_with_config(config).await;
    for (target, body) in requests() {
        let got = router.client().await.post(target, &body).await;
        let wanted = Client::connect(single.addr()).await.post(target, &body).await;
        assert_eq!((got.status(), wanted.status()), (200, 200), "{body}: {}", got.text());
        let (mut got, mut wanted) = (comparable(got.text()), comparable(wanted.text()));
        if body.contains(r#""return_routed_experts":true"#) && !body.contains("return_logprob") {
            // A stream that needs prefill for its last event only has the measurements there only.
            for item in got.iter_mut().chain(&mut wanted).filter(|item| item["meta_info"].is_object()) {
                let is_kept = |name: &String| !name.starts_with("prefill_") && !name.starts_with("storage_");
                item["meta_info"].as_object_mut().unwrap().retain(|name, _| is_kept(name));
            }
        }
        assert_eq!(got, wanted, "{body}");
    }
}

#[tokio::test]
async fn merged_responses_are_those_of_a_regular_server() {
    merged_as_by_a_regular_server(false).await;
}

#[tokio::test]
async fn merged_responses_of_the_rust_front_end_are_those_of_a_regular_server() {
    merged_as_by_a_regular_server(true).await;
}

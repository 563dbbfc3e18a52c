//! `/v1/responses`, `/v1/messages` and `/invocations` beyond what the recordings show: tool calls that end,
//! as in the source of SGLang 0.5.23, failures of the transfer, and ids.

mod common;

use common::{both, fields, post, quick_pair, send};
use loadtest::sim::{Sim, SimConfig, SimPair};
use serde_json::{Value, json};

const TOOL: &str = r#"{"type":"object","properties":{"x":{"type":"integer"}},"required":["x"]}"#;

fn responses(pair: &SimPair, room: i64, extra: &str) -> String {
    format!(
        "{{\"model\":\"tiny\",\"input\":\"the of\",\"max_output_tokens\":6,{extra}{}}}",
        fields(pair, room)
    )
}

fn messages(pair: &SimPair, room: i64, extra: &str) -> String {
    format!(
        "{{\"model\":\"tiny\",\"messages\":[{{\"role\":\"user\",\"content\":\"the of\"}}],\"max_tokens\":4,{extra}{}}}",
        fields(pair, room)
    )
}

fn types(events: &[String]) -> Vec<String> {
    let kind =
        |event: &String| serde_json::from_str::<Value>(event).unwrap()["type"].as_str().unwrap().to_owned();
    let mut types: Vec<String> = events.iter().map(kind).collect();
    types.dedup();
    types
}

#[tokio::test]
async fn a_forced_tool_is_called_on_decode_and_is_a_token_of_text_on_prefill() {
    let pair = quick_pair().await;
    let tools = format!(
        r#""tools":[{{"name":"f","input_schema":{TOOL}}}],"tool_choice":{{"type":"tool","name":"f"}},"#
    );
    let (prefill, decode) = both(&pair, "/v1/messages", &messages(&pair, 1, &tools)).await;
    assert_eq!(prefill.json()["content"][0]["type"], "text");
    let answer = decode.json();
    assert_eq!((&answer["stop_reason"], &answer["content"][0]["name"]), (&json!("tool_use"), &json!("f")));
    assert_eq!(answer["content"][0]["input"], json!({"x": 1}));

    let tools = format!(
        r#""tools":[{{"type":"function","name":"f","parameters":{TOOL}}}],"tool_choice":"required","#
    );
    let (prefill, decode) = both(&pair, "/v1/responses", &responses(&pair, 2, &tools)).await;
    assert_eq!(prefill.json()["output"][0]["type"], "message");
    let answer = decode.json();
    assert_eq!(
        (&answer["status"], &answer["output"][0]["type"]),
        (&json!("completed"), &json!("function_call"))
    );
    assert_eq!(answer["output"][0]["arguments"], "{\"x\":1}");
    assert_eq!(answer["tools"][0]["parameters"], serde_json::from_str::<Value>(TOOL).unwrap());
    pair.shutdown().await;
}

#[tokio::test]
async fn a_streamed_call_has_its_own_events() {
    let pair = quick_pair().await;
    let tools = format!(
        r#""stream":true,"tools":[{{"name":"f","input_schema":{TOOL}}}],"tool_choice":{{"type":"any"}},"#
    );
    let (_, decode) = both(&pair, "/v1/messages", &messages(&pair, 1, &tools)).await;
    let events = decode.events();
    assert_eq!(
        types(&events),
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
    assert!(events[2].contains(r#"{"type":"input_json_delta","partial_json":"{\"x\":1}"}"#), "{events:?}");

    let tools = format!(
        r#""stream":true,"tools":[{{"type":"function","name":"f","parameters":{TOOL}}}],"tool_choice":"required","#
    );
    let (prefill, decode) = both(&pair, "/v1/responses", &responses(&pair, 2, &tools)).await;
    assert_eq!(types(&prefill.events()), ["response.created", "response.in_progress", "response.incomplete"]);
    let events = decode.events();
    assert_eq!(
        types(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed"
        ]
    );
    for (number, event) in events.iter().enumerate() {
        assert_eq!(serde_json::from_str::<Value>(event).unwrap()["sequence_number"], number);
    }
    pair.shutdown().await;
}

#[tokio::test]
async fn a_request_without_a_room_fails_in_the_shape_of_its_api() {
    let pair = quick_pair().await;
    let part = "without bootstrap room id";
    let message = |value: &Value| value["error"]["message"].as_str().unwrap().contains(part);
    for (path, body) in [
        ("/v1/messages", r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":4"#),
        ("/v1/responses", r#"{"input":"a""#),
        ("/invocations", r#"{"messages":[{"role":"user","content":"a"}]"#),
    ] {
        let whole = send(&pair.decode, "POST", path, &format!("{body}}}")).await;
        assert_eq!(whole.status, 400, "{path}");
        let nested = path != "/invocations";
        assert!(
            if nested { message(&whole.json()) } else { whole.text().contains(part) },
            "{}",
            whole.text()
        );
        let stream = send(&pair.decode, "POST", path, &format!("{body},\"stream\":true}}")).await;
        // These APIs send the head of a stream before they know.
        assert_eq!(stream.status, if nested { 200 } else { 400 }, "{path}");
        assert!(stream.text().contains(part), "{path}");
        assert!(!stream.text().contains("[DONE]"));
    }
    pair.shutdown().await;
}

#[tokio::test]
async fn a_leg_without_its_partner_fails_after_the_servers_own_time() {
    let pair = SimPair::start(
        SimConfig { time_scale: 0.001, ..SimConfig::prefill() },
        SimConfig { time_scale: 0.001, ..SimConfig::decode() },
    )
    .await
    .unwrap();
    let response = send(&pair.prefill, "POST", "/v1/messages", &messages(&pair, 1, "")).await;
    assert_eq!((response.status, &response.json()["error"]["type"]), (500, &json!("api_error")));
    let response =
        send(&pair.prefill, "POST", "/v1/responses", &responses(&pair, 2, "\"stream\":true,")).await;
    let last = response.events().pop().unwrap();
    assert!(last.contains("\"type\":\"response.failed\"") && last.contains("\"message\":\"500: "), "{last}");
    assert_eq!(pair.prefill.stats().failed, 2);
    pair.shutdown().await;
}

#[tokio::test]
async fn a_request_id_is_the_responses_id_and_aborts_it() {
    let slow = SimConfig {
        inter_token: std::time::Duration::from_secs(60),
        time_scale: 0.01,
        ..SimConfig::default()
    };
    let sim = Sim::start(slow).await.unwrap();
    let body = r#"{"input":"the of","request_id":"resp_mine","stream":true}"#;
    let mut exchange = common::Exchange::open(sim.addr(), &post("/v1/responses", body)).await;
    exchange.until("response.output_text.delta").await;
    send(&sim, "POST", "/abort_request", r#"{"rid":"resp_mine"}"#).await;
    let events = exchange.response().await.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["response"]["id"]), (&json!("response.failed"), &json!("resp_mine")));
    sim.shutdown().await;
}

#[tokio::test]
async fn invocations_are_chats() {
    let sim = Sim::start(SimConfig::default()).await.unwrap();
    let body = r#"{"messages":[{"role":"user","content":"the of"}],"max_tokens":4}"#;
    let [chat, invocation] = [
        send(&sim, "POST", "/v1/chat/completions", body).await.json(),
        send(&sim, "POST", "/invocations", body).await.json(),
    ];
    assert_eq!(chat["choices"], invocation["choices"]);
    sim.shutdown().await;
}

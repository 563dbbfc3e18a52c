//! Calls every endpoint of a router and prints the responses. Fails if a status is not the expected one.
//! Without a URL it starts two simulated servers and a router itself.
//!
//! ```sh
//! cargo run --example client
//! cargo run --example client -- http://127.0.0.1:30000
//! ```

mod support;

use std::time::Duration;

use loadtest::sim::{SimConfig, SimPair};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use serde_json::{Value, json};
use support::{Events, Result, send, text};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Length of the printed part of a response, in characters.
const EXCERPT: usize = 80;

/// A request and its expected status.
struct Call {
    method: &'static str,
    path: String,
    body: String,
    status: u16,
    /// The part of the response that is printed, as a JSON pointer; for a stream, the part of its first
    /// event.
    show: &'static str,
}

impl Call {
    fn new(method: &'static str, path: impl Into<String>, status: u16) -> Self {
        Self { method, path: path.into(), body: String::new(), status, show: "" }
    }

    fn get(path: impl Into<String>) -> Self {
        Self::new("GET", path, 200)
    }

    fn post(path: &str, body: &Value) -> Self {
        Self::new("POST", path, 200).body(body.to_string())
    }

    fn body(self, body: impl Into<String>) -> Self {
        Self { body: body.into(), ..self }
    }

    fn show(self, show: &'static str) -> Self {
        Self { show, ..self }
    }
}

/// Every endpoint, and three erroneous requests.
fn calls(model: &str) -> Vec<Call> {
    let generate = json!({"text": "The capital of France", "sampling_params": {"max_new_tokens": 8}});
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let chat = json!({"model": model, "messages": messages, "max_tokens": 8});
    let completion = json!({"model": model, "prompt": "The capital of France", "max_tokens": 8});
    let batch = json!(["The capital of France", "The capital of Italy"]);
    vec![
        Call::get("/health"),
        Call::get("/health_generate"),
        Call::new("POST", "/flush_cache?timeout=5", 200).show("/message"),
        Call::get("/server_info").show("/internal_states/0"),
        Call::get("/get_server_info").show("/prefill/0"),
        Call::get("/model_info"),
        Call::get("/get_model_info"),
        Call::get("/v1/models").show("/data/0/id"),
        Call::get(format!("/v1/models/{model}")).show("/id"),
        Call::post("/generate", &generate).show("/text"),
        Call::new("PUT", "/generate", 200).body(generate.to_string()).show("/text"),
        Call::post("/generate", &with(&generate, json!({"stream": true}))).show("/text"),
        // The prompt's logprobs come from prefill, the text from decode; the router merges them.
        Call::post("/generate", &with(&generate, json!({"return_logprob": true, "logprob_start_len": 0})))
            .show("/meta_info/input_token_logprobs"),
        Call::post("/v1/chat/completions", &chat).show("/choices/0/message/content"),
        Call::post("/v1/chat/completions", &with(&chat, json!({"stream": true}))).show("/choices/0/delta"),
        Call::post("/v1/completions", &completion).show("/choices/0/text"),
        Call::post("/v1/completions", &with(&completion, json!({"prompt": batch}))).show("/choices/1/text"),
        Call::post("/v1/completions", &with(&completion, json!({"echo": true, "logprobs": 1})))
            .show("/choices/0/logprobs/tokens"),
        Call::new("GET", "/no/such/path", 404).show("/error/code"),
        Call::new("GET", "/generate", 405).show("/error/code"),
        Call::new("POST", "/generate", 400).body(r#"{"text": "no end"#).show("/error/code"),
    ]
}

/// `fields`, with some of them replaced.
fn with(fields: &Value, others: Value) -> Value {
    let mut fields = fields.clone();
    if let (Value::Object(fields), Value::Object(others)) = (&mut fields, others) {
        fields.extend(others);
    }
    fields
}

#[tokio::main]
async fn main() -> Result<()> {
    match std::env::args().nth(1) {
        Some(url) => call_all(&url).await,
        None => call_simulated().await,
    }
}

async fn call_simulated() -> Result<()> {
    let quick = |config: SimConfig| SimConfig { time_scale: 0.1, ..config };
    let servers = SimPair::start(quick(SimConfig::prefill()), quick(SimConfig::decode())).await?;
    let prefill = vec![(servers.prefill.url(), servers.prefill.bootstrap_port())];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![servers.decode.url()], 60)
        .shutdown_lame_duck(Duration::ZERO);
    let router = MiniLoadBalancer::new(config)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move { router.serve(listener, async { drop(stopped.await) }).await });

    let result = call_all(&url).await;

    drop(stop);
    serving.await??;
    result
}

/// Sends all requests, also after a failure.
async fn call_all(url: &str) -> Result<()> {
    let models: Value = serde_json::from_str(&text(send(url, "GET", "/v1/models", "").await?).await?)?;
    let model = models["data"][0]["id"].as_str().ok_or("the router's response has no model")?;
    let mut unexpected = 0;
    for call in calls(model) {
        let (status, response) = make(url, &call).await?;
        let shown: String = response.trim_end().replace('\n', " ").chars().take(EXCERPT).collect();
        println!("{:<4} {:<24} {status} {shown}", call.method, call.path);
        if status != call.status {
            println!("     expected {}", call.status);
            unexpected += 1;
        }
    }
    if unexpected > 0 {
        return Err(format!("{unexpected} unexpected responses").into());
    }
    println!("all responses were as expected");
    Ok(())
}

/// Sends a request. Returns its status and what to print of the response.
async fn make(url: &str, call: &Call) -> Result<(u16, String)> {
    let response = send(url, call.method, &call.path, call.body.clone()).await?;
    let status = response.status().as_u16();
    let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.starts_with("text/event-stream") {
        return Ok((status, part(&text(response).await?, call.show)));
    }
    let mut events = Events::of(response);
    let first = events.next().await?.unwrap_or_default();
    let mut count = 1;
    while events.next().await?.is_some() {
        count += 1;
    }
    Ok((status, format!("{count} events, the first: {}", part(&first, call.show))))
}

/// The part of a JSON text at `pointer`, or all of a text that has no such part.
fn part(response: &str, pointer: &str) -> String {
    let value: Option<Value> = serde_json::from_str(response).ok();
    value.as_ref().and_then(|value| value.pointer(pointer)).map_or(response.to_owned(), Value::to_string)
}

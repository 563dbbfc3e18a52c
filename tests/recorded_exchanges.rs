//! Recorded exchanges with SGLang pairs, replayed through the router: the client gets decode's response byte
//! for byte, however it is split into reads; for prompt logprobs, with prefill's lists merged in.

mod kit;

use kit::{Exchange, Response, Router, ScriptedServer, Step, exchanges, fixture};
use serde_json::Value;

/// How a server's bytes are split into writes.
#[derive(Clone, Copy)]
enum Chunking {
    Whole,
    Bytes,
    /// Chunks of 1 to 97 bytes, a different sequence for each seed.
    Random(u64),
}

impl Chunking {
    fn steps(self, bytes: &[u8]) -> Vec<Step> {
        let mut random = fastrand::Rng::with_seed(match self {
            Self::Random(seed) => seed,
            _ => 0,
        });
        let mut rest = bytes;
        let mut steps = Vec::new();
        while !rest.is_empty() {
            let size = match self {
                Self::Whole => rest.len(),
                Self::Bytes => 1,
                Self::Random(_) => random.usize(1..98),
            };
            let (piece, after) = rest.split_at(size.min(rest.len()));
            steps.push(Step::Send(piece.to_vec()));
            rest = after;
        }
        steps
    }
}

fn routed() -> Vec<Exchange> {
    let exchanges = exchanges();
    assert!(exchanges.len() >= 50, "the recordings are complete: {}", exchanges.len());
    exchanges
}

async fn replay(exchange: &Exchange, chunking: Chunking) -> Response {
    let (prefill, decode) = (exchange.prefill.raw.clone(), exchange.decode.raw.clone());
    let prefill = ScriptedServer::start(move |_| chunking.steps(&prefill)).await;
    let decode = ScriptedServer::start(move |_| chunking.steps(&decode)).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let target = exchange.request.head.start_line.split(' ').nth(1).unwrap();
    let response = router.client().await.post(target, &exchange.request.body).await;
    if response.status() < 400 {
        // Decode may respond before prefill has read its request.
        prefill.wait_for_requests(1).await;
        decode.wait_for_requests(1).await;
    }
    // A prefill that rejects at once may end the exchange before decode has read its request.
    let seen = [prefill.requests(), decode.requests()].concat();
    assert!(seen.len() == 2 || response.status() >= 400, "{}", exchange.name);
    for request in seen {
        assert_sent_as_recorded(exchange, &request.body);
    }
    response
}

/// But for the bootstrap fields, and the id that a response gets, a server must receive the recorded request.
fn assert_sent_as_recorded(exchange: &Exchange, sent: &[u8]) {
    let without = |body: &[u8]| {
        let mut fields: serde_json::Map<String, Value> = serde_json::from_slice(body).unwrap();
        let count = ["bootstrap_host", "bootstrap_port", "bootstrap_room"]
            .iter()
            .filter_map(|name| fields.remove(*name))
            .count();
        fields.remove("request_id");
        (fields, count)
    };
    assert_eq!(without(sent), (without(&exchange.request.body).0, 3), "{}", exchange.name);
}

/// All that a client sees of a response, except for the framing and the request id.
fn visible(head: &kit::Head, body: &[u8]) -> (String, Vec<(String, String)>, Vec<u8>) {
    let others = ["transfer-encoding", "content-length", "x-request-id", "connection"];
    let mut headers: Vec<_> =
        head.headers.iter().filter(|(name, _)| !others.contains(&&*name.to_lowercase())).cloned().collect();
    headers.sort();
    (head.start_line.clone(), headers, body.to_vec())
}

fn assert_verbatim(exchange: &Exchange, response: &Response) {
    assert!(response.complete, "{}", exchange.name);
    let got = visible(&response.head, &response.body);
    let decode = visible(&exchange.decode.head, &exchange.decode.body);
    if exchange.decode.head.start_line.contains(" 200 ") {
        assert_eq!(got, decode, "{}", exchange.name);
    } else {
        // Both servers rejected the request: the first response is relayed.
        let prefill = visible(&exchange.prefill.head, &exchange.prefill.body);
        assert!(got == decode || got == prefill, "{}: {got:?}", exchange.name);
    }
    assert_eq!(response.head.is_chunked(), exchange.decode.head.is_chunked(), "{}", exchange.name);
}

fn wants_prompt_logprobs(exchange: &Exchange) -> bool {
    let request: Value = serde_json::from_slice(&exchange.request.body).unwrap();
    let any = |name: &str, test: fn(&Value) -> bool| match &request[name] {
        Value::Array(values) => values.iter().any(test),
        value => test(value),
    };
    let has_start = any("logprob_start_len", |start| start.as_i64().is_some_and(|start| start != -1));
    let has_ids = any("token_ids_logprob", |ids| !ids.is_null());
    any("return_logprob", |flag| *flag == true) && (has_start || has_ids)
        || request["echo"] == true && request["logprobs"].as_i64() > Some(0)
}

async fn every_exchange_is_verbatim(chunking: Chunking) {
    let exchanges: Vec<Exchange> = routed().into_iter().filter(|e| !wants_prompt_logprobs(e)).collect();
    assert!(exchanges.len() >= 22, "{}", exchanges.len());
    for exchange in exchanges {
        assert_verbatim(&exchange, &replay(&exchange, chunking).await);
    }
}

#[tokio::test]
async fn recorded_responses_are_verbatim() {
    every_exchange_is_verbatim(Chunking::Whole).await;
}

#[tokio::test]
async fn recorded_responses_are_verbatim_byte_by_byte() {
    every_exchange_is_verbatim(Chunking::Bytes).await;
}

#[tokio::test]
async fn recorded_responses_are_verbatim_in_random_chunks() {
    for seed in 0..5 {
        every_exchange_is_verbatim(Chunking::Random(seed)).await;
    }
}

/// The lists that only prefill has.
const LISTS: [&str; 3] = ["input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"];
/// What prefill alone measures.
const MEASUREMENTS: [&str; 3] = ["prefill_finished_time", "storage_prefetch_wait", "storage_staging_wait"];

/// The JSON texts of a response: one, or one per event.
fn texts(body: &[u8]) -> Vec<String> {
    let body = std::str::from_utf8(body).unwrap();
    if !body.starts_with("data: ") {
        return vec![body.to_owned()];
    }
    body.split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| event["data: ".len()..].to_owned())
        .collect()
}

/// The items of a response or of a stream's events, each with its index in a batch.
fn items(body: &[u8]) -> Vec<(u64, Value)> {
    let values = values(body);
    match &values[..] {
        [Value::Array(items)] => (0..).zip(items.clone()).collect(),
        _ => values.into_iter().map(|item| (item["index"].as_u64().unwrap_or(0), item)).collect(),
    }
}

/// Decode's items with what only prefill knows.
fn merged(exchange: &Exchange) -> Vec<(u64, Value)> {
    let prefill = items(&exchange.prefill.body);
    let mut decode = items(&exchange.decode.body);
    for (index, item) in &mut decode {
        let (_, from) = prefill.iter().find(|(other, _)| other == index).expect("the same items");
        let (from, to) = (&from["meta_info"], item["meta_info"].as_object_mut().unwrap());
        for list in LISTS.iter().filter(|list| from.get(*list).is_some()) {
            assert_eq!(to.insert((*list).to_owned(), from[list].clone()), Some(Value::Array(Vec::new())));
        }
        for name in MEASUREMENTS {
            assert_eq!(to.insert(name.to_owned(), from[name].clone()), None);
        }
        if let Some(listed) = to.get_mut("output_token_ids_logprobs") {
            assert!(listed[0].is_null());
            listed[0] = from["output_token_ids_logprobs"][0].clone();
        }
    }
    decode
}

async fn prompt_logprobs_are_merged(chunking: Chunking) {
    let exchanges: Vec<Exchange> =
        routed().into_iter().filter(|e| wants_prompt_logprobs(e) && e.name.starts_with("gen_")).collect();
    let names: Vec<&str> = exchanges.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names.len(), 16, "{names:?}");
    for exchange in exchanges {
        let response = replay(&exchange, chunking).await;
        assert!(response.complete);
        assert_eq!(visible(&response.head, b""), visible(&exchange.decode.head, b""), "{}", exchange.name);
        assert_eq!(items(&response.body), merged(&exchange), "{}", exchange.name);
        for text in texts(&response.body).iter().filter(|text| *text != "[DONE]") {
            serde_json::from_str::<Value>(text).expect("JSON");
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_are_merged_into_decodes_response() {
    prompt_logprobs_are_merged(Chunking::Whole).await;
}

#[tokio::test]
async fn prompt_logprobs_are_merged_byte_by_byte() {
    prompt_logprobs_are_merged(Chunking::Bytes).await;
}

#[tokio::test]
async fn prompt_logprobs_are_merged_in_random_chunks() {
    for seed in 0..20 {
        prompt_logprobs_are_merged(Chunking::Random(seed)).await;
    }
}

/// Without the fields that differ between two servers that computed the same: ids and times.
fn without_ids(mut response: Value) -> Value {
    for key in ["id", "created"] {
        response.as_object_mut().unwrap().remove(key);
    }
    response
}

#[tokio::test]
async fn echoed_logprobs_match_a_regular_server() {
    let exchange = routed().into_iter().find(|exchange| exchange.name == "cmpl_logprobs_echo").unwrap();
    let regular: Value =
        serde_json::from_slice(&fixture("reg/cmpl_logprobs_echo.resp").unwrap().body).unwrap();
    for chunking in [Chunking::Whole, Chunking::Bytes, Chunking::Random(1)] {
        let response = replay(&exchange, chunking).await;
        assert_eq!(without_ids(response.json()), without_ids(regular.clone()));
    }
}

/// The events of a stream, without the last, `[DONE]`.
fn values(body: &[u8]) -> Vec<Value> {
    texts(body).iter().filter_map(|text| serde_json::from_str(text).ok()).collect()
}

#[tokio::test]
async fn merged_logprobs_match_a_regular_server() {
    let same_requests = [
        // The request to the regular server asked for more lists.
        ("gen_logprob_text", "reg/gen_logprob_full.resp", &LISTS[..1]),
        ("gen_logprob_stream", "reg/gen_stream_logprob.resp", &LISTS[..]),
    ];
    for (name, regular, lists) in same_requests {
        let exchange = routed().into_iter().find(|exchange| exchange.name == name).unwrap();
        let got = values(&replay(&exchange, Chunking::Whole).await.body);
        let regular = values(&fixture(regular).unwrap().body);
        assert_eq!(got.len(), regular.len());
        for (got, regular) in got.iter().zip(&regular) {
            for list in lists {
                assert_eq!(got["meta_info"][list], regular["meta_info"][list], "{name} {list}");
            }
        }
    }
}

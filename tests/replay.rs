//! Recorded SGLang pairs, replayed through the router: what the client gets is
//! what decode answered, byte for byte, however the bytes come in; for prompt
//! logprobs, plus prefill's lists.

mod kit;

use kit::{Answer, Exchange, Router, Step, Upstream, exchanges, fixture};
use serde_json::Value;

/// How a server's bytes are cut into writes.
#[derive(Clone, Copy)]
enum Cut {
    Whole,
    Bytes,
    /// Pieces of 1 to 97 bytes, a different sequence for each seed.
    Random(u64),
}

impl Cut {
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

/// Routes that other work adds.
const NOT_ROUTED: [&str; 2] = ["messages_basic", "responses_basic"];

fn routed() -> Vec<Exchange> {
    let exchanges: Vec<Exchange> =
        exchanges().into_iter().filter(|exchange| !NOT_ROUTED.contains(&exchange.name.as_str())).collect();
    assert!(exchanges.len() >= 28, "the recordings are complete: {}", exchanges.len());
    exchanges
}

async fn replayed(exchange: &Exchange, cut: Cut) -> Answer {
    let (prefill, decode) = (exchange.prefill.raw.clone(), exchange.decode.raw.clone());
    let prefill = Upstream::start(move |_| cut.steps(&prefill)).await;
    let decode = Upstream::start(move |_| cut.steps(&decode)).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let target = exchange.request.head.start_line.split(' ').nth(1).unwrap();
    let answer = router.client().await.post(target, &exchange.request.body).await;
    if answer.status() < 400 {
        // Decode may be done before prefill has read its request.
        prefill.arrived(1).await;
        decode.arrived(1).await;
    }
    // A prefill that refuses at once may end the exchange before decode has read its request.
    let seen = [prefill.seen(), decode.seen()].concat();
    assert!(seen.len() == 2 || answer.status() >= 400, "{}", exchange.name);
    for request in seen {
        assert_sent_as_recorded(exchange, &request.body);
    }
    answer
}

/// But for the bootstrap fields, a server must see the request that was recorded.
fn assert_sent_as_recorded(exchange: &Exchange, sent: &[u8]) {
    let without = |body: &[u8]| {
        let mut fields: serde_json::Map<String, Value> = serde_json::from_slice(body).unwrap();
        let count = ["bootstrap_host", "bootstrap_port", "bootstrap_room"]
            .iter()
            .filter_map(|name| fields.remove(*name))
            .count();
        (fields, count)
    };
    assert_eq!(without(sent), (without(&exchange.request.body).0, 3), "{}", exchange.name);
}

/// Everything a client can see of an answer, but for the framing of the body and the request's name.
fn visible(head: &kit::Head, body: &[u8]) -> (String, Vec<(String, String)>, Vec<u8>) {
    let others = ["transfer-encoding", "content-length", "x-request-id"];
    let mut headers: Vec<_> =
        head.headers.iter().filter(|(name, _)| !others.contains(&&*name.to_lowercase())).cloned().collect();
    headers.sort();
    (head.start_line.clone(), headers, body.to_vec())
}

fn assert_verbatim(exchange: &Exchange, answer: &Answer) {
    assert!(answer.complete, "{}", exchange.name);
    let got = visible(&answer.head, &answer.body);
    let decode = visible(&exchange.decode.head, &exchange.decode.body);
    if exchange.decode.head.start_line.contains(" 200 ") {
        assert_eq!(got, decode, "{}", exchange.name);
    } else {
        // Both servers refused: the one that spoke first is heard.
        let prefill = visible(&exchange.prefill.head, &exchange.prefill.body);
        assert!(got == decode || got == prefill, "{}: {got:?}", exchange.name);
    }
    assert_eq!(answer.head.is_chunked(), exchange.decode.head.is_chunked(), "{}", exchange.name);
}

fn wants_prompt_logprobs(exchange: &Exchange) -> bool {
    let request: Value = serde_json::from_slice(&exchange.request.body).unwrap();
    request["return_logprob"] == true && (request["logprob_start_len"].as_i64() >= Some(0))
        || request["echo"] == true && request["logprobs"].as_i64() > Some(0)
}

async fn every_exchange_is_verbatim(cut: Cut) {
    let exchanges: Vec<Exchange> = routed().into_iter().filter(|e| !wants_prompt_logprobs(e)).collect();
    assert!(exchanges.len() >= 22, "{}", exchanges.len());
    for exchange in exchanges {
        assert_verbatim(&exchange, &replayed(&exchange, cut).await);
    }
}

#[tokio::test]
async fn a_recorded_answer_reaches_the_client_verbatim() {
    every_exchange_is_verbatim(Cut::Whole).await;
}

#[tokio::test]
async fn a_recorded_answer_that_comes_byte_by_byte_reaches_the_client_verbatim() {
    every_exchange_is_verbatim(Cut::Bytes).await;
}

#[tokio::test]
async fn a_recorded_answer_in_random_pieces_reaches_the_client_verbatim() {
    for seed in 0..5 {
        every_exchange_is_verbatim(Cut::Random(seed)).await;
    }
}

/// The lists that only prefill has.
const LISTS: [&str; 3] = ["input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"];

/// The JSON texts of an answer: one, or one an event.
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

/// Where `key`'s list stands in an item's text. The recordings are compact and have no bracket in a string.
fn list_at(text: &str, key: &str) -> Option<std::ops::Range<usize>> {
    let start = text.find(&format!("\"{key}\":"))? + key.len() + 3;
    let mut depth = 0;
    for (offset, byte) in text[start..].bytes().enumerate() {
        match byte {
            b'[' => depth += 1,
            b']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(start..start + offset + 1);
        }
    }
    None
}

/// An item of decode's with prefill's lists in it.
fn with_lists(decode: &str, prefill: &str) -> String {
    let mut text = decode.to_owned();
    for key in LISTS {
        if let (Some(to), Some(from)) = (list_at(&text, key), list_at(prefill, key)) {
            assert_eq!(&text[to.clone()], "[]");
            text.replace_range(to, &prefill[from]);
        }
    }
    text
}

/// Cuts a batch into its items. In the recordings only a batch's own items are separated so.
fn items(text: &str) -> Vec<&str> {
    text.trim_start_matches('[').trim_end_matches(']').split("},{\"text\"").collect()
}

fn merged(exchange: &Exchange) -> Vec<u8> {
    let prefill = texts(&exchange.prefill.body);
    let mut body = String::from_utf8(exchange.decode.body.clone()).unwrap();
    for text in texts(&exchange.decode.body) {
        let new = if text.starts_with('[') {
            let pairs = items(&text).into_iter().zip(items(&prefill[0]));
            let merged: Vec<String> = pairs.map(|(decode, prefill)| with_lists(decode, prefill)).collect();
            format!("[{}]", merged.join("},{\"text\""))
        } else {
            with_lists(&text, &prefill[0])
        };
        assert_eq!(body.matches(&text).count(), 1);
        body = body.replace(&text, &new);
    }
    body.into_bytes()
}

async fn prompt_logprobs_are_merged(cut: Cut) {
    let exchanges: Vec<Exchange> =
        routed().into_iter().filter(|e| wants_prompt_logprobs(e) && e.name.starts_with("gen_")).collect();
    let names: Vec<&str> = exchanges.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["gen_batch_lists_logprob", "gen_logprob", "gen_logprob_stream", "gen_logprob_text"]);
    for exchange in exchanges {
        let answer = replayed(&exchange, cut).await;
        assert!(answer.complete);
        let expected = visible(&exchange.decode.head, &merged(&exchange));
        assert_ne!(expected.2, exchange.decode.body);
        assert_eq!(visible(&answer.head, &answer.body), expected, "{}", exchange.name);
        for text in texts(&answer.body).iter().filter(|text| *text != "[DONE]") {
            serde_json::from_str::<Value>(text).expect("JSON");
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_of_prefill_stand_in_decodes_answer() {
    prompt_logprobs_are_merged(Cut::Whole).await;
}

#[tokio::test]
async fn prompt_logprobs_are_merged_when_answers_come_byte_by_byte() {
    prompt_logprobs_are_merged(Cut::Bytes).await;
}

#[tokio::test]
async fn prompt_logprobs_are_merged_when_answers_come_in_random_pieces() {
    for seed in 0..20 {
        prompt_logprobs_are_merged(Cut::Random(seed)).await;
    }
}

/// What is the same in the answers of two servers that computed the same: all but ids and times.
fn without_ids(mut answer: Value) -> Value {
    for key in ["id", "created"] {
        answer.as_object_mut().unwrap().remove(key);
    }
    answer
}

#[tokio::test]
async fn a_completion_with_echoed_logprobs_is_what_a_regular_server_answers() {
    let exchange = routed().into_iter().find(|exchange| exchange.name == "cmpl_logprobs_echo").unwrap();
    let regular: Value =
        serde_json::from_slice(&fixture("reg/cmpl_logprobs_echo.resp").unwrap().body).unwrap();
    for cut in [Cut::Whole, Cut::Bytes, Cut::Random(1)] {
        let answer = replayed(&exchange, cut).await;
        assert_eq!(without_ids(answer.json()), without_ids(regular.clone()));
    }
}

/// The events of a stream, but for the last, which is no JSON.
fn values(body: &[u8]) -> Vec<Value> {
    texts(body).iter().filter_map(|text| serde_json::from_str(text).ok()).collect()
}

#[tokio::test]
async fn merged_logprobs_are_those_of_a_regular_server() {
    let same_requests = [
        // The regular server was also asked for other lists, which the pair was not.
        ("gen_logprob_text", "reg/gen_logprob_full.resp", &LISTS[..1]),
        ("gen_logprob_stream", "reg/gen_stream_logprob.resp", &LISTS[..]),
    ];
    for (name, regular, lists) in same_requests {
        let exchange = routed().into_iter().find(|exchange| exchange.name == name).unwrap();
        let got = values(&replayed(&exchange, Cut::Whole).await.body);
        let regular = values(&fixture(regular).unwrap().body);
        assert_eq!(got.len(), regular.len());
        for (got, regular) in got.iter().zip(&regular) {
            for list in lists {
                assert_eq!(got["meta_info"][list], regular["meta_info"][list], "{name} {list}");
            }
        }
    }
}

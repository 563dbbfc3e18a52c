//! Compares the simulator with the recordings: it gets each recorded request and must respond in the recorded
//! shape. A shape is the status, the header names with all values but numbers and dates, the framing, and of
//! JSON the keys, their order, and the types of all values.
//!
//! Allowed differences, each because the recordings differ among themselves in it:
//! - `cached_tokens_details` is null or an object, depending on the real server's cache.
//! - A run of equal entries may have another length: log-probabilities, bytes of a token, events of a stream
//!   (the real detokenizer merges tokens). The entries themselves are compared.
//! - Entries of a batch's stream interleave in any order; the events of each index are compared separately.

mod common;

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use common::{Exchange, Framing, Response};
use loadtest::sim::{Sim, SimConfig, SimPair};

/// Recordings whose decode server reached `max_tokens` inside of a tool call, which made text of it. Calls of
/// the simulator always end; `apis.rs` has their shape. Prefill's leg is compared.
const CUT_OFF_CALLS: [&str; 4] = [
    "messages_tools",
    "messages_tools_stream",
    "responses_tools_required",
    "responses_tools_required_stream",
];
/// How long a server that is recorded as hanging is watched.
const HANG: Duration = Duration::from_millis(300);

fn folder(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")).join(name)
}

fn load(folder_name: &str, file: &str) -> Vec<u8> {
    fs::read(folder(folder_name).join(file)).unwrap_or_else(|error| panic!("{folder_name}/{file}: {error}"))
}

/// A recorded request with another bootstrap port and the matching content length.
fn aimed(request: &[u8], port: u16) -> Vec<u8> {
    let text = String::from_utf8(request.to_vec()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let port = port.to_string();
    let fields = ["\"bootstrap_port\":8998", "\"bootstrap_port\":[8998", ",8998]"];
    let body =
        fields.iter().fold(body.to_owned(), |body, field| body.replace(field, &field.replace("8998", &port)));
    let line = |line: &str| match line.to_ascii_lowercase().starts_with("content-length:") {
        true => format!("Content-Length: {}", body.len()),
        false => line.to_owned(),
    };
    let head: Vec<String> = head.split("\r\n").map(line).collect();
    format!("{}\r\n\r\n{body}", head.join("\r\n")).into_bytes()
}

mod shape {
    //! JSON with its keys in order, reduced to types.

    /// Appends the shape of the value at the start of `text`; returns what follows it.
    fn value<'a>(text: &'a str, key: &str, out: &mut String) -> &'a str {
        if key == "cached_tokens_details" {
            out.push_str("details");
            return skip(text);
        }
        match text.as_bytes()[0] {
            b'{' => object(text, key, out),
            b'[' => array(text, key, out),
            b'"' => {
                out.push_str("string");
                skip(text)
            }
            b't' | b'f' => {
                out.push_str("bool");
                skip(text)
            }
            b'n' => {
                out.push_str("null");
                skip(text)
            }
            _ => {
                let rest = skip(text);
                let number = &text[..text.len() - rest.len()];
                out.push_str(if number.contains('.') { "float" } else { "int" });
                rest
            }
        }
    }

    fn object<'a>(text: &'a str, key: &str, out: &mut String) -> &'a str {
        let mut fields = Vec::new();
        let mut rest = &text[1..];
        while !rest.starts_with('}') {
            let after = skip(rest);
            let name = &rest[1..rest.len() - after.len() - 1];
            let mut shape = String::new();
            rest = value(after.strip_prefix(':').expect("a colon without spaces"), name, &mut shape);
            fields.push((name, shape));
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        // In completions the keys are tokens; in chat they are fixed.
        let tokens = key == "top_logprobs" && fields.iter().all(|(_, shape)| shape == "float");
        out.push('{');
        for (name, shape) in fields {
            out.push_str(&format!("{}:{shape},", if tokens { "token" } else { name }));
        }
        out.push('}');
        &rest[1..]
    }

    /// Consecutive equal entries count once.
    fn array<'a>(text: &'a str, key: &str, out: &mut String) -> &'a str {
        out.push('[');
        let mut rest = &text[1..];
        let mut last = String::new();
        while !rest.starts_with(']') {
            let mut entry = String::new();
            rest = value(rest, key, &mut entry);
            if entry != last {
                out.push_str(&entry);
                out.push(',');
            }
            last = entry;
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        out.push(']');
        &rest[1..]
    }

    /// What follows the value at the start of `text`.
    fn skip(text: &str) -> &str {
        let mut stream = serde_json::Deserializer::from_str(text).into_iter::<serde_json::Value>();
        stream.next().expect("a value").expect("valid JSON");
        &text[stream.byte_offset()..]
    }

    pub(crate) fn of(text: &str) -> String {
        let mut out = String::new();
        assert_eq!(value(text.trim_end(), "", &mut out), "", "{text}");
        out
    }
}

/// Header names, sorted, with the values that are part of the shape.
fn headers(response: &Response) -> BTreeSet<String> {
    let described = |(name, value): &(String, String)| match name.as_str() {
        "date" | "content-length" => name.clone(),
        _ => format!("{name}: {value}"),
    };
    response.headers.iter().map(described).collect()
}

/// The index of an event's prompt in a batch, if the event has one.
fn index_of(event: &str) -> Option<&str> {
    let start = match event.starts_with("{\"text\"") {
        true => event.rsplit_once(",\"index\":")?.1,
        false => event.split_once("\"choices\":[{\"index\":")?.1,
    };
    start.split([',', '}']).next()
}

/// The shape of each event, by index; consecutive equal shapes count once.
fn event_shapes(response: &Response) -> Vec<(Option<String>, Vec<String>)> {
    let mut lines: Vec<(Option<String>, Vec<String>)> = Vec::new();
    for event in response.events() {
        let index = index_of(&event).map(str::to_owned);
        let shape = if event == "[DONE]" { event } else { shape::of(&event) };
        let at = lines.iter().position(|(own, _)| *own == index).unwrap_or_else(|| {
            lines.push((index, Vec::new()));
            lines.len() - 1
        });
        if lines[at].1.last() != Some(&shape) {
            lines[at].1.push(shape);
        }
    }
    lines.sort();
    lines
}

fn compare(name: &str, real: &Response, simulated: &Response) {
    assert_eq!(real.status, simulated.status, "{name}: {}", simulated.text());
    assert_eq!(headers(real), headers(simulated), "{name}");
    match (&real.framing, &simulated.framing) {
        (Framing::Chunked(_), Framing::Chunked(chunks)) => {
            for chunk in chunks {
                let begins = chunk.starts_with(b"data: ") || chunk.starts_with(b"event: ");
                assert!(begins && chunk.ends_with(b"\n\n"), "{name}: one event per chunk");
                let events = String::from_utf8_lossy(chunk).matches("\n\n").count();
                assert_eq!(events, 1, "{name}: one event per chunk");
            }
            let named = chunks.iter().all(|chunk| chunk.starts_with(b"event: "));
            let done = simulated.events().last().is_some_and(|last| last == "[DONE]");
            assert!(done != named, "{name}: [DONE] is the last event, or events have names");
            assert_eq!(event_shapes(real), event_shapes(simulated), "{name}");
        }
        (Framing::Length, Framing::Length) if real.header("content-type") == Some("application/json") => {
            assert_eq!(shape::of(&real.text()), shape::of(&simulated.text()), "{name}");
        }
        (real_framing, framing) => {
            assert_eq!(real_framing, framing, "{name}");
            assert_eq!(real.text(), simulated.text(), "{name}");
        }
    }
}

async fn pair() -> SimPair {
    // The context length of the recorded servers, which is part of recorded error messages.
    let config = |config: SimConfig| SimConfig { context_length: 2048, ..config };
    SimPair::start(config(SimConfig::prefill()), config(SimConfig::decode())).await.unwrap()
}

async fn send_recorded(folder: &str, name: &str, sim: &Sim, port: u16) -> Exchange {
    Exchange::open(sim.addr(), &aimed(&load(folder, &format!("{name}.req")), port)).await
}

/// Sends a recorded request and compares the response, or watches a server that is recorded as hanging.
async fn replay(folder: &str, name: &str, sim: &Sim, port: u16) {
    let recorded = load(folder, &format!("{name}.resp"));
    let mut exchange = send_recorded(folder, name, sim, port).await;
    if recorded.is_empty() {
        let outcome = exchange.wait(HANG).await;
        assert!(
            !outcome.closed && outcome.raw.is_empty(),
            "{name} hangs: {}",
            String::from_utf8_lossy(&outcome.raw)
        );
        return;
    }
    let real = Response::parse(&recorded).unwrap_or_else(|| panic!("{name} is recorded as whole"));
    compare(name, &real, &exchange.response().await);
}

#[tokio::test]
async fn every_recorded_exchange_of_a_pair_gets_a_response_of_the_recorded_shape() {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder("pd")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        if let Some(name) = file.strip_suffix(".decode.req") {
            names.insert(name.to_owned());
        }
    }
    assert!(CUT_OFF_CALLS.iter().all(|name| names.contains(*name)));
    assert!(names.len() >= 33, "{names:?}");
    for name in names {
        let pair = pair().await;
        let port = pair.prefill.bootstrap_port().unwrap();
        let (prefill, decode) = (format!("{name}.prefill"), format!("{name}.decode"));
        let on_decode = async {
            if CUT_OFF_CALLS.contains(&name.as_str()) {
                send_recorded("pd", &decode, &pair.decode, port).await.response().await;
            } else {
                replay("pd", &decode, &pair.decode, port).await;
            }
        };
        tokio::join!(replay("pd", &prefill, &pair.prefill, port), on_decode);
        assert_eq!(pair.decode.stats().mismatches, 0, "{name}");
        pair.shutdown().await;
    }
}

#[tokio::test]
async fn requests_without_a_room_get_errors_of_the_recorded_shapes() {
    let pair = pair().await;
    for name in ["gen", "gen_stream", "chat"] {
        replay("pd_nobootstrap", &format!("{name}.prefill"), &pair.prefill, 0).await;
        replay("pd_nobootstrap", &format!("{name}.decode"), &pair.decode, 0).await;
    }
}

#[tokio::test]
async fn a_single_leg_waits_as_recorded() {
    let pair = pair().await;
    let port = pair.prefill.bootstrap_port().unwrap();
    replay("pd_fail", "decode_only_8s", &pair.decode, port).await;
    replay("pd_fail", "decode_only_chat_stream_5s", &pair.decode, port).await;
    replay("pd_fail", "prefill_only_8s", &pair.prefill, port).await;
    for (name, sim) in [("decode_only_stream_8s", &pair.decode), ("prefill_only_stream_5s", &pair.prefill)] {
        let request = aimed(&load("pd_fail", &format!("{name}.req")), port);
        let outcome = Exchange::open(sim.addr(), &request).await.wait(HANG).await;
        let text = String::from_utf8(outcome.raw).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\n"), "{name}: {text}");
        assert!(!outcome.closed, "{name}");
    }
}

#[tokio::test]
async fn information_endpoints_have_the_recorded_shapes() {
    let config = |config: SimConfig| SimConfig { time_scale: 0.01, context_length: 2048, ..config };
    let pair = SimPair::start(config(SimConfig::prefill()), config(SimConfig::decode())).await.unwrap();
    for what in
        ["flush_cache", "health", "health_generate", "model_info", "server_info", "v1_loads", "v1_models"]
    {
        replay("pd_info", &format!("prefill_{what}"), &pair.prefill, 0).await;
        replay("pd_info", &format!("decode_{what}"), &pair.decode, 0).await;
    }
}

#[tokio::test]
async fn a_regular_server_responds_in_the_recorded_shapes() {
    let config = SimConfig { time_scale: 0.01, context_length: 2048, ..SimConfig::default() };
    let sim = Sim::start(config).await.unwrap();
    // Left out: `head_health`, whose content length is that of a body that is not sent, and
    // `gen_batch_stream`, where the real server merged all tokens between the first and the last. The events
    // themselves are covered by `gen_stream_logprob` and by the pair's batch streams.
    let names = [
        "chat_err_badjson",
        "chat_err_ct",
        "chat_tools",
        "cmpl_batch_stream",
        "cmpl_logprobs_echo",
        "gen_batch_empty",
        "gen_batch_logprob",
        "gen_err_badjson",
        "gen_err_noinput",
        "gen_err_temp",
        "gen_err_temp_stream",
        "gen_logprob_full",
        "gen_noct",
        "gen_stream_logprob",
        "get_flush_cache_get",
        "get_generate_get",
        "get_health",
        "get_model_info",
        "get_not_found",
        "get_ready",
        "get_v1_loads",
        "get_v1_models",
        "get_v1_models_tiny",
        "get_v1_models_unknown",
        "messages_err_temp",
        "messages_n2",
        "messages_stream",
        "messages_system_stop",
        "post_abort_unknown",
        "post_flush_cache",
        "responses_cancel",
        "responses_err_prev",
        "responses_get",
        "responses_logprobs",
        "responses_n2",
        "responses_stream",
        "cmpl_logprobs_echo_stream",
    ];
    for name in names {
        replay("reg", name, &sim, 0).await;
    }
}

#[test]
fn shapes_differ_by_keys_order_and_types() {
    let shape = shape::of(r#"{"a":1,"b":[0.5,0.25],"c":null}"#);
    assert_eq!(shape, "{a:int,b:[float,],c:null,}");
    assert_ne!(shape::of(r#"[{"a":1}]"#), shape::of(r#"[{"b":1}]"#));
    for other in [
        r#"{"b":[0.5],"a":1,"c":null}"#,
        r#"{"a":1.0,"b":[0.5],"c":null}"#,
        r#"{"a":1,"b":[],"c":null}"#,
        r#"{"a":1,"b":[0.5],"c":0}"#,
        r#"{"a":1,"b":[0.5]}"#,
        r#"{"a":1,"b":[{"d":0.5}],"c":null}"#,
    ] {
        assert_ne!(shape::of(other), shape, "{other}");
    }
}

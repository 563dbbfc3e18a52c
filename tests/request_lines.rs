//! The log lines of requests, from outside: the library's tracing events, the function that
//! gets them instead, and the program's lines. All have the same fields in the same order.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kit::{Router, RouterProcess, ScriptedServer, Step, json};
use mini_lb::{LineFieldName, MiniLbConfig, RequestLineVisitor};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

const BODY: &str = r#"{"text":"a"}"#;

/// Names of fields and their values in JSON, in order.
type FieldValues = Vec<(&'static str, String)>;

/// One event: its level and its fields.
type Logged = (Level, FieldValues);

/// Collects the events of requests.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<Logged>>>);

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "mini_lb::request" && *metadata.level() <= Level::INFO
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(Vec::new());
        event.record(&mut fields);
        self.0.lock().unwrap().push((*event.metadata().level(), fields.0));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Fields(FieldValues);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), serde_json::Value::from(value).to_string()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.push((field.name(), value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.push((field.name(), value.to_string()));
    }

    fn record_f64(&mut self, field: &Field, _: f64) {
        self.0.push((field.name(), "TIME".to_owned()));
    }
}

/// Its response is merged, so prefill has responded when it ends: it has all times.
const MERGED: &str = r#"{"text":"a","return_logprob":true,"logprob_start_len":0}"#;
const RESPONSE: &str = r#"{"text":"b","meta_info":{"input_token_logprobs":[]}}"#;
const REFUSAL: &str = "{}";

/// Servers that respond to `/generate`, and a prefill server that refuses completions while decode does not
/// respond.
async fn servers() -> [ScriptedServer; 2] {
    let ok = || vec![Step::Send(json("200 OK", RESPONSE))];
    let prefill = ScriptedServer::start(move |request| match request.target() {
        "/generate?key=secret" => ok(),
        _ => vec![Step::Send(json("503 Service Unavailable", REFUSAL))],
    });
    let decode = ScriptedServer::start(move |request| match request.target() {
        "/generate?key=secret" => ok(),
        _ => vec![Step::Hang],
    });
    [prefill.await, decode.await]
}

/// A request that succeeds, one that a server refuses twice, and one that the router refuses. Together their
/// lines have every field.
async fn send_requests(client: &mut kit::Client) {
    for (target, body, status) in
        [("/generate?key=secret", MERGED, 200), ("/v1/completions", BODY, 503), ("/generate", "no", 400)]
    {
        client.send_request("POST", target, &[("x-request-id", "r-1")], body.as_bytes()).await;
        assert_eq!(client.response().await.status(), status);
    }
}

/// What the first two are logged with: level, message, and fields with their values, in order.
fn expected_lines(prefill: &str, decode: &str) -> [(Level, String, FieldValues); 2] {
    let text = |text: &str| format!("\"{text}\"");
    let time = || "TIME".to_owned();
    let success = vec![
        ("request_id", text("r-1")),
        ("method", text("POST")),
        ("path", text("/generate")),
        ("status", "200".to_owned()),
        ("phase", text("answer_body")),
        ("prefill", text(prefill)),
        ("decode", text(decode)),
        ("selection", text("only:0/2,only")),
        ("attempts", "1".to_owned()),
        ("streaming", "false".to_owned()),
        ("bytes_in", MERGED.len().to_string()),
        ("bytes_out", RESPONSE.len().to_string()),
        ("request_ms", time()),
        ("sent_ms", time()),
        ("prefill_head_ms", time()),
        ("decode_head_ms", time()),
        ("first_byte_ms", time()),
        ("total_ms", time()),
    ];
    let refused = vec![
        ("request_id", text("r-1")),
        ("method", text("POST")),
        ("path", text("/v1/completions")),
        ("status", "503".to_owned()),
        ("code", text("server_error")),
        ("phase", text("answer_head")),
        ("prefill", text(prefill)),
        ("decode", text(decode)),
        ("selection", text("only:0/0,only")),
        ("attempts", "2".to_owned()),
        ("retried", text("status")),
        ("streaming", "false".to_owned()),
        ("bytes_in", BODY.len().to_string()),
        ("bytes_out", REFUSAL.len().to_string()),
        ("request_ms", time()),
        ("sent_ms", time()),
        ("prefill_head_ms", time()),
        ("first_byte_ms", time()),
        ("total_ms", time()),
    ];
    let failure = format!("request failed: prefill server {prefill} answered 503");
    [(Level::INFO, "request".to_owned(), success), (Level::WARN, failure, refused)]
}

/// A line with `TIME` for the numbers of fields `…_ms`, which differ from run to run.
fn mask_times(line: &str, assign: &str) -> String {
    let name_end = format!("_ms{assign}");
    let mut parts = line.split(&name_end);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, part| {
        let rest = part.trim_start_matches(|char: char| char.is_ascii_digit() || char == '.');
        assert_ne!(rest, part, "a number");
        format!("{line}{name_end}TIME{rest}")
    })
}

/// One test for events and the function that replaces them: the subscriber is the process's.
#[tokio::test]
async fn events_have_all_fields_in_order_unless_a_function_gets_the_lines() {
    let events = Events::default();
    tracing::subscriber::set_global_default(events.clone()).unwrap();
    let [prefill, decode] = servers().await;
    let options = |config: MiniLbConfig| config.access_log(true).retry_on_status([503]).max_retries(1);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    send_requests(&mut router.client().await).await;
    router.wait_shutdown().await;
    let logged = std::mem::take(&mut *events.0.lock().unwrap());
    assert_eq!(logged.len(), 3, "{logged:?}");
    for (logged, (level, message, fields)) in
        logged.into_iter().zip(expected_lines(&prefill.url(), &decode.url()))
    {
        // tracing hands the message over before the other fields.
        let message = ("message", format!("\"{message}\""));
        assert_eq!(logged, (level, [vec![message], fields].concat()));
    }

    let lines = Arc::new(Mutex::new(Vec::new()));
    let written = Arc::clone(&lines);
    let write = move |line: &mini_lb::RequestLine<'_>| {
        let mut names = Names::default();
        line.visit(&mut names);
        let line = (line.level(), line.message().into_owned(), names.0);
        written.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    };
    let options = |config: MiniLbConfig| options(config).request_log(LevelFilter::WARN, write);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    send_requests(&mut router.client().await).await;
    router.wait_shutdown().await;
    assert_eq!(*events.0.lock().unwrap(), []);
    let [_, (level, message, fields)] = expected_lines(&prefill.url(), &decode.url());
    let names = fields.into_iter().map(|(name, _)| name).collect();
    assert_eq!(*lines.lock().unwrap(), [(level, message, names)]);
}

/// Collects the names of the fields that a line has.
#[derive(Default)]
struct Names(Vec<&'static str>);

impl RequestLineVisitor for Names {
    fn text(&mut self, name: LineFieldName, _: &str) {
        self.0.push(name.as_str());
    }

    fn number(&mut self, name: LineFieldName, _: u64) {
        self.0.push(name.as_str());
    }

    fn flag(&mut self, name: LineFieldName, _: bool) {
        self.0.push(name.as_str());
    }

    fn time(&mut self, name: LineFieldName, _: Duration) {
        self.0.push(name.as_str());
    }
}

#[tokio::test]
async fn the_programs_lines_have_the_same_fields_in_text_and_in_json() {
    let [prefill, decode] = servers().await;
    for format in ["text", "json"] {
        let args = ["--access-log", "--log-format", format, "--retry-on-status", "503"];
        let program = RouterProcess::between(&prefill, &decode, &args).await;
        send_requests(&mut program.client().await).await;
        let lines = program.stop().await;
        let lines: Vec<&String> = lines.iter().filter(|line| line.contains("mini_lb::request")).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        for (line, (level, message, fields)) in
            lines.iter().zip(expected_lines(&prefill.url(), &decode.url()))
        {
            let (assign, expected) = if format == "text" {
                let fields =
                    fields.iter().map(|(name, value)| format!(" {name}={}", value.trim_matches('"')));
                ("=", format!("{level:>5} mini_lb::request: {message}{}", fields.collect::<String>()))
            } else {
                let fields = fields.iter().map(|(name, value)| format!(",\"{name}\":{value}"));
                let begin = format!(r#""level":"{level}","target":"mini_lb::request","message":"{message}""#);
                ("\":", format!("{begin}{}}}", fields.collect::<String>()))
            };
            let line = mask_times(line, assign);
            // Before it is the time of day.
            assert!(line.ends_with(&expected), "{line}\n{expected}");
        }
    }
}

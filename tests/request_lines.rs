//! What a user of the library is told of requests: events, or lines that a function is
//! given; and that the program's own lines say the same.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use kit::{Program, Router, Step, Upstream, json};
use mini_lb::MiniLbConfig;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

const BODY: &str = r#"{"text":"a"}"#;

/// One event: its level, and its fields with their values as JSON has them.
type Told = (Level, Vec<(&'static str, String)>);

/// Takes events about requests.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<Told>>>);

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

struct Fields(Vec<(&'static str, String)>);

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
        self.0.push((field.name(), "a time".to_owned()));
    }
}

/// A line of the program's, in the order in which it is written, without what events have no fields for.
fn fields_of(line: &str) -> Vec<(String, String)> {
    let members = line.trim_start_matches('{').trim_end_matches('}').split(",\"");
    members
        .map(|member| member.trim_start_matches('"').split_once("\":").unwrap())
        .filter(|(name, _)| !["timestamp", "level", "target"].contains(name))
        .map(|(name, value)| (name, if name.ends_with("_ms") { "a time" } else { value }))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Requests that are answered, refused by a server, and refused by the router.
async fn ask(client: &mut kit::Client) {
    for (target, body, status) in
        [("/generate", BODY, 200), ("/v1/completions", BODY, 503), ("/generate", "no", 400)]
    {
        client.start("POST", target, &[("x-request-id", "r-1")], body.as_bytes()).await;
        assert_eq!(client.answer().await.status(), status);
    }
}

/// Servers that answer `/generate` well, and refuse completions.
async fn servers() -> [Upstream; 2] {
    let start = || async {
        Upstream::start(|request| {
            let answer = match request.target() {
                "/generate" => json("200 OK", r#"{"text":"b"}"#),
                _ => json("503 Service Unavailable", "{}"),
            };
            vec![Step::Send(answer)]
        })
        .await
    };
    [start().await, start().await]
}

/// One test for both: the subscriber is the process's.
#[tokio::test]
async fn events_and_lines_tell_the_same_in_the_same_order() {
    let events = Events::default();
    tracing::subscriber::set_global_default(events.clone()).unwrap();
    let [prefill, decode] = servers().await;
    let options = |config: MiniLbConfig| config.access_log(true).max_retries(0);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    ask(&mut router.client().await).await;
    router.ended().await;
    let told = std::mem::take(&mut *events.0.lock().unwrap());
    assert_eq!(
        told.iter().map(|(level, _)| *level).collect::<Vec<_>>(),
        [Level::INFO, Level::WARN, Level::INFO]
    );

    let args = ["--access-log", "--log-format", "json", "--disable-retries"];
    let program = Program::between(&prefill, &decode, &args).await;
    ask(&mut program.client().await).await;
    let lines = program.ended().await;
    let lines: Vec<&String> = lines.iter().filter(|line| line.contains("mini_lb::request")).collect();
    assert_eq!(lines.len(), told.len(), "{lines:?}");
    for ((level, mut fields), line) in told.into_iter().zip(lines) {
        assert!(line.contains(&format!("\"level\":\"{level}\",\"target\":\"mini_lb::request\",")), "{line}");
        // The message is the first in a line, wherever the event has it.
        fields.sort_by_key(|(name, _)| *name != "message");
        let fields: Vec<_> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        assert_eq!(fields_of(line), fields);
    }

    // Whoever has a function for lines has no events.
    let lines = Arc::new(Mutex::new(Vec::new()));
    let taken = Arc::clone(&lines);
    let write = move |line: &mini_lb::RequestLine<'_>| {
        let code = line.failure.map_or("", |failure| failure.code);
        let told = (line.level(), line.message().into_owned(), line.status, code, line.path.to_owned());
        taken.lock().unwrap_or_else(PoisonError::into_inner).push(told);
    };
    let options =
        |config: MiniLbConfig| config.access_log(true).max_retries(0).request_log(LevelFilter::WARN, write);
    let router = Router::start_with(&[&prefill], &[&decode], options).await;
    ask(&mut router.client().await).await;
    router.ended().await;
    assert_eq!(*events.0.lock().unwrap(), []);
    let lines = lines.lock().unwrap();
    let [(level, message, status, code, path)] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!(
        (*level, *status, *code, &path[..]),
        (Level::WARN, Some(503), "server_error", "/v1/completions")
    );
    assert!(message.starts_with("request failed: ") && message.ends_with(" answered 503"), "{message}");
}

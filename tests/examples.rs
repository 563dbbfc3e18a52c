//! The examples, run as a newcomer runs them: their output and exit status are what the documents promise.

mod kit;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use kit::processes::{BUILD_DEADLINE, BuiltRouter, ChildProcess, Servers, command, missing, python, target};
use loadtest::sim::{hash_text, hash_value, text::output_text};
use serde_json::{Value, json};

/// The built example. `cargo test` builds examples, `cargo test --test examples` does not.
fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let built = ["quickstart", "custom_config", "client"].map(|name| modified(&built_example(name)));
        let oldest = built.into_iter().min().flatten();
        if oldest.is_none() || oldest < newest_source(&source()) {
            build_examples();
        }
    });
    built_example(name)
}

fn built_example(name: &str) -> PathBuf {
    target().join("examples").join(name)
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|about| about.modified()).ok()
}

fn newest_source(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).expect("the examples").filter_map(|file| Some(file.ok()?.path()));
    files
        .filter_map(|file| match file.extension().and_then(OsStr::to_str) {
            Some("rs") => modified(&file),
            _ if file.is_dir() => newest_source(&file),
            _ => None,
        })
        .max()
}

/// Builds into the folder and with the profile that this test was built with.
fn build_examples() {
    let profile = match target().file_name().and_then(OsStr::to_str).expect("a profile's folder") {
        "debug" => "dev",
        other => other,
    };
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["build", "--examples", "--profile", profile, "--target-dir"]);
    cargo.arg(target().parent().expect("a target folder"));
    let mut cargo = ChildProcess::start(cargo);
    let status = cargo.wait_within(BUILD_DEADLINE);
    assert!(status.success(), "{}", cargo.output());
}

fn run(name: &str, args: &[&str]) -> ChildProcess {
    ChildProcess::start(command(example(name), args.iter().copied(), &[]))
}

fn plain() -> Servers {
    Servers::start(|config| config)
}

/// The text that the simulated servers generate for a chat request.
fn predicted(chat: &str) -> String {
    let chat: Value = serde_json::from_str(chat).expect("a chat request");
    let tokens = chat["max_tokens"].as_u64().expect("a number of tokens");
    output_text(hash_value(&chat["messages"]), usize::try_from(tokens).expect("few tokens"))
}

/// What follows `start` in the only line that begins with it.
fn line<'a>(output: &'a str, start: &str) -> &'a str {
    let mut lines = output.lines().filter_map(|line| line.trim_start().strip_prefix(start));
    let line = lines.next().unwrap_or_else(|| panic!("no line begins with {start:?}:\n{output}"));
    assert!(lines.next().is_none(), "two lines begin with {start:?}:\n{output}");
    line
}

#[test]
fn quickstart_streams_a_chat_and_shows_both_legs() {
    let mut quickstart = run("quickstart", &["--once"]);
    let output = quickstart.expect_success();
    let chat = output.lines().find(|line| line.starts_with('{')).expect("the request");
    let text = predicted(chat);
    assert!(output.contains(&format!("\n{text}\n")), "{text:?}:\n{output}");
    // Tokens are printed as they arrive. Of 14, some may arrive together on a busy machine.
    assert!(quickstart.stdout.chunks_in(&text) > 4, "{output}");

    let (_, legs) = output.split_once("What each server received:\n").expect("the legs");
    let (prefill, decode) = legs.split_once("decode ").expect("decode's leg");
    let prefill = prefill.strip_prefix("prefill ").expect("prefill's leg");
    let lines = |leg: &str| leg.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>();
    assert_eq!(lines(prefill), lines(decode));
    let leg = lines(prefill);
    assert_eq!(leg[0], "POST /v1/chat/completions");
    assert_eq!(leg[1], r#"bootstrap_host "127.0.0.1""#);
    let number = |line: &str, name: &str| line.strip_prefix(name).and_then(|n| n.parse::<i64>().ok());
    assert!(number(&leg[2], "bootstrap_port ").is_some_and(|port| port > 0), "{leg:?}");
    assert!(number(&leg[3], "bootstrap_room ").is_some_and(|room| room > 0), "{leg:?}");
    assert_eq!(leg[4..], ["the rest is byte for byte what the client sent"]);
}

#[test]
fn quickstart_serves_the_curl_line_that_it_prints_until_ctrl_c() {
    let mut quickstart = run("quickstart", &[]);
    quickstart.wait_for("curl -N ");
    quickstart.wait_for("}'\n");
    let output = quickstart.stdout.text();
    let curl = format!("curl -N {}", line(&output, "curl -N "));
    if Command::new("curl").arg("--version").output().is_err() {
        missing::<()>("curl is not installed");
    } else {
        let response = ChildProcess::start(command("sh", ["-c", &curl], &[])).expect_success();
        let token = |event: &str| {
            let event: Value = serde_json::from_str(event).expect("JSON");
            event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
        };
        let events = response.lines().filter_map(|line| line.strip_prefix("data: {"));
        let text: String = events.map(|event| token(&format!("{{{event}"))).collect();
        assert_eq!(text, predicted(curl.split('\'').nth(3).expect("a body")));
        assert!(response.ends_with("data: [DONE]\n\n"), "{response}");
    }
    quickstart.signal("INT");
    quickstart.expect_success();
}

#[test]
fn custom_config_spreads_requests_as_its_policies_say() {
    let output = run("custom_config", &[]).expect_success();
    let requests = |role: &str| -> Vec<usize> {
        let count = |line: &str| line.split_whitespace().nth(3).and_then(|count| count.parse().ok());
        let lines = output.lines().filter(|line| line.starts_with(role));
        lines.map(|line| count(line).unwrap_or_else(|| panic!("a count: {line}"))).collect()
    };
    // All ten requests of a client go to one prefill server.
    let prefill = requests("prefill");
    assert_eq!((prefill.len(), prefill.iter().sum::<usize>()), (2, 60), "{output}");
    assert!(prefill.iter().all(|count| count % 10 == 0), "{output}");
    let decode = requests("decode");
    assert_eq!((decode.len(), decode.iter().sum::<usize>()), (3, 60), "{output}");
    assert!(decode[2] < decode[0] && decode[2] < decode[1], "the slow server got its full share: {output}");
}

#[test]
fn client_calls_every_endpoint() {
    let output = run("client", &[]).expect_success();
    for called in [
        "GET  /health ",
        "GET  /health_generate ",
        "POST /flush_cache?timeout=5 ",
        "GET  /get_server_info ",
        "GET  /server_info ",
        "GET  /get_model_info ",
        "GET  /model_info ",
        "GET  /v1/models ",
        "GET  /v1/models/tiny ",
        "PUT  /generate ",
    ] {
        assert!(line(&output, called).trim_start().starts_with("200"), "{output}");
    }
    let text = json!(output_text(hash_text("The capital of France"), 8)).to_string();
    for (called, ending) in [
        ("POST /generate ", format!("200 {text}")),
        ("PUT  /generate ", format!("200 {text}")),
        ("POST /v1/completions ", format!("200 {text}")),
        ("GET  /no/such/path ", r#"404 "not_found""#.to_owned()),
        ("GET  /generate ", r#"405 "method_not_allowed""#.to_owned()),
        ("POST /generate ", r#"400 "invalid_json""#.to_owned()),
    ] {
        let is_it = |line: &str| line.starts_with(called) && line.ends_with(&ending);
        assert!(output.lines().any(is_it), "{called} {ending}:\n{output}");
    }
    // Four prompt tokens; the first has no logprob.
    assert!(output.contains("200 [[null,"), "{output}");
    assert!(output.contains(r#"200 ["The"," capital"," of"," France","#), "{output}");
    assert!(output.contains("200 8 events, the first: "), "{output}");
    assert!(output.ends_with("all responses were as expected\n"), "{output}");
}

#[test]
fn client_calls_the_router_that_it_is_given() {
    let servers = plain();
    let router = BuiltRouter::start(&servers);
    let output = run("client", &[&router.url]).expect_success();
    assert!(output.ends_with("all responses were as expected\n"), "{output}");
    assert!(servers.pair.decode.stats().completed >= 9);
}

#[test]
fn client_fails_on_an_unexpected_response() {
    // A decode server alone cannot generate.
    let servers = plain();
    let mut client = run("client", &[&servers.pair.decode.url()]);
    assert!(!client.wait().success());
    assert!(client.stdout.text().contains("expected 200"), "{}", client.output());
}

#[test]
fn python_client_prints_the_responses_of_both_apis() {
    let Some(python) = python() else { return };
    let servers = plain();
    let router = BuiltRouter::start(&servers);
    let script = source().join("python_client.py");
    let args = ["-X", "utf8", &script.to_string_lossy(), &router.url];
    let output = ChildProcess::start(command(python, args, &[])).expect_success();
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let chat = output_text(hash_value(&messages), 16);
    let generated = |prompt: &str| output_text(hash_text(prompt), 8);

    assert_eq!(line(&output, "model: "), "tiny");
    assert_eq!(unquoted(line(&output, "chat: ")), chat);
    assert!(output.contains(&format!("stream: {chat}\n")), "{chat:?}:\n{output}");
    for prompt in ["The capital of France", "The capital of Italy"] {
        assert_eq!(unquoted(line(&output, &format!("completion of '{prompt}': "))), generated(prompt));
    }
    assert_eq!(unquoted(line(&output, "generated: ")), generated("The capital of France"));
    assert_eq!(unquoted(line(&output, "generated in 8 events: ")), generated("The capital of France"));
    let logprobs = line(&output, "prompt logprobs: ");
    assert!(logprobs.starts_with("[None, -") && logprobs.split(", ").count() == 4, "{logprobs}");
    assert_eq!(line(&output, "servers: "), "1 prefill, 1 decode");
    assert!(line(&output, "flush_cache: ").starts_with("200 "), "{output}");
}

/// The text of a Python string literal, with the escapes that simulated servers produce.
fn unquoted(literal: &str) -> String {
    let quote = &literal[..1];
    let inside = literal.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)).expect("a literal");
    let escapes = [("\\n", "\n"), ("\\t", "\t"), ("\\'", "'"), ("\\\\", "\\")];
    escapes.iter().fold(inside.to_owned(), |text, (escape, meant)| text.replace(escape, meant))
}

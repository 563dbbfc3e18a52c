//! What the built program logs: at startup, of failed requests, of hostile input, and never of secrets.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use kit::program::Folder;
use kit::{Gate, RouterProcess, STREAM_HEAD, ScriptedServer, Step, chunk, fixture, json};
use serde_json::Value;

const BODY: &str = r#"{"text":"the secret prompt"}"#;

async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", r#"{"text":"the secret answer"}"#)).await
}

/// A server that sends the beginning of a response and closes the connection.
async fn truncating_server(begin: &'static [u8]) -> ScriptedServer {
    ScriptedServer::start(move |_| vec![Step::Send(begin.to_vec()), Step::Pause(PAUSE), Step::Close]).await
}

/// Long enough for the router to read the beginning before the end.
const PAUSE: Duration = Duration::from_millis(50);

/// A URL of a port on which nothing listens.
fn unreachable_url() -> String {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", free.local_addr().unwrap())
}

fn request_lines(lines: &[String]) -> Vec<&String> {
    lines.iter().filter(|line| line.contains("mini_lb::request")).collect()
}

fn parsed(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[tokio::test]
async fn first_line_shows_the_effective_configuration() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let args = ["--max-payload-size", "1000000", "--retry-max-retries", "1", "--disable-retries"];
    let program = RouterProcess::between(&prefill, &decode, &args).await;
    let line = program.line("listening on ").await;
    for part in [
        "INFO mini_lb: listening on http://127.0.0.1:",
        ": 1 prefill, 1 decode, policy cache_aware/least_load, 1 worker thread ",
        &format!("prefill=\"{} 8998\"", prefill.url()),
        &format!("decode={}", decode.url()),
        "--disable-retries",
        "--max-payload-size 1000000",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(!line.contains("--retry-max-retries"), "at its default: {line}");
}

#[tokio::test]
async fn first_line_shows_options_from_the_config_file() {
    let folder = Folder::new("understood");
    let file = folder.put("mini-lb.toml", "max_merge_size = 1000\nretry_max_retries = 1\n");
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let program = RouterProcess::between(&prefill, &decode, &["--config", file.to_str().unwrap()]).await;
    let line = program.line("listening on ").await;
    assert!(line.contains("--max-merge-size 1000") && !line.contains("--retry-max-retries"), "{line}");
}

#[tokio::test]
async fn successful_request_is_logged_only_with_access_log() {
    let prefill = ok_server().await;
    // Decode after prefill, as with SGLang: the line has the time of prefill's head only if that came first.
    let later = [Step::Pause(PAUSE), Step::Send(json("200 OK", r#"{"text":"the secret answer"}"#))];
    let decode = ScriptedServer::start(move |_| later.to_vec()).await;
    let quiet = RouterProcess::between(&prefill, &decode, &[]).await;
    assert_eq!(quiet.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!(request_lines(&quiet.stop().await), [""; 0]);

    let program = RouterProcess::between(&prefill, &decode, &["--access-log", "--log-format", "json"]).await;
    let mut client = program.client().await;
    client.send_request("POST", "/generate?key=k", &[("x-request-id", "r-1")], BODY.as_bytes()).await;
    let response = client.response().await;
    assert_eq!(client.get("/health").await.status(), 200);
    let lines = program.stop().await;
    let lines = request_lines(&lines);
    assert_eq!(lines.len(), 2, "{lines:?}");
    let line = parsed(lines[0]);
    for (name, expected) in [
        ("level", "INFO".into()),
        ("message", "request".into()),
        ("request_id", "r-1".into()),
        ("method", "POST".into()),
        ("path", "/generate".into()),
        ("status", 200.into()),
        ("phase", "answer_body".into()),
        ("prefill", prefill.url().into()),
        ("decode", decode.url().into()),
        ("selection", "only:0/18,only".into()),
        ("attempts", 1.into()),
        ("streaming", false.into()),
        ("bytes_in", BODY.len().into()),
        ("bytes_out", response.body.len().into()),
    ] as [(&str, Value); 14]
    {
        assert_eq!(line[name], expected, "{name} in {line}");
    }
    assert_eq!(line["retried"], Value::Null);
    let time = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{name} in {line}"));
    let times =
        ["request_ms", "sent_ms", "prefill_head_ms", "decode_head_ms", "first_byte_ms", "total_ms"].map(time);
    // Prefill's head may arrive at any time after the request was sent.
    let in_order = [times[0], times[1], times[3], times[4], times[5]];
    assert!(in_order.is_sorted() && times[1] <= times[2], "{line}");
    assert_eq!(parsed(lines[1])["path"], "/health");
}

#[tokio::test]
async fn debug_says_why_a_request_went_where_it_went() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    for (level, is_said) in [("debug", true), ("info", false)] {
        let program = RouterProcess::between(&prefill, &decode, &["--log-level", level]).await;
        let mut client = program.client().await;
        client.send_request("POST", "/generate", &[("x-request-id", "r-8")], BODY.as_bytes()).await;
        assert_eq!(client.response().await.status(), 200);
        let lines = program.stop().await;
        let said: Vec<_> = lines.iter().filter(|line| line.contains("selected a pair")).collect();
        assert_eq!(said.len(), usize::from(is_said), "{lines:?}");
        for line in said {
            let (prefill, decode) = (prefill.url(), decode.url());
            let fields = format!("request_id=r-8 prefill={prefill} decode={decode} selection=only:0/18,only");
            assert!(line.contains(" DEBUG ") && line.contains(&fields), "{line}");
        }
    }
}

#[tokio::test]
async fn failed_request_logs_one_line_with_pair_phase_and_cause() {
    let stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n\
                   9\r\ndata: a\n\n\r\n";
    for (decode, status, code, phase, cause) in [
        (
            Some(truncating_server(b"").await),
            502,
            "decode_closed",
            "legs",
            "closed the connection before its response was complete",
        ),
        (
            Some(truncating_server(stream).await),
            200,
            "decode_closed",
            "answer_body",
            "closed the connection before its response was complete",
        ),
        (None, 502, "decode_connect", "legs", "cannot be reached"),
        (
            Some(ScriptedServer::always(json("503 Service Unavailable", "{}")).await),
            503,
            "server_error",
            "answer_head",
            "answered 503",
        ),
    ] {
        let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let url = decode.as_ref().map_or_else(unreachable_url, ScriptedServer::url);
        let program = RouterProcess::start(&prefill.url(), &url, &["--disable-retries"]).await;
        let mut client = program.client().await;
        client.send_request("POST", "/v1/completions", &[("x-request-id", "r-7")], BODY.as_bytes()).await;
        assert_eq!(client.response().await.status(), status);
        let line = program.line("request failed").await;
        for part in [
            "WARN mini_lb::request: request failed: decode server ",
            cause,
            " request_id=r-7 method=POST path=/v1/completions ",
            &format!(" status={status} code={code} phase={phase} "),
            &format!(" prefill={} decode={url} selection=only:0/", prefill.url()),
            ",only attempts=1 ",
            " total_ms=",
        ] {
            assert!(line.contains(part), "{part:?} in {line}");
        }
        let lines = program.stop().await;
        let said: Vec<_> = lines.iter().filter(|line| line.contains(" WARN ")).collect();
        assert_eq!(said.len(), 1, "{said:?}");
    }
}

#[tokio::test]
async fn retried_request_logs_the_reason() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let program = RouterProcess::start(&prefill.url(), &unreachable_url(), &[]).await;
    assert_eq!(program.client().await.post("/generate", BODY).await.status(), 502);
    let line = program.line("request failed").await;
    assert!(line.contains(" attempts=2 retried=decode_connect "), "{line}");
}

#[tokio::test]
async fn request_cut_off_by_shutdown_is_logged_as_failed() {
    let hangs = || ScriptedServer::start(|_| vec![Step::Hang]);
    let (prefill, decode) = (hangs().await, hangs().await);
    let program = RouterProcess::between(&prefill, &decode, &["--shutdown-grace-period-secs", "0"]).await;
    let mut client = program.client().await;
    client.send_request("POST", "/generate", &[("x-request-id", "r-9")], BODY.as_bytes()).await;
    kit::with_timeout("both legs", async {
        while prefill.requests().is_empty() || decode.requests().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let lines = program.stop().await;
    let lines = request_lines(&lines);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains(" WARN ") && lines[0].contains(" request_id=r-9 "), "{lines:?}");
    assert!(lines[0].contains(" code=shutdown phase=legs "), "{lines:?}");
}

#[tokio::test]
async fn client_errors_are_logged_at_info() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let program = RouterProcess::between(&prefill, &decode, &[]).await;
    assert_eq!(program.client().await.post("/generate", "no JSON").await.status(), 400);
    assert_eq!(program.client().await.get("/nowhere").await.status(), 404);
    program.line("code=not_found").await;
    let lines = program.stop().await;
    let levels: Vec<_> = request_lines(&lines).iter().map(|line| line.contains(" INFO ")).collect();
    assert_eq!(levels, [true, true], "{lines:?}");
}

#[tokio::test]
async fn cancelled_request_is_logged_at_debug() {
    let (prefill, decode) = (ScriptedServer::start(|_| vec![Step::Hang]).await, ok_server().await);
    let decode_hangs = ScriptedServer::start(|_| vec![Step::Hang]).await;
    drop(decode);
    let program = RouterProcess::between(&prefill, &decode_hangs, &["--log-level", "debug"]).await;
    let mut client = program.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    kit::with_timeout("both legs", async {
        while prefill.requests().is_empty() || decode_hangs.requests().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(client);
    let line = program.line("request cancelled").await;
    assert!(line.contains("DEBUG ") && line.contains(" phase=legs "), "{line}");
    let lines = program.stop().await;
    assert_eq!(request_lines(&lines).len(), 1, "{lines:?}");
}

#[tokio::test]
async fn repeated_failures_are_rate_limited_and_counted() {
    let program = RouterProcess::start(&unreachable_url(), &unreachable_url(), &["--disable-retries"]).await;
    let mut client = program.client().await;
    for _ in 0..200 {
        assert_eq!(client.post("/generate", BODY).await.status(), 502);
    }
    let lines = program.stop().await;
    let written = request_lines(&lines).len();
    // Each of two causes has 20 lines, because either leg may fail first.
    assert!((20..=40).contains(&written), "{written}");
    let counts = lines.iter().filter_map(|line| line.split_once(" suppressed=")?.1.parse::<usize>().ok());
    assert_eq!(counts.sum::<usize>() + written, 200, "{lines:#?}");
}

#[tokio::test]
async fn log_level_filters_lines() {
    let program =
        RouterProcess::start(&unreachable_url(), &unreachable_url(), &["--log-level", "warn"]).await;
    let mut client = program.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 502);
    assert_eq!(client.get("/nowhere").await.status(), 404);
    let lines = program.stop().await;
    assert!(lines.len() == 1 && lines[0].contains(" WARN mini_lb::request"), "{lines:?}");
}

#[tokio::test]
async fn json_log_is_one_object_per_line_for_hostile_input() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let args = ["--access-log", "--log-format", "json", "--log-level", "debug"];
    let program = RouterProcess::between(&prefill, &decode, &args).await;
    let hostile: [&[u8]; 4] = [b"a\"b", b"\xff\xfe{", b"\x1b[31m", b"{\"level\":\"ERROR\"}"];
    for id in hostile {
        let nowhere = b"POST /x%22%0a\"'{} HTTP/1.1\r\nhost: r\r\nconnection: close\r\nx-request-id: ";
        let encoded = b"POST /generate HTTP/1.1\r\nhost: r\r\nconnection: close\r\ncontent-encoding: ";
        for head in [&nowhere[..], encoded] {
            let mut client = program.client().await;
            client.send([head, id, b"\r\ncontent-length: 0\r\n\r\n"].concat()).await;
            client.wait_closed().await;
        }
    }
    let lines = program.stop().await;
    let mut paths = 0;
    for line in &lines {
        let object = parsed(line);
        for name in ["timestamp", "level", "target", "message"] {
            assert!(object[name].is_string(), "{name} in {line}");
        }
        assert!(!line.contains(char::is_control), "{line:?}");
        paths += usize::from(object["path"].as_str().is_some_and(|path| path.contains("%22%0a")));
    }
    assert!(paths >= 2, "{lines:#?}");
}

#[tokio::test]
async fn text_log_escapes_control_characters() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let program = RouterProcess::between(&prefill, &decode, &[]).await;
    let mut client = program.client().await;
    // C1 controls in UTF-8, which HTTP allows in a header and some terminals obey.
    let encoding: &[u8] = b"gzip, \xc2\x9b31m\xe2\x80\xa8\xe2\x80\xaex";
    let head = b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-encoding: ";
    client.send([&head[..], encoding, b"\r\ncontent-length: 2\r\n\r\n{}"].concat()).await;
    assert_eq!(client.response().await.status(), 415);
    let line = program.line("code=unsupported_encoding").await;
    assert!(line.contains("Content-Encoding gzip, \\u{9b}31m\\u{2028}\\u{202e}x"), "{line}");
    assert!(!line.contains(char::is_control), "{line:?}");
}

#[tokio::test]
async fn log_file_has_the_lines_of_stderr() {
    let folder = Folder::new("files");
    let logs = folder.path("logs");
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let args = ["--log-dir", logs.to_str().unwrap(), "--access-log"];
    let program = RouterProcess::between(&prefill, &decode, &args).await;
    for _ in 0..3 {
        assert_eq!(program.client().await.post("/generate", BODY).await.status(), 200);
    }
    let lines = program.stop().await;
    let files: Vec<PathBuf> = std::fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("mini-lb.20") && name.len() == "mini-lb.2026-01-31.log".len(), "{name}");
    let text = std::fs::read_to_string(&files[0]).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    assert_eq!(request_lines(&lines).len(), 3);
}

#[tokio::test]
async fn unwritable_log_dir_is_named() {
    let folder = Folder::new("taken");
    let file = folder.put("taken", "a file");
    let mut program =
        RouterProcess::spawn("http://a:1", "http://b:1", &["--log-dir", file.to_str().unwrap()]);
    assert_eq!(program.exit_code().await, Some(2));
    let lines = program.lines();
    let said = format!("error: --log-dir {}: ", file.display());
    assert!(lines.len() == 1 && lines[0].starts_with(&said), "{lines:?}");
}

#[tokio::test]
async fn secrets_are_never_logged() {
    let folder = Folder::new("secrets");
    let logs = folder.path("logs");
    let prefill = ScriptedServer::always(json("200 OK", "the secret prefill")).await;
    let refusal = json("500 Internal Server Error", "{\"error\":\"the secret refusal\"}");
    let refuses = ScriptedServer::always(refusal).await;
    let args = ["--log-level", "debug", "--access-log", "--log-dir", logs.to_str().unwrap()];
    for decode in [ok_server().await, refuses, truncating_server(b"HTTP/1.1 200 the secret head\r\n").await] {
        let program = RouterProcess::between(&prefill, &decode, &args).await;
        let mut client = program.client().await;
        let headers = [
            ("authorization", "Bearer secret-key"),
            ("x-api-key", "secret-key"),
            ("cookie", "secret-cookie"),
            ("x-custom", "secret-header"),
        ];
        for target in
            ["/generate?api_key=secret-query", "/flush_cache?key=secret-query", "/none?secret-query"]
        {
            client.send_request("POST", target, &headers, BODY.as_bytes()).await;
            client.response().await;
        }
        client
            .send_request(
                "POST",
                "/generate",
                &headers,
                b"{\"text\":\"the secret prompt\", the secret error}",
            )
            .await;
        client.response().await;
        client.send(b"GET /health HTTP/1.1\r\nx-secret: the secret head\r\n\r\n").await;
        client.response().await;
        let lines = program.stop().await;
        assert!(request_lines(&lines).len() >= 5, "{lines:?}");
        let secret = lines.iter().find(|line| line.contains("secret"));
        assert_eq!(secret, None);
    }
    for entry in std::fs::read_dir(&logs).unwrap() {
        assert!(!std::fs::read_to_string(entry.unwrap().path()).unwrap().contains("secret\u{20}"));
    }
}

#[tokio::test]
async fn ejected_backend_is_logged() {
    let (prefill, url) = (ok_server().await, unreachable_url());
    let args = ["--health-failure-threshold", "1"];
    let program = RouterProcess::start_probing(&prefill.url(), &url, &args).await;
    program.line(&format!("WARN mini_lb::upstream::backend: decode server {url} is not up")).await;
    program
        .line(&format!("INFO mini_lb::upstream::backend: prefill server {} is healthy", prefill.url()))
        .await;
}

/// A server with SGLang's Rust front end: its description as recorded, with another bootstrap port after a
/// restart.
async fn rust_server(role: &'static str, restarted: Arc<AtomicBool>) -> ScriptedServer {
    let info = fixture(&format!("rust_pd/server_info.{role}.resp")).unwrap().raw;
    let (refused, probes) = (AtomicBool::new(false), Arc::clone(&restarted));
    ScriptedServer::start(move |seen| match seen.target() {
        "/ready" => vec![Step::Send(json("404 Not Found", ""))],
        // Out of rotation once, so that it is asked for its description again.
        "/health" if probes.load(SeqCst) && !refused.swap(true, SeqCst) => {
            vec![Step::Send(json("503 Service Unavailable", ""))]
        }
        "/server_info" if restarted.load(SeqCst) => {
            let text = String::from_utf8(info.clone()).unwrap();
            let before = "\"disaggregation_bootstrap_port\":31000";
            assert!(text.contains(before));
            vec![Step::Send(text.replace(before, "\"disaggregation_bootstrap_port\":31001").into())]
        }
        "/server_info" => vec![Step::Send(info.clone())],
        "/generate" if restarted.load(SeqCst) => vec![Step::Send(json("500 Internal Server Error", "{}"))],
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await
}

#[tokio::test]
async fn bootstrap_port_that_contradicts_the_servers_own_is_a_warning_with_both() {
    let [prefill, decode] =
        ["prefill", "decode"].map(|role| rust_server(role, Arc::new(AtomicBool::new(false))));
    let (prefill, decode) = (prefill.await, decode.await);
    // The kit configures 8998, which is also what this server was started with.
    let program = RouterProcess::start_probing(&prefill.url(), &decode.url(), &[]).await;
    for url in [prefill.url(), decode.url()] {
        program.line(&format!("server {url} is healthy")).await;
    }
    let lines = program.stop().await;
    let warnings: Vec<_> = lines.iter().filter(|line| line.contains(" WARN ")).collect();
    assert_eq!(warnings.len(), 1, "{lines:#?}");
    let url = prefill.url();
    let said = format!("prefill server {url} is configured with bootstrap port 8998 but reports 31000");
    assert!(warnings[0].contains(&said), "{warnings:?}");
}

#[tokio::test]
async fn learned_bootstrap_port_that_changes_is_a_warning_with_both() {
    let restarted = Arc::new(AtomicBool::new(false));
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let learned = rust_server("prefill", Arc::clone(&restarted)).await;
    let url = learned.url();
    let args = ["--prefill", &url, "--policy", "round_robin"];
    let program = RouterProcess::start_probing(&prefill.url(), &decode.url(), &args).await;
    program.line(&format!("prefill server {url} reports bootstrap port 31000")).await;
    program.line(&format!("decode server {} is healthy", decode.url())).await;
    restarted.store(true, SeqCst);
    // The next probe of /health is due in ten seconds, or after a failed request.
    for _ in 0..2 {
        program.client().await.post("/generate", BODY).await;
    }
    program.line(&format!("prefill server {url} is draining")).await;
    let line =
        program.line(&format!("prefill server {url} reports bootstrap port 31001, before 31000")).await;
    assert!(line.contains(" WARN "), "{line}");
}

#[tokio::test]
async fn late_refusal_of_prefill_is_logged_with_the_requests_id_and_fails_nothing() {
    let (begun, refused) = (Gate::new(), Gate::new());
    let (now, after) = (begun.clone(), refused.clone());
    let prefill = ScriptedServer::start(move |_| {
        vec![Step::Wait(now.clone()), Step::Send(json("500 Broken", "{}")), Step::Pause(PAUSE)]
    })
    .await;
    let decode = ScriptedServer::start(move |_| {
        let first = [STREAM_HEAD.as_bytes(), &chunk("data: 1\n\n")].concat();
        let last = [&chunk("data: [DONE]\n\n")[..], b"0\r\n\r\n"].concat();
        vec![Step::Send(first), Step::Wait(after.clone()), Step::Send(last)]
    })
    .await;
    let program = RouterProcess::between(&prefill, &decode, &["--access-log"]).await;
    let mut client = program.client().await;
    let body = r#"{"text":"a","stream":true}"#;
    client.send_request("POST", "/generate", &[("x-request-id", "r-1")], body.as_bytes()).await;
    let head = client.head().await;
    client.read_until("data: 1").await;
    begun.open();
    let late = program.line("after decode had started to respond").await;
    assert!(late.contains("WARN") && late.contains("status=500"), "{late}");
    assert!(late.contains("request_id=\"r-1\"") || late.contains("request_id=r-1"), "{late}");
    refused.open();
    assert!(client.finish_response(head).await.complete);
    let line = program.line("request request_id=r-1").await;
    assert!(line.contains("INFO") && line.contains("status=200") && !line.contains(" code="), "{line}");
}

//! `--check-config --probe`: what is said of servers before traffic flows, by the built program to simulated,
//! recorded and scripted servers.
//!
//! Multi-threaded tests: waiting for the program blocks a thread, and the servers need another.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::time::{Duration, Instant};

use kit::program::output;
use kit::{
    ScriptedServer, Step, TerminatorOptions, TestCa, TlsTerminator, fixture, free_port, json, ok_server,
};
use loadtest::sim::{Sim, SimConfig};

/// What the program has printed, and its exit code.
struct Report {
    text: String,
    code: Option<i32>,
}

/// Asks the servers of a command line. The program's own time limit for each answer is 1 s.
fn probe(args: &[&str]) -> Report {
    let words = ["--check-config", "--probe"].into_iter().chain(args.iter().copied());
    let output = output(words, &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{text}");
    let is_printable = |c: char| c == '\n' || c == ' ' || c.is_ascii_graphic();
    assert!(text.chars().all(is_printable), "{text:?}");
    // Only a word of its own, such as a URL, may be longer.
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
    Report { text, code: output.status.code() }
}

impl Report {
    /// The server's row, by column.
    fn row(&self, url: &str) -> Vec<&str> {
        let row = self.text.lines().find(|line| line.starts_with(&format!("{url} ")));
        row.unwrap_or_else(|| panic!("{url} in {}", self.text)).split_whitespace().collect()
    }

    /// What is said of a server, in one line each.
    fn findings(&self, title: &str) -> Vec<String> {
        let lines = self.text.lines().skip_while(|line| !line.starts_with(&format!("{title} ("))).skip(1);
        let mut findings: Vec<String> = Vec::new();
        for line in lines.take_while(|line| line.starts_with("  ")) {
            match (line.strip_prefix("    "), findings.last_mut()) {
                (Some(rest), Some(last)) => *last += &format!(" {rest}"),
                _ => findings.push(line.trim_start().to_owned()),
            }
        }
        findings
    }

    fn has(&self, title: &str, parts: &[&str]) {
        let findings = self.findings(title);
        let is_found = |part: &&str| findings.iter().any(|finding| finding.contains(*part));
        assert!(parts.iter().all(is_found), "{parts:?} of {title} in {}", self.text);
        assert_eq!(findings.len(), parts.len(), "{}", self.text);
    }
}

async fn prefill() -> Sim {
    Sim::start(SimConfig::prefill()).await.expect("free ports")
}

async fn decode() -> Sim {
    Sim::start(SimConfig::decode()).await.expect("a free port")
}

/// A server that describes itself with this text.
async fn described(text: String) -> ScriptedServer {
    ScriptedServer::always(json("200 OK", &text)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_fit_are_a_table_and_exit_code_0() {
    let (prefill, decode) = (prefill().await, decode().await);
    let port = prefill.bootstrap_port().unwrap().to_string();
    let report = probe(&["--prefill", &prefill.url(), &port, "--decode", &decode.url()]);
    let text = &report.text;
    assert_eq!(report.code, Some(0), "{text}");
    let titles: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        titles,
        "SERVER ROLE FITS VERSION BOOTSTRAP TP DP PAGE TRANSFER MODEL".split(' ').collect::<Vec<_>>()
    );
    let row = [&prefill.url(), "prefill", "yes", "0.5.23", &port, "1", "1", "1", "mooncake", "tiny"];
    assert_eq!(report.row(&prefill.url()), row);
    assert_eq!(report.row(&decode.url())[1..5], ["decode", "yes", "0.5.23", "-"]);
    assert!(text.ends_with("\nall fit: 2 servers asked, 2 fit; 0 errors, 0 warnings\n"), "{text}");
    // The same without a port, which is learned.
    let report = probe(&["--prefill", &prefill.url(), "--decode", &decode.url()]);
    assert_eq!((report.code, report.row(&prefill.url())[4]), (Some(0), port.as_str()), "{}", report.text);
    // And by name.
    let (prefill, decode) =
        (format!("localhost:{}", prefill.addr().port()), format!("localhost:{}", decode.addr().port()));
    let report = probe(&["--prefill-dns", &prefill, &port, "--decode-dns", &decode]);
    assert_eq!(
        report.row(&format!("http://127.0.0.1:{}", prefill.rsplit(':').next().unwrap()))[2],
        "yes",
        "{}",
        report.text
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_in_the_place_of_another_kind_does_not_fit() {
    let (one, other, whole) =
        (prefill().await, decode().await, Sim::start(SimConfig::default()).await.unwrap());
    let report = probe(&["--prefill", &other.url(), "--decode", &one.url(), "--decode", &whole.url()]);
    assert_eq!(report.code, Some(3), "{}", report.text);
    assert_eq!(report.row(&other.url())[1..3], ["prefill", "NO"]);
    report.has(&other.url(), &[
        "error: it is given with --prefill and was started with --disaggregation-mode decode: give it with --decode",
        "warning: its bootstrap server",
    ]);
    report.has(&one.url(), &["--disaggregation-mode prefill: give it with --prefill"]);
    report.has(
        &whole.url(),
        &["was started without --disaggregation-mode: start it with --disaggregation-mode decode"],
    );
    let report = probe(&["--worker-urls", &one.url(), &whole.url()]);
    report.has(&one.url(), &["it would wait for the other server of a pair; use --prefill and --decode"]);
    assert_eq!((report.code, report.row(&whole.url())[2]), (Some(3), "yes"), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_bootstrap_port_is_an_error_unless_somebody_answers_there() {
    let (prefill, decode) = (prefill().await, decode().await);
    let told = prefill.bootstrap_port().unwrap();
    let wrong = free_port().to_string();
    let report = probe(&["--prefill", &prefill.url(), &wrong, "--decode", &decode.url()]);
    assert_eq!(report.code, Some(3), "{}", report.text);
    report.has(&prefill.url(), &[&format!(
        "error: its bootstrap port is {told}, and {wrong} is configured, where nobody answers: write {told} behind its URL"
    )]);
    // A port that is mapped to it.
    let mapped = ok_server().await.address().port().to_string();
    let mapping = ok_server().await;
    let port = mapping.address().port().to_string();
    assert_ne!(mapped, port);
    let report = probe(&["--prefill", &prefill.url(), &port, "--decode", &decode.url()]);
    assert_eq!(report.code, Some(0), "{}", report.text);
    report.has(
        &prefill.url(),
        &[&format!("warning: its bootstrap port is {told}, and {port} is configured: right only if")],
    );
    assert!(
        report.text.ends_with("all fit: 2 servers asked, 2 fit; 0 errors, 1 warning\n"),
        "{}",
        report.text
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_a_server_refuses_is_named() {
    let with_key = |config| SimConfig { api_key: Some("right".into()), ..config };
    let prefill = Sim::start(with_key(SimConfig::prefill())).await.unwrap();
    let decode = Sim::start(with_key(SimConfig::decode())).await.unwrap();
    let servers = [prefill.url(), decode.url()];
    let args = ["--prefill", &servers[0], "--decode", &servers[1]];
    let report = probe(&args);
    assert_eq!(report.code, Some(3), "{}", report.text);
    report.has(
        &servers[1],
        &["it wants a key: GET /server_info returned 401; give its --api-key with --worker-api-key"],
    );
    let report = probe(&[&args[..], &["--worker-api-key", "wrong"]].concat());
    report.has(
        &servers[0],
        &["it refuses the key: GET /server_info returned 401; --worker-api-key must be its --api-key"],
    );
    let report = probe(&[&args[..], &["--worker-api-key", "right"]].concat());
    assert_eq!(report.code, Some(0), "{}", report.text);
    assert!(!report.text.contains("right"), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_answer_is_told_in_bounded_time() {
    let silent: Vec<ScriptedServer> = {
        let mut all = Vec::new();
        for _ in 0..8 {
            all.push(ScriptedServer::start(|_| vec![Step::Hang]).await);
        }
        all
    };
    let down = format!("http://127.0.0.1:{}", free_port());
    let prefill = prefill().await;
    let mut args = vec!["--prefill".to_owned(), prefill.url(), "--decode".to_owned(), down.clone()];
    args.extend(silent.iter().flat_map(|server| ["--decode".to_owned(), server.url()]));
    args.extend(
        ["--decode-dns", "no-such-name.invalid:1", "--health-check-timeout-secs", "1"].map(str::to_owned),
    );
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let begun = Instant::now();
    let report = probe(&args);
    // One after the other they would take 8 s at least.
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
    assert_eq!(report.code, Some(3), "{}", report.text);
    report.has(
        &down,
        &["error: it cannot be reached: Connection refused (os error 111); is it started, and are"],
    );
    for server in &silent {
        report.has(&server.url(), &["error: it did not respond within 1s"]);
    }
    let said = report.text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("All servers error: DNS lookup of no-such-name.invalid:1 failed: "), "{said}");
    assert!(
        said.ends_with("NOT READY for traffic: 10 servers asked, 1 fit; 10 errors, 0 warnings"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_sglang_server_is_told_apart() {
    let html = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>";
    let page = ScriptedServer::always(html.as_bytes().to_vec()).await;
    let router = described(r#"{"internal_states":[],"prefill":[],"decode":[]}"#.into()).await;
    let other = described(r#"{"text":"hi"}"#.into()).await;
    let missing = ScriptedServer::always(json("404 Not Found", "{}")).await;
    let starting = ScriptedServer::always(json("503 Service Unavailable", "")).await;
    let no_http = ScriptedServer::always(b"SSH-2.0-OpenSSH_9.6\r\n".to_vec()).await;
    let urls = [&page, &router, &other, &missing, &starting, &no_http].map(ScriptedServer::url);
    let report = probe(&["--worker-urls", &urls[0], &urls[1], &urls[2], &urls[3], &urls[4], &urls[5]]);
    assert_eq!(report.code, Some(3), "{}", report.text);
    for (url, part) in urls.iter().zip([
        "error: it is no SGLang server: GET /server_info returned 200 with text/html and no JSON object",
        "error: it is a router, not a server",
        "error: it is no SGLang server: GET /server_info returned 200 without version, model_path",
        "error: GET /get_server_info returned 404, as /server_info did: it is no SGLang server",
        "error: it is not ready: GET /server_info returned 503",
        "it speaks no HTTP, or TLS: then write its URL with https://",
    ]) {
        report.has(url, &[part]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_untrusted_certificate_and_a_wrong_scheme_are_told_apart() {
    let ca = TestCa::new();
    let server = Sim::start(SimConfig::default()).await.unwrap();
    let options = TerminatorOptions {
        identity: ca.issue("server", &["localhost"]),
        truncates: false,
        reads_slowly: false,
        client_ca: None,
    };
    let tls = TlsTerminator::start(server.addr(), options).await;
    let plain = format!("https://{}", server.addr());
    let args = ["--worker-urls", &tls.url(), &plain];
    let report = probe(&args);
    assert_eq!(report.code, Some(3), "{}", report.text);
    report.has(&tls.url(), &["its certificate does not come from a known CA (see --ca-cert-paths)"]);
    report.has(&plain, &["TLS: what it sent is not TLS; write its URL with http://"]);
    let report = probe(&["--ca-cert-paths", ca.file().to_str().unwrap(), "--worker-urls", &tls.url()]);
    assert_eq!(report.code, Some(0), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_versions_pages_and_transfers_are_compared() {
    // What a real decode server has said, with changes.
    let recorded = String::from_utf8(fixture("pd_info/decode_server_info.resp").unwrap().body).unwrap();
    let prefill = prefill().await;
    let other = |from: &str, to: &str| {
        assert!(recorded.contains(from), "{from}");
        described(recorded.replace(from, to))
    };
    let same = described(recorded.clone()).await;
    let model = other(r#""served_model_name":"tiny""#, r#""served_model_name":"llama\u001b[2J""#).await;
    let page = other(r#""page_size":1,"#, r#""page_size":64,"#).await;
    let transfer = other(
        r#""disaggregation_transfer_backend":"mooncake""#,
        r#""disaggregation_transfer_backend":"nixl""#,
    )
    .await;
    let version = other(r#""version":"0.5.23""#, r#""version":"0.5.18""#).await;
    let sizes = other(r#""dp_size":1,"#, r#""dp_size":8,"#).await;
    let cache = other(r#""kv_cache_dtype":"auto""#, r#""kv_cache_dtype":"fp8_e5m2""#).await;
    let urls = [&same, &model, &page, &transfer, &version, &sizes, &cache].map(ScriptedServer::url);
    let mut args = vec!["--prefill".to_owned(), prefill.url()];
    args.extend(urls.iter().flat_map(|url| ["--decode".to_owned(), url.clone()]));
    let report = probe(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(report.code, Some(3), "{}", report.text);
    assert_eq!(report.row(&urls[0])[2], "yes", "{}", report.text);
    report.has(&urls[1], &[r"error: it serves the model llama\u{1b}[2J, and most others serve tiny"]);
    report.has(
        &urls[2],
        &["error: its --page-size is 64, and that of most others is 1: no KV cache can be sent"],
    );
    report.has(
        &urls[3],
        &["error: its --disaggregation-transfer-backend is nixl, and that of most others is mooncake"],
    );
    report.has(&urls[6], &["warning: its --kv-cache-dtype is fp8_e5m2, and that of most others is auto"]);
    let said = report.text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("warning: servers run different versions of SGLang: 0.5.18 (1 decode), 0.5.23 (6 decode, 1 prefill)"), "{said}");
    assert!(said.contains("warning: decode servers differ in dp_size: 1, 8"), "{said}");
    assert_eq!((report.row(&urls[4])[2], report.row(&urls[5])[6]), ("yes", "8"), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encoders_and_language_only_servers_need_each_other() {
    let language_only = Sim::start(SimConfig { language_only: true, ..SimConfig::prefill() }).await.unwrap();
    let (prefill, decode) = (prefill().await, decode().await);
    let encoder = Sim::start(SimConfig::encoder()).await.unwrap();
    let broken = Sim::start(SimConfig::encoder()).await.unwrap();
    broken.fail_health(Some(500));
    let servers = [language_only.url(), prefill.url(), decode.url(), encoder.url(), broken.url()];
    let pairs = ["--prefill", &servers[0], "--prefill", &servers[1], "--decode", &servers[2]];
    let report = probe(&pairs);
    assert_eq!(report.code, Some(0), "{}", report.text);
    report.has(&servers[0], &["warning: it is language-only, and no encoder is given with --encode"]);
    let report = probe(&[&pairs[..], &["--encode", &servers[3], "--encode", &servers[4]]].concat());
    assert_eq!((report.code, report.row(&servers[3])[2]), (Some(3), "yes"), "{}", report.text);
    report.has(
        &servers[1],
        &["warning: it is not language-only: it encodes media itself and takes no encoders"],
    );
    report.has(&servers[4], &["error: it does not work: GET /health returned 500"]);
    // An encoder answers 404 to what it is asked as a server.
    let report = probe(&["--prefill", &servers[3], "--decode", &servers[2]]);
    report.has(
        &servers[3],
        &["it is no SGLang server, or its base path is wrong; an encoder goes to --encode"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_servers_are_asked_at_their_own_endpoint_and_draining_ones_told() {
    let old = ScriptedServer::start(|seen| {
        vec![Step::Send(match seen.target() {
            "/get_server_info" => json("200 OK", r#"{"model_path":"/m/tiny","tp_size":2}"#),
            _ => json("404 Not Found", "{}"),
        })]
    });
    let draining = ScriptedServer::start(|seen| {
        vec![Step::Send(match seen.target() {
            "/ready" => json("503 Service Unavailable", ""),
            _ => json("200 OK", r#"{"disaggregation_mode":"null","model_path":"/m/tiny"}"#),
        })]
    });
    let (old, draining) = tokio::join!(old, draining);
    let report = probe(&["--worker-urls", &old.url(), &draining.url()]);
    assert_eq!(
        report.row(&old.url())[2..],
        ["warning", "-", "-", "2", "-", "-", "-", "/m/tiny"],
        "{}",
        report.text
    );
    report.has(&old.url(), &["warning: it does not say its --disaggregation-mode"]);
    report.has(&draining.url(), &["error: it is starting or draining: GET /ready returned 503"]);
    assert_eq!(report.code, Some(3));
}

#[test]
fn a_bad_configuration_and_no_servers_are_told_without_asking() {
    let refused = |args: &[&str]| {
        let output = output(args.iter().copied(), &[]);
        assert_eq!(output.stdout, b"");
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let sentence = "error: --probe: goes with --check-config, which does not start the router; give both\n";
    assert_eq!(refused(&["--probe", "--worker-urls", "http://127.0.0.1:1"]), (Some(2), sentence.to_owned()));
    let (code, said) = refused(&["--check-config", "--probe", "--worker-urls", "127.0.0.1:1"]);
    assert_eq!(code, Some(2));
    assert!(said.starts_with("error: --worker-urls 127.0.0.1:1: "), "{said}");
    let report = probe(&[]);
    assert_eq!(report.code, Some(3), "{}", report.text);
    let said = report.text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("error: there is no prefill server: requests get 503 (--prefill names one)"),
        "{said}"
    );
}

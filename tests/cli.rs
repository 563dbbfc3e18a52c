//! The built program, as a user meets it: its command line, its sentences, its
//! exit codes and its reaction to signals. What it routes is tested elsewhere.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Output;
use std::time::{Duration, Instant};

mod kit;
#[path = "../src/bin/mini-lb/cli/unsupported.rs"]
mod unsupported;

use kit::program::{self, Program, free_port};
use unsupported::{ACCEPTED, POLICIES, REFUSED, WITHOUT_EFFECT};

/// No step takes anywhere near this long; it only bounds a test that fails.
const DEADLINE: Duration = Duration::from_secs(30);

/// Every flag of `python -m sglang_router.launch_router` in sglang-router 0.3.2.
const SGLANG_ROUTER_0_3_2: &str = "
    host port worker-urls policy prefill-policy decode-policy cache-threshold balance-abs-threshold
    balance-rel-threshold bucket-adjust-interval-secs eviction-interval-secs max-tree-size max-idle-secs
    assignment-mode max-payload-size dp-aware enable-igw mini-lb pd-disaggregation prefill decode
    worker-startup-timeout-secs worker-startup-check-interval log-dir log-level service-discovery selector
    service-discovery-port service-discovery-namespace prefill-selector decode-selector prometheus-port
    prometheus-host prometheus-duration-buckets request-id-headers request-timeout-secs
    shutdown-grace-period-secs cors-allowed-origins max-concurrent-requests queue-size queue-timeout-secs
    rate-limit-tokens-per-second retry-max-retries retry-initial-backoff-ms retry-max-backoff-ms
    retry-backoff-multiplier retry-jitter-factor disable-retries cb-failure-threshold cb-success-threshold
    cb-timeout-duration-secs cb-window-duration-secs disable-circuit-breaker health-failure-threshold
    health-success-threshold health-check-timeout-secs health-check-interval-secs health-check-endpoint
    disable-health-check model-path tokenizer-path chat-template tokenizer-cache-enable-l0
    tokenizer-cache-l0-max-entries tokenizer-cache-enable-l1 tokenizer-cache-l1-max-memory
    reasoning-parser tool-call-parser mcp-config-path backend history-backend oracle-wallet-path
    oracle-tns-alias oracle-connect-descriptor oracle-username oracle-password oracle-pool-min
    oracle-pool-max oracle-pool-timeout-secs postgres-db-url postgres-pool-max redis-url redis-pool-max
    redis-retention-days client-cert-path client-key-path ca-cert-paths tls-cert-path tls-key-path
    enable-trace otlp-traces-endpoint api-key control-plane-api-keys control-plane-audit-enabled
    jwt-issuer jwt-audience jwt-jwks-uri jwt-role-mapping";

/// Every flag that does something here, and the default that its help shows.
const SUPPORTED: &[(&str, &str)] = &[
    ("--prefill <URL> [PORT|none]", ""),
    ("--decode <URL>", ""),
    ("--prefill-dns <HOST:PORT> [BOOTSTRAP|none]", ""),
    ("--decode-dns <HOST:PORT>", ""),
    ("--worker-urls [<URL>...]", ""),
    ("--worker-dns <HOST:PORT>", ""),
    ("--service-discovery", ""),
    ("--selector <KEY=VALUE>...", ""),
    ("--prefill-selector <KEY=VALUE>...", ""),
    ("--decode-selector <KEY=VALUE>...", ""),
    ("--service-discovery-port <PORT>", "[default: 80]"),
    ("--service-discovery-namespace <NAME>", "[default: all namespaces]"),
    ("--dns-interval-secs <SECONDS>", "[default: 5]"),
    ("--worker-startup-timeout-secs <SECONDS>", "[default: 1800]"),
    ("--worker-startup-check-interval <SECONDS>", "[default: 1]"),
    ("--prefill-bootstrap-host <URL> <HOST>", ""),
    (
        "--policy <cache_aware|least_load|power_of_two|consistent_hash|round_robin|random>",
        "[default: cache_aware]",
    ),
    (
        "--prefill-policy <cache_aware|least_load|power_of_two|consistent_hash|round_robin|random>",
        "[default: --policy]",
    ),
    (
        "--decode-policy <cache_aware|least_load|power_of_two|consistent_hash|round_robin|random>",
        "[default: --policy]",
    ),
    ("--hash-key-headers <HEADER>...", "[default: x-smg-routing-key x-session-id]"),
    ("--prefix-index-bytes <BYTES>", "[default: 67108864]"),
    ("--host <HOST>", "[default: 0.0.0.0]"),
    ("--port <PORT>", "[default: 30000]"),
    ("--proxy-protocol", ""),
    ("--dp-aware", ""),
    ("--request-timeout-secs <SECONDS>", "[default: 1800]"),
    ("--stream-idle-timeout-secs <SECONDS>", "[default: 300]"),
    ("--retry-max-retries <COUNT>", "[default: 1]"),
    ("--retry-on-status <STATUS>...", ""),
    ("--disable-retries", ""),
    ("--request-head-timeout-secs <SECONDS>", "[default: 15]"),
    ("--request-body-idle-timeout-secs <SECONDS>", "[default: 30]"),
    ("--request-body-timeout-secs <SECONDS>", "[default: 300]"),
    ("--client-idle-timeout-secs <SECONDS>", "[default: 90]"),
    ("--connect-timeout-secs <SECONDS>", "[default: 5]"),
    ("--shutdown-lame-duck-secs <SECONDS>", "[default: 3]"),
    ("--shutdown-grace-period-secs <SECONDS>", "[default: 180]"),
    ("--max-n <COUNT>", "[default: 16]"),
    ("--max-payload-size <BYTES>", "[default: 536870912]"),
    ("--max-merge-size <BYTES>", "[default: 268435456]"),
    ("--max-buffered-bytes <BYTES>", "[default: a quarter of the memory]"),
    ("--max-concurrent-requests <COUNT>", "[default: -1]"),
    ("--queue-size <COUNT>", "[default: 100]"),
    ("--queue-timeout-secs <SECONDS>", "[default: 60]"),
    ("--rate-limit-tokens-per-second <COUNT>", "[default: no limit]"),
    ("--max-in-flight-per-prefill <COUNT>", "[default: no limit]"),
    ("--max-in-flight-per-decode <COUNT>", "[default: no limit]"),
    ("--max-in-flight-per-worker <COUNT>", "[default: no limit]"),
    ("--api-key <KEY>", ""),
    ("--api-key-file <FILE>", ""),
    ("--admin-api-key <KEY>", ""),
    ("--admin-api-key-file <FILE>", ""),
    ("--worker-api-key <KEY>", ""),
    ("--worker-api-key-file <FILE>", ""),
    ("--worker-api-key-replaces-authorization", ""),
    ("--cors-allowed-origins <ORIGIN>...", ""),
    ("--health-check-interval-secs <SECONDS>", "[default: 1]"),
    ("--health-check-timeout-secs <SECONDS>", "[default: 5]"),
    ("--health-failure-threshold <COUNT>", "[default: 3]"),
    ("--health-success-threshold <COUNT>", "[default: 2]"),
    ("--load-poll-secs <SECONDS>", "[default: 0]"),
    ("--disable-health-check", ""),
    ("--worker-threads <COUNT>", "[default: one per core]"),
    ("--backend-idle-timeout-secs <SECONDS>", "[default: 4]"),
    ("--max-idle-per-backend <COUNT>", "[default: 512]"),
    ("--socket-buffer-size <BYTES>", "[default: tuned by the kernel]"),
    ("--prometheus-host <HOST>", "[default: 127.0.0.1]"),
    ("--prometheus-port <PORT>", "[default: 29000, or none if that is in use]"),
    ("--tls-cert-path <FILE>", "[default: plain HTTP]"),
    ("--tls-key-path <FILE>", ""),
    ("--ca-cert-paths <FILE>...", "[default: the system's]"),
    ("--client-cert-path <FILE>", ""),
    ("--client-key-path <FILE>", ""),
    ("--http2", ""),
    ("--http2-max-streams <COUNT>", "[default: 128]"),
    ("--log-level <debug|info|warn|error>", "[default: info]"),
    ("--log-format <text|json>", "[default: text]"),
    ("--log-dir <FOLDER>", ""),
    ("--trace-log <PATH>", ""),
    ("--trace-log-max-bytes <BYTES>", "[default: 268435456]"),
    ("--access-log", ""),
    ("--request-id-headers <HEADER>...", "[default: x-request-id x-correlation-id x-trace-id request-id]"),
    ("--enable-trace", ""),
    ("--otlp-traces-endpoint <URL>", "[default: http://localhost:4318]"),
    ("--config <FILE>", ""),
    ("--check-config", ""),
    ("--probe", ""),
];

/// Without it each test that ends a router takes 3 s longer.
const LAME_DUCK: &str = "--shutdown-lame-duck-secs";

/// A good configuration, to which a test adds one error.
const SERVERS: [&str; 4] = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"];

#[test]
fn documented_command_line_starts_answers_and_ends_with_0_on_sigterm() {
    let port = free_port().to_string();
    let typed = "--pd-disaggregation --mini-lb --prefill http://127.0.0.1:1 8998 \
                 --prefill http://127.0.0.1:2 none --decode http://127.0.0.1:3 --host 127.0.0.1 \
                 --policy random --request-timeout-secs 1800 --log-level info --port";
    let mut router = Program::start(typed.split_whitespace().chain([port.as_str()]));
    let line = router.wait_for("listening on ");
    let said = format!("listening on http://127.0.0.1:{port}: 2 prefill, 1 decode, policy random/random, ");
    assert!(line.contains(&said), "{line}");
    assert!(line.contains(" worker thread"), "{line}");
    assert!(!line.contains('\u{1b}'), "ANSI although stderr is no terminal: {line}");
    assert_eq!(get("/health", &port), "HTTP/1.1 200 OK");
    router.send("TERM");
    assert_eq!(router.exit_code(), Some(0));
}

#[test]
fn sigterm_makes_the_router_unready_before_it_stops_accepting_connections() {
    let port = free_port().to_string();
    let typed = ["--disable-health-check", "--port", &port, LAME_DUCK, "1"];
    let mut router = start_plain(&typed);
    assert_eq!(get("/ready", &port), "HTTP/1.1 200 OK");
    let told = Instant::now();
    router.send("TERM");
    router.wait_for("shutting down");
    assert_eq!(get("/ready", &port), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(router.exit_code(), Some(0));
    assert!(told.elapsed() >= Duration::from_secs(1), "{:?}", told.elapsed());
}

#[test]
fn sigint_ends_the_program_with_0() {
    let mut router = start_plain(&[]);
    router.wait_for("listening on ");
    router.send("INT");
    assert_eq!(router.exit_code(), Some(0));
}

#[test]
fn second_signal_ends_the_program_although_a_request_is_open() {
    let mut open = OpenRequest::start(&[]);
    open.router.send("TERM");
    open.router.wait_for("SIGTERM received; ");
    assert!(open.router.is_running(), "the first signal must leave the request open");
    open.router.send("TERM");
    assert_eq!(open.router.exit_code(), Some(0));
}

#[test]
fn shutdown_grace_period_bounds_how_long_a_request_stays_open() {
    // Without the flag this takes 180 s, longer than the deadline.
    let mut open = OpenRequest::start(&["--shutdown-grace-period-secs", "0"]);
    open.router.send("TERM");
    assert_eq!(open.router.exit_code(), Some(0));
}

#[test]
fn request_timeout_bounds_how_long_a_request_stays_open() {
    let open = OpenRequest::start(&["--request-timeout-secs", "1"]);
    assert_eq!(status_line(open.client), "HTTP/1.1 504 Gateway Timeout");
}

#[test]
fn max_payload_size_bounds_a_request_body() {
    let port = free_port().to_string();
    let _router = start_plain(&["--max-payload-size", "11", "--port", &port]);
    assert_eq!(status_line(post_generate(&port)), "HTTP/1.1 413 Payload Too Large");
}

#[test]
fn log_level_filters_the_log() {
    let port = free_port().to_string();
    let mut router = start_plain(&["--log-level", "error", "--port", &port]);
    assert_eq!(get("/health", &port), "HTTP/1.1 200 OK");
    router.send("TERM");
    assert_eq!(router.exit_code(), Some(0));
    assert_eq!(router.lines.iter().collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn listening_line_names_policies_and_workers() {
    for (typed, said) in [
        ("--worker-threads 1", "1 prefill, 1 decode, policy cache_aware/least_load, 1 worker thread"),
        ("--worker-threads=2 --policy round_robin", "policy round_robin/round_robin, 2 worker threads"),
        ("--policy round_robin --decode-policy random", "policy round_robin/random, "),
        ("--prefill-policy round_robin", "policy round_robin/least_load, "),
        ("--policy least_request --decode-policy po2", "policy least_request/po2, "),
    ] {
        let router = start_plain(&typed.split_whitespace().collect::<Vec<_>>());
        let line = router.wait_for("listening on ");
        assert!(line.contains(said), "{typed}: {line}");
    }
}

#[test]
fn a_prefill_port_may_be_left_out_before_any_other_flag() {
    for typed in [
        "--prefill http://127.0.0.1:1 --prefill http://127.0.0.1:2 NONE --decode http://127.0.0.1:3",
        "--decode http://127.0.0.1:3 --prefill http://127.0.0.1:1 8998 --prefill=http://a:2 --mini-lb",
        "--decode=http://127.0.0.1:3 --prefill http://127.0.0.1:1 None --prefill http://127.0.0.1:2",
    ] {
        let port = free_port().to_string();
        let router =
            Program::start(["--host=127.0.0.1", "--port", &port].into_iter().chain(typed.split_whitespace()));
        let line = router.wait_for("listening on ");
        assert!(line.contains(": 2 prefill, 1 decode, "), "{typed}: {line}");
    }
}

#[test]
fn flags_without_an_effect_are_accepted() {
    let router = start_plain(ACCEPTED);
    router.wait_for("listening on ");
}

#[test]
fn flags_that_tune_what_does_not_exist_are_accepted_and_the_log_says_why() {
    let typed: Vec<&str> = WITHOUT_EFFECT.iter().flat_map(|(flag, _)| [*flag, "0.3"]).collect();
    let router = start_plain(&typed);
    for (flag, why) in WITHOUT_EFFECT {
        router.wait_for(&format!("{flag} has no effect: {why}"));
    }
}

#[test]
fn every_other_option_is_accepted() {
    let typed = "--prefill-bootstrap-host http://127.0.0.1:1 prefill.example --connect-timeout-secs 1 \
                 --shutdown-grace-period-secs 0 --max-n 1 --max-payload-size 1 --max-merge-size 1 \
                 --max-idle-per-backend 0 --socket-buffer-size 65536 --request-timeout-secs 4294967295 \
                 --backend-idle-timeout-secs 3 --retry-on-status 429,503 --retry-on-status 500 --health-check-interval-secs 1 \
                 --max-concurrent-requests 5 --max-concurrent-requests -1 --queue-size 0 --queue-timeout-secs 1 \
                 --rate-limit-tokens-per-second 1 --max-in-flight-per-prefill 1 --max-in-flight-per-decode 1 \
                 --cors-allowed-origins http://a.example http://b.example,http://c.example --worker-api-key a \
                 --worker-api-key-replaces-authorization --admin-api-key b --api-key c \
                 --health-check-timeout-secs 1 --health-failure-threshold 1 --health-success-threshold 1";
    let router = start_plain(&typed.split_whitespace().collect::<Vec<_>>());
    router.wait_for("listening on ");
}

#[test]
fn keys_are_read_from_the_command_line_and_from_files_and_are_in_no_log() {
    let folder = std::env::temp_dir().join(format!("mini-lb-keys-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let keys = file("clients", "\nsecret-2\r\n  secret-3  \n\n");
    let admin = file("admin", "secret-4\n");
    let port = free_port().to_string();
    let admin_port = free_port().to_string();
    let router = start_plain(&[
        "--port",
        &port,
        "--prometheus-port",
        &admin_port,
        "--api-key",
        "secret-1",
        "--api-key-file",
        &keys,
        "--admin-api-key-file",
        &admin,
        "--worker-api-key",
        "secret-5",
        "--log-level",
        "debug",
    ]);
    let ask = |port: &str, key: &str| {
        let mut stream = connect(port);
        let head = format!(
            "GET /nothing HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        status_line(stream)
    };
    for key in ["secret-1", "secret-2", "secret-3"] {
        assert_eq!(ask(&port, key), "HTTP/1.1 404 Not Found", "{key}");
        assert_eq!(ask(&admin_port, key), "HTTP/1.1 401 Unauthorized", "{key}");
    }
    assert_eq!(ask(&port, "secret-4"), "HTTP/1.1 401 Unauthorized");
    assert_eq!(ask(&admin_port, "secret-4"), "HTTP/1.1 404 Not Found");
    let two = file("two", "secret-6\nsecret-7\n");
    let said = refused(SERVERS.into_iter().chain(["--admin-api-key-file", &two]));
    assert_eq!(
        said,
        format!("error: --admin-api-key-file {two}: the file must have one key, and it has 2\n")
    );
    std::fs::remove_dir_all(&folder).unwrap();
    router.send("TERM");
    let deadline = Instant::now() + DEADLINE;
    let log: Vec<String> = std::iter::from_fn(|| {
        router.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    })
    .collect();
    assert!(log.iter().any(|line| line.contains("unauthorized")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("secret")), "{log:?}");
}

#[test]
fn the_last_of_a_repeated_flag_wins() {
    let port = free_port().to_string();
    let router =
        start_plain(&["--port", "1", "--policy", "random", "--policy", "round_robin", "--port", &port]);
    let line = router.wait_for("listening on ");
    assert!(
        line.contains(&format!(":{port}: ")) && line.contains("policy round_robin/round_robin"),
        "{line}"
    );
}

#[test]
fn each_wrong_value_is_named_in_one_sentence() {
    let prefill = "--prefill http://127.0.0.1:1";
    let decode = "--decode http://127.0.0.1:2";
    for (typed, sentence) in [
        (
            format!("{decode} --prefill 10.0.0.1:30000"),
            "--prefill 10.0.0.1:30000: a server's URL must begin with http:// or https://",
        ),
        (
            format!("{decode} --prefill http://a:b"),
            "--prefill http://a:b: the port is not a number between 1 and 65535",
        ),
        (format!("{decode} --prefill http://"), "--prefill http://: not a URL such as http://10.0.0.1:30000"),
        (
            format!("{decode} --prefill http://a:1/v1?x=y"),
            "--prefill http://a:1/v1?x=y: a query (what follows ?) cannot be part of a server's URL; remove it",
        ),
        (
            format!("{prefill} --decode http://a:1#x"),
            "--decode http://a:1#x: a fragment (what follows #) is never sent to a server; remove it",
        ),
        (
            format!("{prefill} --decode http://a:1/x/../y"),
            "--decode http://a:1/x/../y: the path has an empty segment or a dot segment",
        ),
        (
            format!("{prefill} --decode https://-a.:1"),
            "--decode https://-a.:1: the host is not a name that a certificate can be for",
        ),
        (
            format!("{prefill} {decode} --tls-cert-path /nowhere/c.pem --tls-key-path k.pem"),
            "--tls-cert-path /nowhere/c.pem: No such file or directory (os error 2)",
        ),
        (
            format!("{prefill} {decode} --ca-cert-paths /nowhere/a.pem /nowhere/b.pem"),
            "--ca-cert-paths /nowhere/a.pem: No such file or directory (os error 2)",
        ),
        (
            format!("{decode} --prefill http://a:1 65536"),
            "--prefill http://a:1 65536: the bootstrap port must be between 1 and 65535, or none",
        ),
        (
            format!("{decode} --prefill http://a:1 http://b:1"),
            "--prefill http://a:1 http://b:1: the bootstrap port must be between 1 and 65535, or none; write the flag \
             before each URL",
        ),
        (
            format!("{decode} --prefill http://a:1 0"),
            "--prefill http://a:1 0: the bootstrap port must be between 1 and 65535, or none",
        ),
        (
            format!("{prefill} {prefill} {decode}"),
            "http://127.0.0.1:1 is given twice with --prefill: each server may be named once",
        ),
        (
            format!("{prefill} {decode} --decode http://127.0.0.1:1"),
            "http://127.0.0.1:1 is given with --prefill and with --decode: each server may be named once",
        ),
        (
            format!("{prefill} {decode} --prefill-bootstrap-host http://a:1 b"),
            "--prefill-bootstrap-host http://a:1: no --prefill has this URL",
        ),
        (format!("{prefill} {decode} --port 0"), "--port 0: the value must be between 1 and 65535"),
        (
            format!("{prefill} {decode} --request-timeout-secs 0"),
            "--request-timeout-secs 0: the value must be at least 1",
        ),
        (
            format!("{prefill} {decode} --worker-threads 0"),
            "--worker-threads 0: the value must be at least 1",
        ),
        (
            format!("{prefill} {decode} --max-concurrent-requests 0"),
            "--max-concurrent-requests 0: the value must be at least 1",
        ),
        (
            format!("{prefill} {decode} --cors-allowed-origins https://a.example/"),
            "--cors-allowed-origins https://a.example/: not an origin such as https://chat.example.com, or *",
        ),
        (
            format!("{prefill} {decode} --worker-api-key-replaces-authorization"),
            "--worker-api-key-replaces-authorization: there is no --worker-api-key",
        ),
        (
            format!("{prefill} {decode} --api-key ключ"),
            "--api-key ***: the key is not printable ASCII, or has a space at an end",
        ),
        (
            format!("{prefill} {decode} --api-key-file /nowhere"),
            "--api-key-file /nowhere: No such file or directory (os error 2)",
        ),
        (
            format!("{prefill} {decode} --api-key-file /dev/null"),
            "--api-key-file /dev/null: there is no key in the file",
        ),
        (format!("{prefill} {decode} --port 70000"), "--port 70000: the value must be at most 65535"),
        (format!("{prefill} {decode} --port x"), "--port x: not a whole number"),
        (
            format!("{prefill} {decode} --request-timeout-secs 5m"),
            "--request-timeout-secs 5m: not a whole number of seconds",
        ),
        (
            format!("{prefill} {decode} --max-payload-size 10MB"),
            "--max-payload-size 10MB: not a whole number of bytes",
        ),
        (
            format!("{prefill} {decode} --max-concurrent-requests -2"),
            "--max-concurrent-requests -2: not a whole number",
        ),
        (
            format!("{prefill} {decode} --retry-on-status 503,200"),
            "--retry-on-status 200: the value must be between 400 and 599",
        ),
        (
            format!("{prefill} {decode} --admin-api-key a --admin-api-key-file b"),
            "--admin-api-key-file b: cannot be used together with --admin-api-key",
        ),
        (
            format!("{prefill} {decode} --tls-cert-path c.pem"),
            "--tls-cert-path c.pem: --tls-key-path must be given too",
        ),
        (
            format!("{prefill} {decode} --client-key-path k.pem"),
            "--client-key-path k.pem: --client-cert-path must be given too",
        ),
        (
            format!("{prefill} {decode} --log-level trace"),
            "--log-level trace: must be debug, info, warn or error",
        ),
        (format!("{prefill} {decode} --log-format xml"), "--log-format xml: must be text or json"),
        (
            format!("{prefill} {decode} --policy x"),
            "--policy x: must be cache_aware or least_load or power_of_two or consistent_hash or round_robin or random",
        ),
    ] {
        assert_eq!(refused(typed.split_whitespace()), format!("error: {sentence}\n"), "{typed}");
    }
}

#[test]
fn a_wrong_number_of_values_is_named() {
    for (typed, said) in [
        ("--max-payload-size -1", "error: unexpected argument '-1' found"),
        ("--pd-disaggregation true", "error: true: --pd-disaggregation takes no value"),
        ("--port 1 2 --host 127.0.0.1", "error: 2: --port takes one value, and has 1"),
        (
            "--prefill-bootstrap-host http://127.0.0.1:1",
            "error: 2 values required for '--prefill-bootstrap-host",
        ),
        ("--prefill", "error: a value is required for '--prefill"),
        (
            "--decode http://a:1 http://b:1",
            "error: http://b:1: --decode takes one value, and has http://a:1; write --decode before each value\n",
        ),
        ("--decode=http://a:1 8998", "error: 8998: --decode takes one value, and has http://a:1; write"),
        (
            "--prefill http://a:1 8998 8999",
            "error: 8999: --prefill takes up to 2 values, and has http://a:1 8998;",
        ),
        ("--nobody-has-this", "error: unexpected argument '--nobody-has-this' found"),
    ] {
        let stderr = refused(SERVERS.into_iter().chain(typed.split_whitespace()));
        assert!(stderr.starts_with(said), "{typed}: {stderr}");
    }
}

#[test]
fn a_word_without_a_flag_is_named() {
    for word in ["serve", "http://127.0.0.1:1"] {
        let said = refused([word].into_iter().chain(SERVERS));
        assert_eq!(
            said,
            format!("error: {word}: there is no such command; the router takes flags (see --help)\n")
        );
    }
}

#[test]
fn every_unsupported_flag_is_refused_by_name() {
    for (flag, instead) in REFUSED {
        let sentence = format!("error: {flag} is not supported: {instead}\n");
        assert_eq!(refused(SERVERS.into_iter().chain([*flag, "3"])), sentence);
        assert_eq!(refused([format!("{flag}=3").as_str()].into_iter().chain(SERVERS)), sentence);
    }
}

#[test]
fn every_policy_that_does_not_exist_here_is_refused_by_name() {
    for flag in ["--policy", "--prefill-policy", "--decode-policy"] {
        for (policy, instead) in POLICIES {
            let stderr = refused(SERVERS.into_iter().chain([flag, policy]));
            assert_eq!(stderr, format!("error: {flag} {policy} is not supported: {instead}\n"));
        }
    }
}

#[test]
fn every_flag_of_sglang_router_is_supported_accepted_or_refused() {
    for name in SGLANG_ROUTER_0_3_2.split_whitespace() {
        let flag = format!("--{name}");
        let supported = SUPPORTED.iter().any(|(shown, _)| shown.split(' ').next() == Some(&flag));
        let without_effect = WITHOUT_EFFECT.iter().any(|(ignored, _)| *ignored == flag);
        let accepted = without_effect || ACCEPTED.contains(&flag.as_str());
        let refused = REFUSED.iter().any(|(refused, _)| *refused == flag);
        assert_eq!([supported, accepted, refused].iter().filter(|yes| **yes).count(), 1, "{flag}");
    }
}

#[test]
fn values_are_not_mistaken_for_unsupported_flags() {
    let router = start_plain(&["--prefill-bootstrap-host", "http://127.0.0.1:1", "api-key"]);
    router.wait_for("listening on ");
    let stderr = refused(["--prefill=--api-key", "--decode", "http://127.0.0.1:2"].into_iter());
    assert!(stderr.starts_with("error: --prefill --api-key: "), "{stderr}");
}

#[test]
fn help_is_grouped_and_shows_every_flag_with_its_default() {
    let output = finish(["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.lines().all(|line| line.len() <= 100), "{help}");
    assert!(help.contains("\n       mini-lb top [URL] [--once]\n"), "{help}");
    let mut rest = help.as_str();
    for heading in [
        "Servers",
        "Load balancing",
        "Listening",
        "Limits and timeouts",
        "Concurrency and rate limits",
        "Authentication and CORS",
        "Health checks",
        "Discovery and startup",
        "Sockets and threads",
        "Admin listener",
        "Logging",
        "Traces",
        "Compatibility",
        "Help",
        "Examples",
    ] {
        let at =
            rest.find(&format!("\n{heading}:\n")).unwrap_or_else(|| panic!("{heading} in order: {help}"));
        rest = &rest[at + 1..];
    }
    // A long line may be wrapped anywhere.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for (flag, default) in SUPPORTED {
        let (_, after) = help.split_once(&format!(" {flag} ")).unwrap_or_else(|| panic!("{flag} in: {help}"));
        let text = after.split(" --").next().unwrap();
        // The default of a role's policy is itself a flag.
        assert!(
            text.contains(default) || after.contains(default) && default.contains("--"),
            "{flag}: {text}"
        );
    }
    for flag in ["--pd-disaggregation", "--mini-lb"] {
        assert!(help.contains(&format!("{flag} Accepted for compatibility")), "{flag}");
    }
    assert!(!help.contains("--disable-circuit-breaker"), "{help}");
}

#[test]
fn help_and_version_are_answered_before_anything_is_refused() {
    let output = finish(["-h", "--api-key", "x"]);
    assert_eq!(output.status.code(), Some(0));
    let output = finish(["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        concat!("mini-lb ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn an_address_in_use_is_named_with_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let typed = ["--host", "127.0.0.1", "--log-level", "error", "--port"];
    let output = finish(SERVERS.into_iter().chain(typed).chain([port.to_string().as_str()]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let sentence = format!(
        "error: cannot listen on 127.0.0.1:{port}: Address already in use (os error 98); another process listens \
         there, perhaps another router (--host, --port)\n"
    );
    assert_eq!((output.status.code(), stderr), (Some(1), sentence));
}

#[test]
fn an_address_that_cannot_be_had_is_named_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let free = free_port().to_string();
    for (typed, sentence) in [
        (
            // Of a range for documents (RFC 5737), which no machine has.
            ["--host", "192.0.2.1", "--port", &free],
            format!(
                "cannot listen on 192.0.2.1:{free}: Cannot assign requested address (os error 99); it is no address of \
                 this machine (0.0.0.0 stands for all of them) (--host, --port)"
            ),
        ),
        (
            ["--port", &free, "--prometheus-port", &port],
            format!(
                "metrics (--prometheus-port): cannot listen on 127.0.0.1:{port}: Address already in use (os error 98); \
                 another process listens there, perhaps another router"
            ),
        ),
    ] {
        let quiet = ["--log-level", "error"];
        let output = finish(SERVERS.into_iter().chain(quiet).chain(typed));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr), (Some(1), format!("error: {sentence}\n")));
    }
}

/// The program with two servers and a free port, before `args`.
fn start_plain(args: &[&str]) -> Program {
    let port = free_port().to_string();
    let plain = SERVERS.into_iter().chain(["--host", "127.0.0.1", "--port", &port, LAME_DUCK, "0"]);
    Program::start(plain.chain(args.iter().copied()))
}

/// An open request: the prefill server has it and does not respond.
struct OpenRequest {
    router: Program,
    client: TcpStream,
    _servers: [TcpListener; 2],
    _leg: TcpStream,
}

impl OpenRequest {
    fn start(args: &[&str]) -> Self {
        let servers = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [prefill, decode] =
            servers.each_ref().map(|server| format!("http://{}", server.local_addr().unwrap()));
        let port = free_port().to_string();
        let typed = ["--prefill", &prefill, "--decode", &decode, "--host", "127.0.0.1", "--port", &port];
        // The connection of a health check would be taken for that of the request.
        let quiet = ["--disable-health-check", LAME_DUCK, "0"];
        let router = Program::start(typed.into_iter().chain(quiet).chain(args.iter().copied()));
        let client = post_generate(&port);
        let leg = accept(&servers[0]);
        Self { router, client, _servers: servers, _leg: leg }
    }
}

/// The output of a program that is expected to end by itself.
fn finish<'a>(args: impl IntoIterator<Item = &'a str>) -> Output {
    program::output(args, &[])
}

/// The error of a program that refuses its command line.
fn refused<'a>(args: impl Iterator<Item = &'a str>) -> String {
    let output = finish(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    stderr
}

/// Connects as soon as the port is open.
fn connect(port: &str) -> TcpStream {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match TcpStream::connect(format!("127.0.0.1:{port}")) {
            Ok(stream) => {
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "no listener on {port}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn accept(listener: &TcpListener) -> TcpStream {
    let deadline = Instant::now() + DEADLINE;
    listener.set_nonblocking(true).unwrap();
    loop {
        match listener.accept() {
            Ok((stream, _)) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "no connection: {error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn get(path: &str, port: &str) -> String {
    let mut stream = connect(port);
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
        .unwrap();
    status_line(stream)
}

/// Sends a body of 12 bytes.
fn post_generate(port: &str) -> TcpStream {
    let mut stream = connect(port);
    let head = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 12\r\n\r\n";
    stream.write_all(format!("{head}{{\"text\":\"x\"}}").as_bytes()).unwrap();
    stream
}

fn status_line(stream: TcpStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[cfg(not(feature = "kubernetes"))]
#[test]
fn flags_of_kubernetes_are_refused_by_a_program_that_was_built_without_it() {
    for args in [
        &["--service-discovery"][..],
        &["--selector", "app=sglang"],
        &["--prefill-selector", "app=sglang", "role=prefill"],
        &["--decode-selector", "app=sglang"],
        &["--service-discovery-port", "8000"],
        &["--service-discovery-namespace", "llm"],
    ] {
        let output = program::output(args.iter().copied(), &[]);
        let flag = args[0];
        let said = format!(
            "error: {flag} is not supported: this program was built without the feature kubernetes; build it with \
             `cargo build --release --features kubernetes`, or give headless services with --prefill-dns and \
             --decode-dns\n"
        );
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()),
            (Some(2), said)
        );
    }
    // In a file or a variable too.
    let output = program::output([], &[("MINI_LB_SELECTOR", "app=sglang")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("built without the feature kubernetes"), "{said}");
}

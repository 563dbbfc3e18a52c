//! The built router between real clients and simulated servers: the official `openai` packages of Python and
//! Node, `anthropic`, `litellm`, `langchain-openai`, `lm_eval` and `requests`. What each client checks is in
//! tests/real_clients/; what the servers saw of it is checked here.

mod kit;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use kit::processes::{BuiltRouter, ChildProcess, Servers, command, node, python, wait_until};
use loadtest::sim::{RecordedRequest, Sim, SimConfig};

const KEY: &str = "a key that every server asks for";

/// What a parse and re-serialisation would change: escapes, spaces, numbers, duplicate keys, bytes behind the
/// object.
const ODD_BODY: &str = concat!(
    " \t{\"text\":\"caf\\u00e9 \\/ 🙂\", \"ключ \\\"x\\\"\" : [1.0,1e2 , -0.0, 12345678901234567890],",
    "\"sampling_params\" :{\"max_new_tokens\":2},\"twice\":1,\"twice\":{\"bootstrap_room\":5}}\r\n "
);

fn script(name: &str) -> String {
    format!("{}/tests/real_clients/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Servers that take 1 ms per token and require the key.
fn servers() -> Servers {
    Servers::start(|config| SimConfig {
        api_key: Some(KEY.to_owned()),
        inter_token: Duration::from_millis(1),
        ..config
    })
}

/// Runs a script that sends the same requests to the router and to a single server and compares the
/// responses.
fn compare(servers: &Servers, router: &BuiltRouter, program: &str, args: &[&str]) -> ChildProcess {
    let single = servers.single.url();
    let environment =
        [("ROUTER", router.url.as_str()), ("ALONE", &single), ("API_KEY", KEY), ("ODD_BODY", ODD_BODY)];
    let mut client = ChildProcess::start(command(program, args.iter().copied(), &environment));
    client.expect_success();
    client
}

/// The same for a Python script, of which no test may be left out.
fn compare_in_python(servers: &Servers, router: &BuiltRouter, python: &Path, name: &str) {
    // The packages warn of their own types, at length.
    let args = ["-X", "utf8", "-W", "ignore", &script(name)];
    let report = compare(servers, router, &python.to_string_lossy(), &args).stderr.text();
    assert!(report.trim_end().ends_with("\nOK"), "tests were left out:\n{report}");
}

fn has_key(seen: &RecordedRequest) -> bool {
    seen.header("authorization") == Some(&format!("Bearer {KEY}"))
}

/// The generation requests of a server, by bootstrap room.
fn by_room(server: &Sim) -> HashMap<i64, RecordedRequest> {
    let seen: Vec<RecordedRequest> =
        server.recorded_requests().into_iter().filter(|seen| seen.room.is_some()).collect();
    let count = seen.len();
    let by_room: HashMap<i64, RecordedRequest> =
        seen.into_iter().filter_map(|seen| Some((seen.room?, seen))).collect();
    assert_eq!(by_room.len(), count, "a room was given twice");
    by_room
}

/// Whether it is one of the requests that every server rejects. After one rejection the other leg may not be
/// sent.
fn is_wrong(seen: &RecordedRequest) -> bool {
    let body = String::from_utf8_lossy(&seen.body);
    body.contains(r#""temperature":-1"#)
        || body.contains(r#""model":"huge""#)
        || body.starts_with(r#"{"bootstrap_"#)
}

/// Checks that both legs of every request are equal but for host and accepted codings, and returns the number
/// of requests.
fn check_legs(servers: &Servers) -> usize {
    let (prefill, decode) = (by_room(&servers.pair.prefill), by_room(&servers.pair.decode));
    let others = |seen: &RecordedRequest| -> Vec<_> {
        let differs = |name: &str| ["host", "accept-encoding"].contains(&name);
        seen.headers.iter().filter(|(name, _)| !differs(name)).cloned().collect()
    };
    for (room, to_prefill) in &prefill {
        let Some(to_decode) = decode.get(room) else {
            assert!(is_wrong(to_prefill), "decode never got room {room}");
            continue;
        };
        assert_eq!(to_prefill.method, to_decode.method);
        assert_eq!(to_prefill.path_and_query, to_decode.path_and_query);
        assert_eq!(to_prefill.body, to_decode.body);
        assert_eq!(others(to_prefill), others(to_decode));
        assert_eq!(to_prefill.header("accept-encoding"), Some("identity"));
        assert!(has_key(to_prefill), "{:?}", to_prefill.headers);
    }
    for (room, to_decode) in &decode {
        assert!(prefill.contains_key(room) || is_wrong(to_decode), "prefill never got room {room}");
    }
    for server in [&servers.pair.prefill, &servers.pair.decode] {
        wait_until("no generation is left", || server.stats().in_flight == 0);
        let stats = server.stats();
        assert_eq!((stats.crashes, stats.mismatches, stats.aborted), (0, 0, 0), "{stats:?}");
    }
    prefill.values().filter(|seen| !is_wrong(seen)).count()
}

/// The request that a client marked with an `x-test` header.
fn marked(server: &Sim, mark: &str) -> RecordedRequest {
    let mut seen = server.recorded_requests().into_iter().filter(|seen| seen.header("x-test") == Some(mark));
    let first = seen.next().unwrap_or_else(|| panic!("no request is marked {mark}"));
    assert!(seen.next().is_none(), "two requests are marked {mark}");
    first
}

#[test]
fn python_clients_get_the_responses_of_a_single_server() {
    let Some(python) = python() else { return };
    let servers = servers();
    let router = BuiltRouter::start(&servers);
    compare_in_python(&servers, &router, python, "test_openai.py");
    let count = check_legs(&servers);
    assert!(count >= 100, "{count} requests");

    let bootstrap = servers.pair.prefill.bootstrap_port().expect("a bootstrap port");
    for server in [&servers.pair.prefill, &servers.pair.decode] {
        let odd = marked(server, "odd");
        let room = odd.room.expect("a room");
        let fields =
            format!(r#","bootstrap_host":"127.0.0.1","bootstrap_port":{bootstrap},"bootstrap_room":{room}"#);
        let (before, after) = ODD_BODY.rsplit_once('}').expect("an object");
        assert_eq!(String::from_utf8_lossy(&odd.body), format!("{before}{fields}}}{after}"));

        let extra = marked(server, "extra");
        assert_eq!(extra.path_and_query, "/v1/chat/completions?trace=1");
        let body: serde_json::Value = serde_json::from_slice(&extra.body).expect("JSON");
        assert_eq!(body["unknown field ✓"], serde_json::json!([1.1, "é\u{2028}🙂", null]));

        assert!(
            server.recorded_requests().iter().any(|seen| seen.path_and_query == "/flush_cache?timeout=10")
        );
    }
}

/// What a client of another package gets is what a single server says, and both legs are equal.
fn gets_the_responses_of_a_single_server(name: &str, requests: usize) {
    let Some(python) = python() else { return };
    let servers = servers();
    let router = BuiltRouter::start(&servers);
    compare_in_python(&servers, &router, python, name);
    let count = check_legs(&servers);
    assert!(count >= requests, "{count} requests");
}

#[test]
fn anthropic_client_gets_the_responses_of_a_single_server() {
    gets_the_responses_of_a_single_server("test_anthropic.py", 8);
}

#[test]
fn litellm_gets_the_responses_of_a_single_server() {
    gets_the_responses_of_a_single_server("test_litellm.py", 10);
}

#[test]
fn langchain_gets_the_responses_of_a_single_server() {
    gets_the_responses_of_a_single_server("test_langchain.py", 15);
}

#[test]
fn lm_evaluation_harness_gets_the_numbers_of_a_single_server() {
    gets_the_responses_of_a_single_server("test_lm_eval.py", 100);
}

#[test]
fn node_client_gets_the_responses_of_a_single_server() {
    let Some(folder) = node() else { return };
    let servers = servers();
    let tests = folder.join("test_openai.mjs");
    let router = BuiltRouter::start(&servers);
    let client =
        compare(&servers, &router, "node", &["--test", "--test-reporter=tap", &tests.to_string_lossy()]);
    let report = client.stdout.text();
    for line in ["# pass 18", "# fail 0", "# skipped 0"] {
        assert!(report.lines().any(|own| own == line), "{line}:\n{report}");
    }
    let count = check_legs(&servers);
    assert!(count >= 20, "{count} requests");
}

/// Runs cancel.py or cancel.mjs until its request has begun.
fn begin(router: &BuiltRouter, program: &str, args: &[&str]) -> ChildProcess {
    let environment = [("ROUTER", router.url.as_str()), ("API_KEY", "any")];
    let mut client = ChildProcess::start(command(program, args.iter().copied(), &environment));
    client.wait_for("begun\n");
    client
}

/// How many samples a client of cancel.py or an API of cancel.mjs asks for.
fn samples_of(name: &str) -> u64 {
    if name.ends_with("samples") { 3 } else { 1 }
}

/// A stream of minutes, of which prefill has completed its part, ends on decode when the client closes it.
fn closed_stream_ends_decode(program: &str, script: &str, name: &str) {
    let servers = Servers::start(|config| SimConfig { inter_token: Duration::from_millis(5), ..config });
    let router = BuiltRouter::start(&servers);
    let mut client = begin(&router, program, &[script, "stream", name]);
    let (prefill, decode) = (&servers.pair.prefill, &servers.pair.decode);
    let samples = samples_of(name);
    wait_until("prefill has done its part", || prefill.stats().completed == samples);
    assert_eq!(decode.stats().in_flight, samples);
    client.send_newline();
    client.wait_for("given up\n");
    wait_until("decode's connection is closed", || decode.stats().connections_open == 0);
    wait_until("decode has stopped", || decode.stats().in_flight == 0);
    assert_eq!((decode.stats().aborted, prefill.stats().in_flight), (samples, 0));
    // Not because the client process ended.
    assert!(client.is_running());
    client.expect_success();
}

/// A request that prefill has not completed ends on both servers when the client cancels it.
fn given_up_request_ends_both_legs(program: &str, script: &str, name: &str) {
    let servers = Servers::start(|config| SimConfig { prefill_time: Duration::from_secs(3_600), ..config });
    let router = BuiltRouter::start(&servers);
    let mut client = begin(&router, program, &[script, "wait", name]);
    let both = [&servers.pair.prefill, &servers.pair.decode];
    let samples = samples_of(name);
    wait_until("both legs run", || both.iter().all(|server| server.stats().in_flight == samples));
    client.send_newline();
    client.wait_for("given up\n");
    for server in both {
        wait_until("a leg's connection is closed", || server.stats().connections_open == 0);
        wait_until("a leg has stopped", || server.stats().in_flight == 0);
        assert_eq!((server.stats().failed, server.stats().completed), (samples, 0));
    }
    // The server that notices first also aborts its partner.
    assert!(both.iter().map(|server| server.stats().aborted).sum::<u64>() >= samples);
    assert!(client.is_running());
    client.expect_success();
}

/// Every client of cancel.py.
const PYTHON_CLIENTS: [&str; 6] =
    ["openai-chat", "openai-samples", "openai-responses", "anthropic", "litellm", "langchain"];
/// Every API of cancel.mjs.
const NODE_APIS: [&str; 3] = ["chat", "samples", "responses"];

#[test]
fn closing_a_stream_in_python_ends_it_on_decode() {
    let Some(python) = python() else { return };
    for client in PYTHON_CLIENTS {
        closed_stream_ends_decode(&python.to_string_lossy(), &script("cancel.py"), client);
    }
}

#[test]
fn cancelling_a_request_in_python_ends_both_legs() {
    let Some(python) = python() else { return };
    for client in PYTHON_CLIENTS {
        given_up_request_ends_both_legs(&python.to_string_lossy(), &script("cancel.py"), client);
    }
}

#[test]
fn aborting_a_stream_in_node_ends_it_on_decode() {
    let Some(folder) = node() else { return };
    for api in NODE_APIS {
        closed_stream_ends_decode("node", &folder.join("cancel.mjs").to_string_lossy(), api);
    }
}

#[test]
fn aborting_a_request_in_node_ends_both_legs() {
    let Some(folder) = node() else { return };
    for api in NODE_APIS {
        given_up_request_ends_both_legs("node", &folder.join("cancel.mjs").to_string_lossy(), api);
    }
}

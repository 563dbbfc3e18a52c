//! All paths but those that generate: each does what the table of docs/API.md says, and SGLang's server has
//! no path without a row there.

mod kit;

use std::fs;
use std::path::Path;
use std::time::Duration;

use loadtest::sim::{SimConfig, SimPair};

use kit::{Client, Response, Router, ScriptedServer, Step, fixture, json};
use mini_lb::MiniLbConfig;
use serde_json::{Value, json};

const ANSWER: &str = r#"{"success":true,"value":1.50,"loads":[]}"#;
/// A body that every route takes.
const BODY: &str = r#"{"rid":"r1", "session_id":"s1"}"#;

/// A row of the documented table, for one path.
#[derive(Debug)]
struct Row {
    path: String,
    methods: Vec<String>,
    access: String,
    what: String,
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The table of docs/API.md.
fn documented() -> Vec<Row> {
    let document = read("docs/API.md");
    let table = document.split("| path | methods |").nth(1).unwrap().split("\n\n").next().unwrap().to_owned();
    let rows = table.lines().skip(2).flat_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [paths, methods, access, what] = cells[..] else { panic!("{line}") };
        let paths: Vec<&str> = paths.split(", ").map(|path| path.trim_matches('`')).collect();
        let row = |path: &&str| Row {
            path: (*path).to_owned(),
            methods: methods.split(", ").map(str::to_owned).collect(),
            access: access.to_owned(),
            what: what.to_owned(),
        };
        paths.iter().map(row).collect::<Vec<_>>()
    });
    let rows: Vec<Row> = rows.collect();
    assert!(rows.len() > 90, "the rows were found: {}", rows.len());
    rows
}

/// A path without placeholders.
fn concrete(path: &str) -> String {
    let mut segments = path.split('/').map(|segment| if segment.starts_with('{') { "x" } else { segment });
    let first = segments.next().unwrap().to_owned();
    segments.fold(first, |path, segment| path + "/" + segment)
}

async fn send(
    router: &Router,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut client = router.client().await;
    client.send_request(method, target, headers, body).await;
    answer(&mut client, method).await
}

async fn answer(client: &mut Client, method: &str) -> Response {
    let head = client.head().await;
    match method {
        "HEAD" => Response { head, body: Vec::new(), complete: true },
        _ => client.finish_response(head).await,
    }
}

async fn server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", ANSWER)).await
}

/// The method and body of each request with this target.
fn seen(server: &ScriptedServer, target: &str) -> Vec<(String, Vec<u8>)> {
    let requests = server.requests().into_iter().filter(|seen| seen.target() == target);
    let method = |line: &str| line.split(' ').next().unwrap().to_owned();
    requests.map(|seen| (method(&seen.head.start_line), seen.body)).collect()
}

#[tokio::test]
async fn every_route_does_what_the_table_says() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut checked = 0;
    for (number, row) in documented().iter().enumerate() {
        for method in &row.methods {
            let target = format!("{}?n={number}", concrete(&row.path));
            let has_body = method == "POST" || method == "PUT" || row.path.contains("_session");
            let body = if has_body { BODY } else { "" };
            let length = body.len().to_string();
            // The kit sends no length with a `GET`.
            let length = [("content-length", length.as_str())];
            let headers = if method == "GET" && has_body { &length[..] } else { &[] };
            let (before, _) = (seen(&prefill, &target).len(), checked += 1);
            let response = match row.what.split([':', ',', ' ']).next().unwrap() {
                "a" | "as" => continue,
                _ => {
                    let mut client = router.client().await;
                    let head: String =
                        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                    if head.is_empty() {
                        client.send_request(method, &target, &[], body.as_bytes()).await;
                    } else {
                        client
                            .send(format!("{method} {target} HTTP/1.1\r\nhost: r\r\n{head}\r\n{body}"))
                            .await;
                    }
                    answer(&mut client, method).await
                }
            };
            let sent = seen(&prefill, &target).split_off(before);
            let forwarded = if method == "HEAD" { "GET" } else { method };
            let body = if row.path == "/flush_cache" { "" } else { body };
            let expected = vec![(forwarded.to_owned(), body.as_bytes().to_vec())];
            let at_decode = seen(&decode, &target);
            let what = format!("{method} {}: {}", row.path, row.what);
            match row.what.split([':', ',', ' ']).next().unwrap() {
                "the" => assert_eq!((response.status(), sent.len()), (200, 0), "{what}"),
                "one" => {
                    assert_eq!((response.status(), sent, at_decode.len()), (200, expected, 0), "{what}");
                    assert!(method == "HEAD" || response.text() == ANSWER, "{what}");
                }
                "all" => {
                    assert_eq!((response.status(), &sent), (200, &expected), "{what}");
                    assert_eq!(at_decode.last(), expected.last(), "{what}");
                }
                "501" => {
                    assert_eq!((response.status(), sent.len() + at_decode.len()), (501, 0), "{what}");
                    if method != "HEAD" {
                        assert_eq!(response.error_code(), "not_possible_with_pd", "{what}");
                        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
                        let reason = row.what.split(": ").nth(1).unwrap();
                        let (of_pairs, _) = reason.split_once(". With").unwrap();
                        assert!(message.contains(of_pairs), "{message}");
                    }
                }
                "404" => assert_eq!((response.status(), sent.len()), (404, 0), "{what}"),
                _ => panic!("{what}"),
            }
        }
    }
    assert!(checked > 110, "{checked}");
}

#[test]
fn every_route_of_sglang_has_a_decision() {
    let rows = documented();
    for list in ["python_all", "rust"] {
        let list = read(&format!("tests/fixtures/routes/{list}.txt"));
        let lines: Vec<&str> = list.lines().filter(|line| !line.is_empty()).collect();
        assert!(lines.len() > 30, "{lines:?}");
        for line in lines {
            let (method, path) = line.split_once(' ').unwrap();
            let method = if method == "WEBSOCKET" { "GET" } else { method };
            // A trailing slash does not count.
            let path = concrete(path);
            let path = if path == "/" { "/" } else { path.trim_end_matches('/') };
            let row = rows.iter().find(|row| concrete(&row.path) == path);
            let row = row.unwrap_or_else(|| panic!("no row for {line}"));
            // `HEAD` of a `GET` that changes servers, which only SGLang's Rust front end takes.
            let is_left_out = method == "HEAD" && row.what.starts_with("all servers");
            assert!(is_left_out || row.methods.iter().any(|known| known == method), "{line}: {row:?}");
        }
    }
}

#[tokio::test]
async fn paths_without_a_row_reach_no_server() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for path in [
        "/nowhere",
        "/v1",
        "/generate2",
        "/generate/x",
        "/GENERATE",
        "/%67enerate",
        "/v1/chat/completions/x",
        "/./generate",
        "/v1/../generate",
        "/v1/models/../../generate",
        "/v1/models/%2e%2e/%2E%2e/generate",
        "/v1/responses/../cancel",
        "/v1/responses/a/b/cancel",
        "/dumper",
        "/tokenize/x",
    ] {
        for method in ["POST", "PUT", "PATCH", "DELETE", "GET"] {
            let response = send(&router, method, path, &[], BODY.as_bytes()).await;
            assert_eq!(
                (response.status(), response.error_code()),
                (404, "not_found".into()),
                "{method} {path}"
            );
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
}

#[tokio::test]
async fn doubled_and_trailing_slashes_are_one_path_also_for_servers() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for (number, (method, sent, received)) in [
        ("GET", "//v1//models/", "/v1/models"),
        ("GET", "/v1/models//org//name/", "/v1/models/org/name"),
        ("GET", "/health_generate//", "/health_generate"),
        ("POST", "/tokenize/", "/tokenize"),
        ("POST", "//pause_generation", "/pause_generation"),
        ("POST", "/generate/", "/generate"),
        ("PUT", "//generate", "/generate"),
        ("POST", "//v1//chat//completions//", "/v1/chat/completions"),
        ("POST", "/v1/completions/", "/v1/completions"),
    ]
    .into_iter()
    .enumerate()
    {
        let query = format!("?n={number}&a=//b/");
        let response = send(&router, method, &format!("{sent}{query}"), &[], br#"{"text":"a"}"#).await;
        assert_eq!(response.status(), 200, "{sent}");
        assert_eq!(seen(&prefill, &format!("{received}{query}")).len(), 1, "{sent}");
    }
    assert_eq!(send(&router, "GET", "//", &[], b"").await.text(), r#""mini-lb is running""#);
    assert_eq!(send(&router, "GET", "/health/", &[], b"").await.status(), 200);
    assert_eq!(send(&router, "GET", "/workers/", &[], b"").await.json()["total"], 2);
}

#[tokio::test]
async fn request_to_all_is_answered_with_what_each_server_says() {
    let started = fixture("reg/profile_start.resp").unwrap();
    let (prefill, decode) = (ScriptedServer::always(started.raw).await, server().await);
    let silent = ScriptedServer::always(fixture("reg/post_abort_unknown.resp").unwrap().raw).await;
    let router = Router::start(&[&prefill], &[&decode, &silent]).await;
    let body = br#"{"num_steps": 5,  "n":1e3}"#;
    let response = send(
        &router,
        "POST",
        "/start_profile?a=b",
        &[("content-type", "application/json"), ("x-a", "1")],
        body,
    )
    .await;
    assert_eq!((response.status(), response.head.header("content-type")), (200, Some("application/json")));
    let got = response.json();
    assert_eq!(got["success"], true);
    assert_eq!(
        got["servers"][0],
        json!({"url": prefill.url(), "role": "prefill", "status": 200, "response": "Start profiling.\n"})
    );
    assert_eq!(
        (&got["servers"][1]["role"], &got["servers"][2]["response"]),
        (&json!("decode"), &Value::Null)
    );
    // The server's own bytes, also of numbers.
    assert!(response.text().contains(&format!("\"response\":{ANSWER}")), "{}", response.text());
    for server in [&prefill, &decode, &silent] {
        let seen = server.only_request().await;
        assert_eq!(seen.head.start_line, "POST /start_profile?a=b HTTP/1.1");
        assert_eq!((&seen.body[..], seen.head.header("x-a")), (&body[..], Some("1")));
    }
}

#[tokio::test]
async fn servers_that_fail_a_request_to_all_are_named() {
    let refusing =
        || ScriptedServer::always(json("400 Bad Request", r#"{"success":false,"message":"no such LoRA"}"#));
    let disguised = || ScriptedServer::always(json("200 OK", r#"{"success":false,"message":"not paused"}"#));
    let path = "/unload_lora_adapter";

    let (prefill, decode, refuser) = (server().await, server().await, refusing().await);
    let router = Router::start(&[&prefill], &[&decode, &refuser]).await;
    let response = send(&router, "POST", path, &[], b"{}").await;
    assert_eq!((response.status(), response.error_code()), (400, "fan_out_failed".into()));
    let servers = response.json()["servers"].clone();
    assert_eq!(servers.as_array().unwrap().len(), 1, "{servers}");
    assert_eq!((&servers[0]["url"], &servers[0]["status"]), (&json!(refuser.url()), &json!(400)));
    assert!(servers[0]["message"].as_str().unwrap().contains("no such LoRA"), "{servers}");

    let (prefill, disguiser, gone) = (server().await, disguised().await, server().await);
    let gone_url = gone.url();
    let router = Router::start(&[&prefill], &[&disguiser, &gone]).await;
    drop(gone);
    let response = send(&router, "POST", path, &[], b"{}").await;
    assert_eq!((response.status(), response.error_code()), (502, "fan_out_failed".into()));
    let servers = response.json()["servers"].clone();
    assert_eq!(
        servers[0],
        json!({"url": disguiser.url(), "role": "decode", "status": 200, "message": "not paused"})
    );
    assert_eq!((&servers[1]["url"], &servers[1]["status"]), (&json!(gone_url), &Value::Null));
}

#[tokio::test]
async fn server_that_hangs_fails_a_request_to_all_after_its_timeout() {
    let (prefill, hanging) = (server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let router = Router::start(&[&prefill], &[&hanging]).await;
    for path in ["/pause_generation", "/abort_request", "/open_session", "/v1/loads"] {
        let method = if path == "/v1/loads" { "GET" } else { "POST" };
        let body = if method == "GET" { "" } else { BODY };
        let response = send(&router, method, &format!("{path}?timeout=0.2"), &[], body.as_bytes()).await;
        assert_eq!(response.status(), if method == "GET" { 200 } else { 502 }, "{path}");
        assert!(response.text().contains(&hanging.url()), "{}", response.text());
        let invalid = send(&router, method, &format!("{path}?timeout=x"), &[], body.as_bytes()).await;
        assert_eq!((invalid.status(), invalid.error_code()), (400, "invalid_admin_request".into()));
    }
}

#[tokio::test]
async fn request_without_servers_is_503() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for worker in send(&router, "GET", "/workers", &[], b"").await.json()["workers"].as_array().unwrap() {
        let path = format!("/workers/{}", worker["id"].as_str().unwrap());
        assert_eq!(send(&router, "DELETE", &path, &[], b"").await.status(), 200);
    }
    for (method, path) in [("POST", "/pause_generation"), ("POST", "/abort_request"), ("POST", "/tokenize")] {
        let response = send(&router, method, path, &[], BODY.as_bytes()).await;
        assert_eq!((response.status(), response.error_code()), (503, "prefill_unavailable".into()), "{path}");
    }
}

#[tokio::test]
async fn routes_that_change_servers_need_the_admin_key() {
    let (prefill, decode) = (server().await, server().await);
    let keyed =
        |config: MiniLbConfig| config.api_key("client").admin_api_key("admin").worker_api_key("worker");
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let rows = documented();
    let operators: Vec<&Row> =
        rows.iter().filter(|row| row.access == "operators" && !row.what.starts_with("as on")).collect();
    assert!(operators.len() > 30, "{}", operators.len());
    for row in operators {
        let (path, method) = (concrete(&row.path), &row.methods[0]);
        for key in ["Bearer client", "Bearer worker", ""] {
            let response = send(&router, method, &path, &[("authorization", key)], BODY.as_bytes()).await;
            assert_eq!(response.status(), 401, "{method} {path} {key}");
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
    let admin = [("authorization", "Bearer admin")];
    for path in ["/pause_generation", "/get_weights_by_name"] {
        assert_eq!(send(&router, "POST", path, &admin, b"{}").await.status(), 200);
        let sent = prefill.requests().pop().unwrap();
        // The admin key does not leave the router.
        assert_eq!(sent.head.header("authorization"), Some("Bearer worker"), "{path}");
    }
}

#[tokio::test]
async fn routes_that_change_servers_are_served_to_loopback_without_an_admin_key() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for header in
        [("x-forwarded-for", "10.0.0.1"), ("origin", "http://evil.example"), ("sec-fetch-site", "cross-site")]
    {
        let response = send(&router, "GET", "/release_memory_occupation", &[header], b"").await;
        assert_eq!((response.status(), response.error_code()), (403, "admin_forbidden".into()), "{header:?}");
        // What clients may do is not the admin's.
        assert_eq!(send(&router, "POST", "/tokenize", &[header], b"{}").await.status(), 200, "{header:?}");
    }
    assert_eq!(decode.connections(), 0);
    let key = [("authorization", "Bearer of-the-servers")];
    assert_eq!(send(&router, "POST", "/pause_generation", &key, b"{}").await.status(), 200);
    assert_eq!(decode.only_request().await.head.header("authorization"), Some("Bearer of-the-servers"));
}

#[tokio::test]
async fn client_aborts_a_request_and_an_operator_all_of_them() {
    let (prefill, decode) = (server().await, server().await);
    let keyed = |config: MiniLbConfig| config.api_key("client").admin_api_key("admin");
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let open = Router::start(&[&prefill], &[&decode]).await;
    let (client, admin, proxied) = (
        ("authorization", "Bearer client"),
        ("authorization", "Bearer admin"),
        ("x-forwarded-for", "10.0.0.1"),
    );
    let (one, all) = (r#"{"rid":"r1"}"#, r#"{"abort_all":true}"#);
    let mut reached = 0;
    for (router, header, body, expected) in [
        (&router, client, one, 200),
        (&router, client, all, 403),
        (&router, client, r#"{"rid":"r1","abort_all":"true"}"#, 403),
        (&router, client, r#"{"rid":"r1","abort\u005fall":1}"#, 403),
        (&router, client, r#"{"rid":""}"#, 400),
        (&router, client, "{}", 400),
        (&router, client, "not json", 400),
        (&router, ("authorization", "Bearer other"), one, 401),
        (&router, admin, one, 200),
        (&router, admin, all, 200),
        (&open, ("x-a", "1"), all, 200),
        (&open, proxied, all, 403),
        (&open, proxied, one, 200),
    ] {
        let response = send(router, "POST", "/abort_request", &[header], body.as_bytes()).await;
        assert_eq!(response.status(), expected, "{header:?} {body}: {}", response.text());
        reached += usize::from(expected == 200);
        assert_eq!(
            (prefill.requests().len(), decode.requests().len()),
            (reached, reached),
            "{header:?} {body}"
        );
        if expected == 200 {
            let sent = decode.requests().pop().unwrap();
            assert_eq!(sent.body, body.as_bytes());
            assert_ne!(sent.head.header("authorization"), Some("Bearer admin"));
        }
    }
}

#[tokio::test]
async fn abort_by_rid_ends_the_request_at_its_servers() {
    let slow = SimConfig { inter_token: Duration::from_secs(3_600), ..SimConfig::decode() };
    let pair = SimPair::start(SimConfig::prefill(), slow).await.unwrap();
    let prefill = vec![(pair.prefill.url(), pair.prefill.bootstrap_port())];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![pair.decode.url()], 60);
    let router = Router::start_with_config(config.worker_threads(1)).await;
    let mut client = router.client().await;
    let body = br#"{"text":"a b","stream":true,"rid":"one","sampling_params":{"max_new_tokens":9}}"#;
    client.send_request("POST", "/generate", &[("content-type", "application/json")], body).await;
    client.read_until("data: ").await;
    let abort = |rid: &str| format!(r#"{{"rid":"{rid}"}}"#);
    let other = send(&router, "POST", "/abort_request", &[], abort("two").as_bytes()).await;
    assert_eq!((other.status(), pair.decode.stats().aborted), (200, 0));
    let response = send(&router, "POST", "/abort_request", &[], abort("one").as_bytes()).await;
    let servers = response.json()["servers"].as_array().unwrap().len();
    assert_eq!((response.status(), servers), (200, 2));
    let ended = client.response().await;
    assert!(ended.complete && ended.text().contains(r#""type":"abort""#), "{}", ended.text());
    assert_eq!(pair.decode.stats().aborted, 1);
    for server in [&pair.prefill, &pair.decode] {
        let seen = server.recorded_requests();
        let aborts = seen.iter().filter(|seen| seen.path_and_query == "/abort_request");
        assert_eq!(aborts.map(|seen| seen.body.clone()).collect::<Vec<_>>(), [abort("two"), abort("one")]);
    }
}

/// Of two pairs, those servers that have the request are asked, and all if nobody is known to have it.
#[tokio::test]
async fn abort_by_rid_goes_to_the_two_servers_that_have_the_request() {
    let server = || {
        ScriptedServer::start(|request| match request.target() {
            "/abort_request" => vec![Step::Send(json("200 OK", ""))],
            _ => vec![Step::Hang],
        })
    };
    let [p1, p2, d1, d2] = [server().await, server().await, server().await, server().await];
    let all = [&p1, &p2, &d1, &d2];
    let router = Router::start(&all[..2], &all[2..]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a","rid":"one"}"#).await;
    kit::with_timeout("both legs", async {
        while all.iter().filter(|server| !server.requests().is_empty()).count() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let counts = || all.map(|server| server.requests().len());
    let with_request = counts();
    // A prefix of the id, as SGLang understands it, and an item of a batch.
    for (number, rid) in ["one", "on", "one_3"].into_iter().enumerate() {
        let body = format!(r#"{{"rid":"{rid}"}}"#);
        let response = send(&router, "POST", "/abort_request", &[], body.as_bytes()).await;
        assert_eq!(response.status(), 200);
        assert_eq!(counts(), with_request.map(|request| request * (number + 2)), "{rid}");
    }
    let before = counts();
    send(&router, "POST", "/abort_request", &[], br#"{"rid":"two"}"#).await;
    assert_eq!(counts(), before.map(|count| count + 1));
    drop(client);
}

#[tokio::test]
async fn abort_reaches_a_removed_server_that_still_has_requests() {
    let busy = || {
        ScriptedServer::start(|seen| match seen.target() {
            "/generate" => vec![Step::Hang],
            _ => vec![Step::Send(json("200 OK", ANSWER))],
        })
    };
    let (prefill, removed, decode) = (busy().await, busy().await, server().await);
    let router = Router::start(&[&prefill], &[&removed]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a","rid":"r1"}"#).await;
    removed.wait_for_requests(1).await;
    let workers = send(&router, "GET", "/workers", &[], b"").await.json()["workers"].clone();
    let worker = workers.as_array().unwrap().iter().find(|worker| worker["url"] == removed.url()).unwrap();
    let path = format!("/workers/{}", worker["id"].as_str().unwrap());
    assert_eq!(send(&router, "DELETE", &path, &[], b"").await.status(), 202);
    let added = json!({"url": decode.url(), "worker_type": "decode"}).to_string();
    assert_eq!(send(&router, "POST", "/workers", &[], added.as_bytes()).await.status(), 202);
    for (path, at_removed) in [("/abort_request", 1), ("/pause_generation", 0)] {
        // An id that is not known here may be of another router's request.
        assert_eq!(send(&router, "POST", path, &[], br#"{"rid":"r2"}"#).await.status(), 200, "{path}");
        assert_eq!(seen(&removed, path).len(), at_removed, "{path}");
        assert_eq!((seen(&prefill, path).len(), seen(&decode, path).len()), (1, 1), "{path}");
    }
}

#[tokio::test]
async fn session_without_an_id_of_its_own_is_refused() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for body in
        ["", "{}", "[]", r#"{"session_id":null}"#, r#"{"session_id":""}"#, r#"{"capacity_of_str_len":9}"#]
    {
        for path in ["/open_session", "/close_session"] {
            let response = send(&router, "POST", path, &[], body.as_bytes()).await;
            assert_eq!((response.status(), response.error_code()), (400, "invalid_admin_request".into()));
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
}

#[tokio::test]
async fn one_server_answers_byte_for_byte() {
    for (method, target, name) in [
        ("POST", "/v1/tokenize", "tokenize"),
        ("POST", "/v1/messages/count_tokens", "count_tokens"),
        ("GET", "/v1/responses/resp_nope", "responses_get"),
        ("POST", "/v1/responses/resp_nope/cancel", "responses_cancel"),
    ] {
        let recording = fixture(&format!("reg/{name}.resp")).unwrap();
        let request = fixture(&format!("reg/{name}.req")).unwrap();
        let (prefill, decode) = (ScriptedServer::always(recording.raw.clone()).await, server().await);
        let router = Router::start(&[&prefill], &[&decode]).await;
        let response =
            send(&router, method, target, &[("content-type", "application/json")], &request.body).await;
        assert_eq!(response.head.start_line, recording.head.start_line, "{target}");
        assert_eq!((&response.body, response.head.header("server")), (&recording.body, Some("uvicorn")));
        assert_eq!(prefill.only_request().await.body, request.body);
        assert_eq!(decode.connections(), 0);
    }
}

#[tokio::test]
async fn another_server_is_asked_after_a_failure() {
    let (broken, prefill, decode) =
        (ScriptedServer::always(json("500 Oops", "no")).await, server().await, server().await);
    let gone = server().await;
    let router = Router::start(&[&gone, &broken, &prefill], &[&decode]).await;
    drop(gone);
    let body = br#"{"prompt":"a"}"#;
    let response = send(&router, "POST", "/tokenize", &[], body).await;
    assert_eq!((response.status(), response.text()), (200, ANSWER));
    assert_eq!(
        (broken.only_request().await.body, prefill.only_request().await.body),
        (body.to_vec(), body.to_vec())
    );
}

#[tokio::test]
async fn at_most_four_servers_are_asked_for_one_answer() {
    let mut broken = Vec::new();
    for _ in 0..6 {
        broken.push(ScriptedServer::always(json("503 Busy", r#"{"a":1}"#)).await);
    }
    let decode = server().await;
    let router = Router::start(&broken.iter().collect::<Vec<_>>(), &[&decode]).await;
    let response = send(&router, "POST", "/detokenize", &[], b"{}").await;
    assert_eq!((response.status(), response.text()), (503, r#"{"a":1}"#));
    assert_eq!(broken.iter().map(|server| server.requests().len()).sum::<usize>(), 4);
}

#[tokio::test]
async fn bodies_are_bounded_and_passed_on_whole() {
    let (prefill, decode) = (server().await, server().await);
    let small = |config: MiniLbConfig| config.max_payload_size(1 << 20);
    let router = Router::start_with(&[&prefill], &[&decode], small).await;
    let body = vec![b'x'; 1 << 20];
    for path in ["/tokenize", "/update_weights_from_tensor"] {
        assert_eq!(send(&router, "POST", path, &[], &body).await.status(), 200, "{path}");
        assert_eq!(prefill.requests().pop().unwrap().body, body);
        let mut client = router.client().await;
        client.send(format!("POST {path} HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n")).await;
        for piece in body.chunks(100_000) {
            client.send([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await;
        }
        client.send("0\r\n\r\n").await;
        assert_eq!(client.response().await.status(), 200, "{path}");
        assert_eq!(prefill.requests().pop().unwrap().body, body);
    }
    assert_eq!(router.buffered_bytes(), 0);
    let reached = prefill.requests().len();
    for (path, length) in
        [("/tokenize", 1 << 20), ("/update_weights_from_tensor", 1 << 20), ("/abort_request", 64 << 10)]
    {
        let response = send(&router, "POST", path, &[], &vec![b' '; length + 1]).await;
        assert_eq!((response.status(), response.error_code()), (413, "body_too_large".into()), "{path}");
    }
    assert_eq!(prefill.requests().len(), reached);
}

#[tokio::test]
async fn loads_of_all_servers_are_one_document() {
    let recorded = |role: &str| fixture(&format!("pd_info/{role}_v1_loads.resp")).unwrap();
    let prefill = ScriptedServer::always(recorded("prefill").raw).await;
    let decode = ScriptedServer::always(recorded("decode").raw).await;
    let (gone, silly) = (server().await, ScriptedServer::always(json("200 OK", "[]")).await);
    let gone_url = gone.url();
    let router = Router::start(&[&prefill], &[&decode, &gone, &silly]).await;
    drop(gone);
    let response = send(&router, "GET", "/v1/loads?include=core", &[], b"").await;
    assert_eq!(response.status(), 200);
    let got = response.json();
    let mut expected = Vec::new();
    for (role, server) in [("prefill", &prefill), ("decode", &decode)] {
        let mut own: Value = serde_json::from_slice(&recorded(role).body).unwrap();
        let mut load = own["loads"][0].take();
        load["server"] = server.url().into();
        load["role"] = role.into();
        expected.push(load);
    }
    assert_eq!(got["loads"], json!(expected));
    assert_eq!((&got["failed"][0]["url"], &got["failed"][0]["status"]), (&json!(gone_url), &Value::Null));
    assert_eq!(got["failed"][1]["message"], "the response is not JSON");
    assert!(response.text().contains(r#""weight_gb":-0.0"#), "numbers stay as they were written");
    assert_eq!(prefill.only_request().await.target(), "/v1/loads?include=core");
}

#[tokio::test]
async fn loads_for_prometheus_have_their_server_as_a_label() {
    let text = |value: u32| {
        let text = format!("# HELP sglang_a A.\n# TYPE sglang_a gauge\nsglang_a{{dp_rank=\"0\"}} {value}\n");
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n";
        format!("{head}content-length: {}\r\n\r\n{text}", text.len())
    };
    let prefill = ScriptedServer::always(text(1)).await;
    let decode = ScriptedServer::always(text(2)).await;
    let old = server().await;
    let router = Router::start(&[&prefill], &[&decode, &old]).await;
    let response = send(&router, "GET", "/v1/loads?format=prometheus", &[], b"").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.head.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let (failed, rest) = response.text().split_once('\n').unwrap();
    assert!(failed.starts_with("# failed: ") && failed.contains(&old.url()), "{failed}");
    let sample = |server: &ScriptedServer, role: &str, value: u32| {
        format!("sglang_a{{server=\"{}\",role=\"{role}\",dp_rank=\"0\"}} {value}\n", server.url())
    };
    let samples = sample(&prefill, "prefill", 1) + &sample(&decode, "decode", 2);
    assert_eq!(rest, format!("# HELP sglang_a A.\n# TYPE sglang_a gauge\n{samples}"));
    drop((prefill, decode, old));
    assert_eq!(send(&router, "GET", "/v1/loads?format=prometheus", &[], b"").await.status(), 502);
    assert_eq!(send(&router, "GET", "/v1/loads", &[], b"").await.status(), 502);
}

#[tokio::test]
async fn probes_need_no_key_and_other_routes_do() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.api_key("k")).await;
    for row in documented() {
        let target = concrete(&row.path);
        for method in row.methods.iter().filter(|_| row.access != "operators") {
            let response = send(&router, method, &target, &[], b"").await;
            let expected = if row.access == "everyone" { 200 } else { 401 };
            assert_eq!(response.status(), expected, "{method} {target}");
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
    let version = send(&router, "GET", "/version", &[("authorization", "Bearer k")], b"").await.json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn head_has_the_headers_of_get_and_no_body() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for target in ["/", "/ping", "/version", "/v1/models", "/server_info", "/v1/loads", "/health_generate"] {
        let mut client = router.client().await;
        let get = client.get(target).await;
        client.send_request("HEAD", target, &[], b"").await;
        let head = client.head().await;
        assert_eq!(head.start_line, get.head.start_line, "{target}");
        assert_eq!(head.header("content-type"), get.head.header("content-type"), "{target}");
        // Nothing of a body is before the next response.
        assert_eq!(client.get("/health").await.status(), 200, "{target}");
    }
}

#[tokio::test]
async fn requests_are_counted_by_what_is_done() {
    let (prefill, decode) = (server().await, server().await);
    let port = kit::free_port();
    let admin = |config: MiniLbConfig| config.admin_address("127.0.0.1", port);
    let router = Router::start_with(&[&prefill], &[&decode], admin).await;
    for (method, path) in [
        ("POST", "/pause_generation"),
        ("POST", "/abort_request"),
        ("POST", "/tokenize"),
        ("GET", "/v1/loads"),
        ("POST", "/v1/embeddings"),
        ("GET", "/ping"),
        ("GET", "/version"),
    ] {
        send(&router, method, path, &[], if method == "GET" { b"" } else { BODY.as_bytes() }).await;
    }
    let mut client = Client::connect(([127, 0, 0, 1], port).into()).await;
    for (endpoint, status, count) in [
        ("fan_out", "200", 2),
        ("one_server", "200", 1),
        ("loads", "200", 1),
        ("not_possible", "501", 1),
        ("health", "200", 1),
        ("other", "200", 1),
    ] {
        let wanted = format!(
            "mini_lb_requests_total{{endpoint=\"{endpoint}\",status=\"{status}\",streaming=\"false\"}} {count}\n"
        );
        kit::with_timeout(&wanted, async {
            while !client.get("//metrics/").await.text().contains(&wanted) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

//! The workers API and the role switch: backends are listed, added, removed and switched under traffic.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Client, Gate, ReceivedRequest, Response, Router, ScriptedServer, Step, json};
use mini_lb::{MiniLbConfig, RoundRobin};
use serde_json::{Value, json as value};

const BODY: &str = r#"{"text":"a"}"#;
const PROBE_INTERVAL: Duration = Duration::from_millis(30);

async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

fn is_request(seen: &ReceivedRequest) -> bool {
    seen.target() == "/generate"
}

fn requests(server: &ScriptedServer) -> usize {
    server.requests().iter().filter(|seen| is_request(seen)).count()
}

async fn router(prefill: &[&ScriptedServer], decode: &[&ScriptedServer]) -> Router {
    Router::start_with(prefill, decode, |config| {
        config.health_checks(true).health_check_interval(PROBE_INTERVAL).policy(RoundRobin::default)
    })
    .await
}

fn config(prefill: &[&ScriptedServer], decode: &[&ScriptedServer]) -> MiniLbConfig {
    let prefill = prefill.iter().map(|server| (server.url(), Some(kit::BOOTSTRAP_PORT))).collect();
    let decode = decode.iter().map(|server| server.url()).collect();
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60)
        .health_check_interval(PROBE_INTERVAL)
        .policy(RoundRobin::default)
}

async fn delete(client: &mut Client, target: &str) -> Response {
    client.send_request("DELETE", target, &[], b"").await;
    client.response().await
}

async fn workers(router: &Router) -> Vec<Value> {
    let response = router.client().await.get("/workers").await;
    assert_eq!(response.status(), 200);
    response.json()["workers"].as_array().expect("a list").clone()
}

/// A server's entry in the list, if any.
async fn entry(router: &Router, server: &ScriptedServer) -> Option<Value> {
    workers(router).await.into_iter().find(|entry| entry["url"] == server.url())
}

async fn wait_for_entry(
    router: &Router,
    server: &ScriptedServer,
    condition: impl Fn(&Value) -> bool,
) -> Value {
    let shown = async {
        loop {
            match entry(router, server).await {
                Some(entry) if condition(&entry) => return entry,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    kit::with_timeout("an entry of /workers", shown).await
}

fn add_request(server: &ScriptedServer, role: &str) -> String {
    value!({ "url": server.url(), "worker_type": role }).to_string()
}

fn percent_encoded(url: &str) -> String {
    url.replace(':', "%3A").replace('/', "%2F")
}

#[tokio::test]
async fn list_shows_what_is_known_of_each_backend() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let first = wait_for_entry(&router, &prefill, |entry| entry["status"] == "healthy").await;
    let id = first["id"].as_str().expect("a string");
    assert_eq!(
        first,
        value!({
            "id": id, "url": prefill.url(), "worker_type": "prefill", "is_healthy": true, "status": "healthy",
            "load": 0, "connection_mode": "http", "source": "config", "bootstrap_host": "127.0.0.1",
            "bootstrap_port": 8998, "dp_size": null, "disaggregation_mode": null,
        })
    );
    let all = router.client().await.get("/workers").await.json();
    assert_eq!((&all["total"], all["workers"].as_array().map(Vec::len)), (&value!(2), Some(2)));
    assert_eq!(
        all["stats"],
        value!({ "prefill_count": 1, "decode_count": 1, "regular_count": 0, "encode_count": 0 })
    );
    let one = router.client().await.get(&format!("/workers/{id}")).await;
    assert_eq!((one.status(), &one.json()["url"]), (200, &value!(prefill.url())));
}

#[tokio::test]
async fn adding_and_removing_backends_fails_no_request() {
    let (prefill, decode, second) = (ok_server().await, ok_server().await, ok_server().await);
    let router = Arc::new(router(&[&prefill], &[&decode]).await);
    wait_for_entry(&router, &decode, |entry| entry["status"] == "healthy").await;
    let stop = Arc::new(AtomicBool::new(false));
    let traffic: Vec<_> = (0..4)
        .map(|_| {
            let (router, stop) = (Arc::clone(&router), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut client, mut count) = (router.client().await, 0_usize);
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(client.post("/generate", BODY).await.status(), 200);
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut operator = router.client().await;
    for round in 1..=5 {
        let response = operator.post("/workers", add_request(&second, "decode")).await;
        assert_eq!(response.status(), 202, "{}", response.text());
        let seen = requests(&second);
        kit::with_timeout("requests at the new server", async {
            while requests(&second) == seen {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let id = response.json()["worker_id"].as_str().expect("an id").to_owned();
        assert_eq!(response.head.header("location"), Some(&*format!("/workers/{id}")));
        let gone = delete(&mut operator, &format!("/workers/{id}?timeout=10")).await;
        assert_eq!((gone.status(), &gone.json()["status"]), (200, &value!("removed")), "round {round}");
        let seen = requests(&second);
        for _ in 0..5 {
            assert_eq!(operator.post("/generate", BODY).await.status(), 200);
        }
        assert_eq!(requests(&second), seen, "it is removed");
    }
    stop.store(true, Ordering::SeqCst);
    for client in traffic {
        assert!(client.await.expect("no error") > 0);
    }
}

#[tokio::test]
async fn new_backend_gets_no_request_before_it_is_healthy() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let up = Gate::new();
    let (held, is_up) = (up.clone(), Arc::new(AtomicBool::new(false)));
    let late = {
        let is_up = Arc::clone(&is_up);
        ScriptedServer::start(move |seen| match seen.target() {
            "/ready" if !is_up.load(Ordering::SeqCst) => {
                vec![Step::Wait(held.clone()), Step::Send(json("200 OK", "{}"))]
            }
            _ => vec![Step::Send(json("200 OK", "{}"))],
        })
        .await
    };
    let router = router(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/workers", add_request(&late, "decode")).await.status(), 202);
    late.wait_for_requests(1).await;
    let shown = entry(&router, &late).await.expect("it is shown");
    assert_eq!((&shown["status"], &shown["source"]), (&value!("starting"), &value!("api")));
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&late), requests(&decode)), (0, 10));
    is_up.store(true, Ordering::SeqCst);
    up.open();
    wait_for_entry(&router, &late, |entry| entry["status"] == "healthy").await;
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!(requests(&late), 2);
}

/// A decode server whose stream ends when the gate opens.
async fn gated_stream(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |seen| {
        if !is_request(seen) {
            return vec![Step::Send(json("200 OK", "{}"))];
        }
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        vec![
            Step::Send([head, "7\r\ndata: 1\r\n"].concat().into()),
            Step::Wait(gate.clone()),
            Step::Send("7\r\ndata: 2\r\n0\r\n\r\n".into()),
        ]
    })
    .await
}

#[tokio::test]
async fn removed_backend_drains_and_the_timeout_reports_in_flight() {
    let gate = Gate::new();
    let (prefill, old, new) = (ok_server().await, gated_stream(&gate).await, ok_server().await);
    let router = router(&[&prefill], &[&old]).await;
    wait_for_entry(&router, &old, |entry| entry["status"] == "healthy").await;
    let mut stream = router.client().await;
    stream.send_request("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    stream.read_until("data: 1").await;

    let mut operator = router.client().await;
    assert_eq!(operator.post("/workers", add_request(&new, "decode")).await.status(), 202);
    let target = format!("/workers/{}", percent_encoded(&old.url()));
    let begun = Instant::now();
    let response = delete(&mut operator, &format!("{target}?timeout=0.2")).await;
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    let said = response.json();
    assert_eq!(
        (response.status(), &said["status"], &said["in_flight"]),
        (202, &value!("draining"), &value!(1))
    );
    let shown = entry(&router, &old).await.expect("it is shown while it drains");
    assert_eq!((&shown["status"], &shown["is_healthy"]), (&value!("draining"), &value!(false)));
    assert_eq!(operator.post("/generate", BODY).await.status(), 200);
    assert_eq!((requests(&old), requests(&new)), (1, 1));

    // Without a timeout the response is immediate.
    assert_eq!(delete(&mut operator, &target).await.json()["status"], "accepted");
    let patient = format!("{target}?timeout=20");
    let (response, ()) = tokio::join!(delete(&mut operator, &patient), async {
        // The router must have begun to wait: without a request the server is gone, and the answer is a 404.
        tokio::time::sleep(Duration::from_millis(500)).await;
        gate.open();
    });
    assert_eq!((response.status(), &response.json()["in_flight"]), (200, &value!(0)));
    assert!(stream.read_until("0\r\n\r\n").await.contains("data: 2"), "the stream goes to its end");
    assert!(entry(&router, &old).await.is_none());
    let response = delete(&mut operator, &target).await;
    assert_eq!((response.status(), response.error_code()), (404, "worker_not_found".to_owned()));
}

#[tokio::test]
async fn invalid_admin_requests_change_nothing() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let before = wait_for_entry(&router, &decode, |entry| entry["status"] == "healthy").await;
    let url = decode.url();
    for (body, code) in [
        ("{".to_owned(), "invalid_admin_request"),
        ("[]".to_owned(), "invalid_admin_request"),
        (r#"{"worker_type":"decode"}"#.to_owned(), "invalid_admin_request"),
        (r#"{"url":"http://h:1"}"#.to_owned(), "invalid_admin_request"),
        (r#"{"url":"http://h:1","worker_type":"regular"}"#.to_owned(), "invalid_admin_request"),
        (r#"{"url":"h","worker_type":"decode"}"#.to_owned(), "invalid_admin_request"),
        (
            r#"{"url":"http://h:1","worker_type":"prefill","bootstrap_port":0}"#.to_owned(),
            "invalid_admin_request",
        ),
        (
            r#"{"url":"http://h:1","worker_type":"prefill","bootstrap_host":"a b"}"#.to_owned(),
            "invalid_admin_request",
        ),
        (format!(r#"{{"url":"{url}","worker_type":"prefill"}}"#), "worker_exists"),
    ] {
        let response = router.client().await.post("/workers", &body).await;
        let status = if code == "worker_exists" { 409 } else { 400 };
        assert_eq!((response.status(), response.error_code().as_str()), (status, code), "{body}");
    }
    let mut client = router.client().await;
    for (target, status) in [
        ("/workers/999999", 404),
        ("/workers/nonsense", 404),
        ("/workers/http%3A%2F%2Fh%3A1", 404),
        ("/workers/1?timeout=x", 400),
    ] {
        assert_eq!(delete(&mut client, target).await.status(), status, "{target}");
    }
    client.send_request("PUT", "/workers", &[], b"").await;
    let response = client.response().await;
    assert_eq!((response.status(), response.head.header("allow")), (405, Some("GET, POST")));
    let large = vec![b' '; (64 << 10) + 1];
    let response = router.client().await.post("/workers", large).await;
    assert_eq!((response.status(), response.error_code().as_str()), (413, "body_too_large"));

    // Adding a backend twice is no error. Fields that the router does not know are listed.
    let twice = value!({ "url": url, "worker_type": "decode", "api_key": "k", "priority": 1 }).to_string();
    let response = client.post("/workers", twice).await;
    assert_eq!((response.status(), &response.json()["worker_id"]), (202, &before["id"]));
    assert_eq!(response.json()["ignored"], value!(["api_key", "priority"]));
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn forwarded_and_browser_requests_are_forbidden() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for (method, target) in
        [("GET", "/workers"), ("POST", "/workers"), ("DELETE", "/workers/1"), ("POST", "/pd_role_switch")]
    {
        // Proxies add the first, browsers the second to what a web page makes them send.
        for header in ["x-forwarded-for", "origin"] {
            client.send_request(method, target, &[(header, "10.0.0.1")], b"{}").await;
            let response = client.response().await;
            assert_eq!(
                (response.status(), response.error_code().as_str()),
                (403, "admin_forbidden"),
                "{method} {target}"
            );
        }
    }
    // The connection is still usable.
    assert_eq!(client.get("/workers").await.status(), 200);
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn admin_listener_has_the_same_endpoints() {
    let (prefill, decode, more) = (ok_server().await, ok_server().await, ok_server().await);
    let port = kit::free_port();
    let admin = |config: MiniLbConfig| config.admin_address("127.0.0.1", port);
    let router = Router::start_with(&[&prefill], &[&decode], admin).await;
    assert_eq!(workers(&router).await.len(), 2);
    let mut client = Client::connect(([127, 0, 0, 1], port).into()).await;
    assert_eq!(client.post("/workers", add_request(&more, "decode")).await.status(), 202);
    assert_eq!(client.get("/workers").await.json()["total"], 3);
    assert_eq!(
        delete(&mut client, &format!("/workers/{}", percent_encoded(&more.url()))).await.status(),
        200
    );
    client.send_request("GET", "/workers", &[("forwarded", "for=10.0.0.1")], b"").await;
    assert_eq!(client.response().await.status(), 403);
}

#[tokio::test]
async fn api_changes_survive_a_reload_until_the_entry_changes() {
    let (prefill, first, second, third) =
        (ok_server().await, ok_server().await, ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&first, &second]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/workers", add_request(&third, "decode")).await.status(), 202);
    assert_eq!(
        delete(&mut client, &format!("/workers/{}", percent_encoded(&second.url()))).await.status(),
        200
    );
    router.reload(config(&[&prefill], &[&first, &second])).expect("a valid configuration");
    assert!(entry(&router, &third).await.is_some(), "added");
    assert!(entry(&router, &second).await.is_none(), "removed");
    // Removed from the file and added again: the new entry overrides the API.
    router.reload(config(&[&prefill], &[&first])).expect("a valid configuration");
    router.reload(config(&[&prefill], &[&first, &second])).expect("a valid configuration");
    assert!(entry(&router, &second).await.is_some());
    // A backend that the file names belongs to the file from then on.
    router.reload(config(&[&prefill], &[&first, &third])).expect("a valid configuration");
    assert_eq!(entry(&router, &third).await.expect("an entry")["source"], "config");
    router.reload(config(&[&prefill], &[&first])).expect("a valid configuration");
    assert!(entry(&router, &third).await.is_none());
}

/// A server that responds to `/pd_role_switch` with these (status, body) pairs in turn, then always with the
/// last.
async fn switching_server(responses: &[(&'static str, &'static str)]) -> ScriptedServer {
    let (responses, next) = (responses.to_vec(), AtomicUsize::new(0));
    ScriptedServer::start(move |seen| {
        if seen.target() != "/pd_role_switch" {
            return vec![Step::Send(json("200 OK", "{}"))];
        }
        let (status, body) = responses[next.fetch_add(1, Ordering::SeqCst).min(responses.len() - 1)];
        vec![Step::Send(json(status, body))]
    })
    .await
}

const SWITCHED: (&str, &str) =
    ("200 OK", r#"{"success":true,"message":"ok","old_role":"decode","new_role":"prefill"}"#);
const NOT_IDLE: (&str, &str) =
    ("400 Bad Request", r#"{"success":false,"message":"instance is not idle","safe_to_restore":true}"#);
const BROKEN: (&str, &str) =
    ("400 Bad Request", r#"{"success":false,"message":"restart required","safe_to_restore":false}"#);

fn switch_request(server: &ScriptedServer, more: &str) -> String {
    format!(r#"{{"worker_url":"{}","new_role":"prefill"{more}}}"#, server.url())
}

fn switch_requests(server: &ScriptedServer) -> Vec<ReceivedRequest> {
    server.requests().into_iter().filter(|seen| seen.target() == "/pd_role_switch").collect()
}

#[tokio::test]
async fn switched_backend_gets_requests_in_its_new_role() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let turning = switching_server(&[NOT_IDLE, SWITCHED]).await;
    let router = router(&[&prefill], &[&decode, &turning]).await;
    wait_for_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    let mut client = router.client().await;
    let more = r#","bootstrap_port":9001,"decode_cuda_graph_bs":[1,2],"drain_timeout_secs":20"#;
    let response = client.post("/pd_role_switch", switch_request(&turning, more)).await;
    assert_eq!((response.status(), response.text()), (200, SWITCHED.1));
    let questions = switch_requests(&turning);
    assert_eq!(questions.len(), 2, "asked again after \"not idle\"");
    assert_eq!(questions[1].json(), value!({ "new_role": "prefill", "decode_cuda_graph_bs": [1, 2] }));
    assert_eq!(questions[1].head.header("content-type"), Some("application/json"));

    let shown = wait_for_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["worker_type"], &shown["bootstrap_port"]), (&value!("prefill"), &value!(9001)));
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&prefill), requests(&turning), requests(&decode)), (2, 2, 4));
    // The role survives a reload with the same entry.
    router.reload(config(&[&prefill], &[&decode, &turning])).expect("a valid configuration");
    assert_eq!(entry(&router, &turning).await.expect("an entry")["worker_type"], "prefill");
}

#[tokio::test]
async fn open_requests_finish_before_the_switch_is_sent() {
    let gate = Gate::new();
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let held = gate.clone();
    let turning = ScriptedServer::start(move |seen| match seen.target() {
        "/generate" => vec![Step::Wait(held.clone()), Step::Send(json("200 OK", r#"{"from":"turning"}"#))],
        "/pd_role_switch" => vec![Step::Send(json(SWITCHED.0, SWITCHED.1))],
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let router = router(&[&prefill], &[&turning]).await;
    wait_for_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    let mut early = router.client().await;
    early.send_request("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    kit::with_timeout("a request", async {
        while requests(&turning) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let mut operator = router.client().await;
    assert_eq!(operator.post("/workers", add_request(&decode, "decode")).await.status(), 202);
    let text = switch_request(&turning, "");
    operator.send_request("POST", "/pd_role_switch", &[], text.as_bytes()).await;
    wait_for_entry(&router, &turning, |entry| entry["status"] == "draining").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(switch_requests(&turning).is_empty(), "a request is in flight");
    // Other changes are rejected meanwhile, and requests are served.
    let mut other = router.client().await;
    assert_eq!(other.post("/workers", add_request(&turning, "decode")).await.error_code(), "worker_busy");
    assert_eq!(other.post("/generate", BODY).await.status(), 200);
    gate.open();
    assert_eq!(early.response().await.text(), r#"{"from":"turning"}"#);
    assert_eq!(operator.response().await.status(), 200);
    assert_eq!(entry(&router, &turning).await.expect("an entry")["worker_type"], "prefill");
}

#[tokio::test]
async fn failed_switch_is_rolled_back_only_if_safe_to_restore() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    for (response, more, is_back) in [
        (NOT_IDLE, r#","drain_timeout_secs":0"#, true),
        (BROKEN, r#","drain_timeout_secs":0"#, false),
        (BROKEN, r#","drain":false"#, true),
        (("404 Not Found", r#"{"detail":"Not Found"}"#), "", false),
    ] {
        let turning = switching_server(&[response]).await;
        let router = router(&[&prefill], &[&decode, &turning]).await;
        wait_for_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
        let mut client = router.client().await;
        let notified = client.post("/pd_role_switch", switch_request(&turning, more)).await;
        assert_eq!(
            (&*notified.head.start_line, notified.text()),
            (&*format!("HTTP/1.1 {}", response.0), response.1)
        );
        let shown = entry(&router, &turning).await;
        assert_eq!(shown.as_ref().map(|entry| &entry["worker_type"]), is_back.then_some(&value!("decode")));
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        if !is_back {
            assert_eq!(client.post("/workers", add_request(&turning, "decode")).await.status(), 202);
            assert_eq!(entry(&router, &turning).await.expect("it is back")["source"], "config");
        }
    }
}

#[tokio::test]
async fn switch_requires_a_known_backend_and_a_role() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    let url = decode.url();
    for (body, status) in [
        (format!(r#"{{"worker_url":"{url}","new_role":"regular"}}"#), 400),
        (format!(r#"{{"worker_url":"{url}","new_role":"prefill","drain_timeout_secs":-1}}"#), 400),
        (r#"{"new_role":"prefill"}"#.to_owned(), 400),
        (r#"{"worker_url":"http://127.0.0.1:1","new_role":"prefill"}"#.to_owned(), 404),
        (format!(r#"{{"worker_url":"{url}","new_role":"decode"}}"#), 200),
    ] {
        let response = client.post("/pd_role_switch", &body).await;
        assert_eq!(response.status(), status, "{body}: {}", response.text());
    }
    assert!(switch_requests(&decode).is_empty());
}

/// The `/server_info` of a server.
fn server_info(port: u16, role: &str) -> Vec<Step> {
    let body = format!(
        r#"{{"disaggregation_mode":"{role}","disaggregation_bootstrap_port":{port},"dp_size":4,"internal_states":[{{}}]}}"#
    );
    vec![Step::Send(json("200 OK", &body))]
}

fn sent_port(decode: &ScriptedServer) -> Value {
    let seen = decode.requests();
    seen.iter().rfind(|seen| is_request(seen)).expect("a request").json()["bootstrap_port"].clone()
}

/// A router with a prefill server whose bootstrap port is not configured.
async fn router_without_port(prefill: &ScriptedServer, decode: &ScriptedServer) -> Router {
    let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), None)], vec![decode.url()], 60);
    Router::start_with(&[], &[], |_| config.worker_threads(1).health_check_interval(PROBE_INTERVAL)).await
}

#[tokio::test]
async fn missing_bootstrap_port_is_learned_and_refreshed() {
    let port = Arc::new(AtomicUsize::new(9_101));
    let is_up = Arc::new(AtomicBool::new(true));
    let (said, up) = (Arc::clone(&port), Arc::clone(&is_up));
    let prefill = ScriptedServer::start(move |seen| match seen.target() {
        "/ready" if !up.load(Ordering::SeqCst) => vec![Step::Send(json("503 Service Unavailable", "{}"))],
        // Older servers have only `/get_server_info`.
        "/server_info" => vec![Step::Send(json("404 Not Found", "{}"))],
        "/get_server_info" => server_info(said.load(Ordering::SeqCst) as u16, "prefill"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let decode = ok_server().await;
    let router = router_without_port(&prefill, &decode).await;
    let shown = wait_for_entry(&router, &prefill, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["bootstrap_port"], &shown["dp_size"]), (&value!(9_101), &value!(4)));
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), 9_101);
    assert_eq!(router.backend(&prefill).bootstrap_port(), Some(9_101));

    // It restarts with another port.
    is_up.store(false, Ordering::SeqCst);
    wait_for_entry(&router, &prefill, |entry| entry["status"] != "healthy").await;
    port.store(9_102, Ordering::SeqCst);
    is_up.store(true, Ordering::SeqCst);
    wait_for_entry(&router, &prefill, |entry| entry["bootstrap_port"] == 9_102).await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), 9_102);
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn port_is_null_if_unknown_and_a_configured_one_wins() {
    let silent = ok_server().await;
    let decode = ok_server().await;
    let router = router_without_port(&silent, &decode).await;
    wait_for_entry(&router, &silent, |entry| entry["status"] == "healthy").await;
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), Value::Null);

    let other = ScriptedServer::start(|seen| match seen.target() {
        "/server_info" => server_info(9_101, "prefill"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let router = self::router(&[&other], &[&decode]).await;
    wait_for_entry(&router, &other, |entry| entry["dp_size"] == 4).await;
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), kit::BOOTSTRAP_PORT);
}

#[tokio::test]
async fn description_of_the_wrong_role_is_shown_but_not_used() {
    let wrong = ScriptedServer::start(|seen| match seen.target() {
        "/server_info" => server_info(9_101, "decode"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let decode = ok_server().await;
    let router = router_without_port(&wrong, &decode).await;
    let shown = wait_for_entry(&router, &wrong, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["disaggregation_mode"], &shown["bootstrap_port"]), (&value!("decode"), &Value::Null));
}

#[tokio::test]
async fn traffic_uses_the_healthy_backend_while_another_starts() {
    let (prefill, up) = (ok_server().await, ok_server().await);
    let address = {
        let gone = ok_server().await;
        gone.stop_listening().await;
        gone.address()
    };
    let urls = vec![format!("http://{address}"), up.url()];
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), Some(1))], urls, 60)
        .worker_threads(1)
        .health_check_interval(Duration::from_secs(3_600))
        .worker_startup_check_interval(PROBE_INTERVAL)
        .policy(RoundRobin::default);
    let router = Router::start_with(&[], &[], |_| config).await;
    kit::with_timeout("the first probes", async {
        while workers(&router).await.iter().filter(|entry| entry["status"] == "unknown").count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let mut client = router.client().await;
    assert_eq!(client.get("/ready").await.status(), 200);
    for _ in 0..6 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    let late = ScriptedServer::start_at(address, |_| vec![Step::Send(json("200 OK", "{}"))]).await;
    wait_for_entry(&router, &late, |entry| entry["status"] == "healthy").await;
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&up), requests(&late)), (8, 2));
}

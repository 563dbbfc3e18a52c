//! Servers that operators show, add, remove and give another role, while requests go on.

mod kit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kit::{Answer, Client, Gate, Router, Seen, Step, Upstream, json};
use mini_lb::{MiniLbConfig, RoundRobin};
use serde_json::{Value, json as value};

const BODY: &str = r#"{"text":"a"}"#;
const OFTEN: Duration = Duration::from_millis(30);

async fn server() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

fn is_request(seen: &Seen) -> bool {
    seen.target() == "/generate"
}

fn requests(server: &Upstream) -> usize {
    server.seen().iter().filter(|seen| is_request(seen)).count()
}

async fn router(prefill: &[&Upstream], decode: &[&Upstream]) -> Router {
    Router::start_with(prefill, decode, |config| {
        config.health_checks(true).health_check_interval(OFTEN).policy(RoundRobin::default)
    })
    .await
}

fn config(prefill: &[&Upstream], decode: &[&Upstream]) -> MiniLbConfig {
    let prefill = prefill.iter().map(|server| (server.url(), Some(kit::BOOTSTRAP_PORT))).collect();
    let decode = decode.iter().map(|server| server.url()).collect();
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60)
        .health_check_interval(OFTEN)
        .policy(RoundRobin::default)
}

async fn delete(client: &mut Client, target: &str) -> Answer {
    client.start("DELETE", target, &[], b"").await;
    client.answer().await
}

async fn workers(router: &Router) -> Vec<Value> {
    let answer = router.client().await.get("/workers").await;
    assert_eq!(answer.status(), 200);
    answer.json()["workers"].as_array().expect("a list").clone()
}

/// The entry of a server, if the router shows it.
async fn entry(router: &Router, server: &Upstream) -> Option<Value> {
    workers(router).await.into_iter().find(|entry| entry["url"] == server.url())
}

async fn until_entry(router: &Router, server: &Upstream, is_so: impl Fn(&Value) -> bool) -> Value {
    let shown = async {
        loop {
            match entry(router, server).await {
                Some(entry) if is_so(&entry) => return entry,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    kit::patiently("an entry of /workers", shown).await
}

fn order(server: &Upstream, role: &str) -> String {
    value!({ "url": server.url(), "worker_type": role }).to_string()
}

fn encoded(url: &str) -> String {
    url.replace(':', "%3A").replace('/', "%2F")
}

#[tokio::test]
async fn servers_are_shown_with_what_is_known_of_them() {
    let (prefill, decode) = (server().await, server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let first = until_entry(&router, &prefill, |entry| entry["status"] == "healthy").await;
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
    assert_eq!(all["stats"], value!({ "prefill_count": 1, "decode_count": 1, "regular_count": 0 }));
    let one = router.client().await.get(&format!("/workers/{id}")).await;
    assert_eq!((one.status(), &one.json()["url"]), (200, &value!(prefill.url())));
}

#[tokio::test]
async fn servers_come_and_go_under_traffic_without_an_error() {
    let (prefill, decode, second) = (server().await, server().await, server().await);
    let router = Arc::new(router(&[&prefill], &[&decode]).await);
    until_entry(&router, &decode, |entry| entry["status"] == "healthy").await;
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
        let answer = operator.post("/workers", order(&second, "decode")).await;
        assert_eq!(answer.status(), 202, "{}", answer.text());
        let seen = requests(&second);
        kit::patiently("requests at the new server", async {
            while requests(&second) == seen {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let id = answer.json()["worker_id"].as_str().expect("an id").to_owned();
        assert_eq!(answer.head.header("location"), Some(&*format!("/workers/{id}")));
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
async fn a_new_server_gets_no_request_before_it_is_up() {
    let (prefill, decode) = (server().await, server().await);
    let up = Gate::new();
    let (held, is_up) = (up.clone(), Arc::new(AtomicBool::new(false)));
    let late = {
        let is_up = Arc::clone(&is_up);
        Upstream::start(move |seen| match seen.target() {
            "/ready" if !is_up.load(Ordering::SeqCst) => {
                vec![Step::Wait(held.clone()), Step::Send(json("200 OK", "{}"))]
            }
            _ => vec![Step::Send(json("200 OK", "{}"))],
        })
        .await
    };
    let router = router(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/workers", order(&late, "decode")).await.status(), 202);
    late.arrived(1).await;
    let shown = entry(&router, &late).await.expect("it is shown");
    assert_eq!((&shown["status"], &shown["source"]), (&value!("starting"), &value!("api")));
    for _ in 0..10 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&late), requests(&decode)), (0, 10));
    is_up.store(true, Ordering::SeqCst);
    up.open();
    until_entry(&router, &late, |entry| entry["status"] == "healthy").await;
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!(requests(&late), 2);
}

/// A decode server that holds `/generate` until the gate opens.
async fn holding(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |seen| {
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
async fn a_removed_server_finishes_its_stream_and_the_timeout_says_what_is_left() {
    let gate = Gate::new();
    let (prefill, old, new) = (server().await, holding(&gate).await, server().await);
    let router = router(&[&prefill], &[&old]).await;
    until_entry(&router, &old, |entry| entry["status"] == "healthy").await;
    let mut stream = router.client().await;
    stream.start("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    stream.read_until("data: 1").await;

    let mut operator = router.client().await;
    assert_eq!(operator.post("/workers", order(&new, "decode")).await.status(), 202);
    let target = format!("/workers/{}", encoded(&old.url()));
    let begun = Instant::now();
    let answer = delete(&mut operator, &format!("{target}?timeout=0.2")).await;
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    let said = answer.json();
    assert_eq!(
        (answer.status(), &said["status"], &said["in_flight"]),
        (202, &value!("draining"), &value!(1))
    );
    let shown = entry(&router, &old).await.expect("it is shown while it drains");
    assert_eq!((&shown["status"], &shown["is_healthy"]), (&value!("draining"), &value!(false)));
    assert_eq!(operator.post("/generate", BODY).await.status(), 200);
    assert_eq!((requests(&old), requests(&new)), (1, 1));

    // Without a timeout nothing is waited for.
    assert_eq!(delete(&mut operator, &target).await.json()["status"], "accepted");
    let patient = format!("{target}?timeout=20");
    let (answer, ()) = tokio::join!(delete(&mut operator, &patient), async {
        // The router must have begun to wait: without a request the server is gone, and the answer is a 404.
        tokio::time::sleep(Duration::from_millis(500)).await;
        gate.open();
    });
    assert_eq!((answer.status(), &answer.json()["in_flight"]), (200, &value!(0)));
    assert!(stream.read_until("0\r\n\r\n").await.contains("data: 2"), "the stream goes to its end");
    assert!(entry(&router, &old).await.is_none());
    let answer = delete(&mut operator, &target).await;
    assert_eq!((answer.status(), answer.code()), (404, "worker_not_found".to_owned()));
}

#[tokio::test]
async fn orders_that_make_no_sense_change_nothing() {
    let (prefill, decode) = (server().await, server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let before = until_entry(&router, &decode, |entry| entry["status"] == "healthy").await;
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
        let answer = router.client().await.post("/workers", &body).await;
        let status = if code == "worker_exists" { 409 } else { 400 };
        assert_eq!((answer.status(), answer.code().as_str()), (status, code), "{body}");
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
    client.start("PUT", "/workers", &[], b"").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.head.header("allow")), (405, Some("GET, POST")));
    let large = vec![b' '; (64 << 10) + 1];
    let answer = router.client().await.post("/workers", large).await;
    assert_eq!((answer.status(), answer.code().as_str()), (413, "body_too_large"));

    // What is there already is no error: an order may be sent twice. What means nothing here is named.
    let twice = value!({ "url": url, "worker_type": "decode", "api_key": "k", "priority": 1 }).to_string();
    let answer = client.post("/workers", twice).await;
    assert_eq!((answer.status(), &answer.json()["worker_id"]), (202, &before["id"]));
    assert_eq!(answer.json()["ignored"], value!(["api_key", "priority"]));
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn only_programs_on_this_machine_may_ask() {
    let (prefill, decode) = (server().await, server().await);
    let router = router(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for (method, target) in
        [("GET", "/workers"), ("POST", "/workers"), ("DELETE", "/workers/1"), ("POST", "/pd_role_switch")]
    {
        // A proxy says so of others' requests, and a browser of what a page makes it send.
        for header in ["x-forwarded-for", "origin"] {
            client.start(method, target, &[(header, "10.0.0.1")], b"{}").await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status(), answer.code().as_str()),
                (403, "admin_forbidden"),
                "{method} {target}"
            );
        }
    }
    // The connection is good for another request.
    assert_eq!(client.get("/workers").await.status(), 200);
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn the_admin_listener_has_the_same_endpoints() {
    let (prefill, decode, more) = (server().await, server().await, server().await);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let admin = |config: MiniLbConfig| config.admin_address("127.0.0.1", port);
    let router = Router::start_with(&[&prefill], &[&decode], admin).await;
    assert_eq!(workers(&router).await.len(), 2);
    let mut client = Client::connect(([127, 0, 0, 1], port).into()).await;
    assert_eq!(client.post("/workers", order(&more, "decode")).await.status(), 202);
    assert_eq!(client.get("/workers").await.json()["total"], 3);
    assert_eq!(delete(&mut client, &format!("/workers/{}", encoded(&more.url()))).await.status(), 200);
    client.start("GET", "/workers", &[("forwarded", "for=10.0.0.1")], b"").await;
    assert_eq!(client.answer().await.status(), 403);
}

#[tokio::test]
async fn what_operators_said_outlives_a_reload_until_the_entry_changes() {
    let (prefill, first, second, third) = (server().await, server().await, server().await, server().await);
    let router = router(&[&prefill], &[&first, &second]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/workers", order(&third, "decode")).await.status(), 202);
    assert_eq!(delete(&mut client, &format!("/workers/{}", encoded(&second.url()))).await.status(), 200);
    router.reload(config(&[&prefill], &[&first, &second])).expect("a good configuration");
    assert!(entry(&router, &third).await.is_some(), "added");
    assert!(entry(&router, &second).await.is_none(), "removed");
    // Out of the file and in again: the file's word is new.
    router.reload(config(&[&prefill], &[&first])).expect("a good configuration");
    router.reload(config(&[&prefill], &[&first, &second])).expect("a good configuration");
    assert!(entry(&router, &second).await.is_some());
    // What the file names is the file's from then on.
    router.reload(config(&[&prefill], &[&first, &third])).expect("a good configuration");
    assert_eq!(entry(&router, &third).await.expect("it is there")["source"], "config");
    router.reload(config(&[&prefill], &[&first])).expect("a good configuration");
    assert!(entry(&router, &third).await.is_none());
}

/// A server that answers `/pd_role_switch` by a script of (status, body), the last of them for ever.
async fn switching(answers: &[(&'static str, &'static str)]) -> Upstream {
    let (answers, next) = (answers.to_vec(), AtomicUsize::new(0));
    Upstream::start(move |seen| {
        if seen.target() != "/pd_role_switch" {
            return vec![Step::Send(json("200 OK", "{}"))];
        }
        let (status, body) = answers[next.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1)];
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

fn switch_order(server: &Upstream, more: &str) -> String {
    format!(r#"{{"worker_url":"{}","new_role":"prefill"{more}}}"#, server.url())
}

fn switch_questions(server: &Upstream) -> Vec<Seen> {
    server.seen().into_iter().filter(|seen| seen.target() == "/pd_role_switch").collect()
}

#[tokio::test]
async fn a_server_that_is_idle_in_the_end_gets_requests_in_its_new_role() {
    let (prefill, decode) = (server().await, server().await);
    let turning = switching(&[NOT_IDLE, SWITCHED]).await;
    let router = router(&[&prefill], &[&decode, &turning]).await;
    until_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    let mut client = router.client().await;
    let more = r#","bootstrap_port":9001,"decode_cuda_graph_bs":[1,2],"drain_timeout_secs":20"#;
    let answer = client.post("/pd_role_switch", switch_order(&turning, more)).await;
    assert_eq!((answer.status(), answer.text()), (200, SWITCHED.1));
    let questions = switch_questions(&turning);
    assert_eq!(questions.len(), 2, "asked again after \"not idle\"");
    assert_eq!(questions[1].json(), value!({ "new_role": "prefill", "decode_cuda_graph_bs": [1, 2] }));
    assert_eq!(questions[1].head.header("content-type"), Some("application/json"));

    let shown = until_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["worker_type"], &shown["bootstrap_port"]), (&value!("prefill"), &value!(9001)));
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&prefill), requests(&turning), requests(&decode)), (2, 2, 4));
    // The role outlives a reload in which the entry is the same.
    router.reload(config(&[&prefill], &[&decode, &turning])).expect("a good configuration");
    assert_eq!(entry(&router, &turning).await.expect("it is there")["worker_type"], "prefill");
}

#[tokio::test]
async fn open_requests_end_before_the_server_is_asked_to_switch() {
    let gate = Gate::new();
    let (prefill, decode) = (server().await, server().await);
    let held = gate.clone();
    let turning = Upstream::start(move |seen| match seen.target() {
        "/generate" => vec![Step::Wait(held.clone()), Step::Send(json("200 OK", r#"{"from":"turning"}"#))],
        "/pd_role_switch" => vec![Step::Send(json(SWITCHED.0, SWITCHED.1))],
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let router = router(&[&prefill], &[&turning]).await;
    until_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
    let mut early = router.client().await;
    early.start("POST", "/generate", &[("content-type", "application/json")], BODY.as_bytes()).await;
    kit::patiently("a request", async {
        while requests(&turning) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let mut operator = router.client().await;
    assert_eq!(operator.post("/workers", order(&decode, "decode")).await.status(), 202);
    let text = switch_order(&turning, "");
    operator.start("POST", "/pd_role_switch", &[], text.as_bytes()).await;
    until_entry(&router, &turning, |entry| entry["status"] == "draining").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(switch_questions(&turning).is_empty(), "a request is under way");
    // Nobody else changes it now, and requests go on.
    let mut other = router.client().await;
    assert_eq!(other.post("/workers", order(&turning, "decode")).await.code(), "worker_busy");
    assert_eq!(other.post("/generate", BODY).await.status(), 200);
    gate.open();
    assert_eq!(early.answer().await.text(), r#"{"from":"turning"}"#);
    assert_eq!(operator.answer().await.status(), 200);
    assert_eq!(entry(&router, &turning).await.expect("it is there")["worker_type"], "prefill");
}

#[tokio::test]
async fn a_server_that_does_not_switch_is_put_back_only_if_it_says_that_it_may_be() {
    let (prefill, decode) = (server().await, server().await);
    for (answer, more, is_back) in [
        (NOT_IDLE, r#","drain_timeout_secs":0"#, true),
        (BROKEN, r#","drain_timeout_secs":0"#, false),
        (BROKEN, r#","drain":false"#, true),
        (("404 Not Found", r#"{"detail":"Not Found"}"#), "", false),
    ] {
        let turning = switching(&[answer]).await;
        let router = router(&[&prefill], &[&decode, &turning]).await;
        until_entry(&router, &turning, |entry| entry["status"] == "healthy").await;
        let mut client = router.client().await;
        let told = client.post("/pd_role_switch", switch_order(&turning, more)).await;
        assert_eq!((&*told.head.start_line, told.text()), (&*format!("HTTP/1.1 {}", answer.0), answer.1));
        let shown = entry(&router, &turning).await;
        assert_eq!(shown.as_ref().map(|entry| &entry["worker_type"]), is_back.then_some(&value!("decode")));
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        if !is_back {
            assert_eq!(client.post("/workers", order(&turning, "decode")).await.status(), 202);
            assert_eq!(entry(&router, &turning).await.expect("it is back")["source"], "config");
        }
    }
}

#[tokio::test]
async fn a_switch_needs_a_server_that_is_known_and_a_role() {
    let (prefill, decode) = (server().await, server().await);
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
        let answer = client.post("/pd_role_switch", &body).await;
        assert_eq!(answer.status(), status, "{body}: {}", answer.text());
    }
    assert!(switch_questions(&decode).is_empty());
}

/// What a prefill server says of itself.
fn described(port: u16, role: &str) -> Vec<Step> {
    let body = format!(
        r#"{{"disaggregation_mode":"{role}","disaggregation_bootstrap_port":{port},"dp_size":4,"internal_states":[{{}}]}}"#
    );
    vec![Step::Send(json("200 OK", &body))]
}

fn sent_port(decode: &Upstream) -> Value {
    let seen = decode.seen();
    seen.iter().rfind(|seen| is_request(seen)).expect("a request").json()["bootstrap_port"].clone()
}

/// A router in front of a prefill server whose bootstrap port it is not told.
async fn unknowing(prefill: &Upstream, decode: &Upstream) -> Router {
    let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), None)], vec![decode.url()], 60);
    Router::start_with(&[], &[], |_| config.worker_threads(1).health_check_interval(OFTEN)).await
}

#[tokio::test]
async fn a_bootstrap_port_that_was_not_given_is_learned_and_learned_again() {
    let port = Arc::new(AtomicUsize::new(9_101));
    let is_up = Arc::new(AtomicBool::new(true));
    let (said, up) = (Arc::clone(&port), Arc::clone(&is_up));
    let prefill = Upstream::start(move |seen| match seen.target() {
        "/ready" if !up.load(Ordering::SeqCst) => vec![Step::Send(json("503 Service Unavailable", "{}"))],
        // An older server's name for it.
        "/server_info" => vec![Step::Send(json("404 Not Found", "{}"))],
        "/get_server_info" => described(said.load(Ordering::SeqCst) as u16, "prefill"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let decode = server().await;
    let router = unknowing(&prefill, &decode).await;
    let shown = until_entry(&router, &prefill, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["bootstrap_port"], &shown["dp_size"]), (&value!(9_101), &value!(4)));
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), 9_101);
    assert_eq!(router.knows(&prefill).bootstrap_port(), Some(9_101));

    // It comes back as another.
    is_up.store(false, Ordering::SeqCst);
    until_entry(&router, &prefill, |entry| entry["status"] != "healthy").await;
    port.store(9_102, Ordering::SeqCst);
    is_up.store(true, Ordering::SeqCst);
    until_entry(&router, &prefill, |entry| entry["bootstrap_port"] == 9_102).await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), 9_102);
    assert_eq!(workers(&router).await.len(), 2);
}

#[tokio::test]
async fn a_port_stays_null_where_nothing_is_said_and_a_given_one_stays() {
    let silent = server().await;
    let decode = server().await;
    let router = unknowing(&silent, &decode).await;
    until_entry(&router, &silent, |entry| entry["status"] == "healthy").await;
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), Value::Null);

    let other = Upstream::start(|seen| match seen.target() {
        "/server_info" => described(9_101, "prefill"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let router = self::router(&[&other], &[&decode]).await;
    until_entry(&router, &other, |entry| entry["dp_size"] == 4).await;
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!(sent_port(&decode), kit::BOOTSTRAP_PORT);
}

#[tokio::test]
async fn what_a_server_of_another_role_says_is_shown_and_not_used() {
    let wrong = Upstream::start(|seen| match seen.target() {
        "/server_info" => described(9_101, "decode"),
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await;
    let decode = server().await;
    let router = unknowing(&wrong, &decode).await;
    let shown = until_entry(&router, &wrong, |entry| entry["status"] == "healthy").await;
    assert_eq!((&shown["disaggregation_mode"], &shown["bootstrap_port"]), (&value!("decode"), &Value::Null));
}

#[tokio::test]
async fn traffic_flows_to_the_server_that_is_up_while_another_starts() {
    let (prefill, up) = (server().await, server().await);
    let address = {
        let gone = server().await;
        gone.stop_listening().await;
        gone.address()
    };
    let urls = vec![format!("http://{address}"), up.url()];
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), Some(1))], urls, 60)
        .worker_threads(1)
        .health_check_interval(Duration::from_secs(3_600))
        .worker_startup_check_interval(OFTEN)
        .policy(RoundRobin::default);
    let router = Router::start_with(&[], &[], |_| config).await;
    kit::patiently("the first probes", async {
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
    let late = Upstream::start_at(address, |_| vec![Step::Send(json("200 OK", "{}"))]).await;
    until_entry(&router, &late, |entry| entry["status"] == "healthy").await;
    for _ in 0..4 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((requests(&up), requests(&late)), (8, 2));
}

//! Polls of prefill servers' loads (`--load-poll-secs`): what others have given to a server counts when one
//! is chosen, for as long as the server goes on telling it.

mod kit;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kit::{ReceivedRequest, Router, RouterProcess, ScriptedServer, Step, fixture, json, ok_server};
use mini_lb::{CacheAware, LeastLoad, MiniLbConfig, Policy, PowerOfTwo};

const BODY: &str = r#"{"text":"a"}"#;
/// Short, so that tests need not wait.
const INTERVAL: Duration = Duration::from_millis(30);

fn is_poll(seen: &ReceivedRequest) -> bool {
    seen.target() == "/v1/loads"
}

fn polls(server: &ScriptedServer) -> usize {
    server.requests().iter().filter(|seen| is_poll(seen)).count()
}

fn requests(server: &ScriptedServer) -> usize {
    server.requests().iter().filter(|seen| seen.target() == "/generate").count()
}

/// What a real prefill server has answered to a poll, but with so many tokens that wait.
fn load(tokens: u64) -> Vec<u8> {
    let recorded = fixture("pd_info/prefill_v1_loads.resp").expect("a whole response").body;
    let idle = r#""num_waiting_uncached_tokens":0"#;
    let recorded = String::from_utf8(recorded).expect("JSON");
    assert!(recorded.contains(idle));
    json("200 OK", &recorded.replace(idle, &format!(r#""num_waiting_uncached_tokens":{tokens}"#)))
}

/// A prefill server, and what it answers to polls: nothing at all if that is empty.
struct Polled {
    server: ScriptedServer,
    answer: Arc<Mutex<Vec<u8>>>,
}

impl Polled {
    async fn start(answer: Vec<u8>) -> Self {
        let answer = Arc::new(Mutex::new(answer));
        let current = Arc::clone(&answer);
        let script = move |seen: &ReceivedRequest| match is_poll(seen) {
            true if current.lock().unwrap().is_empty() => vec![Step::Hang],
            true => vec![Step::Send(current.lock().unwrap().clone())],
            false => vec![Step::Send(json("200 OK", "{}"))],
        };
        Self { server: ScriptedServer::start(script).await, answer }
    }

    fn answers(&self, answer: Vec<u8>) {
        *self.answer.lock().unwrap() = answer;
    }

    fn foreign_work(&self, router: &Router) -> u64 {
        router.backend(&self.server).foreign_work()
    }

    async fn wait_foreign_work(&self, router: &Router, bytes: u64) {
        wait_until("the work that the server tells", || self.foreign_work(router) == bytes).await;
    }
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    kit::with_timeout(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

async fn send(router: &Router, requests: usize) {
    let mut client = router.client().await;
    for _ in 0..requests {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    router.wait_idle().await;
}

async fn busy_server_is_left_to_others<P: Policy>(policy: fn() -> P) {
    let (busy, other) = (Polled::start(load(1_000_000)).await, Polled::start(load(0)).await);
    let decode = ok_server().await;
    let router = Router::start_with(&[&busy.server, &other.server], &[&decode], |config| {
        config.policy(policy).load_poll_interval(INTERVAL)
    })
    .await;
    busy.wait_foreign_work(&router, 4_000_000).await;
    send(&router, 20).await;
    assert_eq!((requests(&busy.server), requests(&other.server)), (0, 20));
    busy.answers(load(0));
    busy.wait_foreign_work(&router, 0).await;
    // Idle servers share the requests: that one of them gets none of 40 is a matter of 2^40.
    send(&router, 40).await;
    assert!(requests(&busy.server) > 0);
    assert!(polls(&decode) == 0, "decode servers are not asked");
}

#[tokio::test]
async fn server_that_tells_much_waiting_work_gets_no_requests_until_it_tells_none() {
    busy_server_is_left_to_others(|| LeastLoad).await;
    busy_server_is_left_to_others(|| PowerOfTwo).await;
    busy_server_is_left_to_others(CacheAware::new).await;
}

#[tokio::test]
async fn what_a_server_has_told_counts_for_three_intervals() {
    let interval = Duration::from_secs(1);
    let servers = [
        Polled::start(load(1_000)).await,
        Polled::start(load(1_000)).await,
        Polled::start(load(1_000)).await,
    ];
    let decode = ok_server().await;
    let router = Router::start_with(&servers.each_ref().map(|polled| &polled.server), &[&decode], |config| {
        config.load_poll_interval(interval)
    })
    .await;
    for polled in &servers {
        polled.wait_foreign_work(&router, 4_000).await;
    }
    let told = Instant::now();
    servers[0].answers(Vec::new());
    servers[1].answers(json("500 Internal Server Error", "{}"));
    servers[2].answers(json("200 OK", r#"{"loads":[{"num_waiting_uncached_tokens":"many"}]}"#));
    wait_until("a poll that fails", || servers.iter().all(|polled| polls(&polled.server) > 1)).await;
    // Where this machine took longer to come here, nothing is known.
    if told.elapsed() < 2 * interval {
        assert_eq!(servers.each_ref().map(|polled| polled.foreign_work(&router)), [4_000; 3]);
    }
    for polled in &servers {
        polled.wait_foreign_work(&router, 0).await;
    }
    assert!(told.elapsed() > interval);
    servers[0].answers(load(2_000));
    servers[0].wait_foreign_work(&router, 8_000).await;
}

#[tokio::test]
async fn polls_that_fail_change_nothing() {
    let failures = [
        json("200 OK", "{"),
        json("200 OK", "[]"),
        json("200 OK", r#"{"loads":[]}"#),
        json("200 OK", r#"{"loads":[{"num_waiting_uncached_tokens":-5}]}"#),
        json("401 Unauthorized", "{}"),
        b"no HTTP\r\n\r\n".to_vec(),
    ];
    let mut servers = Vec::new();
    for failure in failures {
        servers.push(Polled::start(failure).await);
    }
    let decode = ok_server().await;
    let all: Vec<_> = servers.iter().map(|polled| &polled.server).collect();
    let router = Router::start_with(&all, &[&decode], |config| {
        config.policy(|| LeastLoad).health_checks(true).load_poll_interval(INTERVAL)
    })
    .await;
    wait_until("polls of all servers", || all.iter().all(|server| polls(server) > 5)).await;
    send(&router, 200).await;
    for polled in &servers {
        assert_eq!(polled.foreign_work(&router), 0);
        assert!(router.backend(&polled.server).is_healthy());
        // The mean is 33 of 200.
        assert!(requests(&polled.server) > 5);
    }
}

#[tokio::test]
async fn servers_are_not_polled_by_default() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let _router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.health_checks(true).health_check_interval(Duration::from_millis(10))
    })
    .await;
    prefill.wait_for_requests(10).await;
    assert_eq!(polls(&prefill), 0);
}

#[tokio::test]
async fn polls_begin_and_end_with_a_reload() {
    let (prefill, decode) = (Polled::start(load(1_000)).await, ok_server().await);
    let config = || {
        let prefill = vec![(prefill.server.url(), Some(kit::BOOTSTRAP_PORT))];
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 60).health_checks(false)
    };
    let router = Router::start_with_config(config()).await;
    let polled = config().load_poll_interval(INTERVAL).worker_api_key("a-key");
    assert!(router.reload(polled).expect("a valid configuration").needs_restart.is_empty());
    prefill.wait_foreign_work(&router, 4_000).await;
    let seen = prefill.server.requests();
    assert_eq!(seen[0].head.start_line, "GET /v1/loads HTTP/1.1");
    assert_eq!(seen[0].head.header("authorization"), Some("Bearer a-key"));
    router.reload(config()).expect("a valid configuration");
    prefill.wait_foreign_work(&router, 0).await;
    assert_eq!(polls(&prefill.server), prefill.server.requests().len(), "health checks are off");
}

#[tokio::test]
async fn server_without_the_route_is_asked_less_often() {
    let old = Polled::start(json("404 Not Found", r#"{"detail":"Not Found"}"#)).await;
    let (new, decode) = (Polled::start(load(0)).await, ok_server().await);
    let _router = Router::start_with(&[&old.server, &new.server], &[&decode], |config| {
        config.load_poll_interval(Duration::from_millis(10))
    })
    .await;
    // In the same time the other one is asked about six times: 1, 3, 7, 15 and 31 intervals later.
    wait_until("polls of the new server", || polls(&new.server) >= 60).await;
    assert!((2..=15).contains(&polls(&old.server)), "{}", polls(&old.server));
}

#[tokio::test]
async fn server_without_the_route_is_logged_once() {
    let old = Polled::start(json("404 Not Found", r#"{"detail":"Not Found"}"#)).await;
    let decode = ok_server().await;
    let program = RouterProcess::between(&old.server, &decode, &["--load-poll-secs", "1"]).await;
    // The second one comes after the interval that is left out.
    wait_until("two polls", || polls(&old.server) >= 2).await;
    program.client().await.post("/generate", BODY).await;
    let lines = program.stop().await;
    let told: Vec<_> = lines.iter().filter(|line| line.contains("/v1/loads")).collect();
    assert_eq!(told.len(), 1, "{lines:?}");
    assert!(told[0].contains(&old.server.url()) && told[0].contains("404"), "{told:?}");
}

#[tokio::test]
async fn routers_that_share_nothing_send_a_conversation_to_the_same_servers() {
    let mut prefill = Vec::new();
    for _ in 0..8 {
        prefill.push(Polled::start(load(0)).await.server);
    }
    let (all, decode) = (prefill.iter().collect::<Vec<_>>(), ok_server().await);
    let mut routers = Vec::new();
    for _ in 0..3 {
        let with_polls =
            |config: MiniLbConfig| config.policy(CacheAware::new).load_poll_interval(Duration::from_secs(1));
        routers.push(Router::start_with(&all, &[&decode], with_polls).await);
    }
    let number = AtomicU64::new(0);
    let mut used = HashSet::new();
    for conversation in 0..12 {
        let before: Vec<_> = all.iter().map(|server| requests(server)).collect();
        // All of them are idle, so each router takes the first of the two homes, at each turn.
        for turn in 1..4 {
            for router in &routers {
                let text = format!("conversation {conversation} {}", "x".repeat(5_000 * turn));
                let body = format!(r#"{{"text":"{text}","rid":"{}"}}"#, number.fetch_add(1, Relaxed));
                assert_eq!(router.client().await.post("/generate", body).await.status(), 200);
                router.wait_idle().await;
            }
        }
        let changed =
            |(place, server): (usize, &&ScriptedServer)| (requests(server) > before[place]).then_some(place);
        let at: Vec<_> = all.iter().enumerate().filter_map(changed).collect();
        assert_eq!(at.len(), 1, "conversation {conversation} was sent to {at:?}");
        used.extend(at);
    }
    assert!(used.len() > 2, "{used:?}");
}

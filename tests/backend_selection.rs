//! How a backend is chosen: policies, pairs, and the bootstrap fields that follow from the choice.

mod kit;

use std::sync::Arc;

use kit::{Client, Gate, Router, ScriptedServer, Step, json};
use mini_lb::{
    Backend, Choice, ConsistentHash, MiniLbConfig, MiniLoadBalancer, Policy, Random, Role, RoundRobin,
};

const BODY: &str = r#"{"text":"a"}"#;

async fn servers<const N: usize>() -> [ScriptedServer; N] {
    let mut servers = Vec::new();
    for _ in 0..N {
        servers.push(ScriptedServer::always(json("200 OK", "{}")).await);
    }
    servers.try_into().ok().expect("as many as were started")
}

fn counts(servers: &[ScriptedServer]) -> Vec<usize> {
    servers.iter().map(|server| server.requests().len()).collect()
}

/// Sends requests one after the other and waits until the servers of each role have received all of them.
async fn send(router: &Router, requests: usize, roles: [&[ScriptedServer]; 2]) {
    let mut client = router.client().await;
    for _ in 0..requests {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    let all_seen = async {
        while roles.iter().any(|servers| counts(servers).iter().sum::<usize>() < requests) {
            tokio::task::yield_now().await;
        }
    };
    kit::with_timeout("every request at the servers", all_seen).await;
}

#[tokio::test]
async fn random_policy_uses_every_backend_of_each_role() {
    let (prefill, decode) = (servers::<3>().await, servers::<2>().await);
    let router =
        Router::start_with(&prefill.each_ref(), &decode.each_ref(), |config| config.policy(|| Random)).await;
    send(&router, 300, [&prefill, &decode]).await;
    // The mean is 100 of 300; fewer than 60 is 5 standard deviations off.
    assert!(counts(&prefill).iter().all(|count| *count > 60), "{:?}", counts(&prefill));
    assert!(counts(&decode).iter().all(|count| *count > 100), "{:?}", counts(&decode));
}

#[tokio::test]
async fn round_robin_rotates_within_each_role() {
    let (prefill, decode) = (servers::<3>().await, servers::<2>().await);
    let router = Router::start_with(&prefill.each_ref(), &decode.each_ref(), |config| {
        config.policy(RoundRobin::default)
    })
    .await;
    send(&router, 12, [&prefill, &decode]).await;
    assert_eq!((counts(&prefill), counts(&decode)), (vec![4, 4, 4], vec![6, 6]));
}

#[tokio::test]
async fn each_role_can_have_its_own_policy() {
    let (prefill, decode) = (servers::<2>().await, servers::<3>().await);
    let router = Router::start_with(&prefill.each_ref(), &decode.each_ref(), |config| {
        config.prefill_policy(Last).decode_policy(RoundRobin::default())
    })
    .await;
    send(&router, 6, [&prefill, &decode]).await;
    assert_eq!((counts(&prefill), counts(&decode)), (vec![0, 6], vec![2, 2, 2]));
}

/// A policy of a library user.
struct Last;

impl Policy for Last {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        choice.servers().last().unwrap()
    }
}

#[tokio::test]
async fn bootstrap_fields_name_the_selected_prefill_backend() {
    let (prefill, decode) = (servers::<2>().await, servers::<1>().await);
    let named = |server: &ScriptedServer, port| (server.url(), Some(port));
    let config = MiniLbConfig::new(
        "127.0.0.1",
        1,
        vec![named(&prefill[0], 1_111), named(&prefill[1], 2_222)],
        vec![decode[0].url()],
        60,
    )
    .prefill_policy(RoundRobin::default());
    let router = Router::start_with_config(config).await;
    send(&router, 2, [&prefill, &decode]).await;
    assert_eq!(prefill[0].only_request().await.json()["bootstrap_port"], 1_111);
    assert_eq!(prefill[1].only_request().await.json()["bootstrap_port"], 2_222);
}

#[test]
fn library_user_can_select_a_pair() {
    let config = MiniLbConfig::new(
        "127.0.0.1",
        30_000,
        vec![("http://[FD00::1]:1234".into(), Some(9_000)), ("http://p2".into(), None)],
        vec!["http://d1:31000/".into()],
        60,
    )
    .prefill_policy(RoundRobin::default())
    .decode_policy(Random);
    let balancer = MiniLoadBalancer::new(config).unwrap();
    let pair = balancer.select_pair().expect("servers of both roles");
    let prefill = pair.prefill();
    assert_eq!((prefill.role(), prefill.url()), (Role::Prefill, "http://[fd00::1]:1234"));
    assert_eq!((prefill.bootstrap_host(), prefill.bootstrap_port()), (Some("[fd00::1]"), Some(9_000)));
    assert_eq!((pair.decode().role(), pair.decode().url()), (Role::Decode, "http://d1:31000"));
    let pair = balancer.select_pair().expect("servers of both roles");
    assert_eq!((pair.prefill().url(), pair.prefill().bootstrap_port()), ("http://p2:80", None));
    assert_eq!(pair.decode().bootstrap_host(), None);
}

/// What a request says that its prefill server is to keep until the gate opens.
const HOLD: &str = "hold this one";

/// Three prefill servers that hold requests with [`HOLD`], and a decode server, behind a router.
struct Fleet {
    prefill: Vec<ScriptedServer>,
    _decode: ScriptedServer,
    gate: Gate,
    router: Router,
    client: Client,
    /// Requests that the prefill servers had before the last one.
    counts: Vec<usize>,
}

impl Fleet {
    async fn start(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Self {
        let gate = Gate::new();
        let mut prefill = Vec::new();
        for _ in 0..3 {
            let gate = gate.clone();
            let script = move |request: &kit::ReceivedRequest| {
                let is_held = String::from_utf8_lossy(&request.body).contains(HOLD);
                let wait = is_held.then(|| Step::Wait(gate.clone()));
                wait.into_iter().chain([Step::Send(json("200 OK", "{}"))]).collect()
            };
            prefill.push(ScriptedServer::start(script).await);
        }
        let [decode] = servers::<1>().await;
        let router = Router::start_with(&prefill.iter().collect::<Vec<_>>(), &[&decode], options).await;
        let client = router.client().await;
        let counts = counts(&prefill);
        Self { prefill, _decode: decode, gate, router, client, counts }
    }

    /// Sends a request and returns the index of the prefill server that got it.
    async fn send(&mut self, target: &str, headers: &[(&str, &str)], body: &str) -> usize {
        self.client.send_request("POST", target, headers, body.as_bytes()).await;
        assert_eq!(self.client.response().await.status(), 200);
        let sent = self.counts.iter().sum::<usize>() + 1;
        let arrived = async {
            while counts(&self.prefill).iter().sum::<usize>() < sent {
                tokio::task::yield_now().await;
            }
        };
        kit::with_timeout("the request at a prefill server", arrived).await;
        let before = std::mem::replace(&mut self.counts, counts(&self.prefill));
        self.counts.iter().zip(before).position(|(now, before)| *now > before).expect("one has it")
    }

    async fn chat(&mut self, turns: &[String]) -> usize {
        let turns: Vec<_> =
            turns.iter().map(|text| format!(r#"{{"role":"user","content":"{text}"}}"#)).collect();
        let body = format!(r#"{{"model":"m","messages":[{}]}}"#, turns.join(","));
        self.send("/v1/chat/completions", &[], &body).await
    }

    /// Waits until a prefill server has as much work as it should.
    async fn wait_for_work(&self, server: usize, is_right: impl Fn(u64) -> bool) {
        let server = self.router.backend(&self.prefill[server]);
        let right = async {
            while !is_right(server.work()) {
                tokio::task::yield_now().await;
            }
        };
        kit::with_timeout("the work of a server", right).await;
    }
}

fn turn(number: usize, length: usize) -> String {
    format!("turn {number} {}", "x".repeat(length))
}

#[tokio::test]
async fn a_conversation_stays_on_its_prefill_server_until_that_is_too_busy() {
    let mut fleet = Fleet::start(|config| config).await;
    let mut turns = vec![turn(0, 8_000)];
    let home = fleet.chat(&turns).await;
    for number in 1..8 {
        turns.push(turn(number, 1_500));
        assert_eq!(fleet.chat(&turns).await, home, "turn {number}");
    }
    // A request that continues it stays too, with much more to compute than anybody else could be waited for.
    let held = [&turns[..], &[format!("{HOLD} {}", turn(8, 200_000))]].concat();
    assert_eq!(fleet.chat(&held).await, home);
    fleet.wait_for_work(home, |work| (200_000..203_000).contains(&work)).await;
    turns.push(turn(9, 100));
    let other = fleet.chat(&turns).await;
    assert_ne!(other, home, "computing 19 KB again is sooner done than waiting for 200 KB");
    fleet.gate.open();
    for server in 0..3 {
        fleet.wait_for_work(server, |work| work == 0).await;
    }
}

#[tokio::test]
async fn a_server_whose_cache_was_flushed_is_not_waited_for() {
    let mut fleet = Fleet::start(|config| config).await;
    let turns = vec![turn(0, 16_000)];
    let home = fleet.chat(&turns).await;
    let held = [&turns[..], &[HOLD.to_owned()]].concat();
    assert_eq!(fleet.chat(&held).await, home);
    fleet.wait_for_work(home, |work| work > 0).await;
    assert_eq!(fleet.chat(&turns).await, home, "a short wait is better than to compute all of it");
    fleet.wait_for_work(home, |work| work < 3_200).await;
    assert_eq!(fleet.client.post("/flush_cache", "").await.status(), 200);
    fleet.counts = counts(&fleet.prefill);
    assert_ne!(fleet.chat(&turns).await, home);
    fleet.gate.open();
}

#[tokio::test]
async fn with_limits_on_each_server_a_conversation_stays_as_well() {
    let limits = |config: MiniLbConfig| config.max_in_flight_per_prefill(5).max_in_flight_per_decode(5);
    let mut fleet = Fleet::start(limits).await;
    let mut turns = vec![turn(0, 8_000)];
    let home = fleet.chat(&turns).await;
    for number in 1..8 {
        turns.push(turn(number, 1_500));
        assert_eq!(fleet.chat(&turns).await, home, "turn {number}");
    }
}

#[tokio::test]
async fn a_key_in_a_header_or_in_the_body_names_the_server() {
    let mut fleet = Fleet::start(|config| config.policy(|| ConsistentHash)).await;
    let mut homes = Vec::new();
    for key in (0..12).map(|number| format!("session-{number}")) {
        let body = format!(r#"{{"text":"a","session_id":"{key}"}}"#);
        let home = fleet.send("/generate", &[], &body).await;
        assert_eq!(fleet.send("/generate", &[("x-session-id", &key)], BODY).await, home);
        // The header counts first.
        assert_eq!(
            fleet.send("/generate", &[("X-SMG-Routing-Key", &key)], r#"{"session_id":"x"}"#).await,
            home
        );
        homes.push(home);
    }
    homes.sort_unstable();
    homes.dedup();
    assert!(homes.len() > 1, "twelve keys are not all on one server");
}

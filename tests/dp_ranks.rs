//! Data-parallel ranks of servers: each is chosen by itself, by the room or by fields of the request, and
//! used as much as the others.

mod kit;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kit::processes::{BuiltRouter, Servers};
use kit::{Client, ReceivedRequest, Router, ScriptedServer, Step, json, with_timeout};
use loadtest::sim::{LoadBalance, RankStats, Role, Sim, SimConfig};
use mini_lb::{Backend, Choice, LeastLoad, MiniLbConfig, Policy, Selection};
use serde_json::Value;
use tokio::task::JoinSet;

/// As often as the options allow.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const BODY: &str = r#"{"text":"a","sampling_params":{"max_new_tokens":1}}"#;

fn simulated(role: Role, dp_size: u16) -> SimConfig {
    SimConfig { role, dp_size, prefix_cache: true, time_scale: 0.1, ..SimConfig::default() }
}

async fn start(config: SimConfig) -> Sim {
    Sim::start(config).await.expect("a free port")
}

/// A router in front of simulated servers, whose ranks it knows.
async fn router(prefill: &Sim, decode: &Sim, options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Router {
    let servers = (vec![(prefill.url(), prefill.bootstrap_port())], vec![decode.url()]);
    let config = MiniLbConfig::new("127.0.0.1", 30_000, servers.0, servers.1, 60).worker_threads(1);
    let router =
        Router::start_with(&[], &[], |_| options(config.health_check_interval(PROBE_INTERVAL))).await;
    wait_ready(router.address()).await;
    router
}

/// Servers are asked for their ranks with the first probe.
async fn wait_ready(address: SocketAddr) {
    let mut client = Client::connect(address).await;
    with_timeout("the servers to be ready", async {
        while client.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A prompt of so many bytes that is no other's.
fn prompt(number: usize, bytes: usize) -> String {
    let text: String = (0..bytes / 8).map(|word| format!("{:07} ", number * 10_007 + word)).collect();
    format!(r#"{{"text":"{text}","sampling_params":{{"max_new_tokens":1}}}}"#)
}

/// Sends these bodies from so many clients, each of which sends one after the other.
async fn send_all(address: SocketAddr, clients: usize, bodies: Vec<String>) {
    let (bodies, next) = (Arc::new(bodies), Arc::new(AtomicUsize::new(0)));
    let mut sending = JoinSet::new();
    for _ in 0..clients {
        let (bodies, next) = (Arc::clone(&bodies), Arc::clone(&next));
        sending.spawn(async move {
            let mut client = Client::connect(address).await;
            while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                let response = client.post("/generate", body).await;
                assert_eq!(response.status(), 200, "{}", response.text());
            }
        });
    }
    sending.join_all().await;
}

fn requests(sim: &Sim) -> Vec<u64> {
    sim.rank_stats().iter().map(|rank| rank.requests).collect()
}

/// The difference of the most and the least, as a part of the mean.
fn spread(counts: &[u64]) -> f64 {
    let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
    (most - least) as f64 * counts.len() as f64 / counts.iter().sum::<u64>() as f64
}

#[test]
fn eight_ranks_get_as_many_requests_each_from_the_built_program() {
    let servers = Servers::start(|config| {
        let dp_size = if config.role == Role::Prefill { 8 } else { 1 };
        SimConfig { dp_size, record: false, ..config }
    });
    let program = BuiltRouter::start(&servers);
    let address = program.url.strip_prefix("http://").unwrap().parse().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        wait_ready(address).await;
        send_all(address, 4, (0..10_000).map(|number| prompt(number, 2_500)).collect()).await;
    });
    let counts = requests(&servers.pair.prefill);
    assert_eq!(counts.iter().sum::<u64>(), 10_000);
    // With random ones it would be about 0.075.
    assert!(spread(&counts) <= 0.02, "{counts:?}");
    assert_eq!(servers.pair.prefill.stats().failed, 0);
}

/// How many of the prompts that come again the simulated server has cached.
async fn found_again(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> u64 {
    let prefill = start(simulated(Role::Prefill, 8)).await;
    let decode = start(simulated(Role::Decode, 1)).await;
    let router = router(&prefill, &decode, options).await;
    // One after the other: a rank that is behind with its work, as on a busy machine, is not given a prompt
    // although it has it cached.
    for _ in 0..4 {
        send_all(router.address(), 1, (0..24).map(|number| prompt(number, 5_000)).collect()).await;
    }
    assert_eq!(requests(&prefill).iter().sum::<u64>(), 96);
    prefill.rank_stats().iter().map(|rank| rank.cached_prompts).sum()
}

#[tokio::test]
async fn a_repeated_prompt_goes_to_the_rank_that_has_it() {
    let known = found_again(|config| config).await;
    // Without probes the router does not know of ranks: rooms are random, and so are ranks.
    let ignored = found_again(|config| config.health_checks(false)).await;
    println!("of 72 repeated prompts {known} were cached, {ignored} with ranks ignored");
    assert_eq!(known, 72);
    assert!(ignored < known / 2, "{ignored} of {known}");
}

#[tokio::test]
async fn both_servers_are_told_their_ranks_where_they_do_not_follow_the_room() {
    let round_robin = Some(LoadBalance::RoundRobin);
    let prefill = start(SimConfig { load_balance: round_robin, ..simulated(Role::Prefill, 4) }).await;
    let decode = start(simulated(Role::Decode, 2)).await;
    // Their own load balancers would use all ranks.
    let router = router(&prefill, &decode, |config| config.dp_aware(true).policy(|| LastRank)).await;
    let mut client = router.client().await;
    for path in ["/generate", "/v1/chat/completions", "/v1/completions"] {
        for number in 0..8 {
            let body = format!(
                r#"{{"text":"{number}","prompt":"{number}","messages":[{{"role":"user","content":"{number}"}}]}}"#
            );
            client.send_request("POST", path, &[("x-data-parallel-rank", "1")], body.as_bytes()).await;
            let response = client.response().await;
            assert_eq!(response.status(), 200, "{}", response.text());
        }
    }
    assert_eq!(requests(&prefill), [0, 0, 0, 24]);
    assert_eq!(requests(&decode), [0, 24]);
    assert_eq!(decode.stats().mismatches, 0);
}

/// What a server is sent, and what it says of itself.
async fn describing_server(info: &'static str) -> ScriptedServer {
    ScriptedServer::start(move |seen| match seen.target() {
        "/server_info" => vec![Step::Send(json("200 OK", info))],
        _ => vec![Step::Send(json("200 OK", "{}"))],
    })
    .await
}

fn generations(server: &ScriptedServer) -> Vec<ReceivedRequest> {
    server.requests().into_iter().filter(|seen| seen.target() == "/generate").collect()
}

fn text(seen: &ReceivedRequest) -> String {
    String::from_utf8(seen.body.clone()).unwrap()
}

async fn between(prefill: &ScriptedServer, decode: &ScriptedServer, is_dp_aware: bool) -> Router {
    let servers = (vec![(prefill.url(), Some(8998))], vec![decode.url()]);
    let config = MiniLbConfig::new("127.0.0.1", 30_000, servers.0, servers.1, 60).worker_threads(1);
    let config = config.health_check_interval(PROBE_INTERVAL).policy(|| LeastLoad).dp_aware(is_dp_aware);
    let router = Router::start_with(&[], &[], |_| config).await;
    wait_ready(router.address()).await;
    router
}

const ROUND_ROBIN: &str = r#"{"dp_size":4,"load_balance_method":"round_robin"}"#;
const FOLLOWS_ROOM: &str = r#"{"dp_size":4,"load_balance_method":"follow_bootstrap_room"}"#;
const TWO_RANKS: &str = r#"{"dp_size":2,"load_balance_method":"round_robin"}"#;

#[tokio::test]
async fn legs_differ_by_the_fields_of_their_ranks_only() {
    for (of_prefill, is_dp_aware) in
        [(ROUND_ROBIN, true), (FOLLOWS_ROOM, true), (ROUND_ROBIN, false), (FOLLOWS_ROOM, false)]
    {
        let (prefill, decode) = (describing_server(of_prefill).await, describing_server(TWO_RANKS).await);
        let router = between(&prefill, &decode, is_dp_aware).await;
        let mut client = router.client().await;
        let mut seen = BTreeMap::<(u64, u64), usize>::new();
        for _ in 0..8 {
            assert_eq!(client.post("/generate", r#"{"text":"a"}"#).await.status(), 200);
            router.wait_idle().await;
            let (to_prefill, to_decode) = (generations(&prefill), generations(&decode));
            let [to_prefill, to_decode] = [to_prefill, to_decode].map(|all| text(all.last().unwrap()));
            let fields: Value = serde_json::from_str(&to_decode).unwrap();
            let room = fields["bootstrap_room"].as_u64().unwrap();
            let common = format!(
                r#"{{"text":"a","bootstrap_host":"127.0.0.1","bootstrap_port":8998,"bootstrap_room":{room}"#
            );
            let decode_rank = fields["routed_dp_rank"].as_u64();
            let of_decode = decode_rank.map_or(String::new(), |rank| format!(r#","routed_dp_rank":{rank}"#));
            assert_eq!(of_decode.is_empty(), !is_dp_aware);
            let rank = room % 4;
            if is_dp_aware && of_prefill == ROUND_ROBIN {
                let told = format!(r#","disagg_prefill_dp_rank":{rank}}}"#);
                assert_eq!(to_prefill, format!(r#"{common},"routed_dp_rank":{rank}{told}"#));
                assert_eq!(to_decode, format!("{common}{of_decode}{told}"));
            } else {
                assert_eq!(to_prefill, format!("{common}}}"));
                assert_eq!(to_decode, format!("{common}{of_decode}}}"));
            }
            *seen.entry((rank, decode_rank.unwrap_or(0))).or_default() += 1;
        }
        let of_rank = |rank| seen.iter().filter(|((own, _), _)| *own == rank).map(|(_, count)| count).sum();
        let counts: [usize; 4] = [0, 1, 2, 3].map(of_rank);
        if is_dp_aware || of_prefill == FOLLOWS_ROOM {
            assert_eq!(counts, [2; 4], "{of_prefill} {is_dp_aware}");
        }
    }
}

#[tokio::test]
async fn a_rank_that_the_client_has_chosen_is_the_one_that_it_gets() {
    let prefill = start(simulated(Role::Prefill, 4)).await;
    let decode = start(simulated(Role::Decode, 4)).await;
    for is_dp_aware in [false, true] {
        let router = router(&prefill, &decode, |config| config.dp_aware(is_dp_aware)).await;
        let mut client = router.client().await;
        for (field, rank) in [("routed_dp_rank", 2), ("data_parallel_rank", 1), ("disagg_prefill_dp_rank", 3)]
        {
            let before = requests(&prefill);
            for _ in 0..10 {
                let body = format!(r#"{{"{field}":{rank},"text":"a"}}"#);
                let response = client.post("/generate", body).await;
                assert_eq!(response.status(), 200, "{}", response.text());
            }
            let mut expected = before;
            expected[rank] += 10;
            assert_eq!(requests(&prefill), expected, "{field} {is_dp_aware}");
        }
        let refused = client.post("/generate", r#"{"routed_dp_rank":4,"text":"a"}"#).await;
        assert_eq!(refused.status(), 400, "{}", refused.text());
        // Null is no rank, and no choice of the router is added to it.
        assert_eq!(client.post("/generate", r#"{"routed_dp_rank":null,"text":"a"}"#).await.status(), 200);
    }
    // Those that choose the rank of prefill only are on any.
    let of_decode = requests(&decode);
    assert!(of_decode[2] >= 20 && of_decode[1] >= 20, "{of_decode:?}");
}

/// A prefill server that can be taken down and has as many ranks as it is told.
struct Restarting {
    server: ScriptedServer,
    is_up: Arc<AtomicBool>,
    dp_size: Arc<AtomicUsize>,
}

impl Restarting {
    async fn start(dp_size: usize) -> Self {
        let (is_up, dp_size) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(dp_size)));
        let (up, ranks) = (Arc::clone(&is_up), Arc::clone(&dp_size));
        let server = ScriptedServer::start(move |seen| match seen.target() {
            "/ready" if !up.load(Ordering::SeqCst) => vec![Step::Send(json("503 Service Unavailable", "{}"))],
            "/server_info" => {
                let body = format!(r#"{{"dp_size":{}}}"#, ranks.load(Ordering::SeqCst));
                vec![Step::Send(json("200 OK", &body))]
            }
            _ => vec![Step::Send(json("200 OK", "{}"))],
        })
        .await;
        Self { server, is_up, dp_size }
    }

    async fn restart(&self, router: &Router, dp_size: usize) {
        let backend = router.backend(&self.server);
        for is_up in [false, true] {
            self.is_up.store(is_up, Ordering::SeqCst);
            self.dp_size.store(dp_size, Ordering::SeqCst);
            with_timeout("the router to notice", async {
                while backend.is_healthy() != is_up {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    }
}

#[tokio::test]
async fn after_a_restart_with_other_ranks_those_are_used_and_the_counts_go_on() {
    let prefill = Restarting::start(3).await;
    let decode = kit::ok_server().await;
    let router = between(&prefill.server, &decode, false).await;
    let backend = router.backend(&prefill.server);
    let mut client = router.client().await;
    let mut sent = 0;
    for dp_size in [3, 5, 1, 2] {
        if sent > 0 {
            prefill.restart(&router, dp_size).await;
        }
        for _ in 0..2 * dp_size {
            assert_eq!(client.post("/generate", BODY).await.status(), 200);
        }
        router.wait_idle().await;
        let rooms = generations(&prefill.server)[sent..]
            .iter()
            .map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap() % dp_size as u64)
            .collect::<Vec<_>>();
        // One after the other, so that it is the turn of each.
        let mut counts = vec![0; dp_size];
        rooms.iter().for_each(|rank| counts[*rank as usize] += 1);
        assert_eq!(counts, vec![2; dp_size], "{rooms:?}");
        sent += rooms.len();
        assert_eq!(backend.ended(mini_lb::Outcome::Completed), sent as u64, "the same server");
        assert!(Arc::ptr_eq(&backend, &router.backend(&prefill.server)));
    }
}

/// Looks at servers only, and takes the first of equal ones.
struct KnowsNoRanks;

impl Policy for KnowsNoRanks {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        choice.servers().iter().min_by_key(|server| server.in_flight()).unwrap()
    }
}

/// The last rank of the first server.
struct LastRank;

impl Policy for LastRank {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        let last = (0..choice.servers().len()).max_by_key(|index| choice.rank(*index)).unwrap();
        choice.select(last)
    }
}

#[tokio::test]
async fn a_custom_policy_uses_all_ranks_or_the_one_that_it_selects() {
    let prefill = start(simulated(Role::Prefill, 8)).await;
    let decode = start(simulated(Role::Decode, 1)).await;
    let router_of_servers = router(&prefill, &decode, |config| config.policy(|| KnowsNoRanks)).await;
    send_all(router_of_servers.address(), 1, vec![BODY.to_owned(); 80]).await;
    assert_eq!(requests(&prefill), [10; 8]);
    let router_of_ranks = router(&prefill, &decode, |config| config.policy(|| LastRank)).await;
    send_all(router_of_ranks.address(), 4, vec![BODY.to_owned(); 80]).await;
    assert_eq!(requests(&prefill), [10, 10, 10, 10, 10, 10, 10, 90]);
}

#[tokio::test]
async fn a_simulated_server_refuses_a_rank_that_the_room_contradicts() {
    let prefill = start(simulated(Role::Prefill, 4)).await;
    let mut client = Client::connect(prefill.addr()).await;
    let room = r#""bootstrap_host":"127.0.0.1","bootstrap_port":1,"bootstrap_room":6"#;
    let response = client.post("/generate", format!(r#"{{"text":"a","routed_dp_rank":1,{room}}}"#)).await;
    assert_eq!(response.status(), 500);
    let why =
        "follow_bootstrap_room conflict: dispatched to dp_rank 1 but bootstrap_room 6 implies dp_rank 2";
    assert!(response.text().contains(why), "{}", response.text());
    assert_eq!(prefill.rank_stats()[1], RankStats { requests: 1, cached_prompts: 0 });
    let ranks: HashSet<_> = (0..4).map(|rank| requests(&prefill)[rank]).collect();
    assert_eq!(ranks.len(), 2);
}

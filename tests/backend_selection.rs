//! How a backend is chosen: policies, pairs, and the bootstrap fields that follow from the choice.

mod kit;

use std::sync::Arc;

use kit::{Router, ScriptedServer, json};
use mini_lb::{Backend, Choice, MiniLbConfig, MiniLoadBalancer, Policy, Random, Role, RoundRobin};

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
    let router = Router::start(&prefill.each_ref(), &decode.each_ref()).await;
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

//! Servers behind a gateway that tells them apart by a path: their URLs have it, and all requests begin with
//! it.

mod kit;

use std::time::Duration;

use kit::{ReceivedRequest, Router, ScriptedServer, Step, json};
use mini_lb::MiniLbConfig;
use serde_json::{Value, json as value};

const BODY: &str = r#"{"text":"a"}"#;

/// A gateway that passes `/p` on to a prefill server and `/d` to a decode server. Everything else is unknown
/// to it.
async fn gateway() -> ScriptedServer {
    ScriptedServer::start(|request| {
        let target = request.target();
        let answer = match target.get(..3) {
            Some("/p/") => json("200 OK", r#"{"text":"of prefill"}"#),
            Some("/d/") => json("200 OK", r#"{"text":"of decode"}"#),
            _ => json("404 Not Found", "{}"),
        };
        vec![Step::Send(answer)]
    })
    .await
}

fn config(gateway: &ScriptedServer) -> MiniLbConfig {
    let url = gateway.url();
    let prefill = vec![(format!("{url}/p"), Some(kit::BOOTSTRAP_PORT))];
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![format!("{url}/d/")], 60).worker_threads(1)
}

fn targets(requests: &[ReceivedRequest]) -> Vec<String> {
    let mut targets: Vec<_> = requests.iter().map(|request| request.target().to_owned()).collect();
    targets.sort();
    targets
}

#[tokio::test]
async fn both_legs_have_the_path_of_their_server() {
    let gateway = gateway().await;
    let router = Router::start_with_config(config(&gateway)).await;
    let response = router.client().await.post("/generate?a=/b", BODY).await;
    assert_eq!((response.status(), response.text()), (200, r#"{"text":"of decode"}"#));
    gateway.wait_for_requests(2).await;
    let requests = gateway.requests();
    assert_eq!(targets(&requests), ["/d/generate?a=/b", "/p/generate?a=/b"]);
    for request in requests {
        assert_eq!(request.head.header("host"), Some(gateway.address().to_string().as_str()));
        // The bootstrap server of a prefill has no path.
        assert_eq!(request.json()["bootstrap_host"], "127.0.0.1");
    }
}

#[tokio::test]
async fn probes_and_questions_have_the_path_too() {
    let gateway = gateway().await;
    let config = config(&gateway).health_check_interval(Duration::from_millis(50));
    let router = Router::start_with(&[], &[], |_| config.health_checks(true)).await;
    let ready = async { while router.client().await.get("/ready").await.status() != 200 {} };
    kit::with_timeout("servers that are ready", ready).await;
    assert_eq!(router.client().await.get("/v1/models").await.status(), 200);
    assert_eq!(router.client().await.get("/flush_cache").await.status(), 200);
    let requests = gateway.requests();
    for target in ["/p/ready", "/d/ready", "/p/v1/models", "/p/flush_cache", "/d/flush_cache"] {
        assert!(targets(&requests).iter().any(|seen| seen == target), "{target}");
    }
    assert!(requests.iter().all(|request| ["/p/", "/d/"].contains(&&request.target()[..3])));
}

#[tokio::test]
async fn two_servers_of_one_address_are_two_workers() {
    let gateway = gateway().await;
    let router = Router::start_with_config(config(&gateway)).await;
    let mut client = router.client().await;
    let url = gateway.url();
    let body = value!({ "url": format!("{url}/d/2"), "worker_type": "decode" }).to_string();
    assert_eq!(client.post("/workers", &body).await.status(), 202);
    let urls = |workers: &Value| {
        let workers = workers["workers"].as_array().expect("a list");
        workers.iter().map(|worker| worker["url"].as_str().expect("a URL").to_owned()).collect::<Vec<_>>()
    };
    let listed = client.get("/workers").await.json();
    assert_eq!(urls(&listed), ["/p", "/d", "/d/2"].map(|path| format!("{url}{path}")));
    let second = format!("{url}/d/2").replace(':', "%3A").replace('/', "%2F");
    client.send_request("DELETE", &format!("/workers/{second}?timeout=5"), &[], b"").await;
    assert_eq!(client.response().await.status(), 200);
    let listed = client.get("/workers").await.json();
    assert_eq!(urls(&listed), ["/p", "/d"].map(|path| format!("{url}{path}")));
}

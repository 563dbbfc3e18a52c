//! The load generator against its simulated servers, through the router: every kind of request succeeds, on
//! reused connections.

use std::time::Duration;

use loadtest::canned::{Canned, Plan, Role};
use loadtest::load::{Load, Request, RequestKind, Until};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use tokio::net::TcpListener;

#[tokio::test]
async fn every_kind_of_load_is_served_on_reused_connections() {
    let plan = Plan { tokens: 16, ..Plan::default() };
    let start = |role| Canned::start(role, ([127, 0, 0, 1], 0).into(), plan).expect("a free port");
    let (prefill, decode) = (start(Role::Prefill), start(Role::Decode));
    let config =
        MiniLbConfig::new("127.0.0.1", 30_000, vec![(prefill.url(), Some(8998))], vec![decode.url()], 60);
    let router = MiniLoadBalancer::new(config.worker_threads(1)).expect("a valid configuration");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let target = listener.local_addr().expect("a bound address");
    tokio::spawn(async move { router.serve(listener, std::future::pending()).await });
    for (kind, body) in [
        (RequestKind::Chat, 300),
        (RequestKind::Chat, 1 << 20),
        (RequestKind::ChatStream, 300),
        (RequestKind::Logprobs, 300),
        (RequestKind::LogprobStream, 300),
    ] {
        let mut load = Load::new(target, Request::new(target, kind, body, plan.tokens), 2, Duration::ZERO);
        load.until = Until::Count(10);
        let report = load.run().await.expect("a run");
        assert_eq!((report.requests, report.errors, report.unmerged), (10, 0, 0), "{kind:?}: {report:?}");
    }
    for server in [prefill, decode] {
        let seen = server.counts();
        assert_eq!(seen.requests, 50);
        assert!(seen.connections <= 4, "connections are reused: {seen:?}");
    }
}

//! Servers that respond before they have read the request's body, and then read no more of it.

mod kit;

use std::time::Duration;

use kit::{Response, Router, ScriptedServer, Step, TerminatorOptions, TestCa, TlsTerminator, ok_server};
use mini_lb::{MiniLbConfig, Outcome, Role};

const REFUSAL: &str = r#"{"error":{"message":"too large"}}"#;

/// A refusal in the parts in which it is sent.
fn refusal(status: &str) -> [Vec<u8>; 2] {
    let (length, reason) = (REFUSAL.len(), &status[4..]);
    let head = format!(
        "HTTP/1.1 {status}\r\nx-why: {reason}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    let (first, rest) = REFUSAL.split_at(9);
    [(head + first).into(), rest.into()]
}

/// How a server goes on after a refusal whose request it has not read.
fn endings() -> [Vec<Step>; 4] {
    [
        // The kernel sends a reset, because there are unread bytes.
        vec![Step::Close],
        vec![Step::Pause(Duration::from_millis(20)), Step::Close],
        // As nginx.
        vec![Step::Linger],
        // Reads nothing, and stays.
        vec![Step::CloseAfter(Duration::from_secs(30))],
    ]
}

/// A pair of which the server of one role refuses, and the other says nothing until it is closed.
struct Pair {
    refusing: ScriptedServer,
    _silent: ScriptedServer,
    router: Router,
}

impl Pair {
    async fn start(role: Role, steps: Vec<Step>) -> Self {
        let refusing = ScriptedServer::start_early(move |_| steps.clone()).await;
        let silent = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let router = match role {
            Role::Prefill => Router::start(&[&refusing], &[&silent]).await,
            Role::Decode | Role::Regular => Router::start(&[&silent], &[&refusing]).await,
        };
        Self { refusing, _silent: silent, router }
    }

    async fn post(&self, size: usize) -> Response {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(size));
        self.router.client().await.post("/generate", body).await
    }

    /// How often a leg on the refusing server ended so.
    async fn ended(&self, outcome: Outcome) -> u64 {
        self.router.wait_idle().await;
        self.router.backend(&self.refusing).ended(outcome)
    }
}

async fn a_refusal_is_passed_on(role: Role) {
    const REPEATS: u64 = 2;
    for ending in endings() {
        for parts in [1, 2] {
            let [first, rest] = refusal("413 Payload Too Large");
            let mut steps = match parts {
                1 => vec![Step::Send([first, rest].concat())],
                // The rest comes when the head has been read, and more of the request may be written.
                _ => vec![Step::Send(first), Step::Pause(Duration::from_millis(20)), Step::Send(rest)],
            };
            steps.extend(ending.clone());
            let pair = Pair::start(role, steps).await;
            for size in [10, 1_000_000, 8_000_000] {
                for _ in 0..REPEATS {
                    let response = pair.post(size).await;
                    assert_eq!((response.status(), response.text()), (413, REFUSAL), "{role}, {size} bytes");
                    assert_eq!(response.head.header("x-why"), Some("Payload Too Large"));
                }
            }
            assert_eq!(pair.ended(Outcome::Refused).await, 3 * REPEATS, "{role}, in {parts} parts");
            assert!(pair.router.backend(&pair.refusing).is_healthy());
        }
    }
}

#[tokio::test]
async fn refusal_of_an_unread_body_by_prefill_is_passed_on() {
    a_refusal_is_passed_on(Role::Prefill).await;
}

#[tokio::test]
async fn refusal_of_an_unread_body_by_decode_is_passed_on() {
    a_refusal_is_passed_on(Role::Decode).await;
}

#[tokio::test]
async fn refusals_of_both_servers_are_passed_on() {
    for status in ["401 Unauthorized", "413 Payload Too Large", "429 Too Many Requests"] {
        let refusing = move |_: &_| vec![Step::Send(refusal(status).concat()), Step::Close];
        let prefill = ScriptedServer::start_early(refusing).await;
        let decode = ScriptedServer::start_early(refusing).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8_000_000));
        for _ in 0..8 {
            let response = router.client().await.post("/generate", &body).await;
            assert_eq!((&response.head.start_line[9..], response.text()), (status, REFUSAL));
        }
        router.wait_idle().await;
        for server in [&prefill, &decode] {
            let server = router.backend(server);
            assert_eq!(server.ended(Outcome::Closed), 0);
            assert!(server.is_healthy());
        }
    }
}

#[tokio::test]
async fn server_that_closes_without_a_response_is_a_closed_connection() {
    for role in [Role::Prefill, Role::Decode] {
        for end in [Step::Close, Step::Reset] {
            let pair = Pair::start(role, vec![end]).await;
            for size in [10, 8_000_000] {
                let response = pair.post(size).await;
                assert_eq!(response.status(), 502);
                assert_eq!(response.error_code(), format!("{role}_closed"));
            }
            assert_eq!(pair.ended(Outcome::Closed).await, 2);
        }
    }
}

#[tokio::test]
async fn connection_is_not_used_again_after_a_response_to_an_unread_body() {
    let decode = ScriptedServer::start_early(|_| {
        // A length, and no `connection: close`: only the unwritten request shows that it cannot be used.
        let refusal = kit::json("429 Too Many Requests", REFUSAL);
        vec![Step::Send(refusal), Step::CloseAfter(Duration::from_secs(30))]
    })
    .await;
    let prefill = ok_server().await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8_000_000));
    for count in 1..=3 {
        assert_eq!(router.client().await.post("/generate", &body).await.status(), 429);
        router.wait_idle().await;
        assert_eq!(decode.connections(), count);
    }
}

#[tokio::test]
async fn refusal_of_an_unread_body_arrives_over_tls() {
    let ca = TestCa::new();
    let decode = ScriptedServer::start_early(|_| {
        vec![Step::Send(refusal("413 Payload Too Large").concat()), Step::Linger]
    })
    .await;
    // It closes the connection when the server has closed its side, with most of the body unread.
    let options = TerminatorOptions {
        identity: ca.issue("server", &["localhost"]),
        truncates: false,
        reads_slowly: true,
        client_ca: None,
    };
    let terminator = TlsTerminator::start(decode.address(), options).await;
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let config = MiniLbConfig::new(
        "127.0.0.1",
        30_000,
        vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))],
        vec![terminator.url()],
        60,
    );
    let router = Router::start_with_config(config.backend_ca([ca.file()])).await;
    for size in [10, 1_000_000, 8_000_000] {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(size));
        for _ in 0..4 {
            let response = router.client().await.post("/generate", &body).await;
            assert_eq!((response.status(), response.text()), (413, REFUSAL), "{size} bytes");
        }
    }
}

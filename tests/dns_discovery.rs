//! Backends found by DNS, backends that start late, and descriptions that contradict the configuration: the
//! built program with simulated SGLang servers.
//!
//! Multi-threaded tests: reading the program's log blocks a thread, and the servers need another.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use kit::{Client, Router, ScriptedServer, Step, json};
use loadtest::sim::{Role, Sim, SimConfig};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;

/// The program, on a port of its own; ended when a test ends.
struct Program {
    child: Child,
    lines: Receiver<String>,
    address: SocketAddr,
}

impl Program {
    fn start(args: &[&str]) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mini-lb"))
            .args(args)
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--prometheus-port", "0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let program = Self { child, lines, address };
        program.line("listening on");
        program
    }

    fn line(&self, part: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(kit::TIMEOUT) {
                Ok(line) if line.contains(part) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no line with {part:?} ({error}) after {seen:?}"),
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server that describes itself as a prefill server.
async fn prefill() -> ScriptedServer {
    ScriptedServer::start(|seen| {
        let body = match seen.target() {
            "/server_info" => r#"{"disaggregation_mode":"prefill","disaggregation_bootstrap_port":9101}"#,
            _ => "{}",
        };
        vec![Step::Send(json("200 OK", body))]
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dns_name_expands_to_all_its_addresses() {
    let (prefill, decode) = (prefill().await, ScriptedServer::always(json("200 OK", "{}")).await);
    let name = |server: &ScriptedServer| format!("localhost:{}", server.address().port());
    let (prefill_name, decode_name) = (name(&prefill), name(&decode));
    let typed =
        ["--prefill-dns", &prefill_name, "none", "--decode-dns", &decode_name, "--dns-interval-secs", "1"];
    let program = Program::start(&typed);
    let mut client = Client::connect(program.address).await;
    kit::with_timeout("a ready router", async {
        while client.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // `localhost` may have a second address on which nothing listens; that backend gets no request.
    for _ in 0..5 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    let shown = client.get("/workers").await.json();
    let of = |server: &ScriptedServer| {
        let all = shown["workers"].as_array().unwrap();
        all.iter()
            .find(|entry| entry["url"] == server.url())
            .expect("127.0.0.1 is an address of localhost")
            .clone()
    };
    assert_eq!((&of(&prefill)["source"], &of(&decode)["source"]), (&"dns".into(), &"dns".into()));
    let seen = decode.requests();
    let request = seen.iter().find(|seen| seen.target() == "/generate").unwrap().json();
    assert_eq!((&request["bootstrap_host"], &request["bootstrap_port"]), (&"127.0.0.1".into(), &9101.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_dns_name_is_logged_once_and_retried() {
    let decode = ScriptedServer::always(json("200 OK", "{}")).await;
    let (url, name) = (decode.url(), "no-such-name.invalid:1");
    let program = Program::start(&["--prefill-dns", name, "--decode", &url, "--dns-interval-secs", "1"]);
    let line = program.line("DNS lookup of");
    assert!(line.contains("no-such-name.invalid:1") && line.contains("WARN"), "{line}");
    let mut client = Client::connect(program.address).await;
    let response = client.post("/generate", BODY).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "prefill_unavailable"));
    assert_eq!(client.get("/ready").await.status(), 503);
    // Two more lookups.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert!(!program.lines.try_iter().any(|line| line.contains("DNS lookup of")), "logged once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backend_that_misses_the_startup_timeout_is_logged_as_error() {
    let prefill = prefill().await;
    let decode = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (prefill_url, decode_url) = (prefill.url(), format!("http://{decode}"));
    let program = Program::start(&[
        "--prefill",
        &prefill_url,
        "9101",
        "--decode",
        &decode_url,
        "--worker-startup-timeout-secs",
        "1",
        "--health-check-interval-secs",
        "1",
    ]);
    program.line(&format!("decode server {decode_url} is not up"));
    let line = program.line(&format!("decode server {decode_url} has not come up within 1s"));
    assert!(line.contains("ERROR"), "{line}");
    // Probes continue, and it is used once it is up.
    let _late = ScriptedServer::start_at(decode, |_| vec![Step::Send(json("200 OK", "{}"))]).await;
    program.line(&format!("decode server {decode_url} is healthy"));
    assert_eq!(Client::connect(program.address).await.get("/ready").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_role_or_bootstrap_port_is_logged() {
    let (first, second) = (prefill().await, prefill().await);
    let (prefill_url, decode_url) = (first.url(), second.url());
    let program = Program::start(&["--prefill", &prefill_url, "9100", "--decode", &decode_url]);
    let mut expected = vec![
        format!("prefill server {prefill_url} is configured with bootstrap port 9100 but reports 9101"),
        format!("{decode_url} is configured as a decode server but reports that it is a prefill server"),
    ];
    while !expected.is_empty() {
        let line = program.line("but reports");
        expected.retain(|part| !line.contains(part.as_str()));
    }
}

async fn simulated(role: Role, bootstrap_port: u16) -> Sim {
    let config = SimConfig {
        role,
        bootstrap_port: Some(bootstrap_port),
        inter_token: Duration::from_millis(2),
        ..SimConfig::default()
    };
    Sim::start(config).await.expect("a free port")
}

/// The decode servers assume a wrong bootstrap port, so that only the learned port, sent by the router,
/// connects them to prefill. Meanwhile one decode server is added and removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn learned_bootstrap_port_works_while_backends_come_and_go() {
    let prefill = simulated(Role::Prefill, 0).await;
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (decode, second) = (simulated(Role::Decode, unused).await, simulated(Role::Decode, unused).await);
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], vec![decode.url()], 60)
        .worker_threads(1)
        .policy(RoundRobin::default)
        .health_check_interval(Duration::from_millis(50));
    let router = Router::start_with(&[], &[], |_| config).await;
    let mut operator = router.client().await;
    kit::with_timeout("a ready router", async {
        while operator.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let body = r#"{"text":"hello there","sampling_params":{"max_new_tokens":40},"stream":true}"#;
    let streams: Vec<_> = (0..8)
        .map(|_| {
            let address = router.address();
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                for _ in 0..6 {
                    let response = client.post("/generate", body).await;
                    assert_eq!(response.status(), 200, "{}", response.text());
                    assert!(
                        response.complete && response.text().ends_with("data: [DONE]\n\n"),
                        "{}",
                        response.text()
                    );
                    assert!(!response.text().contains("\"error\""), "{}", response.text());
                }
            })
        })
        .collect();
    let order = format!(r#"{{"url":"{}","worker_type":"decode"}}"#, second.url());
    let target = format!("/workers/{}?timeout=20", second.url().replace('/', "%2F"));
    for _ in 0..4 {
        assert_eq!(operator.post("/workers", &order).await.status(), 202);
        tokio::time::sleep(Duration::from_millis(100)).await;
        operator.send_request("DELETE", &target, &[], b"").await;
        let response = operator.response().await;
        assert_eq!((response.status(), &response.json()["in_flight"]), (200, &0.into()));
    }
    for stream in streams {
        stream.await.expect("no error");
    }
    assert!(
        second.recorded_requests().iter().any(|seen| format!("{seen:?}").contains("/generate")),
        "the second decode server got requests"
    );
}

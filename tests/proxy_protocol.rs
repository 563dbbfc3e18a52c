//! `--proxy-protocol`: a load balancer says in front of each connection who the client is.

mod kit;

use std::process::Command;
use std::time::Duration;

use kit::{Client, OK, Router, RouterProcess, ScriptedServer, TestCa, ok_server, run_curl};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;
const VERSION_1: &[u8] = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n";
const LOOPBACK: &[u8] = b"PROXY TCP4 127.0.0.1 127.0.0.1 4711 80\r\n";
/// For `[2001:db8::7]:4711`.
const VERSION_2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24\
    \x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x12\x67\0\x50";
/// The load balancer's own connection.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

struct Setup {
    _prefill: ScriptedServer,
    _decode: ScriptedServer,
    router: Router,
}

async fn setup(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Setup {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let with_protocol = |config: MiniLbConfig| options(config.proxy_protocol(true));
    let router = Router::start_with(&[&prefill], &[&decode], with_protocol).await;
    Setup { _prefill: prefill, _decode: decode, router }
}

/// A connection that begins with these bytes.
async fn client(router: &Router, header: &[u8]) -> Client {
    let mut client = router.client().await;
    client.send(header).await;
    client
}

#[tokio::test]
async fn requests_after_a_header_of_either_version_are_served() {
    let setup = setup(|config| config).await;
    for header in [VERSION_1, VERSION_2, LOCAL, b"PROXY UNKNOWN\r\n"] {
        let mut client = client(&setup.router, header).await;
        for _ in 0..2 {
            let response = client.post("/generate", BODY).await;
            assert_eq!((response.status(), response.text()), (200, OK), "{}", header.escape_ascii());
        }
    }
    // Header and request together, and one byte at a time.
    let request = "GET /health HTTP/1.1\r\nhost: r\r\n\r\n";
    let all = [VERSION_1, request.as_bytes()].concat();
    assert_eq!(client(&setup.router, &all).await.response().await.status(), 200);
    let mut slow = setup.router.client().await;
    for byte in &all {
        slow.send([*byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(slow.response().await.status(), 200);
}

#[tokio::test]
async fn connections_without_a_header_are_closed_with_the_reason() {
    let setup = setup(|config| config.request_head_timeout(Duration::from_millis(200))).await;
    let mut direct = setup.router.client().await;
    direct.send("GET /health HTTP/1.1\r\nhost: r\r\n\r\n").await;
    let response = direct.response().await;
    assert_eq!((response.status(), response.error_code().as_str()), (400, "bad_request"));
    assert!(response.text().contains("PROXY header"), "{}", response.text());
    direct.wait_closed().await;
    // One that never ends is closed in time.
    client(&setup.router, &VERSION_2[..20]).await.wait_closed().await;
    setup.router.client().await.wait_closed().await;
}

#[tokio::test]
async fn without_the_option_a_header_is_malformed() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for header in [VERSION_1, VERSION_2] {
        let mut client = client(&router, header).await;
        client.try_send(b"GET /health HTTP/1.1\r\nhost: r\r\n\r\n").await;
        assert_eq!(client.response().await.status(), 400, "{}", header.escape_ascii());
    }
}

#[tokio::test]
async fn an_address_that_a_load_balancer_tells_opens_no_operators_endpoint() {
    let setup = setup(|config| config).await;
    let status = async |header: &[u8]| client(&setup.router, header).await.get("/workers").await.status();
    assert_eq!(status(LOCAL).await, 200);
    for header in [LOOPBACK, VERSION_1, VERSION_2] {
        assert_eq!(status(header).await, 403, "{}", header.escape_ascii());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_of_a_request_is_logged() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let args = ["--proxy-protocol", "--access-log", "--log-format", "json"];
    // The kit connects to see whether the program listens: that is no request.
    let program = RouterProcess::between(&prefill, &decode, &args).await;
    for (header, logged) in [(VERSION_1, "192.0.2.7:4711"), (VERSION_2, "[2001:db8::7]:4711")] {
        let mut client = program.client().await;
        client.send(header).await;
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        program.line(&format!(r#""client":"{logged}""#)).await;
    }
    let mut local = program.client().await;
    local.send(LOCAL).await;
    assert_eq!(local.post("/generate?local", BODY).await.status(), 200);
    let mut direct = program.client().await;
    direct.send("GET /health HTTP/1.1\r\nhost: r\r\n\r\n").await;
    assert_eq!(direct.response().await.status(), 400);
    let warned = program.line("without a PROXY header").await;
    assert!(warned.contains("127.0.0.1") && warned.contains("--proxy-protocol"), "{warned}");
    let lines = program.stop().await;
    assert_eq!(lines.iter().filter(|line| line.contains(r#""client":"#)).count(), 2, "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_speaks_it_before_tls_and_before_http_2() {
    let ca = TestCa::new();
    let identity = ca.issue("router", &["localhost"]);
    let plain = setup(|config| config.http2(true)).await;
    let with_tls = setup(|config| config.http2(true).tls(&identity.cert, &identity.key)).await;
    let (plain_url, tls_port) = (plain.router.url(), with_tls.router.address().port());
    let tls_url = format!("https://localhost:{tls_port}");
    for (url, version) in [
        (&plain_url, "--http1.1"),
        (&plain_url, "--http2-prior-knowledge"),
        (&tls_url, "--http1.1"),
        (&tls_url, "--http2"),
    ] {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "20", "--haproxy-protocol"]);
        curl.arg(version).arg("--cacert").arg(ca.file()).args([
            "--json",
            BODY,
            "--write-out",
            " %{http_code}",
        ]);
        curl.arg(format!("{url}/generate"));
        let Some(said) = run_curl(curl).await else { return };
        assert_eq!(said, format!("{OK} 200"), "{version} {url}");
    }
}

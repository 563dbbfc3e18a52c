//! TLS towards clients: versions, session resumption, clean ends, rejected handshakes, and certificate
//! reloads.

mod kit;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use kit::program::{Program, free_port};
use kit::{
    Gate, Identity, OK, Router, STREAM_HEAD, ScriptedServer, Step, TestCa, TlsClient, json, tls_handshake,
    with_timeout,
};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

const BODY: &[u8] = br#"{"text":"a"}"#;

struct Setup {
    ca: TestCa,
    identity: Identity,
    prefill: ScriptedServer,
    decode: ScriptedServer,
    router: Router,
}

async fn setup(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Setup {
    setup_with_decode(ScriptedServer::always(json("200 OK", OK)).await, options).await
}

async fn setup_with_decode(
    decode: ScriptedServer,
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Setup {
    let prefill = ScriptedServer::always(json("200 OK", OK)).await;
    let ca = TestCa::new();
    let identity = ca.issue("router", &["localhost"]);
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        options(config.tls(&identity.cert, &identity.key))
    })
    .await;
    Setup { ca, identity, prefill, decode, router }
}

impl Setup {
    async fn client(&self) -> TlsClient {
        TlsClient::connect(self.router.address(), self.ca.client(&[])).await
    }

    /// The configuration of this router, for a reload.
    fn config(&self, identity: &Identity) -> MiniLbConfig {
        let prefill = vec![(self.prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![self.decode.url()], 60);
        config.tls(&identity.cert, &identity.key)
    }
}

#[tokio::test]
async fn tls_1_2_and_1_3_are_served() {
    let setup = setup(|config| config).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = setup.ca.client_of(&[version], &["http/1.1"]);
        let mut client = TlsClient::connect(setup.router.address(), config).await;
        for _ in 0..2 {
            let response = client.post("/generate", BODY).await;
            assert_eq!((response.status(), response.text()), (200, OK));
        }
        let session = client.stream.get_ref().1;
        assert_eq!(session.protocol_version(), Some(version.version));
        assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
    }
    assert_eq!(setup.decode.requests().len(), 4);
}

#[tokio::test]
async fn returning_client_resumes_its_session() {
    let setup = setup(|config| config).await;
    let config = setup.ca.client(&[]);
    for kind in [rustls::HandshakeKind::Full, rustls::HandshakeKind::Resumed] {
        let mut client = TlsClient::connect(setup.router.address(), config.clone()).await;
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        assert_eq!(client.stream.get_ref().1.handshake_kind(), Some(kind));
    }
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let response = format!("\"{}\"", "y".repeat(8 << 20));
    let setup =
        setup_with_decode(ScriptedServer::always(json("200 OK", &response)).await, |config| config).await;
    let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8 << 20));
    let mut client = setup.client().await;
    let got = client.post("/generate", body.as_bytes()).await;
    assert_eq!(got.status(), 200);
    assert!(got.complete && got.text() == response);
    assert!(setup.decode.only_request().await.body.starts_with(&body.as_bytes()[..body.len() - 1]));
}

#[tokio::test]
async fn slowly_reading_client_gets_the_whole_response() {
    let large = format!("\"{}\"", "y".repeat(1 << 20));
    let decode = ScriptedServer::always(json("200 OK", &large)).await;
    let setup = setup_with_decode(decode, |config| config.socket_buffer_size(16 << 10)).await;
    let mut client = setup.client().await;
    client.send_request("/generate", BODY).await;
    let mut got = Vec::new();
    while !got.ends_with(b"y\"") {
        let mut piece = vec![0; 8 << 10];
        let count = with_timeout("more of the response", client.stream.read(&mut piece)).await.unwrap();
        got.extend_from_slice(&piece[..count]);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(got.ends_with(large.as_bytes()));
}

#[tokio::test]
async fn stream_events_are_relayed_as_they_arrive() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode = ScriptedServer::start(move |_| {
        vec![
            Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(held.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    client.send_request("/generate", br#"{"stream":true}"#).await;
    client.head().await;
    client.read_until("data: 1").await;
    gate.open();
    client.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn plain_http_on_a_tls_port_gets_400_that_names_https() {
    let setup = setup(|config| config).await;
    let response = setup.router.client().await.get("/health").await;
    assert_eq!((response.status(), response.error_code().as_str()), (400, "bad_request"));
    assert!(response.text().contains("https"), "{}", response.text());
    assert_eq!(response.head.header("connection"), Some("close"));
}

#[tokio::test]
async fn stalled_handshake_is_cut_off_and_blocks_no_other_client() {
    // The handshake below and its request are done in a few milliseconds, on a busy machine in a few hundred.
    let limit = Duration::from_secs(2);
    let setup = setup(|config| config.request_head_timeout(limit)).await;
    let begun = Instant::now();
    let mut bad = Vec::new();
    // Nothing, the beginning of a handshake, and garbage in a handshake record.
    for bytes in [&b""[..], b"\x16\x03\x01\x02\x00\x01", &[&b"\x16\x03\x01\x02\x00"[..], &[7; 512]].concat()]
    {
        let mut socket = TcpStream::connect(setup.router.address()).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        bad.push(socket);
    }
    assert_eq!(setup.client().await.post("/generate", BODY).await.status(), 200);
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    for mut socket in bad {
        let mut rest = Vec::new();
        with_timeout("the connection's end", socket.read_to_end(&mut rest)).await.ok();
        // At most a TLS alert (record type 0x15), no HTTP.
        assert!(rest.is_empty() || rest[0] == 0x15, "{}", rest.escape_ascii());
    }
    assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn rejected_client_gets_its_response_and_close_notify() {
    let limit = Duration::from_millis(300);
    let setup = setup(|config| config.request_head_timeout(limit)).await;
    let mut client = setup.client().await;
    client.send("POST /generate HTTP/1.1\r\nhos").await;
    let response = client.response().await;
    assert_eq!((response.status(), response.error_code().as_str()), (408, "request_timeout"));
    client.expect_clean_close().await;
}

#[tokio::test]
async fn idle_and_close_connections_end_with_close_notify() {
    let setup = setup(|config| config.client_idle_timeout(Duration::from_millis(300))).await;
    let mut idle = setup.client().await;
    assert_eq!(idle.post("/generate", BODY).await.status(), 200);
    idle.expect_clean_close().await;
    let mut asking = setup.client().await;
    asking.send("GET /health HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n").await;
    assert_eq!(asking.response().await.status(), 200);
    asking.expect_clean_close().await;
}

#[tokio::test]
async fn truncated_response_ends_without_close_notify() {
    let decode = ScriptedServer::start(|_| {
        vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart".to_vec()), Step::Close]
    })
    .await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    let response = client.post("/generate", BODY).await;
    assert!(!response.complete, "{response:?}");
}

#[tokio::test]
async fn client_disconnect_closes_the_legs() {
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let setup = setup_with_decode(decode, |config| config).await;
    let mut client = setup.client().await;
    client.send_request("/generate", BODY).await;
    setup.decode.wait_for_requests(1).await;
    drop(client);
    setup.decode.wait_closed(1).await;
}

#[tokio::test]
async fn reloaded_certificate_keeps_open_connections() {
    let gate = Gate::new();
    let setup = setup_with_decode(held(&gate).await, |config| config).await;
    let mut open = setup.client().await;
    open.send_request("/generate", br#"{"stream":true}"#).await;
    open.head().await;
    let old = open.server_certificate();
    // Another certificate in the same files.
    let renewed = setup.ca.issue("router", &["localhost", "other"]);
    assert_eq!(renewed.cert, setup.identity.cert);
    assert_eq!(setup.client().await.server_certificate(), old, "not reloaded yet");
    setup.router.reload(setup.config(&renewed)).expect("valid files");
    let mut new = setup.client().await;
    assert_ne!(new.server_certificate(), old);
    assert_eq!(new.post("/generate", BODY).await.status(), 200);
    gate.open();
    open.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
    assert_eq!(open.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn reload_with_bad_files_keeps_the_old_certificate() {
    let setup = setup(|config| config).await;
    let old = setup.client().await.server_certificate();
    let another = setup.ca.issue("another", &["localhost"]);
    let mixed = Identity { cert: another.cert, key: setup.identity.key.clone() };
    let error = setup.router.reload(setup.config(&mixed)).expect_err("a key of another certificate");
    assert!(error.to_string().contains("--tls-key-path"), "{error}");
    assert_eq!(setup.client().await.server_certificate(), old);
}

#[test]
fn unusable_tls_files_are_rejected_with_flag_and_path() {
    let ca = TestCa::new();
    let (good, other) = (ca.issue("good", &["localhost"]), ca.issue("other", &["localhost"]));
    let empty = ca.path("empty.pem");
    std::fs::write(&empty, "nothing\n").unwrap();
    let torn = ca.path("torn.pem");
    std::fs::write(&torn, "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n").unwrap();
    let not_der = ca.path("not-der.pem");
    std::fs::write(&not_der, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let missing = ca.path("missing.pem");
    let config = || MiniLbConfig::new("h", 1, vec![("http://p".into(), None)], vec!["http://d".into()], 1);
    let refused = |config: MiniLbConfig| MiniLoadBalancer::new(config).err().expect("a refusal").to_string();
    for (config, flag, path, why) in [
        (config().tls(&missing, &good.key), "--tls-cert-path", &missing, "No such file"),
        (config().tls(&empty, &good.key), "--tls-cert-path", &empty, "no certificate"),
        (config().tls(&torn, &good.key), "--tls-cert-path", &torn, "not a PEM file"),
        (config().tls(&not_der, &good.key), "--tls-cert-path", &not_der, "cannot be used"),
        (config().tls(&good.cert, &missing), "--tls-key-path", &missing, "No such file"),
        (config().tls(&good.cert, &good.cert), "--tls-key-path", &good.cert, "no private key"),
        (config().tls(&good.cert, &other.key), "--tls-key-path", &other.key, "not the key"),
        (config().backend_ca([&missing]), "--ca-cert-paths", &missing, "No such file"),
        (config().backend_ca([&not_der]), "--ca-cert-paths", &not_der, "not a CA"),
        (
            config().backend_client_cert(&good.cert, &other.key),
            "--client-key-path",
            &other.key,
            "not the key",
        ),
    ] {
        let sentence = refused(config);
        let begin = format!("{flag} {}: ", path.display());
        assert!(sentence.starts_with(&begin) && sentence.contains(why), "{sentence}");
    }
    assert!(MiniLoadBalancer::new(config().tls(&good.cert, &good.key)).is_ok());
}

#[test]
fn tls_files_lists_every_configured_path() {
    let config = MiniLbConfig::new("h", 1, vec![], vec![], 1);
    assert!(config.tls_files().is_empty());
    let config = config.tls("c", "k").backend_ca(["a", "b"]).backend_client_cert("cc", "ck");
    let names: Vec<_> = config.tls_files().into_iter().map(|path| path.display().to_string()).collect();
    assert_eq!(names, ["c", "k", "cc", "ck", "a", "b"]);
}

#[tokio::test]
async fn client_with_another_ca_rejects_the_router() {
    let setup = setup(|config| config).await;
    assert!(tls_handshake(setup.router.address(), TestCa::new().client(&[])).await.is_err());
    assert_eq!(setup.client().await.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn curl_is_served_over_tls() {
    let setup = setup(|config| config.http2(true)).await;
    let url = format!("https://localhost:{}/generate", setup.router.address().port());
    for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", option, "--max-time", "20", "-w", " %{http_code} %{http_version}"]);
        curl.args(["-d", r#"{"text":"a"}"#, "-4"]).arg("--cacert").arg(setup.ca.file()).arg(&url);
        let Some(output) = kit::run_curl(curl).await else { return };
        assert_eq!(output, format!("{OK} 200 {version}"));
    }
}

/// Starts the program with this certificate between these servers.
fn program(identity: &Identity, servers: [&str; 2]) -> (Program, SocketAddr) {
    let port = free_port();
    let (cert, key) = (identity.cert.to_str().unwrap(), identity.key.to_str().unwrap());
    let [prefill, decode] = servers;
    let program = Program::start([
        "--prefill",
        prefill,
        "--decode",
        decode,
        "--host",
        "127.0.0.1",
        "--port",
        &port.to_string(),
        "--prometheus-port",
        "0",
        "--http2",
        "--disable-health-check",
        "--tls-cert-path",
        cert,
        "--tls-key-path",
        key,
    ]);
    program.wait_for("listening on ");
    (program, SocketAddr::from(([127, 0, 0, 1], port)))
}

#[tokio::test(flavor = "multi_thread")]
async fn program_serves_tls_and_http2() {
    let ca = TestCa::new();
    let (_program, address) =
        program(&ca.issue("router", &["localhost"]), ["http://127.0.0.1:1", "http://127.0.0.1:2"]);
    for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", option, "--max-time", "20", "-4"]);
        curl.args(["-w", "%{http_code} %{http_version}"]).arg("--cacert").arg(ca.file());
        curl.arg(format!("https://localhost:{}/health", address.port()));
        let Some(output) = kit::run_curl(curl).await else { return };
        assert_eq!(output, format!("200 {version}"));
    }
}

/// A decode server whose stream ends when the gate opens.
async fn held(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |seen| {
        if seen.json()["text"] == "a" {
            return vec![Step::Send(json("200 OK", OK))];
        }
        vec![
            Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(gate.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn program_reloads_certificates_on_sighup_and_on_file_change() {
    let (ca, gate) = (TestCa::new(), Gate::new());
    let (prefill, decode) = (ScriptedServer::always(json("200 OK", OK)).await, held(&gate).await);
    let identity = ca.issue("router", &["localhost"]);
    let (program, address) = program(&identity, [&prefill.url(), &decode.url()]);
    let shown = async || TlsClient::connect(address, ca.client(&[])).await.server_certificate();
    let first = shown().await;
    let mut open = TlsClient::connect(address, ca.client(&[])).await;
    open.send_request("/generate", br#"{"stream":true}"#).await;
    open.head().await;
    // A new certificate with the old key.
    let old_key = std::fs::read(&identity.key).unwrap();
    ca.issue("router", &["localhost", "second"]);
    let new_key = std::fs::read(&identity.key).unwrap();
    std::fs::write(&identity.key, old_key).unwrap();
    program.send("HUP");
    let line = program.wait_for("reload failed (SIGHUP)");
    assert!(line.contains("--tls-key-path"), "{line}");
    assert_eq!(shown().await, first);
    // The matching key, noticed without a signal.
    std::fs::write(&identity.key, new_key).unwrap();
    program.wait_for("has changed): ");
    let second = shown().await;
    assert_ne!(second, first);
    ca.issue("router", &["localhost", "third"]);
    program.reload();
    let mut new = TlsClient::connect(address, ca.client(&[])).await;
    assert!(new.server_certificate() != first && new.server_certificate() != second);
    assert_eq!(new.post("/generate", BODY).await.status(), 200);
    // The stream that was open through all reloads.
    gate.open();
    open.read_until("data: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n").await;
    assert_eq!(open.post("/generate", BODY).await.status(), 200);
}

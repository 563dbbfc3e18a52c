//! TLS towards clients: who is served, what is refused and how, and certificates
//! that change.

mod kit;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use kit::program::{Program, free_port};
use kit::{Authority, Gate, Identity, Router, Step, TlsClient, Upstream, json, patiently, shake_hands};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

const BODY: &[u8] = br#"{"text":"a"}"#;
const OK: &str = r#"{"text":"hi"}"#;
const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

struct Front {
    ca: Authority,
    identity: Identity,
    prefill: Upstream,
    decode: Upstream,
    router: Router,
}

async fn front(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Front {
    front_of(Upstream::always(json("200 OK", OK)).await, options).await
}

async fn front_of(decode: Upstream, options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Front {
    let prefill = Upstream::always(json("200 OK", OK)).await;
    let ca = Authority::new();
    let identity = ca.issue("router", &["localhost"]);
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        options(config.tls(&identity.cert, &identity.key))
    })
    .await;
    Front { ca, identity, prefill, decode, router }
}

impl Front {
    async fn client(&self) -> TlsClient {
        TlsClient::connect(self.router.address(), self.ca.client(&[])).await
    }

    /// The configuration of this router, to be loaded again.
    fn config(&self, identity: &Identity) -> MiniLbConfig {
        let prefill = vec![(self.prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![self.decode.url()], 60);
        config.tls(&identity.cert, &identity.key)
    }
}

#[tokio::test]
async fn requests_are_answered_over_both_versions_of_tls() {
    let front = front(|config| config).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = front.ca.client_of(&[version], &["http/1.1"]);
        let mut client = TlsClient::connect(front.router.address(), config).await;
        for _ in 0..2 {
            let answer = client.post("/generate", BODY).await;
            assert_eq!((answer.status(), answer.text()), (200, OK));
        }
        let session = client.stream.get_ref().1;
        assert_eq!(session.protocol_version(), Some(version.version));
        assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
    }
    assert_eq!(front.decode.seen().len(), 4);
}

#[tokio::test]
async fn a_client_that_comes_back_resumes_its_session() {
    let front = front(|config| config).await;
    let config = front.ca.client(&[]);
    for kind in [rustls::HandshakeKind::Full, rustls::HandshakeKind::Resumed] {
        let mut client = TlsClient::connect(front.router.address(), config.clone()).await;
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
        assert_eq!(client.stream.get_ref().1.handshake_kind(), Some(kind));
    }
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let answer = format!("\"{}\"", "y".repeat(8 << 20));
    let front = front_of(Upstream::always(json("200 OK", &answer)).await, |config| config).await;
    let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8 << 20));
    let mut client = front.client().await;
    let got = client.post("/generate", body.as_bytes()).await;
    assert_eq!(got.status(), 200);
    assert!(got.complete && got.text() == answer);
    assert!(front.decode.only().await.body.starts_with(&body.as_bytes()[..body.len() - 1]));
}

#[tokio::test]
async fn all_of_an_answer_reaches_a_client_that_reads_slowly() {
    let large = format!("\"{}\"", "y".repeat(1 << 20));
    let decode = Upstream::always(json("200 OK", &large)).await;
    let front = front_of(decode, |config| config.socket_buffer_size(16 << 10)).await;
    let mut client = front.client().await;
    client.start("/generate", BODY).await;
    let mut got = Vec::new();
    while !got.ends_with(b"y\"") {
        let mut piece = vec![0; 8 << 10];
        let count = patiently("more of an answer", client.stream.read(&mut piece)).await.unwrap();
        got.extend_from_slice(&piece[..count]);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(got.ends_with(large.as_bytes()));
}

#[tokio::test]
async fn each_piece_of_a_stream_is_there_before_the_next() {
    let gate = Gate::new();
    let held = gate.clone();
    let decode = Upstream::start(move |_| {
        vec![
            Step::Send([STREAM_HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(held.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    client.start("/generate", br#"{"stream":true}"#).await;
    client.head().await;
    client.read_until("data: 1").await;
    gate.open();
    client.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn plain_http_on_a_tls_port_is_told_so() {
    let front = front(|config| config).await;
    let answer = front.router.client().await.get("/health").await;
    assert_eq!((answer.status(), answer.code().as_str()), (400, "bad_request"));
    assert!(answer.text().contains("https"), "{}", answer.text());
    assert_eq!(answer.head.header("connection"), Some("close"));
}

#[tokio::test]
async fn whoever_does_not_shake_hands_is_cut_off_and_delays_nobody() {
    // The handshake below and its request are done in a few milliseconds, on a busy machine in a few hundred.
    let limit = Duration::from_secs(2);
    let front = front(|config| config.request_head_timeout(limit)).await;
    let begun = Instant::now();
    let mut bad = Vec::new();
    // Nothing; the beginning of a handshake; what looks like one.
    for bytes in [&b""[..], b"\x16\x03\x01\x02\x00\x01", &[&b"\x16\x03\x01\x02\x00"[..], &[7; 512]].concat()]
    {
        let mut socket = TcpStream::connect(front.router.address()).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        bad.push(socket);
    }
    assert_eq!(front.client().await.post("/generate", BODY).await.status(), 200);
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    for mut socket in bad {
        let mut rest = Vec::new();
        patiently("the connection's end", socket.read_to_end(&mut rest)).await.ok();
        // At most an alert, which is no HTTP.
        assert!(rest.is_empty() || rest[0] == 0x15, "{}", rest.escape_ascii());
    }
    assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_refused_client_gets_the_last_word_and_a_clean_end() {
    let limit = Duration::from_millis(300);
    let front = front(|config| config.request_head_timeout(limit)).await;
    let mut client = front.client().await;
    client.send("POST /generate HTTP/1.1\r\nhos").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.code().as_str()), (408, "request_timeout"));
    client.ends_cleanly().await;
}

#[tokio::test]
async fn idle_and_unwanted_connections_end_cleanly() {
    let front = front(|config| config.client_idle_timeout(Duration::from_millis(300))).await;
    let mut idle = front.client().await;
    assert_eq!(idle.post("/generate", BODY).await.status(), 200);
    idle.ends_cleanly().await;
    let mut asking = front.client().await;
    asking.send("GET /health HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n").await;
    assert_eq!(asking.answer().await.status(), 200);
    asking.ends_cleanly().await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_does_not_end_cleanly() {
    let decode = Upstream::start(|_| {
        vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart".to_vec()), Step::Close]
    })
    .await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    let answer = client.post("/generate", BODY).await;
    assert!(!answer.complete, "{answer:?}");
}

#[tokio::test]
async fn a_client_that_leaves_ends_both_legs() {
    let decode = Upstream::start(|_| vec![Step::Hang]).await;
    let front = front_of(decode, |config| config).await;
    let mut client = front.client().await;
    client.start("/generate", BODY).await;
    front.decode.arrived(1).await;
    drop(client);
    front.decode.closed(1).await;
}

#[tokio::test]
async fn a_new_certificate_is_shown_without_cutting_off_what_is_open() {
    let gate = Gate::new();
    let front = front_of(held(&gate).await, |config| config).await;
    let mut open = front.client().await;
    open.start("/generate", br#"{"stream":true}"#).await;
    open.head().await;
    let old = open.shown();
    // Another certificate in the same files.
    let renewed = front.ca.issue("router", &["localhost", "other"]);
    assert_eq!(renewed.cert, front.identity.cert);
    assert_eq!(front.client().await.shown(), old, "nobody has asked for it yet");
    front.router.reload(front.config(&renewed)).expect("good files");
    let mut new = front.client().await;
    assert_ne!(new.shown(), old);
    assert_eq!(new.post("/generate", BODY).await.status(), 200);
    gate.open();
    open.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
    assert_eq!(open.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn bad_files_change_nothing() {
    let front = front(|config| config).await;
    let old = front.client().await.shown();
    let another = front.ca.issue("another", &["localhost"]);
    let mixed = Identity { cert: another.cert, key: front.identity.key.clone() };
    let error = front.router.reload(front.config(&mixed)).expect_err("a key of another certificate");
    assert!(error.to_string().contains("--tls-key-path"), "{error}");
    assert_eq!(front.client().await.shown(), old);
}

#[test]
fn files_that_are_of_no_use_are_refused_by_name() {
    let ca = Authority::new();
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
fn the_files_are_known_to_whoever_watches_them() {
    let config = MiniLbConfig::new("h", 1, vec![], vec![], 1);
    assert!(config.tls_files().is_empty());
    let config = config.tls("c", "k").backend_ca(["a", "b"]).backend_client_cert("cc", "ck");
    let names: Vec<_> = config.tls_files().into_iter().map(|path| path.display().to_string()).collect();
    assert_eq!(names, ["c", "k", "cc", "ck", "a", "b"]);
}

#[tokio::test]
async fn a_client_of_another_ca_does_not_trust_the_router() {
    let front = front(|config| config).await;
    assert!(shake_hands(front.router.address(), Authority::new().client(&[])).await.is_err());
    assert_eq!(front.client().await.post("/generate", BODY).await.status(), 200);
}

#[tokio::test]
async fn curl_is_served_by_the_router_over_tls() {
    let front = front(|config| config.http2(true)).await;
    let url = format!("https://localhost:{}/generate", front.router.address().port());
    for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", option, "--max-time", "20", "-w", " %{http_code} %{http_version}"]);
        curl.args(["-d", r#"{"text":"a"}"#, "-4"]).arg("--cacert").arg(front.ca.file()).arg(&url);
        let Some(output) = kit::run_curl(curl).await else { return };
        assert_eq!(output, format!("{OK} 200 {version}"));
    }
}

/// The program with this certificate, and servers that do not matter.
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
async fn the_program_speaks_tls_and_http_2() {
    let ca = Authority::new();
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

/// A decode server of which a stream ends when the gate is open.
async fn held(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |seen| {
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
async fn the_program_reads_renewed_certificates_on_sighup_and_by_itself_and_keeps_the_old_if_they_are_bad() {
    let (ca, gate) = (Authority::new(), Gate::new());
    let (prefill, decode) = (Upstream::always(json("200 OK", OK)).await, held(&gate).await);
    let identity = ca.issue("router", &["localhost"]);
    let (program, address) = program(&identity, [&prefill.url(), &decode.url()]);
    let shown = async || TlsClient::connect(address, ca.client(&[])).await.shown();
    let first = shown().await;
    let mut open = TlsClient::connect(address, ca.client(&[])).await;
    open.start("/generate", br#"{"stream":true}"#).await;
    open.head().await;
    // A certificate whose key is another one.
    let old_key = std::fs::read(&identity.key).unwrap();
    ca.issue("router", &["localhost", "second"]);
    let new_key = std::fs::read(&identity.key).unwrap();
    std::fs::write(&identity.key, old_key).unwrap();
    program.send("HUP");
    let line = program.wait_for("reload failed (SIGHUP)");
    assert!(line.contains("--tls-key-path"), "{line}");
    assert_eq!(shown().await, first);
    // The right key, and nobody says so.
    std::fs::write(&identity.key, new_key).unwrap();
    program.wait_for("has changed): ");
    let second = shown().await;
    assert_ne!(second, first);
    ca.issue("router", &["localhost", "third"]);
    program.reload();
    let mut new = TlsClient::connect(address, ca.client(&[])).await;
    assert!(new.shown() != first && new.shown() != second);
    assert_eq!(new.post("/generate", BODY).await.status(), 200);
    // What was open all the while.
    gate.open();
    open.read_until("data: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n").await;
    assert_eq!(open.post("/generate", BODY).await.status(), 200);
}

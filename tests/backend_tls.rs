//! TLS towards servers: who is trusted, what is told of those who are not, and
//! answers that break off.

mod kit;

use std::path::PathBuf;
use std::time::Duration;

use kit::{
    Answer, Authority, FrontOptions, Gate, Handshake, Identity, Router, Step, TlsFront, Upstream, json,
};
use mini_lb::MiniLbConfig;
use tokio::net::TcpListener;

const BODY: &str = r#"{"text":"a"}"#;
const OK: &str = r#"{"text":"hi"}"#;

async fn answering() -> Upstream {
    Upstream::always(json("200 OK", OK)).await
}

async fn encrypted(server: &Upstream, identity: &Identity) -> TlsFront {
    let options = FrontOptions { identity: identity.clone(), cuts: false, slow: false, wants: None };
    TlsFront::start(server.address(), options).await
}

/// A router in front of a plain prefill server and a decode server at this URL.
async fn router(
    prefill: &Upstream,
    decode: &str,
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    Router::serve(options(config(prefill, decode))).await
}

fn config(prefill: &Upstream, decode: &str) -> MiniLbConfig {
    let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.to_owned()], 60).worker_threads(1)
}

fn trusting(ca: &Authority) -> impl FnOnce(MiniLbConfig) -> MiniLbConfig {
    let file = ca.file();
    move |config| config.backend_ca([file])
}

async fn post(router: &Router) -> Answer {
    router.client().await.post("/generate", BODY).await
}

fn message(answer: &Answer) -> String {
    answer.json()["error"]["message"].as_str().expect("a message").to_owned()
}

#[tokio::test]
async fn both_servers_may_speak_tls() {
    let ca = Authority::new();
    let identity = ca.issue("server", &["localhost", "127.0.0.1"]);
    let (prefill, decode) = (answering().await, answering().await);
    let (front, other) = (encrypted(&prefill, &identity).await, encrypted(&decode, &identity).await);
    // By an address, to which a certificate may be issued too.
    let by_address = format!("https://{}", other.address());
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(front.url(), None)], vec![by_address], 60);
    let router = Router::serve(config.worker_threads(1).backend_ca([ca.file()])).await;
    let mut client = router.client().await;
    for _ in 0..3 {
        let answer = client.post("/generate", BODY).await;
        assert_eq!((answer.status(), answer.text()), (200, OK));
        router.idle().await;
    }
    let handshake = |name: Option<&str>| Handshake {
        name: name.map(str::to_owned),
        alpn: Some(b"http/1.1".to_vec()),
        resumed: false,
        has_certificate: false,
    };
    // One connection each, for all three.
    assert_eq!(front.handshakes(), [handshake(Some("localhost"))]);
    assert_eq!(other.handshakes(), [handshake(None)]);
    let host = format!("localhost:{}", front.address().port());
    prefill.arrived(1).await;
    assert_eq!(prefill.seen()[0].head.header("host"), Some(host.as_str()));
    assert_eq!(prefill.seen()[0].json()["bootstrap_host"], "localhost");
}

#[tokio::test]
async fn a_second_connection_resumes_the_session() {
    let ca = Authority::new();
    let (prefill, decode) = (answering().await, answering().await);
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &front.url(), |config| {
        config.backend_ca([ca.file()]).backend_idle_timeout(Duration::from_millis(50))
    })
    .await;
    assert_eq!(post(&router).await.status(), 200);
    // The idle connection is closed, and the server is told.
    front.ended_well(1).await;
    assert_eq!(post(&router).await.status(), 200);
    let resumed: Vec<bool> = front.handshakes().iter().map(|handshake| handshake.resumed).collect();
    assert_eq!(resumed, [false, true]);
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let ca = Authority::new();
    let large = format!("\"{}\"", "y".repeat(8 << 20));
    let (prefill, decode) = (answering().await, Upstream::always(json("200 OK", &large)).await);
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &front.url(), trusting(&ca)).await;
    let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8 << 20));
    let answer = router.client().await.post("/generate", &body).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.complete && answer.text() == large);
    assert!(decode.only().await.body.starts_with(&body.as_bytes()[..body.len() - 1]));
}

#[tokio::test]
async fn all_of_a_request_reaches_a_server_that_reads_slowly() {
    let ca = Authority::new();
    let (prefill, decode) = (answering().await, answering().await);
    let identity = ca.issue("server", &["localhost"]);
    let options = FrontOptions { identity, cuts: false, slow: true, wants: None };
    let front = TlsFront::start(decode.address(), options).await;
    let router =
        router(&prefill, &front.url(), |config| config.backend_ca([ca.file()]).socket_buffer_size(16 << 10))
            .await;
    for length in [100_000, 200_000, 300_000] {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(length));
        assert_eq!(router.client().await.post("/generate", &body).await.status(), 200);
    }
}

#[tokio::test]
async fn each_piece_of_a_stream_is_there_before_the_next() {
    const HEAD: &str =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let ca = Authority::new();
    let (prefill, gate) = (answering().await, Gate::new());
    let held = gate.clone();
    let decode = Upstream::start(move |_| {
        vec![
            Step::Send([HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(held.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &front.url(), trusting(&ca)).await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    client.read_until("data: 1").await;
    gate.open();
    client.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_server_that_is_not_trusted_gets_nothing() {
    let (ca, stranger) = (Authority::new(), Authority::new());
    for (identity, why) in [
        (stranger.issue("unknown", &["localhost"]), "does not come from a known CA"),
        (ca.issue_expired("expired", &["localhost"]), "has expired"),
        (ca.issue("renamed", &["elsewhere.example"]), "is for another name"),
    ] {
        let (prefill, decode) = (answering().await, answering().await);
        let front = encrypted(&decode, &identity).await;
        let router = router(&prefill, &front.url(), trusting(&ca)).await;
        let answer = post(&router).await;
        assert_eq!((answer.status(), answer.code().as_str()), (502, "decode_connect"));
        assert!(message(&answer).contains(why), "{}", message(&answer));
        assert!(decode.seen().is_empty());
    }
}

#[tokio::test]
async fn the_systems_cas_are_not_those_of_a_test() {
    let ca = Authority::new();
    let (prefill, decode) = (answering().await, answering().await);
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    if !PathBuf::from("/etc/ssl/certs/ca-certificates.crt").exists() {
        return;
    }
    let router = router(&prefill, &front.url(), |config| config).await;
    assert_eq!(post(&router).await.code(), "decode_connect");
}

#[tokio::test]
async fn a_server_without_tls_is_told_apart() {
    let ca = Authority::new();
    let prefill = answering().await;
    // It answers anything with HTTP.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let answering = tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let _asked = socket.read(&mut [0; 4096]).await;
            socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.ok();
        }
    });
    let router = router(&prefill, &url, trusting(&ca)).await;
    let answer = post(&router).await;
    assert_eq!((answer.status(), answer.code().as_str()), (502, "decode_connect"));
    assert!(message(&answer).contains("is not TLS"), "{}", message(&answer));
    answering.abort();
}

#[tokio::test]
async fn a_handshake_that_hangs_is_a_connection_that_does_not_open() {
    let ca = Authority::new();
    let prefill = answering().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let router = router(&prefill, &url, |config| {
        config.backend_ca([ca.file()]).connect_timeout(Duration::from_millis(300)).max_retries(0)
    })
    .await;
    let answer = post(&router).await;
    assert_eq!((answer.status(), answer.code().as_str()), (504, "decode_connect_timeout"));
}

/// The answer to a request that a server answers like this, and ends the connection then.
async fn after(answer: &'static str, cuts: bool) -> Answer {
    let ca = Authority::new();
    let prefill = answering().await;
    let decode = Upstream::start(move |_| vec![Step::Send(answer.into()), Step::Close]).await;
    let identity = ca.issue("server", &["localhost"]);
    let front =
        TlsFront::start(decode.address(), FrontOptions { identity, cuts, slow: false, wants: None }).await;
    let router = router(&prefill, &front.url(), trusting(&ca)).await;
    post(&router).await
}

#[tokio::test]
async fn a_body_that_ends_with_the_connection_must_end_as_tls_does() {
    const TO_THE_END: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}";
    let whole = after(TO_THE_END, false).await;
    assert_eq!((whole.status(), whole.text(), whole.complete), (200, "{}", true));
    let cut = after(TO_THE_END, true).await;
    assert!(!cut.complete || cut.status() == 502, "{cut:?}");
}

#[tokio::test]
async fn a_body_that_says_its_end_needs_no_other() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ] {
        let got = after(answer, true).await;
        assert_eq!((got.status(), got.text(), got.complete), (200, "{}", true));
    }
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
    ] {
        for cuts in [true, false] {
            let got = after(answer, cuts).await;
            assert!(!got.complete || got.status() == 502, "{got:?}");
        }
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_server_has_ended_is_not_used() {
    for cuts in [true, false] {
        let ca = Authority::new();
        let prefill = answering().await;
        let decode = Upstream::start(|_| vec![Step::Send(json("200 OK", OK)), Step::Close]).await;
        let identity = ca.issue("server", &["localhost"]);
        let front =
            TlsFront::start(decode.address(), FrontOptions { identity, cuts, slow: false, wants: None })
                .await;
        let router =
            router(&prefill, &front.url(), |config| config.backend_ca([ca.file()]).max_retries(0)).await;
        for count in 1..4 {
            assert_eq!(post(&router).await.status(), 200, "request {count}, cuts: {cuts}");
            decode.closed(count).await;
            front.finished(count).await;
        }
        assert_eq!(front.handshakes().len(), 3);
    }
}

#[tokio::test]
async fn a_server_that_wants_a_certificate_gets_one() {
    let ca = Authority::new();
    let own = ca.issue("router", &["router"]);
    let (prefill, decode) = (answering().await, answering().await);
    let identity = ca.issue("server", &["localhost"]);
    let options = FrontOptions { identity, cuts: false, slow: false, wants: Some(ca.file()) };
    let front = TlsFront::start(decode.address(), options).await;
    let with = router(&prefill, &front.url(), |config| {
        config.backend_ca([ca.file()]).backend_client_cert(&own.cert, &own.key)
    })
    .await;
    assert_eq!(post(&with).await.status(), 200);
    assert!(front.handshakes()[0].has_certificate);

    let without = router(&prefill, &front.url(), trusting(&ca)).await;
    let answer = post(&without).await;
    assert_eq!(answer.status(), 502);
    assert!(message(&answer).contains("CertificateRequired"), "{}", message(&answer));
    assert_eq!(decode.seen().len(), 1);
}

#[tokio::test]
async fn other_cas_hold_from_the_next_connection_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let (prefill, decode) = (answering().await, answering().await);
    let front = encrypted(&decode, &new.issue("server", &["localhost"])).await;
    let router = router(&prefill, &front.url(), trusting(&old)).await;
    assert_eq!(post(&router).await.code(), "decode_connect");
    router.reload(config(&prefill, &front.url()).backend_ca([new.file()])).expect("good files");
    assert_eq!(post(&router).await.status(), 200);
}

#[tokio::test]
async fn a_server_with_tls_is_probed_over_tls() {
    let ca = Authority::new();
    let decode = answering().await;
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    let prefill = answering().await;
    let url = front.url();
    let router = Router::start_with(&[&prefill], &[], |_| {
        config(&prefill, &url).backend_ca([ca.file()]).health_checks(true)
    })
    .await;
    decode.arrived(1).await;
    assert_eq!(decode.seen()[0].target(), "/ready");
    drop(router);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_leg() {
    let ca = Authority::new();
    let (prefill, decode) = (answering().await, Upstream::start(|_| vec![Step::Hang]).await);
    let front = encrypted(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &front.url(), trusting(&ca)).await;
    let mut client = router.client().await;
    client.start("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.arrived(1).await;
    drop(client);
    decode.closed(1).await;
}

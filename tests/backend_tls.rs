//! TLS towards backends: which are trusted, how untrusted ones are reported, and truncated responses.

mod kit;

use std::path::PathBuf;
use std::time::Duration;

use kit::{
    Gate, Handshake, Identity, OK, Response, Router, ScriptedServer, Step, TerminatorOptions, TestCa,
    TlsTerminator, json, ok_server,
};
use mini_lb::MiniLbConfig;
use tokio::net::TcpListener;

const BODY: &str = r#"{"text":"a"}"#;

async fn tls_terminator(server: &ScriptedServer, identity: &Identity) -> TlsTerminator {
    let options = TerminatorOptions {
        identity: identity.clone(),
        truncates: false,
        reads_slowly: false,
        client_ca: None,
    };
    TlsTerminator::start(server.address(), options).await
}

/// A router in front of a plain prefill server and a decode server at this URL.
async fn router(
    prefill: &ScriptedServer,
    decode: &str,
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    Router::start_with_config(options(config(prefill, decode))).await
}

fn config(prefill: &ScriptedServer, decode: &str) -> MiniLbConfig {
    let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
    MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.to_owned()], 60).worker_threads(1)
}

fn with_ca(ca: &TestCa) -> impl FnOnce(MiniLbConfig) -> MiniLbConfig {
    let file = ca.file();
    move |config| config.backend_ca([file])
}

async fn post(router: &Router) -> Response {
    router.client().await.post("/generate", BODY).await
}

fn message(response: &Response) -> String {
    response.json()["error"]["message"].as_str().expect("a message").to_owned()
}

#[tokio::test]
async fn both_legs_can_use_tls() {
    let ca = TestCa::new();
    let identity = ca.issue("server", &["localhost", "127.0.0.1"]);
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let (terminator, other) =
        (tls_terminator(&prefill, &identity).await, tls_terminator(&decode, &identity).await);
    // By address, for which a certificate can be issued too.
    let by_address = format!("https://{}", other.address());
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(terminator.url(), None)], vec![by_address], 60);
    let router = Router::start_with_config(config.worker_threads(1).backend_ca([ca.file()])).await;
    let mut client = router.client().await;
    for _ in 0..3 {
        let response = client.post("/generate", BODY).await;
        assert_eq!((response.status(), response.text()), (200, OK));
        router.wait_idle().await;
    }
    let handshake = |name: Option<&str>| Handshake {
        name: name.map(str::to_owned),
        alpn: Some(b"http/1.1".to_vec()),
        resumed: false,
        has_certificate: false,
    };
    // One connection per backend for all three requests.
    assert_eq!(terminator.handshakes(), [handshake(Some("localhost"))]);
    assert_eq!(other.handshakes(), [handshake(None)]);
    let host = format!("localhost:{}", terminator.address().port());
    prefill.wait_for_requests(1).await;
    assert_eq!(prefill.requests()[0].head.header("host"), Some(host.as_str()));
    assert_eq!(prefill.requests()[0].json()["bootstrap_host"], "localhost");
}

#[tokio::test]
async fn second_connection_resumes_the_tls_session() {
    let ca = TestCa::new();
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &terminator.url(), |config| {
        config.backend_ca([ca.file()]).backend_idle_timeout(Duration::from_millis(50))
    })
    .await;
    assert_eq!(post(&router).await.status(), 200);
    // The idle connection is closed with a close_notify.
    terminator.closed_cleanly(1).await;
    assert_eq!(post(&router).await.status(), 200);
    let resumed: Vec<bool> = terminator.handshakes().iter().map(|handshake| handshake.resumed).collect();
    assert_eq!(resumed, [false, true]);
}

#[tokio::test]
async fn large_bodies_pass_in_both_directions() {
    let ca = TestCa::new();
    let large = format!("\"{}\"", "y".repeat(8 << 20));
    let (prefill, decode) = (ok_server().await, ScriptedServer::always(json("200 OK", &large)).await);
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &terminator.url(), with_ca(&ca)).await;
    let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(8 << 20));
    let response = router.client().await.post("/generate", &body).await;
    assert_eq!(response.status(), 200);
    assert!(response.complete && response.text() == large);
    assert!(decode.only_request().await.body.starts_with(&body.as_bytes()[..body.len() - 1]));
}

#[tokio::test]
async fn slowly_reading_backend_gets_the_whole_request() {
    let ca = TestCa::new();
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let identity = ca.issue("server", &["localhost"]);
    let options = TerminatorOptions { identity, truncates: false, reads_slowly: true, client_ca: None };
    let terminator = TlsTerminator::start(decode.address(), options).await;
    let router = router(&prefill, &terminator.url(), |config| {
        config.backend_ca([ca.file()]).socket_buffer_size(16 << 10)
    })
    .await;
    for length in [100_000, 200_000, 300_000] {
        let body = format!(r#"{{"text":"{}"}}"#, "x".repeat(length));
        assert_eq!(router.client().await.post("/generate", &body).await.status(), 200);
    }
}

#[tokio::test]
async fn stream_events_are_relayed_as_they_arrive() {
    const HEAD: &str =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let ca = TestCa::new();
    let (prefill, gate) = (ok_server().await, Gate::new());
    let held = gate.clone();
    let decode = ScriptedServer::start(move |_| {
        vec![
            Step::Send([HEAD.as_bytes(), b"9\r\ndata: 1\n\n\r\n"].concat()),
            Step::Wait(held.clone()),
            Step::Send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &terminator.url(), with_ca(&ca)).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"stream":true}"#).await;
    client.head().await;
    client.read_until("data: 1").await;
    gate.open();
    client.read_until("data: 2\n\n\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn untrusted_backend_gets_no_request() {
    let (ca, stranger) = (TestCa::new(), TestCa::new());
    for (identity, why) in [
        (stranger.issue("unknown", &["localhost"]), "does not come from a known CA"),
        (ca.issue_expired("expired", &["localhost"]), "has expired"),
        (ca.issue("renamed", &["elsewhere.example"]), "is for another name"),
    ] {
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let terminator = tls_terminator(&decode, &identity).await;
        let router = router(&prefill, &terminator.url(), with_ca(&ca)).await;
        let response = post(&router).await;
        assert_eq!((response.status(), response.error_code().as_str()), (502, "decode_connect"));
        assert!(message(&response).contains(why), "{}", message(&response));
        assert!(decode.requests().is_empty());
    }
}

#[tokio::test]
async fn without_a_configured_ca_only_system_cas_are_trusted() {
    let ca = TestCa::new();
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    if !PathBuf::from("/etc/ssl/certs/ca-certificates.crt").exists() {
        return;
    }
    let router = router(&prefill, &terminator.url(), |config| config).await;
    assert_eq!(post(&router).await.error_code(), "decode_connect");
}

#[tokio::test]
async fn plain_http_backend_behind_an_https_url_is_reported_as_not_tls() {
    let ca = TestCa::new();
    let prefill = ok_server().await;
    // Responds to any bytes with HTTP.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let plain_server = tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let _asked = socket.read(&mut [0; 4096]).await;
            socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.ok();
        }
    });
    let router = router(&prefill, &url, with_ca(&ca)).await;
    let response = post(&router).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "decode_connect"));
    assert!(message(&response).contains("is not TLS"), "{}", message(&response));
    plain_server.abort();
}

#[tokio::test]
async fn hanging_tls_handshake_is_a_connect_timeout() {
    let ca = TestCa::new();
    let prefill = ok_server().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let router = router(&prefill, &url, |config| {
        config.backend_ca([ca.file()]).connect_timeout(Duration::from_millis(300)).max_retries(0)
    })
    .await;
    let response = post(&router).await;
    assert_eq!((response.status(), response.error_code().as_str()), (504, "decode_connect_timeout"));
}

/// What a client gets if decode sends this response and closes the connection.
async fn after(response: &'static str, truncates: bool) -> Response {
    let ca = TestCa::new();
    let prefill = ok_server().await;
    let decode = ScriptedServer::start(move |_| vec![Step::Send(response.into()), Step::Close]).await;
    let identity = ca.issue("server", &["localhost"]);
    let terminator = TlsTerminator::start(
        decode.address(),
        TerminatorOptions { identity, truncates, reads_slowly: false, client_ca: None },
    )
    .await;
    let router = router(&prefill, &terminator.url(), with_ca(&ca)).await;
    post(&router).await
}

#[tokio::test]
async fn close_delimited_body_requires_close_notify() {
    const TO_THE_END: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}";
    let whole = after(TO_THE_END, false).await;
    assert_eq!((whole.status(), whole.text(), whole.complete), (200, "{}", true));
    let cut = after(TO_THE_END, true).await;
    assert!(!cut.complete || cut.status() == 502, "{cut:?}");
}

#[tokio::test]
async fn self_delimited_body_needs_no_close_notify() {
    for response in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ] {
        let got = after(response, true).await;
        assert_eq!((got.status(), got.text(), got.complete), (200, "{}", true));
    }
    for response in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
    ] {
        for truncates in [true, false] {
            let got = after(response, truncates).await;
            assert!(!got.complete || got.status() == 502, "{got:?}");
        }
    }
}

#[tokio::test]
async fn idle_tls_connection_closed_by_the_backend_is_not_reused() {
    for truncates in [true, false] {
        let ca = TestCa::new();
        let prefill = ok_server().await;
        let decode = ScriptedServer::start(|_| vec![Step::Send(json("200 OK", OK)), Step::Close]).await;
        let identity = ca.issue("server", &["localhost"]);
        let terminator = TlsTerminator::start(
            decode.address(),
            TerminatorOptions { identity, truncates, reads_slowly: false, client_ca: None },
        )
        .await;
        let router =
            router(&prefill, &terminator.url(), |config| config.backend_ca([ca.file()]).max_retries(0)).await;
        for count in 1..4 {
            assert_eq!(post(&router).await.status(), 200, "request {count}, truncates: {truncates}");
            decode.wait_closed(count).await;
            terminator.finished(count).await;
        }
        assert_eq!(terminator.handshakes().len(), 3);
    }
}

#[tokio::test]
async fn client_certificate_is_sent_to_a_backend_that_requests_it() {
    let ca = TestCa::new();
    let own = ca.issue("router", &["router"]);
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let identity = ca.issue("server", &["localhost"]);
    let options =
        TerminatorOptions { identity, truncates: false, reads_slowly: false, client_ca: Some(ca.file()) };
    let terminator = TlsTerminator::start(decode.address(), options).await;
    let with = router(&prefill, &terminator.url(), |config| {
        config.backend_ca([ca.file()]).backend_client_cert(&own.cert, &own.key)
    })
    .await;
    assert_eq!(post(&with).await.status(), 200);
    assert!(terminator.handshakes()[0].has_certificate);

    let without = router(&prefill, &terminator.url(), with_ca(&ca)).await;
    let response = post(&without).await;
    assert_eq!(response.status(), 502);
    assert!(message(&response).contains("CertificateRequired"), "{}", message(&response));
    assert_eq!(decode.requests().len(), 1);
}

#[tokio::test]
async fn reloaded_ca_applies_to_new_connections() {
    let (old, new) = (TestCa::new(), TestCa::new());
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let terminator = tls_terminator(&decode, &new.issue("server", &["localhost"])).await;
    let router = router(&prefill, &terminator.url(), with_ca(&old)).await;
    assert_eq!(post(&router).await.error_code(), "decode_connect");
    router.reload(config(&prefill, &terminator.url()).backend_ca([new.file()])).expect("valid files");
    assert_eq!(post(&router).await.status(), 200);
}

#[tokio::test]
async fn https_backend_is_probed_over_tls() {
    let ca = TestCa::new();
    let decode = ok_server().await;
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    let prefill = ok_server().await;
    let url = terminator.url();
    let router = Router::start_with(&[&prefill], &[], |_| {
        config(&prefill, &url).backend_ca([ca.file()]).health_checks(true)
    })
    .await;
    decode.wait_for_requests(1).await;
    assert_eq!(decode.requests()[0].target(), "/ready");
    drop(router);
}

#[tokio::test]
async fn client_disconnect_closes_the_tls_leg() {
    let ca = TestCa::new();
    let (prefill, decode) = (ok_server().await, ScriptedServer::start(|_| vec![Step::Hang]).await);
    let terminator = tls_terminator(&decode, &ca.issue("server", &["localhost"])).await;
    let router = router(&prefill, &terminator.url(), with_ca(&ca)).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    decode.wait_for_requests(1).await;
    drop(client);
    decode.wait_closed(1).await;
}

//! Who may ask: API keys of clients, the admin key of operators, and the key that the router sends to
//! backends.

mod kit;

use std::net::{SocketAddr, UdpSocket};

use kit::{Client, ReceivedRequest, Response, Router, ScriptedServer, free_port, json};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;

async fn ok_server() -> ScriptedServer {
    ScriptedServer::always(json("200 OK", "{}")).await
}

async fn request(router: &Router, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
    let mut client = router.client().await;
    let body = if method == "GET" { "" } else { BODY };
    client.send_request(method, target, headers, body.as_bytes()).await;
    client.response().await
}

fn authorization(seen: &ReceivedRequest) -> Option<&str> {
    seen.head.header("authorization")
}

#[tokio::test]
async fn all_paths_but_health_and_ready_require_the_api_key() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let keyed = |config: MiniLbConfig| config.api_key("sk-1").api_key("sk-2");
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    for (method, target) in [
        ("POST", "/generate"),
        ("PUT", "/generate"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/flush_cache"),
        ("GET", "/health_generate"),
        ("GET", "/server_info"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/a%2fb"),
        ("GET", "/model_info"),
        // Without a key no client learns which paths exist, however they are spelled.
        ("GET", "/nothing"),
        ("POST", "/%67enerate"),
        ("POST", "//generate"),
        ("POST", "/health/../generate"),
        ("POST", "/generate?x=/health"),
        ("POST", "http://router/generate"),
        ("POST", "/health"),
        ("OPTIONS", "/generate"),
    ] {
        for headers in [
            &[][..],
            &[("authorization", "Bearer sk-3")],
            &[("authorization", "Basic sk-1")],
            &[("authorization", "sk-1")],
            &[("x-api-key", "sk-1")],
            &[("proxy-authorization", "Bearer sk-1")],
        ] {
            let response = request(&router, method, target, headers).await;
            assert_eq!(
                (response.status(), response.error_code()),
                (401, "unauthorized".into()),
                "{method} {target}"
            );
            assert_eq!(response.head.header("www-authenticate"), Some("Bearer"));
            assert_eq!(response.json()["error"]["type"], "invalid_request_error");
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
    for target in ["/health", "/health?x=1"] {
        assert_eq!(request(&router, "GET", target, &[]).await.status(), 200);
    }
    // 503, because nothing was probed; but not 401.
    assert_ne!(request(&router, "GET", "/ready", &[]).await.status(), 401);
    for value in ["Bearer sk-1", "bearer sk-2", "BEARER  sk-1"] {
        let response = request(&router, "POST", "/generate", &[("authorization", value)]).await;
        assert_eq!(response.status(), 200, "{value}");
        assert_eq!(authorization(decode.requests().last().unwrap()), Some(value));
    }
}

#[tokio::test]
async fn rejected_key_keeps_the_connection_but_duplicate_headers_close_it() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.api_key("sk-1")).await;
    let mut client = router.client().await;
    let large = format!(r#"{{"text":"{}"}}"#, "a".repeat(300_000));
    for body in [BODY, &large] {
        let response = client.post("/generate", body).await;
        assert_eq!((response.status(), response.head.header("connection")), (401, None));
    }
    client.send_request("POST", "/generate", &[("authorization", "Bearer sk-1")], BODY.as_bytes()).await;
    assert_eq!(client.response().await.status(), 200);

    let twice = [("authorization", "Bearer sk-1"), ("Authorization", "Bearer sk-1")];
    client.send_request("POST", "/generate", &twice, BODY.as_bytes()).await;
    let response = client.response().await;
    assert_eq!((response.status(), response.error_code()), (400, "bad_request".into()));
    client.wait_closed().await;

    let mut careful = router.client().await;
    careful
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n")
        .await;
    let response = careful.response().await;
    assert_eq!(response.status(), 401);
    assert_eq!(response.head.header("connection"), Some("close"));
    careful.wait_closed().await;
}

#[tokio::test]
async fn without_api_keys_authorization_headers_pass_unchanged() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let twice = [("authorization", "Basic a"), ("authorization", "b")];
    let response = request(&router, "POST", "/generate", &twice).await;
    assert_eq!(response.status(), 200);
    for name in ["vary", "access-control-allow-origin", "www-authenticate", "retry-after"] {
        assert_eq!(response.head.header(name), None);
    }
    for seen in [prefill.only_request().await, decode.only_request().await] {
        let sent = seen.head.headers.iter().filter(|(name, _)| name == "authorization");
        assert_eq!(sent.map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["Basic a", "b"]);
    }
}

#[tokio::test]
async fn reload_replaces_api_keys() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let config = || {
        let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 60)
    };
    let router = Router::start_with_config(config().api_key("old")).await;
    let status =
        async |key: &str| request(&router, "POST", "/generate", &[("authorization", key)]).await.status();
    assert_eq!((status("Bearer old").await, status("Bearer new").await), (200, 401));
    router.reload(config().api_key("old").api_key("new")).unwrap();
    assert_eq!((status("Bearer old").await, status("Bearer new").await), (200, 200));
    router.reload(config().api_key("new")).unwrap();
    assert_eq!((status("Bearer old").await, status("Bearer new").await), (401, 200));
    let error = router.reload(config().api_key("secret \n")).unwrap_err().to_string();
    assert!(error.starts_with("--api-key ***: ") && !error.contains("secret"), "{error}");
    assert_eq!((status("Bearer old").await, status("Bearer new").await), (401, 200));
}

#[tokio::test]
async fn worker_api_key_is_sent_with_probes_only() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let keyed = |config: MiniLbConfig| config.worker_api_key("inner").health_checks(true);
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    prefill.wait_for_requests(1).await;
    decode.wait_for_requests(1).await;
    for probe in [&prefill.requests()[0], &decode.requests()[0]] {
        assert_eq!((probe.target(), authorization(probe)), ("/ready", Some("Bearer inner")));
    }
    request(&router, "POST", "/generate", &[("authorization", "Bearer own")]).await;
    request(&router, "POST", "/generate", &[]).await;
    // A client without a key must not act with the router's key.
    request(&router, "POST", "/flush_cache", &[]).await;
    let seen = decode.requests();
    let sent = |target: &str| -> Vec<_> {
        seen.iter().filter(|seen| seen.target() == target).map(authorization).collect()
    };
    assert_eq!(sent("/generate"), [Some("Bearer own"), None]);
    assert_eq!(sent("/flush_cache"), [None]);
}

#[tokio::test]
async fn worker_api_key_replaces_client_authorization_when_configured() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let keyed = |config: MiniLbConfig| {
        config.api_key("outer").worker_api_key("inner").worker_api_key_replaces_authorization(true)
    };
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let key = [("x-a", "1"), ("authorization", "Bearer outer"), ("x-b", "2")];
    for (method, target) in [("POST", "/generate"), ("GET", "/server_info"), ("POST", "/flush_cache")] {
        assert_eq!(request(&router, method, target, &key).await.status(), 200);
    }
    assert_eq!(
        request(&router, "POST", "/generate", &[("authorization", "Bearer inner")]).await.status(),
        401
    );
    prefill.wait_for_requests(3).await;
    assert_eq!((prefill.requests().len(), decode.requests().len()), (3, 3));
    for seen in prefill.requests().iter().chain(&decode.requests()) {
        assert_eq!(authorization(seen), Some("Bearer inner"), "{}", seen.target());
        assert_eq!((seen.head.header("x-a"), seen.head.header("x-b")), (Some("1"), Some("2")));
    }
}

async fn admin_get(address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let mut client = kit::with_timeout("the admin listener", async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::task::yield_now().await;
        }
        Client::connect(address).await
    })
    .await;
    client.send_request("GET", target, headers, b"").await;
    let response = client.response().await;
    let code = if response.body.is_empty() { String::new() } else { response.error_code() };
    (response.status(), code)
}

#[tokio::test]
async fn admin_listener_accepts_loopback_or_the_admin_key() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let port = free_port();
    let local = SocketAddr::from(([127, 0, 0, 1], port));
    // An address of this machine other than loopback, if it has one. Connecting a UDP socket sends nothing.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let remote = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    let remote = remote.ok().map(|address| SocketAddr::new(address.ip(), port));
    let missing = || (404, "not_found".to_owned());
    {
        let open = |config: MiniLbConfig| config.admin_address("0.0.0.0", port).api_key("client");
        let _router = Router::start_with(&[&prefill], &[&decode], open).await;
        assert_eq!(admin_get(local, "/nothing", &[]).await, missing());
        let foreign = admin_get(local, "/nothing", &[("origin", "http://evil.example")]).await;
        assert_eq!(foreign, (403, "admin_forbidden".into()));
        if let Some(remote) = remote {
            let client = [("authorization", "Bearer client")];
            assert_eq!(admin_get(remote, "/nothing", &client).await, (403, "admin_forbidden".into()));
            assert_eq!(admin_get(remote, "/health", &[]).await.0, 200);
        }
    }
    let port = free_port();
    let keyed = |config: MiniLbConfig| config.admin_address("0.0.0.0", port).admin_api_key("admin");
    let _router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let local = SocketAddr::new(local.ip(), port);
    let remote = remote.map(|remote| SocketAddr::new(remote.ip(), port));
    for address in [Some(local), remote].into_iter().flatten() {
        assert_eq!(admin_get(address, "/nothing", &[]).await, (401, "unauthorized".into()));
        let wrong = [("authorization", "Bearer client")];
        assert_eq!(admin_get(address, "/nothing", &wrong).await, (401, "unauthorized".into()));
        assert_eq!(admin_get(address, "/nothing", &[("authorization", "Bearer admin")]).await, missing());
        let twice = [("authorization", "Bearer admin"), ("authorization", "Bearer admin")];
        assert_eq!(admin_get(address, "/nothing", &twice).await, (400, "bad_request".into()));
        assert_eq!(admin_get(address, "/health", &[]).await.0, 200);
    }
}

/// Browsers can send a key only as a basic auth password.
#[tokio::test]
async fn only_the_status_page_accepts_the_admin_key_as_basic_auth() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let port = free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let keyed = |config: MiniLbConfig| config.admin_address("127.0.0.1", port).admin_api_key("secret");
    let _router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let basic = [("authorization", "Basic YWRtaW46c2VjcmV0")];
    assert_eq!(admin_get(address, "/workers", &basic).await, (401, "unauthorized".into()));
    let mut client = Client::connect(address).await;
    client.send_request("GET", "/ui", &[], b"").await;
    let refused = client.response().await;
    assert_eq!(refused.status(), 401);
    assert!(refused.head.header("www-authenticate").unwrap().starts_with("Basic "));
    for good in [&basic[..], &[("authorization", "Bearer secret")]] {
        client.send_request("GET", "/ui", good, b"").await;
        let page = client.response().await;
        assert_eq!(page.status(), 200);
        assert!(page.text().starts_with("<!doctype html>"), "{}", page.text());
    }
    client.send_request("GET", "/ui", &[("authorization", "Basic YWRtaW46d3Jvbmc=")], b"").await;
    assert_eq!(client.response().await.status(), 401);
}

#[tokio::test]
async fn workers_api_requires_the_admin_key_not_a_client_key() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let keyed = |config: MiniLbConfig| config.api_key("client").admin_api_key("admin");
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    for (key, status) in [("Bearer client", 401), ("Bearer admin", 200)] {
        let response = request(&router, "GET", "/workers", &[("authorization", key)]).await;
        assert_eq!(response.status(), status, "{key}");
    }
    assert_eq!(request(&router, "GET", "/workers", &[]).await.status(), 401);
    let generated = request(&router, "POST", "/generate", &[("authorization", "Bearer admin")]).await;
    assert_eq!(generated.status(), 401);
}

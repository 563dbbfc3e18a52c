//! Keys of clients, of operators and towards servers.

mod kit;

use std::net::{SocketAddr, UdpSocket};

use kit::{Answer, Client, Router, Seen, Upstream, json};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;

async fn server() -> Upstream {
    Upstream::always(json("200 OK", "{}")).await
}

async fn ask(router: &Router, method: &str, target: &str, headers: &[(&str, &str)]) -> Answer {
    let mut client = router.client().await;
    let body = if method == "GET" { "" } else { BODY };
    client.start(method, target, headers, body.as_bytes()).await;
    client.answer().await
}

fn authorization(seen: &Seen) -> Option<&str> {
    seen.head.header("authorization")
}

#[tokio::test]
async fn with_a_key_everything_but_health_and_ready_needs_it() {
    let (prefill, decode) = (server().await, server().await);
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
        // Whether there is such a path is no business of theirs either, however it is written.
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
            let answer = ask(&router, method, target, headers).await;
            assert_eq!((answer.status(), answer.code()), (401, "unauthorized".into()), "{method} {target}");
            assert_eq!(answer.head.header("www-authenticate"), Some("Bearer"));
            assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        }
    }
    assert_eq!(prefill.opened() + decode.opened(), 0);
    for target in ["/health", "/health?x=1"] {
        assert_eq!(ask(&router, "GET", target, &[]).await.status(), 200);
    }
    // 503, as nobody was probed; but not 401.
    assert_ne!(ask(&router, "GET", "/ready", &[]).await.status(), 401);
    for value in ["Bearer sk-1", "bearer sk-2", "BEARER  sk-1"] {
        let answer = ask(&router, "POST", "/generate", &[("authorization", value)]).await;
        assert_eq!(answer.status(), 200, "{value}");
        assert_eq!(authorization(decode.seen().last().unwrap()), Some(value));
    }
}

#[tokio::test]
async fn a_connection_stays_usable_after_a_refusal_and_ends_after_an_ambiguous_one() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.api_key("sk-1")).await;
    let mut client = router.client().await;
    let large = format!(r#"{{"text":"{}"}}"#, "a".repeat(300_000));
    for body in [BODY, &large] {
        let answer = client.post("/generate", body).await;
        assert_eq!((answer.status(), answer.head.header("connection")), (401, None));
    }
    client.start("POST", "/generate", &[("authorization", "Bearer sk-1")], BODY.as_bytes()).await;
    assert_eq!(client.answer().await.status(), 200);

    let twice = [("authorization", "Bearer sk-1"), ("Authorization", "Bearer sk-1")];
    client.start("POST", "/generate", &twice, BODY.as_bytes()).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.code()), (400, "bad_request".into()));
    client.closed().await;

    let mut careful = router.client().await;
    careful
        .send("POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 12\r\n\r\n")
        .await;
    let answer = careful.answer().await;
    assert_eq!((answer.status(), answer.head.header("connection")), (401, Some("close")));
}

#[tokio::test]
async fn without_keys_nothing_is_checked_or_changed() {
    let (prefill, decode) = (server().await, server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let twice = [("authorization", "Basic a"), ("authorization", "b")];
    let answer = ask(&router, "POST", "/generate", &twice).await;
    assert_eq!(answer.status(), 200);
    for name in ["vary", "access-control-allow-origin", "www-authenticate", "retry-after"] {
        assert_eq!(answer.head.header(name), None);
    }
    for seen in [prefill.only().await, decode.only().await] {
        let sent = seen.head.headers.iter().filter(|(name, _)| name == "authorization");
        assert_eq!(sent.map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["Basic a", "b"]);
    }
}

#[tokio::test]
async fn keys_change_while_the_router_runs() {
    let (prefill, decode) = (server().await, server().await);
    let config = || {
        let prefill = vec![(prefill.url(), Some(kit::BOOTSTRAP_PORT))];
        MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 60)
    };
    let router = Router::serve(config().api_key("old")).await;
    let status =
        async |key: &str| ask(&router, "POST", "/generate", &[("authorization", key)]).await.status();
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
async fn the_workers_key_is_for_probes_and_clients_own_passes_on() {
    let (prefill, decode) = (server().await, server().await);
    let keyed = |config: MiniLbConfig| config.worker_api_key("inner").health_checks(true);
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    prefill.arrived(1).await;
    decode.arrived(1).await;
    for probe in [&prefill.seen()[0], &decode.seen()[0]] {
        assert_eq!((probe.target(), authorization(probe)), ("/ready", Some("Bearer inner")));
    }
    ask(&router, "POST", "/generate", &[("authorization", "Bearer own")]).await;
    ask(&router, "POST", "/generate", &[]).await;
    // A client without a key must not act with the router's.
    ask(&router, "POST", "/flush_cache", &[]).await;
    let seen = decode.seen();
    let sent = |target: &str| -> Vec<_> {
        seen.iter().filter(|seen| seen.target() == target).map(authorization).collect()
    };
    assert_eq!(sent("/generate"), [Some("Bearer own"), None]);
    assert_eq!(sent("/flush_cache"), [None]);
}

#[tokio::test]
async fn the_workers_key_takes_the_place_of_clients_if_asked() {
    let (prefill, decode) = (server().await, server().await);
    let keyed = |config: MiniLbConfig| {
        config.api_key("outer").worker_api_key("inner").worker_api_key_replaces_authorization(true)
    };
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let key = [("x-a", "1"), ("authorization", "Bearer outer"), ("x-b", "2")];
    for (method, target) in [("POST", "/generate"), ("GET", "/server_info"), ("POST", "/flush_cache")] {
        assert_eq!(ask(&router, method, target, &key).await.status(), 200);
    }
    assert_eq!(ask(&router, "POST", "/generate", &[("authorization", "Bearer inner")]).await.status(), 401);
    prefill.arrived(3).await;
    assert_eq!((prefill.seen().len(), decode.seen().len()), (3, 3));
    for seen in prefill.seen().iter().chain(&decode.seen()) {
        assert_eq!(authorization(seen), Some("Bearer inner"), "{}", seen.target());
        assert_eq!((seen.head.header("x-a"), seen.head.header("x-b")), (Some("1"), Some("2")));
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

async fn operator_asks(address: SocketAddr, target: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let mut client = kit::patiently("the admin listener", async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::task::yield_now().await;
        }
        Client::connect(address).await
    })
    .await;
    client.start("GET", target, headers, b"").await;
    let answer = client.answer().await;
    let code = if answer.body.is_empty() { String::new() } else { answer.code() };
    (answer.status(), code)
}

#[tokio::test]
async fn operators_are_answered_on_loopback_or_with_their_key() {
    let (prefill, decode) = (server().await, server().await);
    let port = free_port();
    let local = SocketAddr::from(([127, 0, 0, 1], port));
    // An address of this machine's that is not loopback, if it has one. Nothing is sent.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let remote = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    let remote = remote.ok().map(|address| SocketAddr::new(address.ip(), port));
    let missing = || (404, "not_found".to_owned());
    {
        let open = |config: MiniLbConfig| config.admin_address("0.0.0.0", port).api_key("client");
        let _router = Router::start_with(&[&prefill], &[&decode], open).await;
        assert_eq!(operator_asks(local, "/nothing", &[]).await, missing());
        let foreign = operator_asks(local, "/nothing", &[("origin", "http://evil.example")]).await;
        assert_eq!(foreign, (403, "admin_forbidden".into()));
        if let Some(remote) = remote {
            let client = [("authorization", "Bearer client")];
            assert_eq!(operator_asks(remote, "/nothing", &client).await, (403, "admin_forbidden".into()));
            assert_eq!(operator_asks(remote, "/health", &[]).await.0, 200);
        }
    }
    let port = free_port();
    let keyed = |config: MiniLbConfig| config.admin_address("0.0.0.0", port).admin_api_key("admin");
    let _router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let local = SocketAddr::new(local.ip(), port);
    let remote = remote.map(|remote| SocketAddr::new(remote.ip(), port));
    for address in [Some(local), remote].into_iter().flatten() {
        assert_eq!(operator_asks(address, "/nothing", &[]).await, (401, "unauthorized".into()));
        let wrong = [("authorization", "Bearer client")];
        assert_eq!(operator_asks(address, "/nothing", &wrong).await, (401, "unauthorized".into()));
        assert_eq!(operator_asks(address, "/nothing", &[("authorization", "Bearer admin")]).await, missing());
        let twice = [("authorization", "Bearer admin"), ("authorization", "Bearer admin")];
        assert_eq!(operator_asks(address, "/nothing", &twice).await, (400, "bad_request".into()));
        assert_eq!(operator_asks(address, "/health", &[]).await.0, 200);
    }
}

/// A browser has no other way to show a key.
#[tokio::test]
async fn the_status_page_takes_the_operators_key_as_a_password_and_nothing_else_does() {
    let (prefill, decode) = (server().await, server().await);
    let port = free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let keyed = |config: MiniLbConfig| config.admin_address("127.0.0.1", port).admin_api_key("secret");
    let _router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    let basic = [("authorization", "Basic YWRtaW46c2VjcmV0")];
    assert_eq!(operator_asks(address, "/workers", &basic).await, (401, "unauthorized".into()));
    let mut client = Client::connect(address).await;
    client.start("GET", "/ui", &[], b"").await;
    let refused = client.answer().await;
    assert_eq!(refused.status(), 401);
    assert!(refused.head.header("www-authenticate").unwrap().starts_with("Basic "));
    for good in [&basic[..], &[("authorization", "Bearer secret")]] {
        client.start("GET", "/ui", good, b"").await;
        let page = client.answer().await;
        assert_eq!(page.status(), 200);
        assert!(page.text().starts_with("<!doctype html>"), "{}", page.text());
    }
    client.start("GET", "/ui", &[("authorization", "Basic YWRtaW46d3Jvbmc=")], b"").await;
    assert_eq!(client.answer().await.status(), 401);
}

#[tokio::test]
async fn servers_are_changed_with_the_operators_key_and_not_with_a_clients() {
    let (prefill, decode) = (server().await, server().await);
    let keyed = |config: MiniLbConfig| config.api_key("client").admin_api_key("admin");
    let router = Router::start_with(&[&prefill], &[&decode], keyed).await;
    for (key, status) in [("Bearer client", 401), ("Bearer admin", 200)] {
        let answer = ask(&router, "GET", "/workers", &[("authorization", key)]).await;
        assert_eq!(answer.status(), status, "{key}");
    }
    assert_eq!(ask(&router, "GET", "/workers", &[]).await.status(), 401);
    let generated = ask(&router, "POST", "/generate", &[("authorization", "Bearer admin")]).await;
    assert_eq!(generated.status(), 401);
}

//! Which pages may read answers, as browsers ask for it.

mod kit;

use kit::{Answer, Router, Step, Upstream};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;
const GOOD: (&str, &str) = ("origin", "https://chat.example.com");
const BAD: (&str, &str) = ("origin", "https://evil.example.com");

/// A server that lets everyone read, as SGLang does.
async fn generous() -> Upstream {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nvary: Accept\r\n\
                access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n\r\n{}";
    Upstream::start(move |_| vec![Step::Send(head.into())]).await
}

async fn ask(router: &Router, method: &str, target: &str, headers: &[(&str, &str)]) -> Answer {
    let mut client = router.client().await;
    let body = if method == "POST" { BODY } else { "" };
    client.start(method, target, headers, body.as_bytes()).await;
    client.answer().await
}

/// All headers about it, in order.
fn said(answer: &Answer) -> Vec<(&str, &str)> {
    let headers = answer.head.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut said: Vec<_> =
        headers.filter(|(name, _)| *name == "vary" || name.starts_with("access-control")).collect();
    said.sort_unstable();
    said
}

const SHARED: [(&str, &str); 3] = [
    ("access-control-allow-origin", "https://chat.example.com"),
    ("access-control-expose-headers", "retry-after, x-request-id"),
    ("vary", "Origin"),
];

#[tokio::test]
async fn named_origins_may_read_and_others_may_not_whatever_servers_say() {
    let (prefill, decode) = (generous().await, generous().await);
    let listed =
        |config: MiniLbConfig| config.cors_allowed_origins(["http://a.example", "https://chat.example.com"]);
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let answer = ask(&router, "POST", "/generate", &[GOOD]).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(said(&answer), [SHARED[0], SHARED[1], ("vary", "Accept"), SHARED[2]]);
    // The router's own answers too: a page must be able to read what went wrong.
    let answer = ask(&router, "POST", "/nothing", &[GOOD]).await;
    assert_eq!((answer.status(), said(&answer)), (404, SHARED.to_vec()));
    let two = [GOOD, GOOD];
    for headers in
        [&[][..], &[BAD], &[("origin", "null")], &[("origin", "https://chat.example.com.evil")], &two]
    {
        let answer = ask(&router, "POST", "/generate", headers).await;
        assert_eq!((answer.status(), said(&answer)), (200, vec![("vary", "Accept")]), "{headers:?}");
    }
}

#[tokio::test]
async fn a_preflight_is_answered_for_known_paths_and_named_origins_only() {
    let (prefill, decode) = (generous().await, generous().await);
    let listed = |config: MiniLbConfig| {
        config.cors_allowed_origins(["https://chat.example.com"]).api_key("sk-1").max_concurrent_requests(1)
    };
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let asks = ("access-control-request-method", "POST");
    let wants = ("access-control-request-headers", "authorization,content-type,x-stainless-lang");
    // Browsers send no key with it.
    let mut client = router.client().await;
    let preflight = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: r\r\nOrigin: https://chat.example.com\r\n\
                     Access-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization,content-type,x-stainless-lang\r\n\r\n";
    client.send(preflight).await;
    let head = client.head().await;
    assert_eq!(head.start_line, "HTTP/1.1 204 No Content");
    let header = |name| head.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!(header("access-control-allow-origin").collect::<Vec<_>>(), [GOOD.1]);
    assert_eq!(header("access-control-allow-methods").collect::<Vec<_>>(), ["POST"]);
    assert_eq!(header("access-control-allow-headers").collect::<Vec<_>>(), [wants.1]);
    assert_eq!(header("access-control-max-age").collect::<Vec<_>>(), ["600"]);
    assert_eq!(header("vary").collect::<Vec<_>>(), ["Origin", "Access-Control-Request-Headers"]);
    assert_eq!(header("content-length").count(), 0);
    // The connection goes on.
    client.start("POST", "/generate", &[("authorization", "Bearer sk-1")], BODY.as_bytes()).await;
    assert_eq!(client.answer().await.status(), 200);

    let key = ("authorization", "Bearer sk-1");
    for (target, headers, status) in [
        ("/v1/chat/completions", &[BAD, asks, key][..], 405),
        ("/v1/chat/completions", &[BAD, asks], 401),
        ("/v1/chat/completions", &[asks, key], 405),
        ("/v1/chat/completions", &[GOOD, key], 405),
        ("/v1/chat/completions", &[GOOD], 401),
        ("/nothing", &[GOOD, asks], 404),
    ] {
        let answer = ask(&router, "OPTIONS", target, headers).await;
        assert_eq!(answer.status(), status, "{target} {headers:?}");
        let methods = said(&answer).iter().any(|(name, _)| *name == "access-control-allow-methods");
        assert!(!methods, "{target} {headers:?}");
    }
}

#[tokio::test]
async fn a_refusal_can_be_read_by_the_page_that_caused_it() {
    let (prefill, decode) = (generous().await, generous().await);
    let listed = |config: MiniLbConfig| config.cors_allowed_origins([GOOD.1]).api_key("sk-1");
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let answer = ask(&router, "POST", "/generate", &[GOOD]).await;
    assert_eq!((answer.status(), said(&answer)), (401, SHARED.to_vec()));
}

#[tokio::test]
async fn every_origin_may_read_if_asked() {
    let (prefill, decode) = (generous().await, generous().await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.cors_allowed_origins(["*"])).await;
    let answer = ask(&router, "POST", "/generate", &[("origin", "null")]).await;
    assert_eq!(said(&answer)[0], ("access-control-allow-origin", "null"));
    assert!(!said(&answer).iter().any(|(name, _)| name.ends_with("credentials")));
}

#[tokio::test]
async fn without_a_list_nothing_is_added_or_taken_away() {
    let (prefill, decode) = (generous().await, generous().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let theirs = [
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-origin", "*"),
        ("vary", "Accept"),
    ];
    assert_eq!(said(&ask(&router, "POST", "/generate", &[GOOD]).await), theirs);
    let preflight = [GOOD, ("access-control-request-method", "POST")];
    let answer = ask(&router, "OPTIONS", "/generate", &preflight).await;
    assert_eq!((answer.status(), answer.code()), (405, "method_not_allowed".into()));
    assert_eq!(answer.head.header("allow"), Some("POST, PUT"));
    assert!(said(&answer).is_empty());
}

//! CORS: which web pages may read responses.

mod kit;

use kit::{Response, Router, ScriptedServer, Step};
use mini_lb::MiniLbConfig;

const BODY: &str = r#"{"text":"a"}"#;
const ALLOWED: (&str, &str) = ("origin", "https://chat.example.com");
const FOREIGN: (&str, &str) = ("origin", "https://evil.example.com");

/// A server that allows every origin, as SGLang does.
async fn permissive_server() -> ScriptedServer {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nvary: Accept\r\n\
                access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n\r\n{}";
    ScriptedServer::start(move |_| vec![Step::Send(head.into())]).await
}

async fn request(router: &Router, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
    let mut client = router.client().await;
    let body = if method == "POST" { BODY } else { "" };
    client.send_request(method, target, headers, body.as_bytes()).await;
    client.response().await
}

/// All CORS headers and `vary`, sorted.
fn cors_headers(response: &Response) -> Vec<(&str, &str)> {
    let headers = response.head.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut cors_headers: Vec<_> =
        headers.filter(|(name, _)| *name == "vary" || name.starts_with("access-control")).collect();
    cors_headers.sort_unstable();
    cors_headers
}

const ALLOWED_HEADERS: [(&str, &str); 3] = [
    ("access-control-allow-origin", "https://chat.example.com"),
    ("access-control-expose-headers", "retry-after, x-request-id"),
    ("vary", "Origin"),
];

#[tokio::test]
async fn only_listed_origins_get_cors_headers_whatever_backends_send() {
    let (prefill, decode) = (permissive_server().await, permissive_server().await);
    let listed =
        |config: MiniLbConfig| config.cors_allowed_origins(["http://a.example", "https://chat.example.com"]);
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let response = request(&router, "POST", "/generate", &[ALLOWED]).await;
    assert_eq!(response.status(), 200);
    assert_eq!(
        cors_headers(&response),
        [ALLOWED_HEADERS[0], ALLOWED_HEADERS[1], ("vary", "Accept"), ALLOWED_HEADERS[2]]
    );
    // The router's own errors too: a page must be able to read what went wrong.
    let response = request(&router, "POST", "/nothing", &[ALLOWED]).await;
    assert_eq!((response.status(), cors_headers(&response)), (404, ALLOWED_HEADERS.to_vec()));
    let two = [ALLOWED, ALLOWED];
    for headers in
        [&[][..], &[FOREIGN], &[("origin", "null")], &[("origin", "https://chat.example.com.evil")], &two]
    {
        let response = request(&router, "POST", "/generate", headers).await;
        assert_eq!(
            (response.status(), cors_headers(&response)),
            (200, vec![("vary", "Accept")]),
            "{headers:?}"
        );
    }
}

#[tokio::test]
async fn preflight_succeeds_for_known_paths_and_listed_origins_only() {
    let (prefill, decode) = (permissive_server().await, permissive_server().await);
    let listed = |config: MiniLbConfig| {
        config.cors_allowed_origins(["https://chat.example.com"]).api_key("sk-1").max_concurrent_requests(1)
    };
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let preflight_method = ("access-control-request-method", "POST");
    let preflight_headers = ("access-control-request-headers", "authorization,content-type,x-stainless-lang");
    // Browsers send preflights without a key.
    let mut client = router.client().await;
    let preflight = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: r\r\nOrigin: https://chat.example.com\r\n\
                     Access-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization,content-type,x-stainless-lang\r\n\r\n";
    client.send(preflight).await;
    let head = client.head().await;
    assert_eq!(head.start_line, "HTTP/1.1 204 No Content");
    let header = |name| head.headers.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!(header("access-control-allow-origin").collect::<Vec<_>>(), [ALLOWED.1]);
    assert_eq!(header("access-control-allow-methods").collect::<Vec<_>>(), ["POST"]);
    assert_eq!(header("access-control-allow-headers").collect::<Vec<_>>(), [preflight_headers.1]);
    assert_eq!(header("access-control-max-age").collect::<Vec<_>>(), ["600"]);
    assert_eq!(header("vary").collect::<Vec<_>>(), ["Origin", "Access-Control-Request-Headers"]);
    assert_eq!(header("content-length").count(), 0);
    // The connection is still usable.
    client.send_request("POST", "/generate", &[("authorization", "Bearer sk-1")], BODY.as_bytes()).await;
    assert_eq!(client.response().await.status(), 200);

    let key = ("authorization", "Bearer sk-1");
    for (target, headers, status) in [
        ("/v1/chat/completions", &[FOREIGN, preflight_method, key][..], 405),
        ("/v1/chat/completions", &[FOREIGN, preflight_method], 401),
        ("/v1/chat/completions", &[preflight_method, key], 405),
        ("/v1/chat/completions", &[ALLOWED, key], 405),
        ("/v1/chat/completions", &[ALLOWED], 401),
        ("/nothing", &[ALLOWED, preflight_method], 404),
    ] {
        let response = request(&router, "OPTIONS", target, headers).await;
        assert_eq!(response.status(), status, "{target} {headers:?}");
        let methods = cors_headers(&response).iter().any(|(name, _)| *name == "access-control-allow-methods");
        assert!(!methods, "{target} {headers:?}");
    }
}

#[tokio::test]
async fn error_responses_carry_cors_headers() {
    let (prefill, decode) = (permissive_server().await, permissive_server().await);
    let listed = |config: MiniLbConfig| config.cors_allowed_origins([ALLOWED.1]).api_key("sk-1");
    let router = Router::start_with(&[&prefill], &[&decode], listed).await;
    let response = request(&router, "POST", "/generate", &[ALLOWED]).await;
    assert_eq!((response.status(), cors_headers(&response)), (401, ALLOWED_HEADERS.to_vec()));
}

#[tokio::test]
async fn wildcard_allows_every_origin() {
    let (prefill, decode) = (permissive_server().await, permissive_server().await);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.cors_allowed_origins(["*"])).await;
    let response = request(&router, "POST", "/generate", &[("origin", "null")]).await;
    assert_eq!(cors_headers(&response)[0], ("access-control-allow-origin", "null"));
    assert!(!cors_headers(&response).iter().any(|(name, _)| name.ends_with("credentials")));
}

#[tokio::test]
async fn without_a_list_backend_cors_headers_pass_unchanged() {
    let (prefill, decode) = (permissive_server().await, permissive_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let theirs = [
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-origin", "*"),
        ("vary", "Accept"),
    ];
    assert_eq!(cors_headers(&request(&router, "POST", "/generate", &[ALLOWED]).await), theirs);
    let preflight = [ALLOWED, ("access-control-request-method", "POST")];
    let response = request(&router, "OPTIONS", "/generate", &preflight).await;
    assert_eq!((response.status(), response.error_code()), (405, "method_not_allowed".into()));
    assert_eq!(response.head.header("allow"), Some("POST, PUT"));
    assert!(cors_headers(&response).is_empty());
}

//! The endpoints besides generation: who is asked, and what is made of it.

mod kit;

use std::time::Instant;

use kit::{Gate, Router, Seen, Step, Upstream, fixture, json};
use serde_json::{Value, json};

/// A server that answers each path as a real one was recorded.
async fn recorded(role: &'static str) -> Upstream {
    let answers = |seen: &Seen| {
        let name = match seen.target().split('?').next().unwrap() {
            "/health_generate" => "health_generate",
            "/flush_cache" => "flush_cache",
            "/server_info" | "/get_server_info" => "server_info",
            "/model_info" | "/get_model_info" => "model_info",
            "/v1/models" => "v1_models",
            other => panic!("not recorded: {other}"),
        };
        name.to_owned()
    };
    Upstream::start(move |seen| {
        vec![Step::Send(fixture(&format!("pd_info/{role}_{}.resp", answers(seen))).unwrap().raw)]
    })
    .await
}

async fn saying(status: &'static str, body: &'static str) -> Upstream {
    Upstream::always(json(status, body)).await
}

#[tokio::test]
async fn health_is_the_routers_own_and_asks_nobody() {
    let (prefill, decode) = (saying("500 Oops", "").await, saying("500 Oops", "").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let answer = router.client().await.get("/health").await;
    assert_eq!((answer.status(), answer.text()), (200, ""));
    assert_eq!(prefill.opened() + decode.opened(), 0);
}

#[tokio::test]
async fn health_generate_is_200_only_if_every_server_is_well() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let sick = saying("503 Service Unavailable", "starting").await;
    let gone = recorded("decode").await;
    let gone_url = gone.url();
    let router = Router::start(&[&prefill], &[&decode]).await;
    let answer = router.client().await.get("/health_generate").await;
    assert_eq!((answer.status(), answer.text()), (200, ""));
    assert_eq!(prefill.only().await.target(), "/health_generate");
    assert_eq!(decode.only().await.target(), "/health_generate");

    let router = Router::start(&[&prefill, &sick], &[&decode, &gone]).await;
    drop(gone);
    let answer = router.client().await.get("/health_generate").await;
    assert_eq!((answer.status(), answer.code()), (503, "unhealthy".into()));
    let servers = answer.json()["servers"].clone();
    assert_eq!(servers.as_array().unwrap().len(), 2);
    assert_eq!(
        servers[0],
        json!({"url": sick.url(), "role": "prefill", "status": 503, "message": "answered 503: starting"})
    );
    assert_eq!((&servers[1]["url"], &servers[1]["status"]), (&json!(gone_url), &Value::Null));
    let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, format!("not all servers are healthy: prefill {}, decode {gone_url}", sick.url()));
}

#[tokio::test]
async fn flush_cache_reaches_every_server_with_its_query_and_headers() {
    let prefills = [recorded("prefill").await, recorded("prefill").await];
    let decode = recorded("decode").await;
    let router = Router::start(&[&prefills[0], &prefills[1]], &[&decode]).await;
    let mut client = router.client().await;
    client.start("POST", "/flush_cache?timeout=60.0", &[("authorization", "Bearer k")], b"").await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.json()["servers"].as_array().unwrap().len(), 3);
    for server in prefills.iter().chain([&decode]) {
        let seen = server.only().await;
        assert_eq!(seen.head.start_line, "POST /flush_cache?timeout=60.0 HTTP/1.1");
        assert_eq!(seen.head.header("authorization"), Some("Bearer k"));
    }
}

#[tokio::test]
async fn a_server_that_refuses_to_flush_is_reported() {
    let busy = fixture("pd_info/flush_cache_busy.decode.resp").unwrap();
    let (prefill, decode) = (recorded("prefill").await, Upstream::always(busy.raw).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let answer = router.client().await.post("/flush_cache", "").await;
    assert_eq!((answer.status(), answer.code()), (400, "flush_cache_failed".into()));
    let servers = answer.json()["servers"].clone();
    assert_eq!((&servers[0]["url"], &servers[0]["status"]), (&json!(decode.url()), &json!(400)));
    assert!(servers[0]["message"].as_str().unwrap().contains("Flush cache failed."), "{servers}");
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_fails_a_flush() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    drop(decode);
    let answer = router.client().await.post("/flush_cache", "").await;
    assert_eq!((answer.status(), answer.code()), (502, "flush_cache_failed".into()));
}

#[tokio::test]
async fn server_info_has_the_shape_that_sglangs_benchmarks_read() {
    let prefill = recorded("prefill").await;
    let decode = [recorded("decode").await, recorded("decode").await];
    let router = Router::start(&[&prefill], &decode.each_ref()).await;
    let info = |role: &str| -> Value {
        serde_json::from_slice(&fixture(&format!("pd_info/{role}_server_info.resp")).unwrap().body).unwrap()
    };
    let states = info("decode")["internal_states"].as_array().unwrap().clone();
    assert!(!states.is_empty());
    for path in ["/server_info", "/get_server_info"] {
        let answer = router.client().await.get(path).await;
        assert_eq!(answer.status(), 200);
        let got = answer.json();
        assert_eq!(got["prefill"], json!([info("prefill")]));
        assert_eq!(got["decode"], json!([info("decode"), info("decode")]));
        assert_eq!(got["internal_states"], json!([states.clone(), states.clone()].concat()));
        assert_eq!(got.as_object().unwrap().len(), 3);
        assert_eq!(prefill.seen().last().unwrap().target(), path);
    }
}

#[tokio::test]
async fn a_server_without_an_answer_is_an_error_entry_in_server_info() {
    let (prefill, decode, silly) =
        (recorded("prefill").await, recorded("decode").await, saying("200 OK", "not json").await);
    let gone = recorded("prefill").await;
    let gone_url = gone.url();
    let router = Router::start(&[&gone, &prefill], &[&silly, &decode]).await;
    drop(gone);
    let answer = router.client().await.get("/server_info").await;
    assert_eq!(answer.status(), 200);
    let got = answer.json();
    assert_eq!(got["prefill"][0]["error"]["url"], gone_url);
    assert!(got["prefill"][1]["tokenizer_path"].is_string());
    assert_eq!(got["decode"][0]["error"]["message"], "the response is not JSON");
    assert!(got["decode"][1]["internal_states"].is_array());
}

#[tokio::test]
async fn server_info_with_no_server_left_is_a_bad_gateway() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    drop((prefill, decode));
    let answer = router.client().await.get("/server_info").await;
    assert_eq!(answer.status(), 502);
    assert_eq!(answer.json()["decode"][0]["error"]["role"], "decode");
}

#[tokio::test]
async fn servers_are_asked_at_the_same_time() {
    let both = Gate::new();
    let waiting = |gate: Gate| {
        Upstream::start(move |_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", "{}"))])
    };
    let (prefill, decode) = (waiting(both.clone()).await, waiting(both.clone()).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for path in ["/server_info", "/health_generate"] {
        let mut client = router.client().await;
        client.start("GET", path, &[], b"").await;
        prefill.arrived(1).await;
        decode.arrived(1).await;
        both.open();
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test]
async fn model_questions_are_answered_by_one_server_verbatim() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for (path, name) in
        [("/model_info", "model_info"), ("/get_model_info", "model_info"), ("/v1/models", "v1_models")]
    {
        let answer = router.client().await.get(path).await;
        let recording = fixture(&format!("pd_info/prefill_{name}.resp")).unwrap();
        assert_eq!((answer.status(), &answer.body), (200, &recording.body), "{path}");
        assert_eq!(answer.head.header("server"), Some("uvicorn"));
    }
    assert_eq!(decode.opened(), 0);
}

#[tokio::test]
async fn one_model_is_asked_for_by_its_whole_id() {
    let recording = fixture("reg/get_v1_models_unknown.resp").unwrap();
    let (prefill, decode) = (Upstream::always(recording.raw.clone()).await, recorded("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let answer = router.client().await.get("/v1/models/org/model-7b?x=1").await;
    assert_eq!((answer.status(), &answer.body), (404, &recording.body));
    assert_eq!(prefill.only().await.target(), "/v1/models/org/model-7b?x=1");
}

#[tokio::test]
async fn a_model_question_goes_to_the_next_server_when_one_cannot_be_reached() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let gone = recorded("prefill").await;
    let gone_url = gone.url();
    let router = Router::start(&[&gone, &prefill], &[&decode]).await;
    drop(gone);
    assert_eq!(router.client().await.get("/v1/models").await.status(), 200);
    drop(prefill);
    let answer = router.client().await.get("/v1/models").await;
    assert_eq!((answer.status(), answer.code()), (502, "prefill_connect".into()));
    assert_eq!(answer.json()["error"]["server"], gone_url);
}

#[tokio::test]
async fn a_head_request_for_health_has_no_body() {
    let (prefill, decode) = (recorded("prefill").await, recorded("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.start("HEAD", "/health", &[], b"").await;
    assert_eq!(client.head().await.start_line, "HTTP/1.1 200 OK");
    assert_eq!(client.get("/health").await.status(), 200);
}

#[tokio::test]
async fn the_router_is_alive_while_its_servers_are_slow() {
    let never = Gate::new();
    let gate = never.clone();
    let prefill = Upstream::start(move |_| vec![Step::Wait(gate.clone())]).await;
    let decode = recorded("decode").await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut slow = router.client().await;
    slow.start("GET", "/server_info", &[], b"").await;
    prefill.arrived(1).await;
    let start = Instant::now();
    assert_eq!(router.client().await.get("/health").await.status(), 200);
    assert!(start.elapsed().as_secs() < 5);
}

//! Endpoints other than generation: which backends they query and how the responses are combined.

mod kit;

use std::time::Instant;

use kit::{Gate, ReceivedRequest, Router, ScriptedServer, Step, fixture, json};
use serde_json::{Value, json};

/// A server with the recorded responses of a real one.
async fn recorded_server(role: &'static str) -> ScriptedServer {
    let responses = |seen: &ReceivedRequest| {
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
    ScriptedServer::start(move |seen| {
        vec![Step::Send(fixture(&format!("pd_info/{role}_{}.resp", responses(seen))).unwrap().raw)]
    })
    .await
}

async fn server_with_response(status: &'static str, body: &'static str) -> ScriptedServer {
    ScriptedServer::always(json(status, body)).await
}

#[tokio::test]
async fn health_queries_no_backend() {
    let (prefill, decode) =
        (server_with_response("500 Oops", "").await, server_with_response("500 Oops", "").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.get("/health").await;
    assert_eq!((response.status(), response.text()), (200, ""));
    assert_eq!(prefill.connections() + decode.connections(), 0);
}

#[tokio::test]
async fn health_generate_is_200_only_if_every_backend_is_healthy() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let sick = server_with_response("503 Service Unavailable", "starting").await;
    let gone = recorded_server("decode").await;
    let gone_url = gone.url();
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.get("/health_generate").await;
    assert_eq!((response.status(), response.text()), (200, ""));
    assert_eq!(prefill.only_request().await.target(), "/health_generate");
    assert_eq!(decode.only_request().await.target(), "/health_generate");

    let router = Router::start(&[&prefill, &sick], &[&decode, &gone]).await;
    drop(gone);
    let response = router.client().await.get("/health_generate").await;
    assert_eq!((response.status(), response.error_code()), (503, "unhealthy".into()));
    let servers = response.json()["servers"].clone();
    assert_eq!(servers.as_array().unwrap().len(), 2);
    assert_eq!(
        servers[0],
        json!({"url": sick.url(), "role": "prefill", "status": 503, "message": "answered 503: starting"})
    );
    assert_eq!((&servers[1]["url"], &servers[1]["status"]), (&json!(gone_url), &Value::Null));
    let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, format!("not all servers are healthy: prefill {}, decode {gone_url}", sick.url()));
}

#[tokio::test]
async fn flush_cache_reaches_every_backend_with_query_and_headers() {
    let prefills = [recorded_server("prefill").await, recorded_server("prefill").await];
    let decode = recorded_server("decode").await;
    let router = Router::start(&[&prefills[0], &prefills[1]], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/flush_cache?timeout=60.0", &[("authorization", "Bearer k")], b"").await;
    let response = client.response().await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.json()["servers"].as_array().unwrap().len(), 3);
    for server in prefills.iter().chain([&decode]) {
        let seen = server.only_request().await;
        assert_eq!(seen.head.start_line, "POST /flush_cache?timeout=60.0 HTTP/1.1");
        assert_eq!(seen.head.header("authorization"), Some("Bearer k"));
    }
}

#[tokio::test]
async fn backend_that_rejects_a_flush_is_reported() {
    let busy = fixture("pd_info/flush_cache_busy.decode.resp").unwrap();
    let (prefill, decode) = (recorded_server("prefill").await, ScriptedServer::always(busy.raw).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.post("/flush_cache", "").await;
    assert_eq!((response.status(), response.error_code()), (400, "flush_cache_failed".into()));
    let servers = response.json()["servers"].clone();
    assert_eq!((&servers[0]["url"], &servers[0]["status"]), (&json!(decode.url()), &json!(400)));
    assert!(servers[0]["message"].as_str().unwrap().contains("Flush cache failed."), "{servers}");
}

#[tokio::test]
async fn unreachable_backend_fails_a_flush() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    drop(decode);
    let response = router.client().await.post("/flush_cache", "").await;
    assert_eq!((response.status(), response.error_code()), (502, "flush_cache_failed".into()));
}

#[tokio::test]
async fn server_info_has_the_shape_that_sglangs_benchmarks_read() {
    let prefill = recorded_server("prefill").await;
    let decode = [recorded_server("decode").await, recorded_server("decode").await];
    let router = Router::start(&[&prefill], &decode.each_ref()).await;
    let info = |role: &str| -> Value {
        serde_json::from_slice(&fixture(&format!("pd_info/{role}_server_info.resp")).unwrap().body).unwrap()
    };
    let states = info("decode")["internal_states"].as_array().unwrap().clone();
    assert!(!states.is_empty());
    for path in ["/server_info", "/get_server_info"] {
        let response = router.client().await.get(path).await;
        assert_eq!(response.status(), 200);
        let got = response.json();
        assert_eq!(got["prefill"], json!([info("prefill")]));
        assert_eq!(got["decode"], json!([info("decode"), info("decode")]));
        assert_eq!(got["internal_states"], json!([states.clone(), states.clone()].concat()));
        assert_eq!(got.as_object().unwrap().len(), 3);
        assert_eq!(prefill.requests().last().unwrap().target(), path);
    }
}

#[tokio::test]
async fn backend_without_a_response_is_an_error_entry_in_server_info() {
    let (prefill, decode, silly) = (
        recorded_server("prefill").await,
        recorded_server("decode").await,
        server_with_response("200 OK", "not json").await,
    );
    let gone = recorded_server("prefill").await;
    let gone_url = gone.url();
    let router = Router::start(&[&gone, &prefill], &[&silly, &decode]).await;
    drop(gone);
    let response = router.client().await.get("/server_info").await;
    assert_eq!(response.status(), 200);
    let got = response.json();
    assert_eq!(got["prefill"][0]["error"]["url"], gone_url);
    assert!(got["prefill"][1]["tokenizer_path"].is_string());
    assert_eq!(got["decode"][0]["error"]["message"], "the response is not JSON");
    assert!(got["decode"][1]["internal_states"].is_array());
}

#[tokio::test]
async fn server_info_without_any_response_is_502() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    drop((prefill, decode));
    let response = router.client().await.get("/server_info").await;
    assert_eq!(response.status(), 502);
    assert_eq!(response.json()["decode"][0]["error"]["role"], "decode");
}

#[tokio::test]
async fn backends_are_queried_concurrently() {
    let both = Gate::new();
    let waiting = |gate: Gate| {
        ScriptedServer::start(move |_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", "{}"))])
    };
    let (prefill, decode) = (waiting(both.clone()).await, waiting(both.clone()).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for path in ["/server_info", "/health_generate"] {
        let mut client = router.client().await;
        client.send_request("GET", path, &[], b"").await;
        prefill.wait_for_requests(1).await;
        decode.wait_for_requests(1).await;
        both.open();
        assert_eq!(client.response().await.status(), 200);
    }
}

#[tokio::test]
async fn model_queries_pass_one_backends_response_verbatim() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for (path, name) in
        [("/model_info", "model_info"), ("/get_model_info", "model_info"), ("/v1/models", "v1_models")]
    {
        let response = router.client().await.get(path).await;
        let recording = fixture(&format!("pd_info/prefill_{name}.resp")).unwrap();
        assert_eq!((response.status(), &response.body), (200, &recording.body), "{path}");
        assert_eq!(response.head.header("server"), Some("uvicorn"));
    }
    assert_eq!(decode.connections(), 0);
}

#[tokio::test]
async fn model_id_with_slashes_is_forwarded_whole() {
    let recording = fixture("reg/get_v1_models_unknown.resp").unwrap();
    let (prefill, decode) =
        (ScriptedServer::always(recording.raw.clone()).await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.get("/v1/models/org/model-7b?x=1").await;
    assert_eq!((response.status(), &response.body), (404, &recording.body));
    assert_eq!(prefill.only_request().await.target(), "/v1/models/org/model-7b?x=1");
}

#[tokio::test]
async fn model_query_falls_back_to_the_next_backend() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let gone = recorded_server("prefill").await;
    let gone_url = gone.url();
    let router = Router::start(&[&gone, &prefill], &[&decode]).await;
    drop(gone);
    assert_eq!(router.client().await.get("/v1/models").await.status(), 200);
    drop(prefill);
    let response = router.client().await.get("/v1/models").await;
    assert_eq!((response.status(), response.error_code()), (502, "prefill_connect".into()));
    assert_eq!(response.json()["error"]["server"], gone_url);
}

#[tokio::test]
async fn head_of_health_has_no_body() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("HEAD", "/health", &[], b"").await;
    assert_eq!(client.head().await.start_line, "HTTP/1.1 200 OK");
    assert_eq!(client.get("/health").await.status(), 200);
}

#[tokio::test]
async fn health_responds_while_backends_are_slow() {
    let never = Gate::new();
    let gate = never.clone();
    let prefill = ScriptedServer::start(move |_| vec![Step::Wait(gate.clone())]).await;
    let decode = recorded_server("decode").await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut slow = router.client().await;
    slow.send_request("GET", "/server_info", &[], b"").await;
    prefill.wait_for_requests(1).await;
    let start = Instant::now();
    assert_eq!(router.client().await.get("/health").await.status(), 200);
    assert!(start.elapsed().as_secs() < 5);
}

#[tokio::test]
async fn model_info_is_asked_of_a_healthy_backend_first() {
    let hanging = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let starting = server_with_response("503 Service Unavailable", "starting").await;
    let healthy = server_with_response("200 OK", r#"{"from":"healthy"}"#).await;
    let decode = server_with_response("200 OK", "{}").await;
    let checked = |config: mini_lb::MiniLbConfig| config.health_checks(true);
    let router = Router::start_with(&[&hanging, &starting, &healthy], &[&decode], checked).await;
    // 200 as soon as one prefill and the decode server are known to be healthy.
    kit::with_timeout("a healthy pair", async {
        while router.client().await.get("/ready").await.status() != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    let began = Instant::now();
    let response = router.client().await.get("/v1/models").await;
    assert_eq!((response.status(), response.text()), (200, r#"{"from":"healthy"}"#));
    // The one that hangs would cost its whole timeout.
    assert!(began.elapsed() < std::time::Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn model_info_of_a_failing_backend_is_asked_of_the_next() {
    let failing = server_with_response("500 Internal Server Error", r#"{"from":"failing"}"#).await;
    let unknown = server_with_response("404 Not Found", r#"{"from":"unknown"}"#).await;
    let decode = recorded_server("decode").await;
    let router = Router::start(&[&failing, &unknown], &[&decode]).await;
    // A 4xx is every server's answer.
    let response = router.client().await.get("/v1/models/none").await;
    assert_eq!((response.status(), response.text()), (404, r#"{"from":"unknown"}"#));
    let router = Router::start(&[&failing], &[&decode]).await;
    let response = router.client().await.get("/v1/models").await;
    assert_eq!((response.status(), response.text()), (500, r#"{"from":"failing"}"#));
}

#[tokio::test]
async fn fan_outs_answer_in_time_and_name_the_backends_that_did_not() {
    let prefill = recorded_server("prefill").await;
    let silent = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let router = Router::start(&[&prefill], &[&silent]).await;
    // 0 stands for the default. All at once: it is 5 s.
    let (flush, info, health, zero) = tokio::join!(
        timed(&router, "POST", "/flush_cache"),
        timed(&router, "GET", "/server_info"),
        timed(&router, "GET", "/health_generate"),
        timed(&router, "POST", "/flush_cache?timeout=0"),
    );
    let short = timed(&router, "POST", "/flush_cache?timeout=0.2").await;
    for ((response, time), seconds) in
        [(&flush, 5.0), (&info, 5.0), (&health, 5.0), (&zero, 5.0), (&short, 0.2)]
    {
        // A busy machine may be late, but not by half of it.
        assert!((seconds..seconds + 2.5).contains(time), "{time} s");
        assert!(response.text().contains(&silent.url()), "{}", response.text());
    }
    for (response, status) in [(&flush, 502), (&short, 502), (&health, 503)] {
        let servers = response.0.json()["servers"].clone();
        assert_eq!((response.0.status(), servers.as_array().map(Vec::len)), (status, Some(1)), "{servers}");
        assert_eq!((&servers[0]["url"], &servers[0]["status"]), (&json!(silent.url()), &Value::Null));
    }
    let error = &info.0.json()["decode"][0]["error"];
    assert_eq!((info.0.status(), &error["url"]), (200, &json!(silent.url())));
    // Its own endpoint has the parameter, too.
    let targets: Vec<_> = silent.requests().iter().map(|seen| seen.target().to_owned()).collect();
    assert!(targets.contains(&"/flush_cache?timeout=0.2".to_owned()), "{targets:?}");
}

/// A response, and how many seconds it took.
async fn timed(router: &Router, method: &str, target: &str) -> (kit::Response, f64) {
    let began = Instant::now();
    let mut client = router.client().await;
    client.send_request(method, target, &[], b"").await;
    (client.response().await, began.elapsed().as_secs_f64())
}

#[tokio::test]
async fn backend_that_answers_a_flush_at_the_end_of_its_own_timeout_is_heard() {
    let prefill = recorded_server("prefill").await;
    let busy = fixture("pd_info/flush_cache_busy.decode.resp").unwrap().raw;
    let wait = std::time::Duration::from_millis(1_100);
    let decode = ScriptedServer::start(move |_| vec![Step::Pause(wait), Step::Send(busy.clone())]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    // On a busy machine the answer may be later than the router waits for it, but not each time.
    for _ in 0..10 {
        let (response, _) = timed(&router, "POST", "/flush_cache?timeout=1").await;
        assert_eq!(response.error_code(), "flush_cache_failed");
        if response.status() == 400 {
            assert_eq!(response.json()["servers"][0]["status"], 400);
            return;
        }
    }
    panic!("its answer is never heard");
}

#[tokio::test]
async fn invalid_timeout_of_a_fan_out_is_rejected() {
    let (prefill, decode) = (recorded_server("prefill").await, recorded_server("decode").await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for (method, path) in [("POST", "/flush_cache"), ("GET", "/server_info"), ("GET", "/health_generate")] {
        for value in ["", "-1", "x", "nan", "3601"] {
            let (response, _) = timed(&router, method, &format!("{path}?timeout={value}")).await;
            let found = (response.status(), response.error_code());
            assert_eq!(found, (400, "invalid_admin_request".into()), "{path} {value}");
        }
    }
    assert_eq!(prefill.connections() + decode.connections(), 0);
}

//! The APIs beside `/generate`, chat and completions: OpenAI's responses, Anthropic's messages, SageMaker's
//! invocations; and fields of requests that mean the same on all of them. What servers respond to them is
//! replayed in `recorded_exchanges.rs`.

mod kit;

use kit::{Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json, ok_server, with_timeout};
use serde_json::{Value, json as value};

/// What prefill and decode got for a request.
async fn legs_of(target: &str, body: &str) -> [Value; 2] {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.post(target, body).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    let legs = [prefill.only_request().await, decode.only_request().await];
    legs.iter().for_each(|leg| assert_eq!(leg.target(), target));
    legs.map(|leg| leg.json())
}

#[tokio::test]
async fn every_generation_route_sends_both_legs_with_bootstrap_fields() {
    for target in ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions"] {
        let [prefill, decode] = legs_of(target, r#"{"model":"m","x":1.50}"#).await;
        assert_eq!(prefill, decode);
        assert!(prefill["bootstrap_room"].as_u64().is_some_and(|room| room > 0));
        assert_eq!(prefill["x"].to_string(), "1.5");
    }
}

#[tokio::test]
async fn a_response_has_one_id_on_both_servers() {
    let [prefill, decode] = legs_of("/v1/responses", r#"{"input":"a"}"#).await;
    assert_eq!(prefill["request_id"], decode["request_id"]);
    assert!(prefill["request_id"].as_str().is_some_and(|id| id.starts_with("resp_") && id.len() == 37));
    // The client's own stays, and its null is none.
    let [prefill, _] = legs_of("/v1/responses", r#"{"input":"a","request_id":"mine"}"#).await;
    assert_eq!(prefill["request_id"], "mine");
    let [prefill, decode] = legs_of("/v1/responses", r#"{"request_id":null,"input":"a"}"#).await;
    assert!(prefill["request_id"].is_string() && prefill["request_id"] == decode["request_id"]);
    for other in ["/v1/chat/completions", "/v1/messages"] {
        assert_eq!(legs_of(other, "{}").await[0].get("request_id"), None);
    }
}

#[tokio::test]
async fn an_earlier_response_is_refused_before_anything_is_sent() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let body = r#"{"input":"a","previous_response_id":"resp_1"}"#;
    let response = router.client().await.post("/v1/responses", body).await;
    assert_eq!((response.status(), &*response.error_code()), (400, "previous_response_not_supported"));
    assert!(prefill.requests().is_empty() && decode.requests().is_empty());
    for allowed in [r#"{"input":"a","previous_response_id":null}"#] {
        assert_eq!(router.client().await.post("/v1/responses", allowed).await.status(), 200);
    }
    // Elsewhere it means nothing.
    assert_eq!(router.client().await.post("/v1/messages", body).await.status(), 200);
}

#[tokio::test]
async fn errors_of_messages_have_anthropics_shape() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let with_key = |config: mini_lb::MiniLbConfig| config.api_key("k").max_payload_size(1_000);
    let router = Router::start_with(&[&prefill], &[&decode], with_key).await;
    let (key, long) = (("authorization", "Bearer k"), "x".repeat(2_000));
    for (headers, body, status, kind, code) in [
        (&[key][..], "no", 400, "invalid_request_error", "invalid_json"),
        (&[], "{}", 401, "authentication_error", "unauthorized"),
        (&[key], &long, 413, "request_too_large", "body_too_large"),
    ] {
        let mut client = router.client().await;
        client.send_request("POST", "/v1/messages", headers, body.as_bytes()).await;
        let response = client.response().await;
        let error = response.json();
        assert_eq!(response.status(), status);
        assert_eq!((&error["type"], &error["error"]["type"]), (&value!("error"), &value!(kind)));
        assert_eq!(error["error"]["code"], code);
        assert!(error["error"]["message"].is_string());
    }
}

/// The end of a stream of which decode breaks off.
async fn broken_stream(target: &str) -> String {
    let prefill = ok_server().await;
    let first = [STREAM_HEAD.as_bytes(), &chunk("event: x\ndata: {\"a\":1}\n\n")].concat();
    let decode = ScriptedServer::start(move |_| vec![Step::Send(first.clone()), Step::Close]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", target, &[], br#"{"stream":true}"#).await;
    client.read_until("decode_closed").await
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_event_of_its_api() {
    let messages = broken_stream("/v1/messages").await;
    assert!(messages.contains("event: error\ndata: {\"error\":{"), "{messages}");
    let responses = broken_stream("/v1/responses").await;
    assert!(responses.contains("event: error\ndata: {"), "{responses}");
    for target in ["/v1/chat/completions", "/invocations", "/generate"] {
        let stream = broken_stream(target).await;
        assert!(
            stream.contains("\n\ndata: {\"error\":{") || stream.contains("\r\ndata: {\"error\":{"),
            "{stream}"
        );
        assert!(!stream.contains("event: error"), "{stream}");
    }
}

/// Prefill rejects a stream inside of it, while decode waits for a KV cache that never comes.
#[tokio::test]
async fn an_error_in_prefills_stream_is_the_clients_response() {
    for (target, event, status) in [
        (
            "/v1/messages",
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"too long"}}"#,
            400,
        ),
        (
            "/v1/responses",
            r#"{"type":"response.failed","response":{"error":{"code":"server_error","message":"too long"}}}"#,
            500,
        ),
    ] {
        let events = format!("event: x\ndata: {event}\n\n");
        let refusal = [STREAM_HEAD.as_bytes(), &chunk(&events), &chunk("")].concat();
        let prefill = ScriptedServer::always(refusal).await;
        let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let response = router.client().await.post(target, r#"{"stream":true}"#).await;
        assert_eq!(response.status(), status, "{target}");
        assert_eq!(response.json()["error"]["message"], "too long");
        decode.wait_closed(1).await;
    }
}

#[tokio::test]
async fn internal_fields_are_removed_refused_or_passed_on() {
    let body = r#"{"a":1,"encoder_urls":["http://10.0.0.1"],"kv_hints":{},"routed_dp_rank":3,"rid":"r"}"#;
    let [prefill, decode] = legs_of("/generate", body).await;
    assert_eq!(prefill, decode);
    let names: Vec<_> = prefill.as_object().unwrap().keys().cloned().collect();
    assert!(
        ["a", "routed_dp_rank", "rid"].iter().all(|kept| names.iter().any(|name| name == kept)),
        "{names:?}"
    );
    assert!(!names.iter().any(|name| name == "encoder_urls" || name == "kv_hints"), "{names:?}");

    let (prefill, decode) = (ok_server().await, ok_server().await);
    let options = ["--internal-fields", "reject", "--dp-rank-fields", "strip"];
    let program = kit::RouterProcess::between(&prefill, &decode, &options).await;
    let response = program.client().await.post("/generate", body).await;
    assert_eq!((response.status(), &*response.error_code()), (400, "internal_field"));
    assert!(response.text().contains("encoder_urls"), "{}", response.text());
    let response = program.client().await.post("/generate", r#"{"routed_dp_rank":3,"text":"a"}"#).await;
    assert_eq!(response.status(), 200);
    assert_eq!(decode.only_request().await.json().get("routed_dp_rank"), None);
    program.stop().await;
}

/// A server whose generations wait, and which notes what it is asked to abort.
async fn waiting_server(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |request| match request.target() {
        "/abort_request" => vec![Step::Send(json("200 OK", ""))],
        _ => vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", OK))],
    })
    .await
}

fn aborted(server: &ScriptedServer) -> Vec<Value> {
    let requests = server.requests();
    let aborts = requests.iter().filter(|request| request.target() == "/abort_request");
    aborts.map(|request| request.json()["rid"].clone()).collect()
}

#[tokio::test]
async fn a_client_that_leaves_has_its_request_aborted_on_both_servers() {
    let gate = Gate::new();
    let (prefill, decode) = (waiting_server(&gate).await, waiting_server(&gate).await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.abort_on_disconnect(true)).await;
    for (target, body) in [
        ("/generate", r#"{"text":"a"}"#),
        ("/generate", r#"{"rid":null,"text":"a"}"#),
        ("/v1/chat/completions", r#"{"rid":"mine"}"#),
        ("/v1/responses", "{}"),
    ] {
        let seen = prefill.requests().len();
        let mut client = router.client().await;
        client.send_request("POST", target, &[("authorization", "Bearer s")], body.as_bytes()).await;
        prefill.wait_for_requests(seen + 1).await;
        decode.wait_for_requests(seen + 1).await;
        let sent = decode.requests().last().expect("a request").json();
        let id = if target == "/v1/responses" { &sent["request_id"] } else { &sent["rid"] };
        assert!(id.as_str().is_some_and(|id| id == "mine" || id.len() >= 37), "{sent}");
        drop(client);
        for server in [&prefill, &decode] {
            server.wait_for_requests(seen + 2).await;
            assert_eq!(aborted(server).last(), Some(id));
            let abort = server.requests().pop().expect("a request");
            assert_eq!(abort.head.header("authorization"), Some("Bearer s"));
        }
    }
    gate.open();
}

/// Lists of more than 64, and whatever is no list of texts, are for the servers to understand.
#[tokio::test]
async fn an_id_that_is_not_understood_stays_the_clients() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.abort_on_disconnect(true)).await;
    let many: Vec<_> = (0..100).map(|number| format!("r{number}")).collect();
    for (number, rid) in
        [value!(many), value!([]), value!(7), value!("x".repeat(300))].into_iter().enumerate()
    {
        let body = value!({"text": "a", "rid": rid}).to_string();
        assert_eq!(router.client().await.post("/generate", body).await.status(), 200);
        decode.wait_for_requests(number + 1).await;
        assert_eq!(decode.requests()[number].json()["rid"], rid);
    }
}

#[tokio::test]
async fn nothing_is_aborted_that_ends_by_itself_or_without_the_flag() {
    let gate = Gate::new();
    gate.open();
    let (prefill, decode) = (waiting_server(&gate).await, waiting_server(&gate).await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.abort_on_disconnect(true)).await;
    let mut client = router.client().await;
    for _ in 0..3 {
        assert_eq!(client.post("/generate", r#"{"text":"a"}"#).await.status(), 200);
    }
    drop(client);
    router.wait_idle().await;
    // A request that is answered after all that an abort would have been sent before.
    assert_eq!(router.client().await.post("/generate", r#"{"text":"b"}"#).await.status(), 200);
    assert_eq!((aborted(&prefill), aborted(&decode)), (Vec::new(), Vec::new()));

    let gate = Gate::new();
    let (prefill, decode) = (waiting_server(&gate).await, waiting_server(&gate).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a"}"#).await;
    decode.wait_for_requests(1).await;
    prefill.wait_for_requests(1).await;
    assert_eq!(decode.requests()[0].json().get("rid"), None);
    drop(client);
    with_timeout("both legs' end", async { router.wait_idle().await }).await;
    gate.open();
    assert_eq!(router.client().await.post("/generate", r#"{"text":"b"}"#).await.status(), 200);
    assert_eq!((aborted(&prefill), aborted(&decode)), (Vec::new(), Vec::new()));
}

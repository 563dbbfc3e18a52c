//! Merges of `routed_experts`: of whole responses, and in the late event of a stream, which is all that waits
//! for prefill.

mod kit;

use kit::{Gate, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json};

/// Four bytes of prefill's, so that its rows end within a group of base64.
const PREFILLS: &str = "cHBwcA==";
const DECODES: &str = "Li4uLm9vb28=";
const MERGED: &str = "cHBwcG9vb28=";

const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

const CHAT: &str = "/v1/chat/completions";
const CHAT_STREAM: &str = r#"{"messages":[],"stream":true,"return_routed_experts":true}"#;

fn sglext(rows: &str) -> String {
    format!(r#"{{"id":"x","choices":[],"sglext":{{"routed_experts":"{rows}"}}}}"#)
}

fn item(rows: &str) -> String {
    format!(r#"{{"text":"a","meta_info":{{"id":"x","routed_experts":"{rows}"}}}}"#)
}

fn event(data: &str) -> String {
    format!("data: {data}\n\n")
}

fn stream(events: &[&str]) -> Vec<u8> {
    let chunks = events.iter().flat_map(|event| chunk(event));
    STREAM_HEAD.bytes().chain(chunks).chain(*b"0\r\n\r\n").collect()
}

/// A decode server whose stream pauses before its last events until the gate opens.
async fn pausing_decode(last: &[&str], gate: &Gate) -> ScriptedServer {
    let first = [STREAM_HEAD.as_bytes(), &chunk(TOKEN)].concat();
    let last: Vec<u8> = last.iter().flat_map(|event| chunk(event)).chain(*b"0\r\n\r\n").collect();
    let gate = gate.clone();
    ScriptedServer::start(move |_| {
        vec![Step::Send(first.clone()), Step::Wait(gate.clone()), Step::Send(last.clone())]
    })
    .await
}

/// A prefill server that does this once the gate is open.
async fn gated_prefill(gate: &Gate, last: Step) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |_| vec![Step::Wait(gate.clone()), last.clone()]).await
}

fn opened() -> Gate {
    let gate = Gate::new();
    gate.open();
    gate
}

#[tokio::test]
async fn rows_of_whole_responses_are_merged() {
    let batch = |rows: &str| format!("[{},{}]", item("AAAA"), item(rows));
    for (target, body, response) in [
        (CHAT, r#"{"messages":[],"return_routed_experts":true}"#, &sglext as &dyn Fn(&str) -> String),
        ("/v1/completions", r#"{"prompt":"a","return_routed_experts":true}"#, &sglext),
        ("/generate", r#"{"text":"a","return_routed_experts":true}"#, &item),
        ("/generate", r#"{"text":["a","b"],"return_routed_experts":true}"#, &batch),
    ] {
        let prefill = ScriptedServer::always(json("200 OK", &response(PREFILLS))).await;
        let decode = ScriptedServer::always(json("200 OK", &response(DECODES))).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let received = router.client().await.post(target, body).await;
        assert_eq!(received.text(), response(MERGED), "{target}");
    }
}

#[tokio::test]
async fn only_the_late_event_of_a_stream_waits_for_prefill() {
    for (target, body, response) in [
        (CHAT, CHAT_STREAM, &sglext as &dyn Fn(&str) -> String),
        ("/v1/completions", r#"{"prompt":"a","stream":true,"return_routed_experts":true}"#, &sglext),
        ("/generate", r#"{"text":"a","stream":true,"return_routed_experts":true}"#, &item),
    ] {
        let answer = Gate::new();
        let prefills = stream(&[&event(&response(PREFILLS)), DONE]);
        let prefill = gated_prefill(&answer, Step::Send(prefills)).await;
        let decode = pausing_decode(&[&event(&response(DECODES)), DONE], &opened()).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = router.client().await;
        client.send_request("POST", target, &[], body.as_bytes()).await;
        let head = client.head().await;
        assert_eq!(head.start_line, "HTTP/1.1 200 OK");
        client.read_until("\n\n").await;
        answer.open();
        let rest = client.finish_response(head).await;
        assert!(rest.complete, "{target}");
        assert_eq!(rest.text(), format!("{TOKEN}{}{DONE}", event(&response(MERGED))), "{target}");
        prefill.wait_for_requests(1).await;
    }
}

#[tokio::test]
async fn late_event_after_prefills_response_is_merged_too() {
    let late = Gate::new();
    let prefill = ScriptedServer::always(stream(&[&event(&sglext(PREFILLS)), DONE])).await;
    let decode = pausing_decode(&[&event(&sglext(DECODES)), DONE], &late).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", CHAT, &[], CHAT_STREAM.as_bytes()).await;
    client.read_until("\n\n").await;
    prefill.wait_for_requests(1).await;
    late.open();
    let rest = client.read_until(DONE).await;
    assert!(rest.contains(MERGED), "{rest}");
    router.wait_idle().await;
    router.wait_buffered(0).await;
}

#[tokio::test]
async fn failure_of_prefill_fails_the_stream_when_its_rows_are_needed() {
    let not_json = [STREAM_HEAD.as_bytes(), &chunk("data: {\n\n"), b"0\r\n\r\n"].concat();
    for (last, code) in [(Step::Close, "prefill_closed"), (Step::Send(not_json), "prefill_unmergeable")] {
        let (failed, late) = (Gate::new(), Gate::new());
        let prefill = gated_prefill(&failed, last).await;
        let decode = pausing_decode(&[&event(&sglext(DECODES)), DONE], &late).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = router.client().await;
        client.send_request("POST", CHAT, &[], CHAT_STREAM.as_bytes()).await;
        let head = client.head().await;
        client.read_until("\n\n").await;
        failed.open();
        late.open();
        let rest = client.finish_response(head).await;
        assert!(!rest.complete && rest.text().contains(code), "{}", rest.text());
        assert!(!rest.text().contains(DECODES), "rows of the output alone would be silently wrong");
    }
}

#[tokio::test]
async fn stream_without_rows_does_not_need_prefill() {
    for last in [Step::Close, Step::Hang] {
        let (failed, late) = (Gate::new(), Gate::new());
        let prefill = gated_prefill(&failed, last).await;
        let decode = pausing_decode(&[TOKEN, DONE], &late).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = router.client().await;
        client.send_request("POST", CHAT, &[], CHAT_STREAM.as_bytes()).await;
        let head = client.head().await;
        client.read_until("\n\n").await;
        failed.open();
        late.open();
        let rest = client.finish_response(head).await;
        assert!(rest.complete);
        assert_eq!(rest.text(), format!("{TOKEN}{TOKEN}{DONE}"));
    }
}

#[tokio::test]
async fn compressed_stream_of_decode_is_not_merged_in_part() {
    let prefill = ScriptedServer::always(stream(&[&event(&sglext(PREFILLS)), DONE])).await;
    let head = STREAM_HEAD.replace("\r\n\r\n", "\r\ncontent-encoding: gzip\r\n\r\n");
    let decode = ScriptedServer::always([head.as_bytes(), &chunk("gzip"), b"0\r\n\r\n"].concat()).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.post(CHAT, CHAT_STREAM).await;
    assert_eq!((response.status(), response.error_code()), (502, "decode_unmergeable".to_owned()));
}

#[tokio::test]
async fn stream_with_an_early_head_is_merged_too() {
    let start = Gate::new();
    let prefill = ScriptedServer::always(stream(&[&event(&sglext(PREFILLS)), DONE])).await;
    let decodes = stream(&[TOKEN, &event(&sglext(DECODES)), DONE]);
    let gate = start.clone();
    let decode =
        ScriptedServer::start(move |_| vec![Step::Wait(gate.clone()), Step::Send(decodes.clone())]).await;
    let keepalive = std::time::Duration::from_millis(20);
    let router =
        Router::start_with(&[&prefill], &[&decode], |config| config.stream_keepalive(keepalive)).await;
    let mut client = router.client().await;
    client.send_request("POST", CHAT, &[], CHAT_STREAM.as_bytes()).await;
    client.read_until(": keep-alive\n\n").await;
    start.open();
    let rest = client.read_until(DONE).await;
    assert!(rest.contains(MERGED), "{rest}");
}

//! Which codings of a response servers are asked for, and what is not added to an encoded response.

mod kit;

use kit::{ReceivedRequest, Response, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json};

/// What a client sends, in lines of any case.
const ACCEPTED: [(&str, &str); 2] = [("Accept-Encoding", "gzip, deflate"), ("ACCEPT-ENCODING", "br")];

/// The values of `Accept-Encoding` that a server received.
fn accepted(seen: &ReceivedRequest) -> Vec<String> {
    let lines = seen.head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("accept-encoding"));
    lines.map(|(_, value)| value.clone()).collect()
}

/// A server that compresses for clients that take it, as a proxy in front of SGLang does. What it sends then
/// can be read by nobody.
async fn compressing(plain: impl Fn(&ReceivedRequest) -> Vec<u8> + Send + Sync + 'static) -> ScriptedServer {
    ScriptedServer::start(move |seen| {
        let compressed =
            b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x1f\x8b\x08".to_vec();
        let takes_gzip = accepted(seen).iter().any(|value| value.contains("gzip"));
        vec![Step::Send(if takes_gzip { compressed } else { plain(seen) })]
    })
    .await
}

async fn post(router: &Router, headers: &[(&str, &str)], body: &str) -> Response {
    let mut client = router.client().await;
    client.send_request("POST", "/generate", headers, body.as_bytes()).await;
    client.response().await
}

#[tokio::test]
async fn a_passed_on_response_is_in_the_clients_coding_and_prefills_is_plain() {
    let plain = |_: &_| json("200 OK", r#"{"text":"a"}"#);
    let (prefill, decode) = (compressing(plain).await, compressing(plain).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for (count, headers) in [&ACCEPTED[..], &ACCEPTED[..1], &[]].into_iter().enumerate() {
        let response = post(&router, headers, r#"{"text":"a"}"#).await;
        assert_eq!(response.head.header("content-encoding").is_some(), !headers.is_empty());
        router.wait_idle().await;
        assert_eq!(accepted(&prefill.requests()[count]), ["identity"]);
        let sent: Vec<&str> = headers.iter().map(|(_, value)| *value).collect();
        assert_eq!(accepted(&decode.requests()[count]), sent);
    }
}

#[tokio::test]
async fn both_responses_of_a_merge_are_plain() {
    let whole = r#"{"text":"a","meta_info":{"input_token_logprobs":[[-1,2,null]]}}"#;
    let response = move |seen: &ReceivedRequest| match seen.json()["stream"] == true {
        false => json("200 OK", whole),
        true => {
            let event = chunk(&format!("data: {whole}\n\n"));
            [STREAM_HEAD.as_bytes(), &event, &chunk("data: [DONE]\n\n"), b"0\r\n\r\n"].concat()
        }
    };
    let (prefill, decode) = (compressing(response).await, compressing(response).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    for stream in [false, true] {
        let body = format!(r#"{{"text":"a","stream":{stream},"return_logprob":true,"logprob_start_len":0}}"#);
        let merged = post(&router, &ACCEPTED, &body).await;
        assert_eq!((merged.status(), merged.head.header("content-encoding")), (200, None));
        assert!(merged.text().contains("[[-1,2,null]"), "{}", merged.text());
    }
    for seen in [prefill.requests(), decode.requests()].concat() {
        assert_eq!(accepted(&seen), ["identity"]);
    }
}

#[tokio::test]
async fn stream_that_may_get_comments_is_plain() {
    let (prefill, decode) = (kit::ok_server().await, kit::ok_server().await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| {
        config.stream_keepalive(std::time::Duration::from_secs(5))
    })
    .await;
    for stream in [true, false] {
        let body = format!(r#"{{"text":"a","stream":{stream}}}"#);
        assert_eq!(post(&router, &ACCEPTED[..1], &body).await.status(), 200);
    }
    let sent: Vec<Vec<String>> = decode.requests().iter().map(accepted).collect();
    assert_eq!(sent, [["identity"], ["gzip, deflate"]]);
}

#[tokio::test]
async fn refusal_in_prefills_stream_is_found_though_the_client_takes_gzip() {
    let refusal = r#"{"error":{"message":"kv transfer failed","code":500}}"#;
    let prefill = compressing(move |_| {
        [STREAM_HEAD.as_bytes(), &chunk(&format!("data: {refusal}\n\n")), b"0\r\n\r\n"].concat()
    })
    .await;
    let decode = ScriptedServer::start(|_| vec![Step::Send(STREAM_HEAD.into()), Step::Hang]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = post(&router, &ACCEPTED, r#"{"text":"a","stream":true}"#).await;
    assert_eq!((response.status(), response.text()), (500, refusal));
}

#[tokio::test]
async fn router_asks_for_plain_descriptions() {
    let info = |_: &_| json("200 OK", r#"{"internal_states":[{"a":1}]}"#);
    let (prefill, decode) = (compressing(info).await, compressing(info).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for (method, target) in [
        ("GET", "/server_info"),
        ("GET", "/v1/models"),
        ("GET", "/model_info"),
        ("GET", "/health_generate"),
        ("POST", "/flush_cache"),
    ] {
        client.send_request(method, target, &ACCEPTED, b"").await;
        let response = client.response().await;
        assert_eq!((response.status(), response.head.header("content-encoding")), (200, None), "{target}");
    }
    client.send_request("GET", "/server_info", &ACCEPTED, b"").await;
    assert_eq!(client.response().await.json()["internal_states"][0]["a"], 1);
    let seen = [prefill.requests(), decode.requests()].concat();
    assert!(seen.len() >= 9);
    for seen in seen {
        assert_eq!(accepted(&seen), ["identity"], "{}", seen.target());
    }
}

#[tokio::test]
async fn nothing_is_appended_to_an_encoded_stream_that_fails() {
    for (encoding, gets_event) in [
        ("", true),
        ("content-encoding: identity\r\n", true),
        ("content-encoding: gzip\r\n", false),
        ("Content-Encoding: BR\r\n", false),
        ("content-encoding: x-new\r\n", false),
        ("content-encoding: identity\r\ncontent-encoding: zstd\r\n", false),
    ] {
        for end in [Step::Close, Step::Reset] {
            let head = STREAM_HEAD.replacen("\r\n", &format!("\r\n{encoding}"), 1);
            let decode = ScriptedServer::start(move |_| {
                let begun = [head.as_bytes(), &chunk("data: 1\n\n")].concat();
                // The first bytes must arrive before the reset, which discards what is unread.
                vec![Step::Send(begun), Step::Pause(std::time::Duration::from_millis(50)), end.clone()]
            })
            .await;
            let prefill = kit::ok_server().await;
            let router = Router::start(&[&prefill], &[&decode]).await;
            let response = post(&router, &ACCEPTED, r#"{"text":"a","stream":true}"#).await;
            assert!(!response.complete);
            let text = String::from_utf8_lossy(&response.body).into_owned();
            assert_eq!(text.contains("decode_closed"), gets_event, "{encoding:?}: {text}");
            if !gets_event {
                assert_eq!(text, "9\r\ndata: 1\n\n\r\n", "{encoding:?}");
            }
        }
    }
}

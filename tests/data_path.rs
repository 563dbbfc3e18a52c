//! The data path: what reaches both backends, what reaches the client, and when.

mod kit;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use kit::{Gate, OK, Router, STREAM_HEAD, ScriptedServer, Step, chunk, json, ok_server};

const BODY: &str = r#"{"text":"a"}"#;

/// A server that responds when the gate opens.
async fn gated(gate: &Gate) -> ScriptedServer {
    let gate = gate.clone();
    ScriptedServer::start(move |_| vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", OK))]).await
}

// Requests to backends.

#[tokio::test]
async fn both_legs_get_the_clients_bytes_plus_the_same_bootstrap_fields() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let body = r#"{ "text" : "caf\u00e9 ☕",  "big":1E400, "x":[1.0,{"b":-0}] }"#;
    let response = router.client().await.post("/generate?a=1&b=%20", body).await;
    assert_eq!((response.status(), response.text()), (200, OK));

    let (prefill, decode) = (prefill.only_request().await, decode.only_request().await);
    assert_eq!(prefill.body, decode.body);
    assert_eq!(prefill.target(), "/generate?a=1&b=%20");
    assert_eq!(decode.target(), "/generate?a=1&b=%20");
    let sent = String::from_utf8(decode.body).unwrap();
    let (kept, added) = sent.split_at(body.len() - 1);
    assert_eq!(kept, &body[..body.len() - 1]);
    let room: u64 = added
        .strip_prefix(r#","bootstrap_host":"127.0.0.1","bootstrap_port":8998,"bootstrap_room":"#)
        .and_then(|rest| rest.strip_suffix('}'))
        .unwrap_or_else(|| panic!("{added}"))
        .parse()
        .unwrap();
    assert!((1..=1 << 62).contains(&room));
}

#[tokio::test]
async fn client_bootstrap_fields_are_removed() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let body =
        r#"{"bootstrap_room":0,"text":"a","bootstrap_\u0068ost":["evil"],"bootstrap_pair_key":"k","n":1}"#;
    router.client().await.post("/generate", body).await;
    for server in [prefill, decode] {
        let sent = String::from_utf8(server.only_request().await.body).unwrap();
        assert!(sent.starts_with(r#"{"text":"a","n":1,"bootstrap_host":"127.0.0.1","#), "{sent}");
        assert_eq!(sent.matches("bootstrap_").count(), 3, "{sent}");
    }
}

#[tokio::test]
async fn every_request_gets_a_unique_bootstrap_room() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    for _ in 0..200 {
        client.post("/generate", BODY).await;
    }
    let rooms: HashSet<u64> =
        decode.requests().iter().map(|seen| seen.json()["bootstrap_room"].as_u64().unwrap()).collect();
    assert_eq!(rooms.len(), 200);
    assert!(rooms.iter().all(|room| (1..=1 << 62).contains(room)));
    // Random, not counted up: of 200 draws from 62 bits hardly any is below 2^32.
    assert!(rooms.iter().filter(|room| **room > 1 << 32).count() > 190);
}

#[tokio::test]
async fn unknown_bootstrap_port_is_null_and_host_can_be_overridden() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let config =
        mini_lb::MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], vec![decode.url()], 60)
            .bootstrap_host(prefill.url(), "fd00::7");
    let router = Router::start_with_config(config).await;
    router.client().await.post("/v1/completions", BODY).await;
    let sent = decode.only_request().await.json();
    assert_eq!(sent["bootstrap_host"], "[fd00::7]");
    assert!(sent["bootstrap_port"].is_null() && sent.as_object().unwrap().contains_key("bootstrap_port"));
}

#[tokio::test]
async fn only_end_to_end_headers_reach_both_legs() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    let headers = [
        ("authorization", "Bearer secret"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("x-request-id", "r-1"),
        ("x-custom", "one"),
        ("x-custom", "two"),
        ("content-type", "application/json"),
        ("accept-encoding", "gzip, deflate, zstd"),
        ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"),
        ("te", "trailers"),
        ("x-override-bootstrap-room", "7"),
        ("x-data-parallel-rank", "3"),
    ];
    client.send_request("POST", "/v1/chat/completions", &headers, br#"{"messages":[]}"#).await;
    assert_eq!(client.response().await.status(), 200);
    // The router reads prefill's response.
    for (server, encodings) in [(prefill, "identity"), (decode, "gzip, deflate, zstd")] {
        let seen = server.only_request().await;
        let mut headers = seen.head.headers.clone();
        headers.sort();
        let length = seen.body.len().to_string();
        let host = server.url()["http://".len()..].to_owned();
        let expected = [
            ("accept-encoding", encodings),
            ("authorization", "Bearer secret"),
            ("content-length", &length),
            ("content-type", "application/json"),
            ("host", &host),
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ("x-custom", "one"),
            ("x-custom", "two"),
            ("x-request-id", "r-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(headers, expected);
    }
}

#[tokio::test]
async fn put_generate_is_forwarded_as_put() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("PUT", "/generate", &[], BODY.as_bytes()).await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(decode.only_request().await.head.start_line, "PUT /generate HTTP/1.1");
    assert_eq!(prefill.only_request().await.head.start_line, "PUT /generate HTTP/1.1");
}

#[tokio::test]
async fn large_body_reaches_both_backends() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let text: String = (0..8_u32 << 20).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let body = format!(r#"{{"bootstrap_room":1,"text":"{text}","stream":false}}"#);
    assert_eq!(router.client().await.post("/generate", &body).await.status(), 200);
    for server in [prefill, decode] {
        server.wait_for_requests(1).await;
        let sent = server.only_request().await.json();
        assert!(sent["text"].as_str().unwrap() == text, "8 MiB of text differ");
        assert_ne!(sent["bootstrap_room"], 1);
    }
}

#[tokio::test]
async fn chunked_request_body_is_forwarded_with_content_length() {
    let (prefill, decode) = (ok_server().await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send("POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n").await;
    for piece in [r#"{"te"#, r#"xt":"#, r#""a"}"#] {
        client.send(chunk(piece)).await;
    }
    client.send("0\r\n\r\n").await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(decode.only_request().await.json()["text"], "a");
    assert!(!decode.only_request().await.head.is_chunked(), "the length is known after the body was read");
}

// Responses to clients.

#[tokio::test]
async fn decode_status_headers_and_body_pass_verbatim() {
    let prefill = ok_server().await;
    let refusal = "HTTP/1.1 429 Slow Down Please\r\nretry-after: 7\r\nx-a: 1\r\nx-a: 2\r\ndate: then\r\n\
                   content-type: text/plain\r\nconnection: x-hop\r\nx-hop: 1\r\ncontent-length: 4\r\n\r\nbusy";
    let decode = ScriptedServer::always(refusal).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/v1/chat/completions", &[("x-request-id", "r-1")], BODY.as_bytes()).await;
    let response = client.response().await;
    assert_eq!(response.head.start_line, "HTTP/1.1 429 Slow Down Please");
    let mut headers = response.head.headers.clone();
    headers.sort();
    let expected = [
        ("content-length", "4"),
        ("content-type", "text/plain"),
        ("date", "then"),
        ("retry-after", "7"),
        ("x-a", "1"),
        ("x-a", "2"),
        // Added by the router to every response.
        ("x-request-id", "r-1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!((headers.as_slice(), response.text()), (expected.as_slice(), "busy"));
}

#[tokio::test]
async fn both_legs_are_sent_before_either_responds() {
    let (decode_seen, prefill_seen) = (Gate::new(), Gate::new());
    let (prefill, decode) = (gated(&decode_seen).await, gated(&prefill_seen).await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    prefill.wait_for_requests(1).await;
    decode.wait_for_requests(1).await;
    prefill_seen.open();
    assert_eq!(client.response().await.status(), 200);
    decode_seen.open();
}

#[tokio::test]
async fn stream_events_are_relayed_one_by_one_while_prefill_is_silent() {
    let (never, second) = (Gate::new(), Gate::new());
    let prefill = gated(&never).await;
    let step = second.clone();
    let decode = ScriptedServer::start(move |_| {
        vec![
            Step::Send(STREAM_HEAD.into()),
            Step::Send(chunk("data: one\n\n")),
            Step::Wait(step.clone()),
            Step::Send(chunk("data: two\n\n")),
            Step::Send(chunk("data: [DONE]\n\n")),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a","stream":true}"#).await;
    let head = client.head().await;
    assert_eq!(head.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(!client.read_until("data: one\n\n").await.contains("two"));
    second.open();
    assert_eq!(client.finish_response(head).await.text(), "data: one\n\ndata: two\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn decode_response_does_not_wait_for_prefill() {
    let never = Gate::new();
    let (prefill, decode) = (gated(&never).await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    assert_eq!(router.client().await.post("/generate", BODY).await.text(), OK);
    assert_eq!(prefill.closed_connections(), 0);
}

#[tokio::test]
async fn late_prefill_response_is_drained_and_its_connection_reused() {
    let late = Gate::new();
    let (prefill, decode) = (gated(&late).await, ok_server().await);
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    late.open();
    router.wait_idle().await;
    assert_eq!(client.post("/generate", BODY).await.status(), 200);
    prefill.wait_for_requests(2).await;
    assert_eq!(prefill.requests().iter().map(|seen| seen.connection).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(prefill.closed_connections(), 0);
}

#[tokio::test]
async fn incomplete_event_is_relayed_as_it_arrives() {
    let more = Gate::new();
    let (prefill, gate) = (ok_server().await, more.clone());
    let decode = ScriptedServer::start(move |_| {
        vec![
            Step::Send(STREAM_HEAD.into()),
            Step::Send(chunk("data: {\"text\":\"half")),
            Step::Wait(gate.clone()),
            Step::Send(chunk("\"}\n\n")),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ]
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], br#"{"text":"a","stream":true}"#).await;
    client.head().await;
    client.read_until("half").await;
    more.open();
    client.read_until("0\r\n\r\n").await;
}

// Failure of one leg ends the other.

#[tokio::test]
async fn prefill_error_is_returned_and_decode_is_closed() {
    let body = r#"{"object":"error","message":"too long","code":400}"#;
    let prefill = ScriptedServer::always(json("400 Bad Request", body)).await;
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    for stream in [false, true] {
        let request = format!(r#"{{"text":"a","stream":{stream}}}"#);
        let response = router.client().await.post("/generate", request).await;
        assert_eq!((response.status(), response.text()), (400, body));
    }
    decode.wait_closed(decode.connections()).await;
}

#[tokio::test]
async fn decode_error_is_returned_and_prefill_is_closed() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::always(json("503 Service Unavailable", "{}")).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let response = router.client().await.post("/v1/completions", BODY).await;
    assert_eq!((response.status(), response.text()), (503, "{}"));
    prefill.wait_closed(1).await;
}

#[tokio::test]
async fn client_disconnect_closes_both_legs() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(|_| {
        vec![Step::Send(STREAM_HEAD.into()), Step::Send(chunk("data: 1\n\n")), Step::Hang]
    })
    .await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut silent = router.client().await;
    silent.send_request("POST", "/generate", &[], br#"{"text":"a","stream":true}"#).await;
    silent.head().await;
    silent.read_until("data: 1").await;
    drop(silent);
    prefill.wait_closed(1).await;
    decode.wait_closed(1).await;
}

#[tokio::test]
async fn client_disconnect_before_the_response_closes_both_legs() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let router = Router::start(&[&prefill], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    prefill.wait_for_requests(1).await;
    decode.wait_for_requests(1).await;
    drop(client);
    prefill.wait_closed(1).await;
    decode.wait_closed(1).await;
}

#[tokio::test]
async fn unreachable_backend_is_502_and_named() {
    let reachable = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let gone = ok_server().await;
    let url = gone.url();
    drop(gone);
    for (role, prefill, decode) in
        [("prefill", url.clone(), reachable.url()), ("decode", reachable.url(), url.clone())]
    {
        let config = mini_lb::MiniLbConfig::new("127.0.0.1", 1, vec![(prefill, None)], vec![decode], 60);
        let router = Router::start_with_config(config).await;
        let response = router.client().await.post("/generate", BODY).await;
        assert_eq!((response.status(), response.error_code()), (502, format!("{role}_connect")));
        let error = &response.json()["error"];
        assert_eq!(error["server"], url);
        assert!(
            error["message"].as_str().unwrap().starts_with(&format!("{role} server {url} cannot be reached"))
        );
    }
}

#[tokio::test]
async fn backend_that_closes_or_sends_no_http_is_502() {
    for (steps, code) in [
        (vec![Step::Close], "decode_closed"),
        (vec![Step::Send(b"HTTP/1.1 200 OK\r\ncontent-le".to_vec()), Step::Close], "decode_closed"),
        (vec![Step::Send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec()), Step::Hang], "decode_bad_response"),
    ] {
        let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let decode = ScriptedServer::start(move |_| steps.clone()).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let response = router.client().await.post("/generate", BODY).await;
        assert_eq!((response.status(), response.error_code()), (502, code.to_owned()));
        prefill.wait_closed(1).await;
    }
}

#[tokio::test]
async fn silent_pair_is_504_after_the_request_timeout() {
    let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
    let config =
        mini_lb::MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], vec![decode.url()], 1);
    let router = Router::start_with_config(config).await;
    let start = Instant::now();
    let response = router.client().await.post("/generate", BODY).await;
    assert_eq!((response.status(), response.error_code()), (504, "decode_timeout".to_owned()));
    assert!(start.elapsed() >= Duration::from_secs(1));
    prefill.wait_closed(1).await;
    decode.wait_closed(1).await;
}

#[tokio::test]
async fn request_timeout_cuts_off_a_stalled_body_but_not_a_stream() {
    for (stream, cut) in [(false, true), (true, false)] {
        let later = Gate::new();
        let gate = later.clone();
        let prefill = ok_server().await;
        let decode = ScriptedServer::start(move |_| {
            let kind = if stream { "text/event-stream" } else { "application/json" };
            let half = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: 10\r\n\r\nhalf-");
            vec![Step::Send(half.into()), Step::Wait(gate.clone()), Step::Send(b"whole".to_vec())]
        })
        .await;
        let config =
            mini_lb::MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), None)], vec![decode.url()], 1);
        let router = Router::start_with_config(config).await;
        let mut client = router.client().await;
        client.send_request("POST", "/generate", &[], format!(r#"{{"stream":{stream}}}"#).as_bytes()).await;
        if !cut {
            // Sleeps past the limit while the stream is open.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            later.open();
        }
        let response = client.response().await;
        assert_eq!((response.complete, response.text()), (!cut, if cut { "half-" } else { "half-whole" }));
    }
}

/// SGLang's 400 quotes the input twice, so an image makes it larger than a megabyte.
#[tokio::test]
async fn refusal_of_any_size_is_relayed_whichever_server_is_first() {
    let quoted = format!(r#"{{"object":"error","message":"{}","code":400}}"#, "A".repeat(3 << 20));
    for late in ["prefill", "decode"] {
        let refusing = |role| {
            let pause = Step::Pause(Duration::from_millis(if role == late { 300 } else { 0 }));
            let steps = vec![pause, Step::Send(json("400 Bad Request", &quoted))];
            ScriptedServer::start(move |_| steps.clone())
        };
        let (prefill, decode) = (refusing("prefill").await, refusing("decode").await);
        let router = Router::start(&[&prefill], &[&decode]).await;
        let response = router.client().await.post("/generate", BODY).await;
        assert_eq!((response.status(), response.complete), (400, true), "{late} is late");
        assert!(response.text() == quoted, "{late} is late: {} bytes", response.body.len());
    }
}

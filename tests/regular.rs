//! Plain servers, without disaggregation, behind the router (`--worker-urls`): a client gets what a server
//! alone would give it, and a server what the client has sent.

#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

mod kit;
#[path = "metrics/scrape.rs"]
#[allow(dead_code, reason = "only counts are looked at")]
mod scrape;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use kit::{
    Gate, Head, OK, Recording, Response, Router, RouterProcess, STREAM_HEAD, ScriptedServer, Step, chunk,
    fixture, fixture_names, json, with_timeout,
};
use loadtest::sim::{Role, Sim, SimConfig};
use mini_lb::{MiniLbConfig, RoundRobin};

const BODY: &str = r#"{"text":"a"}"#;

/// Paths that the router answers itself: the recordings of them are a server's own.
const OF_THE_ROUTER: [&str; 8] =
    ["/", "/health", "/ping", "/ready", "/nope", "/get_load", "/metrics", "/metrics/"];

/// Recorded requests that reach a server, with the server's responses.
fn recorded() -> Vec<(String, Recording, Recording)> {
    let exchange = |name: String| {
        let request = fixture(&format!("reg/{name}.req")).expect("a recorded request");
        let response = fixture(&format!("reg/{name}.resp"))?;
        let mut words = request.head.start_line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let is_own = OF_THE_ROUTER.contains(&target)
            || method == "OPTIONS"
            // The method is not allowed there.
            || (method, target) == ("GET", "/generate")
            // The interim response is for the peer that asked.
            || request.head.header("expect").is_some();
        (!is_own).then_some((name, request, response))
    };
    fixture_names("reg", ".req").into_iter().filter_map(exchange).collect()
}

/// All of a message but what belongs to one connection, and the request's id.
fn visible(head: &Head, body: &[u8]) -> (String, Vec<(String, String)>, Vec<u8>) {
    let others = ["transfer-encoding", "content-length", "x-request-id", "connection", "host"];
    // hyper writes names in lower case.
    let lower = head.headers.iter().map(|(name, value)| (name.to_lowercase(), value.clone()));
    let mut headers: Vec<_> = lower.filter(|(name, _)| !others.contains(&&**name)).collect();
    // What the router asks for where it reads the response itself, besides generation.
    headers.retain(|(name, value)| (&**name, &**value) != ("accept-encoding", "identity"));
    headers.sort();
    (head.start_line.clone(), headers, body.to_vec())
}

#[tokio::test]
async fn every_recorded_exchange_is_the_same_as_without_a_router() {
    let recorded = recorded();
    let names: HashSet<&str> = recorded.iter().map(|(name, ..)| &**name).collect();
    // What pairs refuse, or answer by the router.
    for name in [
        "gen_err_badjson",
        "chat_err_ct",
        "gen_err_array",
        "gen_nan",
        "gen_lone_surrogate",
        "gen_dupkeys",
        "gen_nul",
        "chat_n3",
        "chat_n3_stream_usage",
        "gen_n2",
        "cmpl_n2",
        "api_chat",
        "api_generate",
    ] {
        assert!(names.contains(name), "{name}");
    }
    assert!(recorded.len() > 230, "{}", recorded.len());
    for (name, request, response) in recorded {
        let raw = response.raw.clone();
        let server = ScriptedServer::start(move |_| vec![Step::Send(raw.clone())]).await;
        let router = Router::start_plain(&[&server], |config| config).await;
        let mut client = router.client().await;
        client.send(&request.raw).await;
        let got = client.response().await;
        assert!(got.complete, "{name}");
        let (got_bytes, own_bytes) = (visible(&got.head, &got.body), visible(&response.head, &response.body));
        assert!(got_bytes == own_bytes, "{name}: {got_bytes:?}");
        let seen = server.only_request().await;
        let (sent, at_server) = (visible(&request.head, &request.body), visible(&seen.head, &seen.body));
        assert!(sent == at_server, "{name}: {at_server:?}");
    }
}

#[tokio::test]
async fn a_body_that_no_parser_takes_reaches_the_server() {
    let server = ScriptedServer::always(json("400 Bad Request", r#"{"detail":"mine"}"#)).await;
    let router = Router::start_plain(&[&server], |config| config.max_payload_size(1 << 20)).await;
    let large = vec![b'{'; 600_000];
    let bodies: [&[u8]; 6] = [b"", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", br#"{"a":1}}"#, &large];
    for (count, body) in bodies.into_iter().enumerate() {
        for (target, encoding) in [("/generate", "identity"), ("/v1/chat/completions", "gzip")] {
            let mut client = router.client().await;
            client.send_request("POST", target, &[("content-encoding", encoding)], body).await;
            let response = client.response().await;
            assert_eq!((response.status(), response.text()), (400, r#"{"detail":"mine"}"#), "{count}");
            assert!(server.requests().last().unwrap().body == body, "{count}");
        }
    }
    // The router's own bounds stay.
    let response = router.client().await.post("/generate", vec![b' '; (1 << 20) + 1]).await;
    assert_eq!((response.status(), &*response.error_code()), (413, "body_too_large"));
}

#[tokio::test]
async fn internal_fields_pass_unless_an_operator_says_otherwise() {
    let body = r#"{"text":"a","http_worker_ipc":"ipc:///x","bootstrap_room":7,"encoder_urls":["http://e"]}"#;
    let server = ScriptedServer::always(json("200 OK", OK)).await;
    let router = Router::start_plain(&[&server], |config| config).await;
    router.client().await.post("/generate", body).await;
    assert_eq!(server.requests()[0].body, body.as_bytes());

    let strict = |value: &'static str| {
        move |config: MiniLbConfig| config.set_option("internal-fields", [[value]]).expect("a value")
    };
    let router = Router::start_plain(&[&server], strict("strip")).await;
    for target in ["/generate", "/encode"] {
        router.client().await.post(target, body).await;
        let requests = server.requests();
        assert_eq!(String::from_utf8_lossy(&requests.last().unwrap().body), r#"{"text":"a"}"#, "{target}");
    }
    let count = server.requests().len();
    // What Python reads as an object, and the router cannot, would pass its fields by.
    let hidden = r#"{"text":NaN,"http_worker_ipc":"ipc:///x"}"#;
    let response = router.client().await.post("/encode", hidden).await;
    assert_eq!((response.status(), &*response.error_code()), (400, "invalid_json"));
    let router = Router::start_plain(&[&server], strict("reject")).await;
    let response = router.client().await.post("/encode", body).await;
    assert_eq!((response.status(), &*response.error_code()), (400, "internal_field"));
    assert_eq!(server.requests().len(), count);
    // A form has no fields of JSON.
    let mut client = router.client().await;
    let form = b"--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nw\r\n--b--\r\n";
    let content_type = [("content-type", "multipart/form-data; boundary=b")];
    client.send_request("POST", "/v1/audio/transcriptions", &content_type, form).await;
    assert_eq!(client.response().await.status(), 200);
    assert_eq!(server.requests().last().unwrap().body, form);
}

#[tokio::test]
async fn every_route_of_sglang_that_pairs_cannot_serve_reaches_one_server() {
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-mine\r\nx-of-server: 1\r\n\
                   content-length: 4\r\n\r\n\x00\x01\xff\n";
    let server = ScriptedServer::always(answer.to_vec()).await;
    let router = Router::start_plain(&[&server], |config| config).await;
    for target in [
        "/v1/embeddings",
        "/encode",
        "/v1/classify",
        "/classify",
        "/v1/rerank",
        "/v1/score",
        "/v1/decisions",
        "/v1/systemone",
        "/v1/audio/transcriptions",
        "/api/chat",
        "/api/generate",
        "/vertex_generate",
    ] {
        let (target, body) = (format!("{target}?a=%20b"), b"{\"input\": [NaN,\xff]}");
        let mut client = router.client().await;
        client.send_request("POST", &target, &[("content-type", "application/json")], body).await;
        let response = client.response().await;
        assert_eq!((response.status(), &response.body[..]), (200, &b"\x00\x01\xff\n"[..]), "{target}");
        assert_eq!(response.head.header("content-type"), Some("application/x-mine"));
        let seen = server.requests().pop().unwrap();
        assert_eq!((seen.target(), &seen.body[..]), (&*target, &body[..]));
    }
    let count = server.requests().len();
    // What one server of several must not get alone is not served, and other paths are not known.
    for target in ["/send_weights_to_remote_instance", "/dumper/configure", "/nowhere"] {
        let response = router.client().await.post(target, "{}").await;
        assert_eq!((response.status(), &*response.error_code()), (404, "not_found"), "{target}");
    }
    assert_eq!(router.client().await.get("/v1/embeddings").await.status(), 405);
    assert_eq!(server.requests().len(), count);
}

#[tokio::test]
async fn an_uploaded_recording_is_passed_on_and_its_transcription_streams() {
    let server = ScriptedServer::start(|_| {
        let events = [chunk("data: {\"text\":\"a\"}\n\n"), chunk("data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()];
        vec![Step::Send([STREAM_HEAD.as_bytes(), &events.concat()].concat())]
    })
    .await;
    let router = Router::start_plain(&[&server], |config| config).await;
    let audio: Vec<u8> = (0..300_000_u32).map(|number| (number * 7) as u8).collect();
    let form =
        [&b"--b\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\n"[..], &audio, b"\r\n--b--\r\n"];
    let form = form.concat();
    let mut client = router.client().await;
    let content_type = [("content-type", "multipart/form-data; boundary=b")];
    client.send_request("POST", "/v1/audio/transcriptions", &content_type, &form).await;
    let response = client.response().await;
    assert_eq!(response.text(), "data: {\"text\":\"a\"}\n\ndata: [DONE]\n\n");
    let seen = server.only_request().await;
    assert_eq!(seen.head.header("content-type"), Some(content_type[0].1));
    assert!(seen.body == form);
}

#[tokio::test]
async fn a_server_that_cannot_be_connected_leaves_its_requests_to_another() {
    let (gone, server) = (kit::ok_server().await, kit::ok_server().await);
    gone.stop_listening().await;
    let port = scrape::free_port();
    let router = Router::start_plain(&[&gone, &server], |config| {
        config.policy(RoundRobin::default).admin_address("127.0.0.1", port)
    })
    .await;
    for _ in 0..4 {
        assert_eq!(router.client().await.post("/generate", BODY).await.text(), OK);
    }
    assert_eq!(server.requests().len(), 4);
    let scrape = scrape::after(port, 4).await;
    let url = gone.url();
    let retried = scrape.get("mini_lb_retries_total", &[("role", "regular"), ("cause", "connect")]);
    let failed = [("role", "regular"), ("backend", &*url), ("outcome", "connect")];
    assert_eq!(retried, scrape.get("mini_lb_backend_legs_total", &failed));
    assert!(retried >= 2.0, "{retried}");
    // Alone, its absence is the response.
    let router = Router::start_plain(&[&gone], |config| config).await;
    let response = router.client().await.post("/generate", BODY).await;
    assert_eq!((response.status(), &*response.error_code()), (502, "regular_connect"));
    assert_eq!(response.json()["error"]["server"], url);
}

#[tokio::test]
async fn a_server_that_is_gone_with_its_idle_connection_leaves_the_request_to_another() {
    let (gone, other) = (kit::ok_server().await, kit::ok_server().await);
    let router = Router::start_plain(&[&gone, &other], |config| config.policy(RoundRobin::default)).await;
    let mut client = router.client().await;
    for _ in 0..2 {
        assert_eq!(client.post("/generate", BODY).await.status(), 200);
    }
    assert_eq!((gone.requests().len(), other.requests().len()), (1, 1));
    // Its connections end with its listener.
    gone.stop_listening().await;
    for _ in 0..2 {
        assert_eq!(client.post("/generate", BODY).await.text(), OK);
    }
    assert_eq!(other.requests().len(), 3);
}

#[tokio::test]
async fn a_server_that_fails_in_the_middle_cuts_the_response_and_is_named() {
    let broken = ScriptedServer::start(|_| {
        vec![Step::Send([STREAM_HEAD.as_bytes(), &chunk("data: {\"text\":\"a\"}\n\n")].concat()), Step::Close]
    })
    .await;
    let router = Router::start_plain(&[&broken], |config| config).await;
    let response = router.client().await.post("/generate", r#"{"text":"a","stream":true}"#).await;
    assert!(!response.complete);
    let text = String::from_utf8_lossy(&response.body).into_owned();
    assert!(text.contains("\"text\":\"a\"") && text.contains("regular_closed"), "{text}");
    assert!(text.contains(&broken.url()), "{text}");
    // Before the head there is an error status, and nobody gets the request a second time.
    let silent = ScriptedServer::start(|_| vec![Step::Close]).await;
    let router = Router::start_plain(&[&silent], |config| config).await;
    let response = router.client().await.post("/generate", BODY).await;
    assert_eq!((response.status(), &*response.error_code()), (502, "regular_closed"));
    assert_eq!(silent.requests().len(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_leg() {
    let server = ScriptedServer::start(|seen| match seen.target() {
        "/generate" => vec![Step::Hang],
        _ => vec![Step::Send([STREAM_HEAD.as_bytes(), &chunk("data: {}\n\n")].concat()), Step::Hang],
    })
    .await;
    let router = Router::start_plain(&[&server], |config| config).await;
    let mut client = router.client().await;
    client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
    server.wait_for_requests(1).await;
    drop(client);
    server.wait_closed(1).await;
    let mut client = router.client().await;
    client.send_request("POST", "/v1/completions", &[], br#"{"stream":true}"#).await;
    client.read_until("data: {}").await;
    drop(client);
    server.wait_closed(2).await;
    router.wait_idle().await;
}

#[tokio::test]
async fn a_server_that_is_not_healthy_gets_nothing() {
    let of = |status: &'static str| {
        ScriptedServer::start(move |seen| match seen.target() {
            "/ready" | "/health" => vec![Step::Send(json(status, "{}"))],
            _ => vec![Step::Send(json("200 OK", OK))],
        })
    };
    let (down, up) = (of("500 Internal Server Error").await, of("200 OK").await);
    let router = Router::start_plain(&[&down, &up], |config| {
        let config = config.health_checks(true).health_check_interval(Duration::from_millis(30));
        config.health_failure_threshold(1).policy(RoundRobin::default)
    })
    .await;
    let excluded = router.backend(&down);
    with_timeout("the exclusion", async {
        while excluded.is_healthy() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..4 {
        assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    }
    let generated = |server: &ScriptedServer| {
        server.requests().iter().filter(|seen| seen.target() == "/generate").count()
    };
    assert_eq!((generated(&down), generated(&up)), (0, 4));
    assert_eq!(router.client().await.get("/ready").await.status(), 200);
}

#[tokio::test]
async fn cache_aware_keeps_prompts_on_a_server() {
    let servers = [kit::ok_server().await, kit::ok_server().await, kit::ok_server().await];
    let router = Router::start_plain(&servers.each_ref(), |config| config).await;
    let prompt = |number: usize| format!("{:1$}", format!("prompt {number} "), 40_000);
    let mut client = router.client().await;
    for round in 0..4 {
        for number in 0..6 {
            let body = format!(r#"{{"text":"{}, round {round}"}}"#, prompt(number));
            assert_eq!(client.post("/generate", body).await.status(), 200);
        }
    }
    let mut homes: HashMap<usize, HashSet<usize>> = HashMap::new();
    for (index, server) in servers.iter().enumerate() {
        for seen in server.requests() {
            let body = String::from_utf8_lossy(&seen.body[..40]).into_owned();
            let number = (0..6).find(|number| body.contains(&format!("prompt {number} "))).unwrap();
            homes.entry(number).or_default().insert(index);
        }
    }
    assert!(homes.values().all(|servers| servers.len() == 1), "{homes:?}");
    assert_eq!(homes.len(), 6);
}

#[tokio::test]
async fn requests_on_a_server_are_capped_and_others_wait() {
    let gate = Gate::new();
    let held = gate.clone();
    let server =
        ScriptedServer::start(move |_| vec![Step::Wait(held.clone()), Step::Send(json("200 OK", OK))]).await;
    let router = Router::start_plain(&[&server], |config| config.max_in_flight_per_worker(2)).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = router.client().await;
        client.send_request("POST", "/generate", &[], BODY.as_bytes()).await;
        clients.push(client);
    }
    router.wait_queued(1).await;
    server.wait_for_requests(2).await;
    assert_eq!(router.backend(&server).in_flight(), 2);
    gate.open();
    for mut client in clients {
        assert_eq!(client.response().await.status(), 200);
    }
    assert_eq!(server.requests().len(), 3);
    router.wait_idle().await;
}

#[tokio::test]
async fn clients_need_a_key_for_every_route() {
    let server = kit::ok_server().await;
    let router = Router::start_plain(&[&server], |config| config.api_key("k")).await;
    for target in ["/generate", "/v1/embeddings", "/api/chat"] {
        assert_eq!(router.client().await.post(target, BODY).await.status(), 401, "{target}");
        let mut client = router.client().await;
        client.send_request("POST", target, &[("authorization", "Bearer k")], BODY.as_bytes()).await;
        assert_eq!(client.response().await.status(), 200, "{target}");
    }
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn http2_clients_get_a_plain_servers_stream() {
    let server = ScriptedServer::start(|_| {
        let events = [chunk("data: 1\n\n"), chunk("data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()].concat();
        vec![Step::Send([STREAM_HEAD.as_bytes(), &events].concat())]
    })
    .await;
    let router = Router::start_plain(&[&server], |config| config.http2(true)).await;
    let socket = tokio::net::TcpStream::connect(router.address()).await.unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let connection = tokio::spawn(connection);
    for target in ["/v1/chat/completions", "/api/chat"] {
        let mut ready = send.clone().ready().await.unwrap();
        let request = hyper::Request::post(format!("http://router{target}")).body(()).unwrap();
        let (response, mut body) = ready.send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(b"{\"stream\":true, \"n\": 3}"), true).unwrap();
        let mut stream = with_timeout("a response", response).await.unwrap().into_body();
        let mut received = Vec::new();
        while let Some(data) = with_timeout("data", stream.data()).await {
            received.extend_from_slice(&data.unwrap());
        }
        assert_eq!(received, b"data: 1\n\ndata: [DONE]\n\n", "{target}");
        assert_eq!(server.requests().pop().unwrap().body, b"{\"stream\":true, \"n\": 3}");
    }
    connection.abort();
}

#[tokio::test]
async fn metrics_name_the_one_role_and_count_each_request_once() {
    let server = kit::ok_server().await;
    let port = scrape::free_port();
    let router = Router::start_plain(&[&server], |config| config.admin_address("127.0.0.1", port)).await;
    for _ in 0..3 {
        assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    }
    let scrape = scrape::after(port, 3).await;
    let url = server.url();
    let completed = [("role", "regular"), ("backend", &*url), ("outcome", "completed")];
    assert_eq!(scrape.get("mini_lb_backend_legs_total", &completed), 3.0);
    assert_eq!(scrape.get("mini_lb_backends", &[("role", "regular")]), 1.0);
    let only = [("role", "regular"), ("policy", "cache_aware"), ("reason", "only")];
    assert_eq!(scrape.get("mini_lb_selections_total", &only), 3.0);
    let of_server = [("prefill", &*url), ("decode", &*url)];
    assert_eq!(scrape.get("mini_lb_pair_decode_first_byte_seconds_count", &of_server), 3.0);
    let sent: f64 = ["kept", "opened"]
        .iter()
        .map(|connections| scrape.get("mini_lb_router_send_seconds_count", &[("connections", *connections)]))
        .sum();
    assert_eq!(sent, 3.0);
    assert!(!scrape.text().contains("role=\"prefill\"") && !scrape.text().contains("role=\"decode\""));
}

#[tokio::test]
async fn what_a_server_says_of_prompts_is_learned() {
    const META: &str = r#""meta_info":{"prompt_tokens":100,"cached_tokens":40,"completion_tokens":1}"#;
    let server = ScriptedServer::start(|seen| match seen.target() {
        "/generate" if seen.body.ends_with(b"true}") => {
            let event = chunk(&format!("data: {{\"text\":\"a\",{META}}}\n\n"));
            vec![Step::Send([STREAM_HEAD.as_bytes(), &event, b"0\r\n\r\n"].concat())]
        }
        _ => vec![Step::Send(json("200 OK", &format!(r#"{{"text":"a",{META}}}"#)))],
    })
    .await;
    let told = async |policy: &str, target: &str, body: &str| {
        let port = scrape::free_port();
        let router = Router::start_plain(&[&server], |config| {
            let config = config.admin_address("127.0.0.1", port);
            config.set_option("policy", [[policy]]).expect("a policy")
        })
        .await;
        assert_eq!(router.client().await.post(target, body).await.status(), 200);
        router.wait_idle().await;
        let scrape = scrape::after(port, 1).await;
        let url = server.url();
        let of_server = [("role", "regular"), ("backend", &*url)];
        ["prompt", "cached"]
            .map(|tokens| scrape.get(&format!("mini_lb_backend_{tokens}_tokens_total"), &of_server))
    };
    assert_eq!(told("cache_aware", "/generate", BODY).await, [100.0, 40.0]);
    assert_eq!(told("cache_aware", "/generate", r#"{"text":"a","stream":true}"#).await, [100.0, 40.0]);
    // What is no prompt of a policy's tells nothing of it, and without such a policy nothing is read.
    assert_eq!(told("cache_aware", "/v1/embeddings", BODY).await, [0.0, 0.0]);
    assert_eq!(told("round_robin", "/generate", BODY).await, [0.0, 0.0]);
}

#[tokio::test]
async fn a_reload_changes_the_servers_but_not_what_they_are() {
    let (before, after) = (kit::ok_server().await, kit::ok_server().await);
    let router = Router::start_plain(&[&before], |config| config).await;
    let config = |server: &ScriptedServer| {
        let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![], vec![], 60).health_checks(false);
        config.worker_urls([server.url()])
    };
    let reloaded = router.reload(config(&after)).expect("a valid configuration");
    assert_eq!((reloaded.servers_added, reloaded.servers_removed), (1, 1));
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
    assert_eq!((before.requests().len(), after.requests().len()), (0, 1));
    let pair = MiniLbConfig::new("h", 1, vec![(before.url(), None)], vec![after.url()], 60);
    let refused = router.reload(pair).unwrap_err().to_string();
    assert!(refused.starts_with("--worker-urls: ") && refused.contains("restart"), "{refused}");
    assert_eq!(router.client().await.post("/generate", BODY).await.status(), 200);
}

async fn send(router: &Router, method: &str, target: &str, body: &str) -> Response {
    let mut client = router.client().await;
    client.send_request(method, target, &[("content-type", "application/json")], body.as_bytes()).await;
    client.response().await
}

#[tokio::test]
async fn servers_are_added_to_none_and_removed() {
    let server = kit::ok_server().await;
    let router = Router::start_plain(&[], |config| config).await;
    let refused = send(&router, "POST", "/generate", BODY).await;
    assert_eq!((refused.status(), &*refused.error_code()), (503, "regular_unavailable"));
    assert_eq!(send(&router, "GET", "/ready", "").await.status(), 503);
    assert_eq!(send(&router, "GET", "/v1/models", "").await.error_code(), "regular_unavailable");
    assert_eq!(send(&router, "POST", "/flush_cache", "").await.error_code(), "regular_unavailable");
    let aborted = send(&router, "POST", "/abort_request", r#"{"rid":"r"}"#).await;
    assert_eq!(aborted.error_code(), "regular_unavailable");
    for worker_type in ["prefill", "decode"] {
        let body = format!(r#"{{"url":"{}","worker_type":"{worker_type}"}}"#, server.url());
        let refused = send(&router, "POST", "/workers", &body).await;
        assert_eq!((refused.status(), &*refused.error_code()), (400, "invalid_admin_request"));
    }
    let added = send(&router, "POST", "/workers", &format!(r#"{{"url":"{}"}}"#, server.url())).await;
    assert_eq!(added.status(), 202);
    let again = format!(r#"{{"url":"{}","worker_type":"regular"}}"#, server.url());
    assert_eq!(send(&router, "POST", "/workers", &again).await.status(), 202);
    assert_eq!(send(&router, "POST", "/generate", BODY).await.text(), OK);
    let list = send(&router, "GET", "/workers", "").await.json();
    assert_eq!(list["workers"][0]["worker_type"], "regular");
    assert_eq!(list["stats"]["regular_count"], 1);
    let switch = format!(r#"{{"worker_url":"{}","new_role":"prefill"}}"#, server.url());
    assert_eq!(send(&router, "POST", "/pd_role_switch", &switch).await.status(), 400);
    let id = list["workers"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(send(&router, "DELETE", &format!("/workers/{id}"), "").await.status(), 200);
    assert_eq!(send(&router, "POST", "/generate", BODY).await.error_code(), "regular_unavailable");
    // As trainers do, and behind a gateway.
    let with_path = format!("/add_worker?url={}/llm-a", server.url());
    assert_eq!(send(&router, "POST", &with_path, "").await.status(), 200);
    assert_eq!(send(&router, "POST", "/v1/embeddings", BODY).await.text(), OK);
    assert_eq!(server.requests().pop().unwrap().target(), "/llm-a/v1/embeddings");
}

#[tokio::test]
async fn of_several_servers_all_get_what_changes_them_and_one_answers_the_rest() {
    let servers = [kit::ok_server().await, kit::ok_server().await];
    let router = Router::start_plain(&servers.each_ref(), |config| config).await;
    let flushed = send(&router, "POST", "/flush_cache", "").await.json();
    assert_eq!(flushed["servers"].as_array().unwrap().len(), 2);
    let paused = send(&router, "POST", "/pause_generation", "{}").await.json();
    assert_eq!((&paused["success"], &paused["servers"][1]["role"]), (&true.into(), &"regular".into()));
    let info = send(&router, "GET", "/server_info", "").await.json();
    assert_eq!((info["regular"].as_array().unwrap().len(), &info["prefill"]), (2, &serde_json::Value::Null));
    assert!(servers.iter().all(|server| server.requests().len() == 3));
    assert_eq!(send(&router, "GET", "/v1/models", "").await.text(), OK);
    assert_eq!(servers.iter().map(|server| server.requests().len()).sum::<usize>(), 7);
}

#[tokio::test]
async fn the_program_takes_sglang_routers_flag() {
    let servers = [kit::ok_server().await, kit::ok_server().await];
    let urls = servers.each_ref().map(ScriptedServer::url);
    let program = RouterProcess::start_plain(&urls, &["--policy", "round_robin", "--access-log"]).await;
    for _ in 0..2 {
        assert_eq!(program.client().await.post("/generate", BODY).await.text(), OK);
    }
    assert!(servers.iter().all(|server| server.requests().len() == 1));
    let line = program.line("path=/generate").await;
    assert!(line.contains(" server=http://127.0.0.1:") && line.contains(" selection=turn:"), "{line}");
    assert!(!line.contains("prefill") && !line.contains(" decode="), "{line}");
    let lines = program.stop().await;
    let listening = lines.iter().find(|line| line.contains("listening on")).unwrap();
    assert!(listening.contains("2 plain servers, policy round_robin, 1 worker"), "{listening}");
}

#[tokio::test]
async fn plain_servers_and_pairs_exclude_each_other() {
    for (args, names) in [
        (&["--prefill", "http://p"][..], "--worker-urls and --prefill "),
        (&["--decode", "http://d"], "--worker-urls and --decode "),
        (&["--decode-dns", "d:1"], "--worker-urls and --decode-dns "),
        (&["--pd-disaggregation"], "--worker-urls and --pd-disaggregation "),
    ] {
        let mut program = RouterProcess::spawn_with(&["--worker-urls", "http://a", "http://b"], args);
        assert_eq!(program.exit_code().await, Some(2));
        let said = program.lines().join("\n");
        assert!(said.contains(names) && said.contains("exclude each other"), "{said}");
    }
    for config in [
        MiniLbConfig::new("h", 1, vec![], vec![], 1).worker_urls(["http://a", "http://A:80/"]),
        MiniLbConfig::new("h", 1, vec![], vec![], 1).worker_urls(["a b"]),
    ] {
        assert!(mini_lb::MiniLoadBalancer::new(config).is_err());
    }
}

#[tokio::test]
async fn a_simulated_server_gives_all_its_samples() {
    let sim = Sim::start(SimConfig { role: Role::Regular, ..SimConfig::default() }).await.unwrap();
    let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![], vec![], 60);
    let config = config.worker_urls([sim.url()]).worker_threads(1);
    let router = Router::start_with_config(config).await;
    let body = r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":3,"n":3}"#;
    let response = send(&router, "POST", "/v1/chat/completions", body).await;
    assert_eq!(response.json()["choices"].as_array().map(Vec::len), Some(3), "{}", response.text());
}

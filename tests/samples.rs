//! Requests for several samples (`n` > 1): a request of its own for each, and one response made of all.

mod kit;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kit::{
    Client, Gate, ReceivedRequest, Router, RouterProcess, STREAM_HEAD, ScriptedServer, Step, chunk, json,
};
use loadtest::sim::{Sim, SimConfig};
use mini_lb::{CacheAware, ConsistentHash, MiniLbConfig, RoundRobin};
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const GENERATE: &str = "/generate";

/// Requests for several samples, in all forms that a regular server takes.
const REQUESTS: [(&str, &str); 18] = [
    (CHAT, r#"{"messages":[{"role":"user","content":"the of"}],"max_tokens":4,"n":3}"#),
    (
        CHAT,
        r#"{"n":2,"messages":[{"role":"user","content":"the of"}],"max_tokens":4,"logprobs":true,"top_logprobs":2}"#,
    ),
    (CHAT, r#"{"messages":[{"role":"user","content":"the"}],"max_tokens":4,"n":3,"stream":true}"#),
    (
        CHAT,
        r#"{"messages":[{"role":"user","content":"the"}],"max_tokens":4,"n":3,"stream":true,"stream_options":{"include_usage":true}}"#,
    ),
    (
        CHAT,
        r#"{"messages":[{"role":"user","content":"the"}],"max_tokens":4,"n":2,"tool_choice":"required","tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]}"#,
    ),
    (
        CHAT,
        r#"{"messages":[{"role":"user","content":"the"}],"max_tokens":4,"n":2,"stream":true,"tool_choice":"required","tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]}"#,
    ),
    (COMPLETIONS, r#"{"prompt":"the of","max_tokens":4,"n":3}"#),
    (COMPLETIONS, r#"{"prompt":["the of","a","and to"],"max_tokens":4,"n":2}"#),
    (COMPLETIONS, r#"{"prompt":["the of","a"],"max_tokens":3,"n":2,"logprobs":1}"#),
    (COMPLETIONS, r#"{"prompt":"the of","max_tokens":3,"n":2,"echo":true,"logprobs":1}"#),
    (COMPLETIONS, r#"{"prompt":["the of","a"],"max_tokens":3,"n":3,"stream":true}"#),
    (
        COMPLETIONS,
        r#"{"prompt":"the","max_tokens":3,"n":2,"stream":true,"stream_options":{"include_usage":true}}"#,
    ),
    (GENERATE, r#"{"text":"the of","sampling_params":{"n":3,"max_new_tokens":4}}"#),
    (GENERATE, r#"{"text":["the of","a","and"],"sampling_params":{"max_new_tokens":3,"n":2}}"#),
    (
        GENERATE,
        r#"{"text":"the of and","sampling_params":{"max_new_tokens":3,"n":2},"return_logprob":true,"logprob_start_len":0}"#,
    ),
    (
        GENERATE,
        r#"{"text":["the of","a b c"],"sampling_params":{"max_new_tokens":3,"n":2},"return_logprob":true,"logprob_start_len":0,"top_logprobs_num":2}"#,
    ),
    (GENERATE, r#"{"text":"the of","sampling_params":{"n":3,"max_new_tokens":4},"stream":true}"#),
    (
        GENERATE,
        r#"{"text":["the of","a"],"sampling_params":{"max_new_tokens":3,"n":2},"stream":true,"return_logprob":true,"logprob_start_len":0}"#,
    ),
];

/// What does not depend on ids and times: whole values, or the events of a stream by index.
fn comparable(response: &str) -> Vec<Value> {
    let data = |event: &str| event.strip_prefix("data: ").filter(|data| *data != "[DONE]").map(parse);
    let mut values: Vec<Value> = if response.starts_with("data: ") {
        assert_eq!(response.matches("data: [DONE]\n\n").count(), 1, "{response}");
        assert!(response.ends_with("data: [DONE]\n\n"), "{response}");
        response.split("\n\n").filter_map(data).collect()
    } else {
        match parse(response) {
            Value::Array(items) => items,
            item => vec![item],
        }
    };
    values.iter_mut().for_each(without_ids_and_times);
    // Samples come in any order, each with its own events in order: the sort is stable.
    values.sort_by_key(|value| (value["index"].as_u64(), value["choices"][0]["index"].as_u64()));
    values
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn without_ids_and_times(value: &mut Value) {
    const VARYING: [&str; 5] = ["id", "created", "tool_calls", "e2e_latency", "request_received_ts"];
    match value {
        Value::Object(fields) => {
            fields.retain(|name, value| {
                !VARYING.contains(&&**name) && !value.is_f64() && !name.ends_with("_time")
                    || name.contains("logprob")
            });
            fields.values_mut().for_each(without_ids_and_times);
        }
        Value::Array(items) => items.iter_mut().for_each(without_ids_and_times),
        _ => {}
    }
}

/// Simulated servers of both roles, several of each.
struct Simulated {
    prefill: Vec<Sim>,
    decode: Vec<Sim>,
}

impl Simulated {
    async fn start(servers: usize, change: impl Fn(SimConfig) -> SimConfig) -> Self {
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for _ in 0..servers {
            prefill.push(Sim::start(change(SimConfig::prefill())).await.expect("free ports"));
            decode.push(Sim::start(change(SimConfig::decode())).await.expect("a free port"));
        }
        Self { prefill, decode }
    }

    async fn router(&self, change: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Router {
        let prefill = self.prefill.iter().map(|sim| (sim.url(), sim.bootstrap_port())).collect();
        let decode = self.decode.iter().map(Sim::url).collect();
        let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).worker_threads(1);
        Router::start_with_config(change(config)).await
    }

    fn all(&self) -> impl Iterator<Item = &Sim> {
        self.prefill.iter().chain(&self.decode)
    }

    /// No request has hung, crashed a server or met another's prompt, and none is left.
    async fn assert_sound(&self) {
        kit::with_timeout("all requests' end", async {
            while self.all().any(|sim| sim.stats().in_flight > 0) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        for sim in self.all() {
            let stats = sim.stats();
            assert_eq!((stats.crashes, stats.mismatches), (0, 0), "{stats:?}");
        }
    }
}

#[tokio::test]
async fn a_pair_answers_requests_for_several_samples_as_a_regular_server_does() {
    let servers = Simulated::start(2, |config| config).await;
    let router = servers.router(|config| config.policy(RoundRobin::default)).await;
    let regular = Sim::start(SimConfig::default()).await.expect("a free port");
    for (target, body) in REQUESTS {
        let got = router.client().await.post(target, body).await;
        let wanted = Client::connect(regular.addr()).await.post(target, body).await;
        assert_eq!((got.status(), wanted.status()), (200, 200), "{body}: {}", got.text());
        assert!(got.complete, "{body}");
        let (got, wanted) = (comparable(got.text()), comparable(wanted.text()));
        assert_eq!(got.len(), wanted.len(), "{body}: {got:#?} {wanted:#?}");
        for (got, wanted) in got.iter().zip(&wanted) {
            assert_eq!(got, wanted, "{body}");
        }
    }
    servers.assert_sound().await;
}

/// Servers that respond to each request as the text of its prompt wants it.
async fn ok_servers(count: usize) -> Vec<ScriptedServer> {
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(ScriptedServer::always(json("200 OK", WHOLE)).await);
    }
    servers
}

const WHOLE: &str = r#"{"text":"hi","meta_info":{"id":"x","prompt_tokens":2,"completion_tokens":1,"finish_reason":{"type":"stop"}}}"#;
const BODY: &str = r#"{"text":"a","sampling_params":{"temperature":1,"n":3,"top_p":0.5}}"#;
const STREAM: &str = r#"{"text":"a","stream":true,"sampling_params":{"n":3}}"#;

fn event(text: &str) -> Vec<u8> {
    chunk(&format!("data: {{\"text\":\"{text}\",\"meta_info\":{{\"id\":\"x\",\"finish_reason\":null}}}}\n\n"))
}

/// A whole stream of one event.
fn short_stream() -> Vec<u8> {
    [STREAM_HEAD.as_bytes(), &event("a"), &chunk("data: [DONE]\n\n"), b"0\r\n\r\n"].concat()
}

fn room(seen: &ReceivedRequest) -> u64 {
    seen.json()["bootstrap_room"].as_u64().expect("a room")
}

async fn round_robin(prefill: &[ScriptedServer], decode: &[ScriptedServer]) -> Router {
    router_with(prefill, decode, |config| config.policy(RoundRobin::default)).await
}

async fn router_with(
    prefill: &[ScriptedServer],
    decode: &[ScriptedServer],
    options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    Router::start_with(&Vec::from_iter(prefill), &Vec::from_iter(decode), options).await
}

#[tokio::test]
async fn each_copy_has_a_room_and_a_pair_of_its_own_and_no_n() {
    let (prefill, decode) = (ok_servers(3).await, ok_servers(3).await);
    let router = round_robin(&prefill, &decode).await;
    let response = router.client().await.post(GENERATE, BODY).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    assert_eq!(response.text(), format!("[{WHOLE},{WHOLE},{WHOLE}]"));
    assert_eq!(response.head.header("content-length"), Some(&*response.text().len().to_string()));
    let mut rooms = HashSet::new();
    for (prefill, decode) in prefill.iter().zip(&decode) {
        let (on_prefill, on_decode) = (prefill.only_request().await, decode.only_request().await);
        assert_eq!(room(&on_prefill), room(&on_decode));
        rooms.insert(room(&on_decode));
        for seen in [on_prefill, on_decode] {
            let body = seen.json();
            assert_eq!(body["sampling_params"], serde_json::json!({ "temperature": 1, "top_p": 0.5 }));
            assert_eq!(body.get("rid"), None);
            assert_eq!(body["text"], "a");
        }
    }
    assert_eq!(rooms.len(), 3);
    router.wait_idle().await;
}

#[tokio::test]
async fn copies_have_ids_of_their_own_that_begin_with_the_clients() {
    let (prefill, decode) = (ok_servers(1).await, ok_servers(1).await);
    let router = round_robin(&prefill, &decode).await;
    for (rid, start) in [(r#""my \"r\"""#, "my \"r\"-minilb-"), (r#"["r1"]"#, "r1-minilb-"), ("7", "minilb-")]
    {
        let before = decode[0].requests().len();
        let body = format!(r#"{{"rid":{rid},"text":"a","sampling_params":{{"n":3}}}}"#);
        assert_eq!(router.client().await.post(GENERATE, body).await.status(), 200, "{rid}");
        let seen = decode[0].requests().split_off(before);
        let rids: HashSet<String> =
            seen.iter().map(|seen| seen.json()["rid"].as_str().expect("a text").to_owned()).collect();
        assert_eq!(rids.len(), 3, "{rid}: {rids:?}");
        assert!(rids.iter().all(|rid| rid.starts_with(start)), "{rid}: {rids:?}");
    }
}

#[tokio::test]
async fn a_request_is_aborted_with_all_its_copies_by_the_clients_id() {
    let slow =
        |config: SimConfig| SimConfig { inter_token: Duration::from_secs(1), time_scale: 0.01, ..config };
    let servers = Simulated::start(1, slow).await;
    let router = servers.router(|config| config).await;
    let mut client = router.client().await;
    let body =
        r#"{"rid":"mine","text":"the of","stream":true,"sampling_params":{"n":3,"max_new_tokens":1000}}"#;
    client.send_request("POST", GENERATE, &[], body.as_bytes()).await;
    for index in 0..3 {
        client.read_until(&format!("\"index\":{index}")).await;
    }
    let aborted = router.client().await.post("/abort_request", r#"{"rid":"mine"}"#).await;
    assert_eq!(aborted.status(), 200, "{}", aborted.text());
    let rest = client.read_until("data: [DONE]").await;
    // The first copy that says so ends the others: one abort is that of the whole request.
    assert_eq!(rest.matches(r#""type":"abort""#).count(), 1, "{rest}");
    servers.assert_sound().await;
    assert_eq!(servers.decode[0].stats().aborted, 3);
}

/// The number of the copy that a request on one server is, in order of arrival.
fn numbered(
    script: impl Fn(usize) -> Vec<Step> + Send + Sync + 'static,
) -> impl Fn(&ReceivedRequest) -> Vec<Step> {
    let next = AtomicUsize::new(0);
    move |_| script(next.fetch_add(1, Ordering::SeqCst))
}

#[tokio::test]
async fn the_first_refusal_is_the_response_and_closes_all_other_legs() {
    for stream in [false, true] {
        for refuses_prefill in [false, true] {
            let refusal = json("503 Service Unavailable", r#"{"error":{"message":"full","code":503}}"#);
            let script = move |refuses: bool| {
                let refusal = refusal.clone();
                numbered(move |copy| match copy {
                    1 if refuses => vec![Step::Send(refusal.clone())],
                    _ => vec![Step::Hang],
                })
            };
            let prefill = ScriptedServer::start(script(refuses_prefill)).await;
            let decode = ScriptedServer::start(script(!refuses_prefill)).await;
            let router = Router::start(&[&prefill], &[&decode]).await;
            let body = if stream { STREAM } else { BODY };
            let response = router.client().await.post(GENERATE, body).await;
            assert_eq!(response.status(), 503, "{}", response.text());
            assert_eq!(response.text(), r#"{"error":{"message":"full","code":503}}"#);
            // All legs of the other copies, and the partner of the one that refused.
            let (refused, other) = if refuses_prefill { (&prefill, &decode) } else { (&decode, &prefill) };
            refused.wait_closed(2).await;
            other.wait_closed(3).await;
            router.wait_idle().await;
        }
    }
}

#[tokio::test]
async fn a_broken_leg_of_one_copy_fails_the_request() {
    for breaks_prefill in [false, true] {
        let script = move |breaks: bool| {
            numbered(move |copy| if copy == 2 && breaks { vec![Step::Reset] } else { vec![Step::Hang] })
        };
        let prefill = ScriptedServer::start(script(breaks_prefill)).await;
        let decode = ScriptedServer::start(script(!breaks_prefill)).await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let response = router.client().await.post(GENERATE, BODY).await;
        let code = if breaks_prefill { "prefill_closed" } else { "decode_closed" };
        assert_eq!((response.status(), &*response.error_code()), (502, code), "{}", response.text());
        prefill.wait_closed(3).await;
        decode.wait_closed(3).await;
        router.wait_idle().await;
    }
}

#[tokio::test]
async fn a_copy_that_breaks_in_the_middle_ends_a_stream_with_an_error_event() {
    let prefill = ok_servers(1).await;
    let begun = Gate::new();
    let seen = begun.clone();
    let decode = ScriptedServer::start(numbered(move |copy| {
        let start = Step::Send([STREAM_HEAD.as_bytes(), &event("a")].concat());
        match copy {
            2 => vec![start, Step::Wait(seen.clone()), Step::Reset],
            _ => vec![start, Step::Hang],
        }
    }))
    .await;
    let router = Router::start(&[&prefill[0]], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], STREAM.as_bytes()).await;
    for index in 0..3 {
        client.read_until(&format!("\"index\":{index}")).await;
    }
    begun.open();
    let rest = client.read_until("decode_closed").await;
    assert!(rest.contains("data: {\"error\":"), "{rest}");
    client.wait_closed().await;
    decode.wait_closed(3).await;
    router.wait_idle().await;
}

#[tokio::test]
async fn an_error_event_of_one_copy_ends_the_stream_as_a_servers_does() {
    let prefill = ok_servers(1).await;
    let all = Gate::new();
    let opened = all.clone();
    let error = "data: {\"error\":{\"message\":\"out of memory\",\"code\":500}}\n\n";
    let decode = ScriptedServer::start(numbered(move |copy| {
        let start = Step::Send([STREAM_HEAD.as_bytes(), &event("a")].concat());
        match copy {
            1 => {
                let end = [&chunk(error)[..], &chunk("data: [DONE]\n\n"), b"0\r\n\r\n"].concat();
                vec![start, Step::Wait(opened.clone()), Step::Send(end)]
            }
            _ => vec![start, Step::Hang],
        }
    }))
    .await;
    let router = Router::start(&[&prefill[0]], &[&decode]).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], STREAM.as_bytes()).await;
    let head = client.head().await;
    assert_eq!(head.start_line, "HTTP/1.1 200 OK");
    let mut text = client.read_until("\"index\":0").await;
    text += &client.read_until("\"index\":2").await;
    all.open();
    text += &client.read_until("0\r\n\r\n").await;
    assert_eq!(text.matches("out of memory").count(), 1, "{text}");
    assert_eq!(text.matches("data: [DONE]").count(), 1, "{text}");
    decode.wait_closed(2).await;
    router.wait_idle().await;
}

#[tokio::test]
async fn a_copy_that_falls_silent_ends_the_stream_though_others_go_on() {
    let prefill = ok_servers(1).await;
    let decode = ScriptedServer::start(numbered(|copy| {
        let start = Step::Send([STREAM_HEAD.as_bytes(), &event("a")].concat());
        let more = [Step::Pause(Duration::from_millis(20)), Step::Send(event("b"))];
        match copy {
            1 => vec![start, Step::Hang],
            _ => [vec![start], more.iter().cycle().take(2_000).cloned().collect()].concat(),
        }
    }))
    .await;
    let idle = |config: MiniLbConfig| config.stream_idle_timeout(Duration::from_millis(400));
    let router = router_with(&prefill, std::slice::from_ref(&decode), idle).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], STREAM.as_bytes()).await;
    let text = client.read_until("decode_timeout").await;
    assert!(text.contains("\"index\":1"), "{text}");
    client.wait_closed().await;
    decode.wait_closed(3).await;
    router.wait_idle().await;
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_a_timeout_of_a_server() {
    let prefill = ok_servers(1).await;
    let decode = ScriptedServer::start(numbered(|copy| match copy {
        2 => vec![Step::Hang],
        _ => vec![Step::Send(json("200 OK", WHOLE))],
    }))
    .await;
    let prefill = vec![(prefill[0].url(), Some(kit::BOOTSTRAP_PORT))];
    let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, vec![decode.url()], 1);
    let router = Router::start_with_config(config.worker_threads(1)).await;
    let response = router.client().await.post(GENERATE, BODY).await;
    assert_eq!((response.status(), &*response.error_code()), (504, "decode_timeout"));
    router.wait_idle().await;
    router.wait_buffered(0).await;
}

#[tokio::test]
async fn a_client_that_leaves_closes_all_legs() {
    for (body, starts) in [(BODY, false), (STREAM, false), (STREAM, true)] {
        let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let decode = ScriptedServer::start(move |_| {
            let start = [STREAM_HEAD.as_bytes(), &event("a")].concat();
            if starts { vec![Step::Send(start), Step::Hang] } else { vec![Step::Hang] }
        })
        .await;
        let router = Router::start(&[&prefill], &[&decode]).await;
        let mut client = router.client().await;
        client.send_request("POST", GENERATE, &[], body.as_bytes()).await;
        prefill.wait_for_requests(3).await;
        decode.wait_for_requests(3).await;
        if starts {
            client.read_until("\"index\":2").await;
        }
        drop(client);
        prefill.wait_closed(3).await;
        decode.wait_closed(3).await;
        router.wait_idle().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_has_all_copies_aborted() {
    let [prefill, decode] = [(), ()].map(|()| {
        ScriptedServer::start(|seen| match seen.target() {
            "/abort_request" => vec![Step::Send(json("200 OK", "{}"))],
            _ => vec![Step::Hang],
        })
    });
    let (prefill, decode) = (prefill.await, decode.await);
    let router = Router::start_with(&[&prefill], &[&decode], |config| config.abort_on_disconnect(true)).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], BODY.as_bytes()).await;
    prefill.wait_for_requests(3).await;
    decode.wait_for_requests(3).await;
    drop(client);
    for server in [&prefill, &decode] {
        server.wait_for_requests(6).await;
        let rids = |is_abort: bool| -> HashSet<String> {
            let requests = server.requests().into_iter();
            let requests = requests.filter(|seen| (seen.target() == "/abort_request") == is_abort);
            requests.map(|seen| seen.json()["rid"].as_str().expect("an id").to_owned()).collect()
        };
        assert_eq!(rids(true).len(), 3);
        assert_eq!(rids(true), rids(false));
    }
}

#[tokio::test]
async fn more_samples_than_max_n_and_impossible_numbers_are_rejected_before_anything_is_sent() {
    let (prefill, decode) = (ok_servers(1).await, ok_servers(1).await);
    let router = router_with(&prefill, &decode, |config| config.max_samples(3)).await;
    for (target, body, status, part) in [
        (GENERATE, r#"{"text":"a","sampling_params":{"n":4}}"#, 400, "--max-n"),
        (CHAT, r#"{"messages":[],"n":4}"#, 400, "--max-n"),
        (COMPLETIONS, r#"{"prompt":"a","n":99999999999999}"#, 400, "--max-n"),
        (CHAT, r#"{"messages":[],"n":0}"#, 400, "range() arg 3 must not be zero"),
        (GENERATE, r#"{"text":"a","sampling_params":{"n":"2"}}"#, 400, "sampling_params.n"),
    ] {
        let response = router.client().await.post(target, body).await;
        assert_eq!(response.status(), status, "{body}: {}", response.text());
        let code = if part == "--max-n" { "n_too_large" } else { "invalid_n" };
        assert_eq!(response.error_code(), code, "{body}");
        assert!(response.text().contains(part), "{}", response.text());
    }
    assert_eq!((prefill[0].requests().len(), decode[0].requests().len()), (0, 0));
    for (target, body) in
        [(GENERATE, r#"{"text":"a","sampling_params":{"n":3}}"#), (GENERATE, r#"{"text":"a"}"#)]
    {
        assert_eq!(router.client().await.post(target, body).await.status(), 200, "{body}");
    }
    decode[0].wait_for_requests(4).await;
}

#[tokio::test]
async fn a_copy_is_sent_to_another_pair_before_anything_was_written() {
    let (prefill, decode) = (ok_servers(1).await, ok_servers(2).await);
    decode[1].stop_listening().await;
    let process = RouterProcess::start(
        &prefill[0].url(),
        &decode[0].url(),
        &["--decode", &decode[1].url(), "--policy", "round_robin", "--access-log"],
    )
    .await;
    let response = process.client().await.post(GENERATE, BODY).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    let line = process.line(" path=/generate ").await;
    // Of three copies one or two are given to the server that is down, and sent again to the other one.
    let retries = line.matches("decode_connect").count();
    assert!(line.contains(&format!(" samples=3 attempts={} retried=", 3 + retries)), "{line}");
    assert!((1..=2).contains(&retries), "{line}");
    assert_eq!(decode[0].requests().len(), 3);
}

#[tokio::test]
async fn a_request_for_several_samples_is_one_line_of_the_log_and_of_a_trace() {
    let (prefill, decode) = (ok_servers(1).await, ok_servers(1).await);
    let trace = kit::program::Folder::new("samples-trace");
    let file = trace.path("trace.jsonl").to_string_lossy().into_owned();
    let args = ["--access-log", "--trace-log", &file];
    let process = RouterProcess::between(&prefill[0], &decode[0], &args).await;
    let response = process.client().await.post(GENERATE, BODY).await;
    assert_eq!(response.status(), 200);
    let line = process.line(" path=/generate ").await;
    assert!(line.contains(" samples=3 attempts=3 streaming=false "), "{line}");
    assert!(line.contains(&format!(" bytes_in={} bytes_out={} ", BODY.len(), response.body.len())), "{line}");
    assert_eq!(process.lines().iter().filter(|line| line.contains(" path=/generate ")).count(), 1);
    process.stop().await;
    let lines = std::fs::read_to_string(&file).expect("a trace");
    assert_eq!(lines.lines().count(), 1, "{lines}");
}

/// Waits for all tasks. Returns the responses, and the most requests that a server had meanwhile.
async fn watched<T: Send + 'static>(
    router: &Router,
    servers: [&ScriptedServer; 2],
    tasks: Vec<tokio::task::JoinHandle<T>>,
) -> (Vec<T>, usize) {
    let servers = servers.map(|server| router.backend(server));
    let mut most = 0;
    kit::with_timeout("all responses", async {
        while tasks.iter().any(|task| !task.is_finished()) {
            most = servers.iter().map(|server| server.in_flight()).fold(most, usize::max);
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut responses = Vec::new();
    for task in tasks {
        responses.push(task.await.expect("no panic"));
    }
    (responses, most)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_many_samples_end_where_servers_take_one_at_a_time() {
    const REQUESTS: usize = 3;
    for worker_threads in [1, 2] {
        let prefill = ScriptedServer::always(json("200 OK", WHOLE)).await;
        let decode = ScriptedServer::start(|seen| {
            let is_stream = seen.json()["stream"] == true;
            let response = if is_stream { short_stream() } else { json("200 OK", WHOLE) };
            vec![Step::Pause(Duration::from_millis(2)), Step::Send(response)]
        })
        .await;
        let options = |config: MiniLbConfig| {
            let config = config.max_in_flight_per_prefill(1).max_in_flight_per_decode(1);
            config.worker_threads(worker_threads).queue_size(8).max_samples(16)
        };
        let router = Router::start_with(&[&prefill], &[&decode], options).await;
        let mut tasks = Vec::new();
        for number in 0..REQUESTS {
            let mut client = router.client().await;
            let body = format!(r#"{{"text":"a","stream":{},"sampling_params":{{"n":16}}}}"#, number == 1);
            tasks.push(tokio::spawn(async move { client.post(GENERATE, body).await }));
        }
        let (responses, most) = watched(&router, [&prefill, &decode], tasks).await;
        for response in responses {
            assert_eq!((response.status(), response.complete), (200, true), "{}", response.text());
        }
        assert_eq!(decode.requests().len(), 16 * REQUESTS);
        // Only a request that has lost its place to another goes above the cap, with one copy.
        assert!(most <= REQUESTS, "{most}");
        router.wait_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_wait_for_capacity() {
    let prefill = ScriptedServer::always(json("200 OK", WHOLE)).await;
    let decode = ScriptedServer::start(|_| {
        vec![Step::Pause(Duration::from_millis(2)), Step::Send(json("200 OK", WHOLE))]
    })
    .await;
    let capped = |config: MiniLbConfig| config.max_in_flight_per_prefill(2).max_in_flight_per_decode(2);
    let router = Router::start_with(&[&prefill], &[&decode], capped).await;
    let mut client = router.client().await;
    let body = r#"{"text":"a","sampling_params":{"n":9}}"#;
    let task = tokio::spawn(async move { client.post(GENERATE, body).await });
    let (responses, most) = watched(&router, [&prefill, &decode], vec![task]).await;
    assert_eq!(responses[0].status(), 200, "{}", responses[0].text());
    assert_eq!((decode.requests().len(), most), (9, 2));
    router.wait_idle().await;
}

#[tokio::test]
async fn copies_wait_until_the_prompt_of_the_first_is_in_its_prefill_server() {
    for (length, stream) in [(10_000, false), (10_000, true), (10, false)] {
        let computed = Gate::new();
        let opened = computed.clone();
        let prefill = ScriptedServer::start(move |_| {
            vec![Step::Wait(opened.clone()), Step::Send(json("200 OK", WHOLE))]
        })
        .await;
        let decode = ScriptedServer::start({
            let computed = computed.clone();
            move |_| {
                let response = if stream { short_stream() } else { json("200 OK", WHOLE) };
                vec![Step::Wait(computed.clone()), Step::Send(response)]
            }
        })
        .await;
        let options = |config: MiniLbConfig| config.prefill_policy(CacheAware::new());
        let router = Router::start_with(&[&prefill], &[&decode], options).await;
        let mut client = router.client().await;
        let text = "a".repeat(length);
        let body = format!(r#"{{"text":"{text}","stream":{stream},"sampling_params":{{"n":4}}}}"#);
        client.send_request("POST", GENERATE, &[], body.as_bytes()).await;
        if length > 1_000 {
            prefill.wait_for_requests(1).await;
            decode.wait_for_requests(1).await;
            // Another request passes the router in the meantime, and the copies are still not there.
            let mut other = router.client().await;
            other.send_request("POST", GENERATE, &[], br#"{"text":"b"}"#).await;
            prefill.wait_for_requests(2).await;
            assert_eq!(prefill.requests().len(), 2);
        } else {
            prefill.wait_for_requests(4).await;
        }
        computed.open();
        assert_eq!(client.response().await.status(), 200);
        prefill.wait_for_requests(if length > 1_000 { 5 } else { 4 }).await;
        let copies = prefill.requests().iter().filter(|seen| seen.body.len() > 60 + length).count();
        assert_eq!(copies, 4);
    }
}

#[tokio::test]
async fn copies_go_at_once_where_the_policy_sends_them_to_other_servers_anyway() {
    let now = Gate::new();
    let script = |now: &Gate| {
        let opened = now.clone();
        move |_: &ReceivedRequest| vec![Step::Wait(opened.clone()), Step::Send(json("200 OK", WHOLE))]
    };
    let prefill = [ScriptedServer::start(script(&now)).await, ScriptedServer::start(script(&now)).await];
    let decode = ScriptedServer::start(script(&now)).await;
    let router = router_with(&prefill, std::slice::from_ref(&decode), |config| {
        // What decode's policy wants to know of requests is no reason.
        config.prefill_policy(RoundRobin::default()).decode_policy(ConsistentHash)
    })
    .await;
    let mut client = router.client().await;
    let body = format!(r#"{{"text":"{}","sampling_params":{{"n":4}}}}"#, "a".repeat(10_000));
    client.send_request("POST", GENERATE, &[], body.as_bytes()).await;
    prefill[0].wait_for_requests(2).await;
    prefill[1].wait_for_requests(2).await;
    now.open();
    assert_eq!(client.response().await.status(), 200);
}

#[tokio::test]
async fn a_silent_stream_of_several_samples_gets_comments_before_the_first_copy_responds() {
    let prefill = ok_servers(1).await;
    let begin = Gate::new();
    let opened = begin.clone();
    let decode =
        ScriptedServer::start(move |_| vec![Step::Wait(opened.clone()), Step::Send(short_stream())]).await;
    let keep_alive = |config: MiniLbConfig| config.stream_keepalive(Duration::from_millis(50));
    let router = router_with(&prefill, std::slice::from_ref(&decode), keep_alive).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], STREAM.as_bytes()).await;
    assert_eq!(client.head().await.start_line, "HTTP/1.1 200 OK");
    client.read_until(": keep-alive\n\n").await;
    client.read_until(": keep-alive\n\n").await;
    begin.open();
    let rest = client.read_until("data: [DONE]\n\n").await;
    for index in 0..3 {
        assert!(rest.contains(&format!("\"index\":{index}")), "{rest}");
    }
    router.wait_idle().await;
}

#[tokio::test]
async fn what_the_copies_of_a_response_hold_is_bounded_and_counted() {
    let text = "x".repeat(4_000);
    let prefill = ok_servers(1).await;
    let last = Gate::new();
    let opened = last.clone();
    let large = WHOLE.replace("hi", &text);
    let decode = ScriptedServer::start(numbered(move |copy| {
        let send = Step::Send(json("200 OK", &large));
        if copy % 3 == 2 { vec![Step::Wait(opened.clone()), send] } else { vec![send] }
    }))
    .await;
    let limited = |config: MiniLbConfig| config.max_merge_size(10_000);
    let router = router_with(&prefill, std::slice::from_ref(&decode), limited).await;
    let mut client = router.client().await;
    client.send_request("POST", GENERATE, &[], BODY.as_bytes()).await;
    kit::with_timeout("two bodies to be held", async {
        while router.buffered_bytes() < 8_000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    last.open();
    let response = client.response().await;
    assert_eq!((response.status(), &*response.error_code()), (502, "decode_answer_too_large"));
    router.wait_buffered(0).await;
    router.wait_idle().await;
}

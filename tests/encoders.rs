//! Encoders: registered with prefill servers, probed, and what happens while there is none. Mostly the built
//! program between simulated servers.
//!
//! Multi-threaded tests: reading the program's log blocks a thread, and the servers need another.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::media::{data_uri, png};
use kit::program::{Folder, Program, client, free_port};
use kit::{Client, Gate, Response, Router, ScriptedServer, Step, json, ok_server, with_timeout};
use loadtest::sim::{EncoderConfig, Sim, SimConfig};
use mini_lb::MiniLbConfig;
use serde_json::{Value, json as value};

const TEXT: &str = r#"{"messages":[{"role":"user","content":"what is an image_url?"}],"max_tokens":3}"#;
/// Of the router under test, where it runs in the test's own process.
const INTERVAL: Duration = Duration::from_millis(30);

/// A chat request with a picture.
fn picture(stream: bool) -> String {
    let part = value!({ "type": "image_url", "image_url": { "url": data_uri("image/png", &png(8, 8)) } });
    let messages = value!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, part] }]);
    value!({ "messages": messages, "max_tokens": 3, "stream": stream }).to_string()
}

/// Simulated times are a tenth of SGLang's.
fn quick(config: SimConfig) -> SimConfig {
    SimConfig { time_scale: 0.1, ..config }
}

async fn prefill() -> Sim {
    let config = SimConfig { language_only: true, ..SimConfig::prefill() };
    Sim::start(quick(config)).await.expect("free ports")
}

/// The same server again, on the same ports.
async fn restart(server: Sim) -> Sim {
    let (addr, bootstrap_port) = (server.addr(), server.bootstrap_port());
    let encoder_bootstrap_port = server.encoder_bootstrap_port();
    server.shutdown().await;
    let language_only = encoder_bootstrap_port.is_some();
    let of_role = if language_only { SimConfig::prefill() } else { SimConfig::encoder() };
    let config =
        SimConfig { addr: Some(addr), bootstrap_port, language_only, encoder_bootstrap_port, ..of_role };
    Sim::start(quick(config)).await.expect("the ports are still free")
}

async fn encoder() -> Sim {
    Sim::start(quick(SimConfig::encoder())).await.expect("a free port")
}

async fn decode() -> Sim {
    Sim::start(quick(SimConfig::decode())).await.expect("a free port")
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    with_timeout(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// The built program between simulated servers, with `encoders`.
struct Setup {
    prefill: Sim,
    decode: Sim,
    program: Program,
    port: u16,
    admin: u16,
}

impl Setup {
    async fn start(encoders: &[&str], args: &[&str]) -> Self {
        let (prefill, decode) = (prefill().await, decode().await);
        let (port, admin) = (free_port(), free_port());
        let listening = [port, admin].map(|port| port.to_string());
        let bootstrap = prefill.bootstrap_port().unwrap().to_string();
        let registry = prefill.encoder_bootstrap_port().unwrap().to_string();
        let (prefill_url, decode_url) = (prefill.url(), decode.url());
        let mut all =
            vec!["--host", "127.0.0.1", "--port", &listening[0], "--prometheus-port", &listening[1]];
        all.extend(["--prefill", &prefill_url, &bootstrap, "--decode", &decode_url]);
        all.extend(["--encoder-bootstrap-port", &registry, "--shutdown-lame-duck-secs", "0"]);
        encoders.iter().for_each(|url| all.extend(["--encode", url]));
        all.extend(args);
        let program = Program::start(all);
        program.wait_for("metrics and status on ");
        Self { prefill, decode, program, port, admin }
    }

    async fn client(&self) -> Client {
        client(self.port).await
    }

    async fn post(&self, body: &str) -> Response {
        self.client().await.post("/v1/chat/completions", body).await
    }

    async fn metrics(&self) -> String {
        client(self.admin).await.get("/metrics").await.text().to_owned()
    }

    async fn wait_registered(&self, urls: &[&str]) {
        until("the prefill server's list of encoders", async || self.prefill.encoder_urls() == urls).await;
    }

    async fn wait_ready(&self) {
        until("a ready router", async || {
            let ready = self.client().await.get("/ready").await;
            ready.status() == 200 && ready.body.is_empty()
        })
        .await;
    }
}

async fn workers(client: &mut Client) -> Value {
    client.get("/workers").await.json()
}

async fn delete(client: &mut Client, target: &str) -> Response {
    client.send_request("DELETE", target, &[], b"").await;
    client.response().await
}

/// The entries of encoders.
fn encode_entries(workers: &Value) -> Vec<Value> {
    let all = workers["workers"].as_array().unwrap();
    all.iter().filter(|entry| entry["worker_type"] == "encode").cloned().collect()
}

/// The status of the next `/encode`, and what holds it.
type Plan = Arc<Mutex<(&'static str, Gate)>>;

async fn planned_encoder(plan: &Plan) -> ScriptedServer {
    let plan = Arc::clone(plan);
    ScriptedServer::start(move |seen| {
        if seen.target() != "/encode" {
            return vec![Step::Send(json("200 OK", "null")), Step::Close];
        }
        let (status, gate) = plan.lock().unwrap().clone();
        let body = r#"{"status":"error","message":"no such image","req_id":"r"}"#;
        vec![Step::Wait(gate), Step::Send(json(status, body)), Step::Close]
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoder_that_fails_is_told_by_prefill_and_decode_is_closed() {
    let plan = Plan::new(Mutex::new(("200 OK", Gate::new())));
    let encoder = planned_encoder(&plan).await;
    let setup = Setup::start(&[&encoder.url()], &[]).await;
    setup.wait_registered(&[&encoder.url()]).await;
    setup.wait_ready().await;
    let mut closed = 0;
    for (status, text) in
        [(400, "400 Bad"), (500, "500 Internal"), (503, "503 Unavailable"), (504, "504 Timeout")]
    {
        for stream in [false, true] {
            let gate = Gate::new();
            *plan.lock().unwrap() = (text, gate.clone());
            let body = picture(stream);
            let fails = async {
                until("decode's leg", async || setup.decode.stats().in_flight == 1).await;
                gate.open();
            };
            let (response, ()) = tokio::join!(setup.post(&body), fails);
            assert_eq!(response.status(), status, "{}", response.text());
            assert!(response.complete && response.text().contains("no such image"), "{}", response.text());
            // Decode would wait for prefill for 30 s of these: what ends it is the router.
            until("decode's end", async || setup.decode.stats().in_flight == 0).await;
            closed += 1;
            assert_eq!(setup.decode.stats().aborted, closed);
        }
    }
    assert_eq!(setup.post(TEXT).await.status(), 200, "text needs no encoder");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoder_encodes_for_prefill_and_one_that_is_gone_is_told_by_it() {
    let encoder = encoder().await;
    let setup = Setup::start(&[&encoder.url()], &[]).await;
    setup.wait_registered(&[&encoder.url()]).await;
    setup.wait_ready().await;
    for stream in [false, true] {
        assert_eq!(setup.post(&picture(stream)).await.status(), 200);
    }
    let requests = encoder.recorded_requests();
    let encodes: Vec<Value> = requests
        .iter()
        .filter(|seen| seen.path_and_query == "/encode")
        .map(|seen| serde_json::from_slice(&seen.body).unwrap())
        .collect();
    assert_eq!(encodes.len(), 2, "prefill's, and not decode's");
    let wanted = value!([data_uri("image/png", &png(8, 8))]);
    assert_eq!((&encodes[0]["modality"], &encodes[0]["mm_items"]), (&"IMAGE".into(), &wanted));
    encoder.fail_encodes(Some(500));
    assert_eq!(setup.post(&picture(false)).await.status(), 500);
    encoder.fail_encodes(None);
    let encoder = restart(encoder).await;
    assert_eq!(setup.post(&picture(false)).await.status(), 200, "the list has it still");
    let lost = encoder.url();
    encoder.shutdown().await;
    // Until the router has noticed.
    let response = setup.post(&picture(false)).await;
    assert_eq!(response.status(), 502);
    assert!(
        response.text().contains(&format!("Failed to dispatch to encoder {lost}")),
        "{}",
        response.text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_no_encoder_is_up_media_get_503_at_once_and_text_goes_on() {
    let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let url = format!("http://{address}");
    let setup = Setup::start(&[&url], &[]).await;
    setup.program.wait_for("no encoder is up");
    until("healthy servers", async || setup.client().await.get("/ready").await.status() == 200).await;
    let ready = setup.client().await.get("/ready").await.json();
    assert_eq!(ready["status"], "degraded");
    let metrics = setup.metrics().await;
    assert!(metrics.contains(&format!("mini_lb_encoder_up{{encoder=\"{url}\"}} 0\n")), "{metrics}");
    let mut client = setup.client().await;
    assert_eq!(client.post("/v1/chat/completions", TEXT).await.status(), 200);
    let sent = setup.prefill.stats().requests;
    let response = client.post("/v1/chat/completions", picture(true)).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "encoder_unavailable"));
    assert_eq!(response.head.header("retry-after"), Some("1"));
    assert!(response.text().contains("no encoder is up"), "{}", response.text());
    // At once: the rest of the body is not waited for.
    let mut early = setup.client().await;
    early.send("POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 50000000\r\n\r\n").await;
    early
        .send(r#"{"messages":[{"content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,"#)
        .await;
    let response = early.response().await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "encoder_unavailable"));
    // Probes and descriptions only.
    let is_generation = |seen: &loadtest::sim::RecordedRequest| seen.method == "POST";
    let generations = setup.prefill.recorded_requests().iter().filter(|seen| is_generation(seen)).count();
    assert_eq!(generations, 1, "of {sent} and more");

    let config = SimConfig { addr: Some(address), ..SimConfig::encoder() };
    let encoder = Sim::start(quick(config)).await.expect("the port is still free");
    setup.program.wait_for(&format!("encoder {url} is healthy"));
    setup.wait_registered(&[&encoder.url()]).await;
    assert_eq!(client.post("/v1/chat/completions", picture(true)).await.status(), 200);
    setup.wait_ready().await;
    let metrics = setup.metrics().await;
    for line in [
        format!("mini_lb_encoder_up{{encoder=\"{url}\"}} 1\n"),
        format!("mini_lb_encoder_registrations{{encoder=\"{url}\",state=\"registered\"}} 1\n"),
        format!("mini_lb_encoder_registrations{{encoder=\"{url}\",state=\"refused\"}} 0\n"),
        "mini_lb_errors_total{code=\"encoder_unavailable\"} 2\n".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_server_that_restarts_gets_its_encoders_again() {
    let (encoder, other) = (encoder().await, encoder().await);
    let urls = [encoder.url(), other.url()];
    let mut setup = Setup::start(&[&urls[0], &urls[1]], &[]).await;
    setup.wait_registered(&[&urls[0], &urls[1]]).await;
    for _ in 0..2 {
        setup.prefill = restart(setup.prefill).await;
        setup.wait_registered(&[&urls[0], &urls[1]]).await;
    }
    setup.wait_ready().await;
    assert_eq!(setup.post(&picture(false)).await.status(), 200);
    // Other routers and the prefill server go on to use them.
    setup.program.send("TERM");
    assert_eq!(setup.program.exit_code(), Some(0));
    assert_eq!(setup.prefill.encoder_urls(), urls);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_registers_new_encoders_and_unregisters_removed_ones() {
    let (prefill, decode, first, second) =
        (prefill().await, decode().await, encoder().await, encoder().await);
    let file = |encoders: &[&Sim]| {
        let urls: Vec<String> = encoders.iter().map(|encoder| encoder.url()).collect();
        format!(
            "prefill = [[\"{}\", {}]]\ndecode = [\"{}\"]\nencode = {urls:?}\nencoder_bootstrap_port = {}\n",
            prefill.url(),
            prefill.bootstrap_port().unwrap(),
            decode.url(),
            prefill.encoder_bootstrap_port().unwrap()
        )
    };
    let (folder, port) = (Folder::new("encoders"), free_port().to_string());
    let path = folder.put("mini-lb.toml", &file(&[&first]));
    let path = path.to_str().unwrap();
    let args = ["--config", path, "--host", "127.0.0.1", "--port", &port, "--prometheus-port", "0"];
    let program = Program::start(args);
    program.wait_for("listening on ");
    let is_listed = async |urls: &[String]| prefill.encoder_urls() == urls;
    until("the first", async || is_listed(&[first.url()]).await).await;
    folder.put("mini-lb.toml", &file(&[&second, &first]));
    assert!(program.reload().contains("encode"));
    until("both", async || is_listed(&[first.url(), second.url()]).await).await;
    folder.put("mini-lb.toml", &file(&[&second]));
    program.reload();
    until("the second", async || is_listed(&[second.url()]).await).await;
    folder.put("mini-lb.toml", &file(&[]));
    program.reload();
    until("none", async || is_listed(&[]).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encoders_come_and_go_through_the_workers_api() {
    let (first, second) = (encoder().await, encoder().await);
    let setup = Setup::start(&[&first.url()], &[]).await;
    setup.wait_registered(&[&first.url()]).await;
    let mut operator = setup.client().await;
    let order = |url: &str, kind: &str| value!({ "url": url, "worker_type": kind, "x": 1 }).to_string();
    let added = operator.post("/workers", order(&second.url(), "encode")).await;
    assert_eq!((added.status(), &added.json()["ignored"]), (202, &value!(["x"])));
    let id = added.json()["worker_id"].as_str().unwrap().to_owned();
    assert_eq!(added.head.header("location"), Some(&*format!("/workers/{id}")));
    setup.wait_registered(&[&first.url(), &second.url()]).await;
    // Again: it is there already.
    let again = operator.post("/workers", order(&second.url(), "encode")).await;
    assert_eq!((again.status(), &again.json()["worker_id"]), (202, &value!(id)));
    let shown = operator.get(&format!("/workers/{id}")).await.json();
    let registrations = value!([{ "prefill": setup.prefill.url(), "state": "registered" }]);
    assert_eq!(
        shown,
        value!({
            "id": id, "url": second.url(), "worker_type": "encode", "is_healthy": true, "status": "healthy",
            "load": null, "connection_mode": "http", "source": "api", "bootstrap_host": null,
            "bootstrap_port": null, "dp_size": null, "disaggregation_mode": null,
            "registrations": registrations,
        })
    );
    let all = workers(&mut operator).await;
    assert_eq!((&all["stats"]["encode_count"], &all["total"]), (&2.into(), &4.into()));
    assert_eq!(encode_entries(&all)[0]["source"], "config");
    // One address is one server, of one kind.
    for (url, kind) in [(setup.decode.url(), "encode"), (first.url(), "decode"), (first.url(), "prefill")] {
        let refused = operator.post("/workers", order(&url, kind)).await;
        assert_eq!((refused.status(), refused.error_code().as_str()), (409, "worker_exists"));
    }
    // What others have registered stays.
    let registry = ([127, 0, 0, 1], setup.prefill.encoder_bootstrap_port().unwrap()).into();
    let foreign = r#"{"url":"http://127.0.0.9:9"}"#;
    assert_eq!(Client::connect(registry).await.post("/register_encoder_url", foreign).await.status(), 200);
    // By its id, and by its URL.
    let removed = delete(&mut operator, &format!("/workers/{id}")).await;
    assert_eq!((removed.status(), &removed.json()["status"]), (200, &"removed".into()));
    setup.wait_registered(&[&first.url(), "http://127.0.0.9:9"]).await;
    let target = format!("/workers/{}", first.url().replace(':', "%3A").replace('/', "%2F"));
    assert_eq!(delete(&mut operator, &target).await.status(), 200);
    setup.wait_registered(&["http://127.0.0.9:9"]).await;
    assert_eq!(delete(&mut operator, &target).await.status(), 404);
    assert_eq!(workers(&mut operator).await["stats"]["encode_count"], 0);
    assert_eq!(
        setup.post(&picture(false)).await.status(),
        502,
        "prefill's own affair: the other's is not there"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_name_names_encoders() {
    let encoder = encoder().await;
    let name = format!("localhost:{}", encoder.addr().port());
    let setup = Setup::start(&[], &["--encode-dns", &name, "--dns-interval-secs", "1"]).await;
    // `localhost` may have a second address, on which nothing listens: that is never registered.
    let url = encoder.url();
    until("the encoder", async || setup.prefill.encoder_urls().contains(&url)).await;
    let all = workers(&mut setup.client().await).await;
    let entry = encode_entries(&all).into_iter().find(|entry| entry["url"] == url.as_str()).unwrap();
    assert_eq!(entry["source"], "dns");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_prefill_server_is_asked_at_the_port_that_it_says() {
    let (first, second, decode, encoder) =
        (prefill().await, prefill().await, decode().await, encoder().await);
    let whole = Sim::start(quick(SimConfig::prefill())).await.expect("free ports");
    let port = free_port().to_string();
    let (urls, url) = ([first.url(), second.url(), whole.url()], encoder.url());
    let bootstrap = [&first, &second, &whole].map(|server| server.bootstrap_port().unwrap().to_string());
    let decode_url = decode.url();
    let mut args = vec!["--host", "127.0.0.1", "--port", &port, "--prometheus-port", "0", "--encode", &url];
    args.extend(["--decode", &decode_url]);
    for (url, bootstrap) in urls.iter().zip(&bootstrap) {
        args.extend(["--prefill", url, bootstrap]);
    }
    let program = Program::start(args);
    // One that encodes itself is known by its own word.
    let line = program.wait_for("takes no encoders");
    assert!(line.contains(&urls[2]) && line.contains("it is not language-only"), "{line}");
    for server in [&first, &second] {
        until("a registration", async || server.encoder_urls() == [url.clone()]).await;
    }
    let mut operator = client(port.parse().unwrap()).await;
    let mut states = Vec::new();
    until("all states", async || {
        let all = workers(&mut client(port.parse().unwrap()).await).await;
        let told = encode_entries(&all)[0]["registrations"].as_array().unwrap().clone();
        told.iter().filter(|one| one["state"] == "registered").count() == 2
    })
    .await;
    for one in encode_entries(&workers(&mut operator).await)[0]["registrations"].as_array().unwrap() {
        states.push((one["prefill"].as_str().unwrap().to_owned(), one["state"].as_str().unwrap().to_owned()));
    }
    let state = |url: &String| states.iter().find(|(own, _)| own == url).map(|(_, state)| state.as_str());
    let expected = [Some("registered"), Some("registered"), Some("refused")];
    assert_eq!(urls.each_ref().map(state), expected);
}

/// A router in the test's own process, whose periods are short.
async fn router(
    prefill: &ScriptedServer,
    encoder: &str,
    registry: u16,
    change: fn(MiniLbConfig) -> MiniLbConfig,
) -> Router {
    let decode = ok_server().await;
    let config = MiniLbConfig::new("127.0.0.1", 1, vec![(prefill.url(), Some(1))], vec![decode.url()], 60)
        .worker_threads(1)
        .shutdown_lame_duck(Duration::ZERO)
        .health_check_interval(INTERVAL)
        .encoder(encoder)
        .encoder_bootstrap_port(registry);
    let router = Router::start_with(&[], &[], |_| change(config)).await;
    // It refuses connections from now on, and no test sends it anything.
    drop(decode);
    router
}

/// A list that says nothing but what it is told to.
async fn registry(listed: impl Fn() -> String + Send + Sync + 'static) -> ScriptedServer {
    ScriptedServer::start(move |seen| {
        let body = if seen.target() == "/list_encoder_urls" { listed() } else { "OK".to_owned() };
        vec![Step::Send(json("200 OK", &body))]
    })
    .await
}

#[tokio::test]
async fn an_empty_list_is_filled_in_the_period_in_which_it_is_seen() {
    let (prefill, encoder) = (ok_server().await, ok_server().await);
    let url = encoder.url();
    let full = format!(r#"{{"encoder_urls":["http://x:1","{url}/"]}}"#);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    // Each third answer is that of a server which has just started.
    let list = registry(move || match counted.fetch_add(1, SeqCst) % 3 {
        0 => r#"{"encoder_urls":[]}"#.to_owned(),
        _ => full.clone(),
    })
    .await;
    let _router = router(&prefill, &url, list.address().port(), |config| config).await;
    list.wait_for_requests(12).await;
    let (mut asked, mut seen) = (0, list.requests().into_iter());
    while let Some(request) = seen.next() {
        assert_eq!(request.head.start_line, "GET /list_encoder_urls HTTP/1.1");
        if asked % 3 == 0
            && let Some(next) = seen.next()
        {
            assert_eq!(next.head.start_line, "POST /register_encoder_url HTTP/1.1");
            assert_eq!(next.json(), value!({ "url": url }));
        }
        asked += 1;
    }
}

#[tokio::test]
async fn a_prefill_server_without_the_port_is_no_less_healthy() {
    let (prefill, encoder) = (ok_server().await, ok_server().await);
    let router = router(&prefill, &encoder.url(), free_port(), |config| config).await;
    let state = async || {
        let all = workers(&mut router.client().await).await;
        encode_entries(&all)[0]["registrations"][0]["state"].clone()
    };
    until("the refusal", async || state().await == "refused").await;
    let all = workers(&mut router.client().await).await;
    assert_eq!(all["workers"][0]["is_healthy"], true);
    assert_eq!(encode_entries(&all)[0]["is_healthy"], true);
}

#[tokio::test]
async fn a_busy_encoder_is_not_called_dead() {
    let held = Gate::new();
    let (gate, answered) = (held.clone(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&answered);
    // The first health check succeeds; the second one waits behind all that there is to encode.
    let encoder = ScriptedServer::start(move |_| match count.fetch_add(1, SeqCst) {
        1 => vec![Step::Wait(gate.clone()), Step::Send(json("200 OK", ""))],
        _ => vec![Step::Send(json("200 OK", ""))],
    })
    .await;
    let prefill = ok_server().await;
    let list = registry(|| r#"{"encoder_urls":[]}"#.to_owned()).await;
    let impatient = |config: MiniLbConfig| {
        config.health_check_timeout(INTERVAL).health_failure_threshold(1).connect_timeout(INTERVAL * 10)
    };
    let router = router(&prefill, &encoder.url(), list.address().port(), impatient).await;
    encoder.wait_for_requests(2).await;
    // For many times as long as a server may take for a health check.
    let seen = list.requests().len();
    list.wait_for_requests(seen + 100).await;
    assert_eq!(answered.load(SeqCst), 2, "one check at a time");
    let mut client = router.client().await;
    let status = encode_entries(&workers(&mut client).await)[0]["status"].clone();
    assert_eq!(status, "healthy");
    held.open();
    encoder.wait_for_requests(4).await;
    assert_eq!(encode_entries(&workers(&mut client).await)[0]["status"], "healthy");
}

#[tokio::test]
async fn an_encoder_that_dies_takes_media_with_it_until_it_is_back() {
    let encoder = ok_server().await;
    let address = encoder.address();
    let prefill = ok_server().await;
    let list = registry(|| r#"{"encoder_urls":[]}"#.to_owned()).await;
    let router = router(&prefill, &encoder.url(), list.address().port(), |config| config).await;
    let mut client = router.client().await;
    let status = async || {
        let all = workers(&mut router.client().await).await;
        encode_entries(&all)[0]["status"].clone()
    };
    until("a healthy encoder", async || status().await == "healthy").await;
    encoder.stop_listening().await;
    drop(encoder);
    until("an unhealthy encoder", async || status().await == "unhealthy").await;
    let refused = [
        ("/v1/chat/completions", picture(false)),
        ("/v1/chat/completions", picture(true).replace("image_url", r"image\u005furl")),
        ("/v1/responses", r#"{"input":[{"content":[{"type":"input_image","image_url":"data:"}]}]}"#.into()),
        ("/v1/messages", r#"{"messages":[{"content":[{"type":"image","source":{}}]}]}"#.into()),
        ("/generate", r#"{"text":"a","image_data":["data:"]}"#.into()),
        ("/generate", r#"{"audio_data":"data:","text":"a"}"#.into()),
    ];
    for (path, body) in &refused {
        let response = client.post(path, body).await;
        assert_eq!(
            (response.status(), response.error_code().as_str()),
            (503, "encoder_unavailable"),
            "{path}"
        );
    }
    // It is prefill's or decode's affair what becomes of these; the router finds no media in them.
    let served = [
        ("/v1/chat/completions", TEXT.to_owned()),
        ("/v1/chat/completions", r#"{"messages":[{"content":"{\"type\":\"image_url\"}"}]}"#.into()),
        ("/v1/chat/completions", r#"{"messages":[],"tools":[{"type":"image_url"}]}"#.into()),
        ("/v1/completions", r#"{"prompt":"image_url"}"#.into()),
        ("/generate", r#"{"text":"image_data","image_data":null,"video_data":[]}"#.into()),
    ];
    for (path, body) in &served {
        let response = client.post(path, body).await;
        assert_ne!(response.error_code(), "encoder_unavailable", "{path} {body}");
    }
    let _encoder = ScriptedServer::start_at(address, |_| vec![Step::Send(json("200 OK", ""))]).await;
    until("a healthy encoder", async || status().await == "healthy").await;
    for (path, body) in &refused {
        assert_ne!(client.post(path, body).await.error_code(), "encoder_unavailable", "{path}");
    }
}

#[tokio::test]
async fn an_encoder_that_cannot_encode_its_dummy_is_unhealthy_after_the_threshold() {
    let config = SimConfig { encoder: EncoderConfig::default(), ..SimConfig::encoder() };
    let encoder = Sim::start(quick(config)).await.expect("a free port");
    let (prefill, list) = (ok_server().await, registry(|| r#"{"encoder_urls":[]}"#.to_owned()).await);
    let router = router(&prefill, &encoder.url(), list.address().port(), |config| config).await;
    let status = async || {
        let all = workers(&mut router.client().await).await;
        encode_entries(&all)[0]["status"].clone()
    };
    until("a healthy encoder", async || status().await == "healthy").await;
    encoder.fail_health(Some(503));
    // Of a server that generates, 503 would mean that it leaves.
    until("an unhealthy encoder", async || {
        let status = status().await;
        assert_ne!(status, "draining");
        status == "unhealthy"
    })
    .await;
    encoder.fail_health(None);
    until("a healthy encoder", async || status().await == "healthy").await;
}

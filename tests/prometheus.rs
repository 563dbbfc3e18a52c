//! `docs/alerts.yaml` and `docs/grafana.json` in a real Prometheus that scrapes the built router under load,
//! one router for each fault: each alert fires when its fault is made and ends after it, a router without a
//! fault has no alert, and each query of the dashboard returns numbers.
//!
//! The rules' durations are divided by 60, and so is the interval of scrapes: see `prometheus/server.rs`.
//! `promtool test rules tests/metrics/alerts.yaml` checks thresholds and texts at their real durations.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

#[allow(dead_code, reason = "`kubernetes.rs` uses all of it")]
#[path = "kubernetes/api_server.rs"]
mod api_server;
mod kit;
#[path = "prometheus/load.rs"]
mod load;
#[path = "prometheus/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use api_server::{ApiServer, Pod};
use kit::{Client, RouterProcess, ScriptedServer, Step, json};
use load::{Load, generate};
use loadtest::sim::{Role, Sim, SimConfig};
use server::Prometheus;

/// Requests a second, where it does not matter.
const RATE: u32 = 20;
/// Far longer than the test takes: a server with this time hangs.
const FOREVER: Duration = Duration::from_secs(3_600);

fn quick(role: Role) -> SimConfig {
    SimConfig { role, record: false, time_scale: 0.1, ..SimConfig::default() }
}

async fn start(config: SimConfig) -> Sim {
    Sim::start(config).await.expect("a free port")
}

async fn start_all<const N: usize>(role: Role) -> [Sim; N] {
    let mut started = Vec::new();
    for _ in 0..N {
        started.push(start(quick(role)).await);
    }
    started.try_into().map_err(drop).expect("as many")
}

/// A server that responds after `time`, and while `fails` with 500 to one of three requests.
async fn scripted(time: Duration, fails: &Arc<AtomicBool>) -> ScriptedServer {
    let (fails, count) = (Arc::clone(fails), AtomicUsize::new(0));
    ScriptedServer::start(move |seen| {
        if seen.head.start_line.starts_with("GET") {
            return vec![Step::Send(json("200 OK", "{}"))];
        }
        let is_failure = fails.load(Relaxed) && count.fetch_add(1, Relaxed) % 3 == 0;
        let status = if is_failure { "500 Internal Server Error" } else { "200 OK" };
        // Sooner than its partner's response.
        let time = if is_failure { Duration::ZERO } else { time };
        vec![Step::Pause(time), Step::Send(json(status, kit::OK))]
    })
    .await
}

/// A router, and the name under which Prometheus scrapes it.
struct Router {
    name: &'static str,
    process: RouterProcess,
    metrics: SocketAddr,
}

impl Router {
    async fn start(name: &'static str, servers: &[String], args: &[&str]) -> Self {
        Self::start_in(&[], name, servers, args).await
    }

    /// The same with variables of the environment.
    async fn start_in(
        variables: &[(&str, &str)],
        name: &'static str,
        servers: &[String],
        args: &[&str],
    ) -> Self {
        let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
        let metrics = SocketAddr::from(([127, 0, 0, 1], kit::free_port()));
        let port = metrics.port().to_string();
        let args = [&["--prometheus-port", &port], args].concat();
        let process = RouterProcess::spawn_in(variables, &servers, &args);
        process.line("metrics and status on ").await;
        kit::with_timeout("a ready router", async {
            while process.client().await.get("/ready").await.status() != 200 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        Self { name, process, metrics }
    }

    fn load(&self, rate: u32, request: impl Fn(usize) -> (&'static str, String) + Send + 'static) -> Load {
        Load::start(self.process.address(), rate, request)
    }
}

/// The arguments for simulated pairs.
fn pairs(prefill: &[Sim], decode: &[Sim]) -> Vec<String> {
    let mut args = Vec::new();
    for server in prefill {
        args.extend(["--prefill".to_owned(), server.url(), server.bootstrap_port().unwrap().to_string()]);
    }
    args.extend(decode.iter().flat_map(|server| ["--decode".to_owned(), server.url()]));
    args
}

fn scripted_pair(prefill: &ScriptedServer, decode: &ScriptedServer) -> Vec<String> {
    ["--prefill", &prefill.url(), "8998", "--decode", &decode.url()].map(str::to_owned).to_vec()
}

fn plain(urls: impl IntoIterator<Item = String>) -> Vec<String> {
    ["--worker-urls".to_owned()].into_iter().chain(urls).collect()
}

/// A prompt with a picture.
fn picture() -> (&'static str, String) {
    let url = kit::media::data_uri("image/png", &kit::media::png(8, 8));
    let part = serde_json::json!({ "type": "image_url", "image_url": { "url": url } });
    let body = serde_json::json!({ "messages": [{ "role": "user", "content": [part] }], "max_tokens": 3 });
    ("/v1/chat/completions", body.to_string())
}

/// A router that works, with everything the dashboard shows of such a one.
struct Steady {
    router: Router,
    _servers: ([Sim; 2], [Sim; 2]),
}

impl Steady {
    async fn start() -> Self {
        let ranks = || SimConfig { dp_size: 2, prefix_cache: true, ..quick(Role::Prefill) };
        let prefill = [start(ranks()).await, start(ranks()).await];
        let decode = start_all::<2>(Role::Decode).await;
        let router = Router::start("steady", &pairs(&prefill, &decode), &[]).await;
        Self { router, _servers: (prefill, decode) }
    }

    fn load(&self) -> Load {
        self.router.load(RATE, |number| match number % 4 {
            0 => generate(&format!("{number} {}", "the of and to ".repeat(200)), 4, false),
            1 => ("/generate", r#"{"text":"a","sampling_params":{"n":2,"max_new_tokens":2}}"#.to_owned()),
            _ => generate(&"a long beginning that all share ".repeat(200), 8, true),
        })
    }
}

/// One fault: the router it is made for, and what makes and ends it.
struct Fault<S> {
    router: Router,
    servers: S,
}

impl<S> Fault<S> {
    fn target(&self) -> (&'static str, SocketAddr) {
        (self.router.name, self.router.metrics)
    }
}

/// The only decode server is down.
async fn server_down(prometheus: &Prometheus, fault: Fault<([Sim; 1], [Sim; 1])>) {
    let Fault { router, servers: (_prefill, [decode]) } = fault;
    let _load = router.load(RATE, |_| generate("a", 2, true));
    let (addr, _) = (decode.addr(), decode.shutdown().await);
    let labels = prometheus.fires("MiniLbNoHealthyServer", router.name).await;
    assert_eq!(labels["role"], "decode");
    // For clients that is the same as a server that fails.
    prometheus.fires("MiniLbDecodeFailing", router.name).await;
    let _decode = start(SimConfig { addr: Some(addr), ..quick(Role::Decode) }).await;
    prometheus.ends("MiniLbNoHealthyServer", router.name).await;
    prometheus.ends("MiniLbDecodeFailing", router.name).await;
}

/// Servers answer 500 to a third of the requests.
async fn server_fails(
    prometheus: &Prometheus,
    fault: Fault<(Arc<AtomicBool>, Vec<ScriptedServer>)>,
    alert: &str,
) {
    let Fault { router, servers: (fails, _servers) } = fault;
    let _load = router.load(RATE, |_| generate("a", 2, false));
    fails.store(true, Relaxed);
    prometheus.fires(alert, router.name).await;
    fails.store(false, Relaxed);
    prometheus.ends(alert, router.name).await;
}

/// Bodies that take more than a millisecond to scan and to write.
async fn large_bodies(prometheus: &Prometheus, fault: Fault<Vec<ScriptedServer>>) {
    let Fault { router, servers: _servers } = fault;
    let prompt = "a long prompt ".repeat(200_000);
    let load = router.load(3, move |_| generate(&prompt, 2, false));
    prometheus.fires("MiniLbRouterSlow", router.name).await;
    drop(load);
    prometheus.ends("MiniLbRouterSlow", router.name).await;
}

/// More requests than are admitted and may wait.
async fn too_many_requests(prometheus: &Prometheus, fault: Fault<Vec<ScriptedServer>>) {
    let Fault { router, servers: _servers } = fault;
    let load = router.load(RATE, |_| generate("a", 2, false));
    prometheus.fires("MiniLbQueueFull", router.name).await;
    drop(load);
    prometheus.ends("MiniLbQueueFull", router.name).await;
}

/// One of several servers hangs: what it is given stays there.
async fn one_hangs(prometheus: &Prometheus, fault: Fault<Vec<Sim>>, alert: &str, prompt: usize) {
    let Fault { router, servers: _servers } = fault;
    let prompt = "of ".repeat(prompt / 3);
    let load = router.load(RATE, move |number| generate(&format!("{number} {prompt}"), 2, false));
    prometheus.fires(alert, router.name).await;
    // The clients give up.
    drop(load);
    prometheus.ends(alert, router.name).await;
}

/// The prefill server's cache has nothing of what the router has sent it, and then it does.
async fn no_cache(prometheus: &Prometheus, fault: Fault<(Arc<AtomicBool>, Vec<ScriptedServer>)>) {
    let Fault { router, servers: (is_empty, _servers) } = fault;
    let prompt = "the same words again ".repeat(500);
    let _load = router.load(RATE, move |_| generate(&prompt, 2, false));
    is_empty.store(true, Relaxed);
    prometheus.fires("MiniLbCacheMisjudged", router.name).await;
    is_empty.store(false, Relaxed);
    prometheus.ends("MiniLbCacheMisjudged", router.name).await;
}

/// Idle clients have most of the descriptors.
async fn idle_clients(prometheus: &Prometheus, fault: Fault<([Sim; 1], [Sim; 1])>) {
    const LIMIT: usize = 100;
    let Fault { router, servers: _servers } = fault;
    let (process, limit) = (router.process.id().to_string(), format!("--nofile={LIMIT}"));
    let limited = Command::new("prlimit").args(["--pid", &process, &limit]).status();
    assert!(limited.expect("prlimit is there").success());
    let mut clients = Vec::new();
    for _ in 0..LIMIT * 4 / 5 {
        clients.push(Client::connect(router.process.address()).await);
    }
    prometheus.fires("MiniLbFilesRunOut", router.name).await;
    drop(clients);
    prometheus.ends("MiniLbFilesRunOut", router.name).await;
}

/// The only encoder is broken.
async fn no_encoder(prometheus: &Prometheus, fault: Fault<([Sim; 1], [Sim; 1], Sim)>) {
    let Fault { router, servers: (_prefill, _decode, encoder) } = fault;
    let _load = router.load(RATE, |_| picture());
    encoder.fail_health(Some(503));
    prometheus.fires("MiniLbNoEncoder", router.name).await;
    encoder.fail_health(None);
    prometheus.ends("MiniLbNoEncoder", router.name).await;
}

/// The prefill server's list of encoders answers with errors.
async fn no_registration(prometheus: &Prometheus, fault: Fault<(Registry, [Sim; 1], [Sim; 1], Sim)>) {
    let Fault { router, servers: (registry, _prefill, _decode, encoder) } = fault;
    registry.fails.store(true, Relaxed);
    let labels = prometheus.fires("MiniLbEncoderUnregistered", router.name).await;
    assert_eq!(labels["encoder"], encoder.url());
    registry.fails.store(false, Relaxed);
    prometheus.ends("MiniLbEncoderUnregistered", router.name).await;
}

/// The API server fails, and then answers again.
async fn pods_unseen(prometheus: &Prometheus, fault: Fault<(ApiServer, Vec<Sim>)>) {
    let Fault { router, servers: (api, _servers) } = fault;
    let broken = || Some(api_server::Fault::Status(500, "etcd is down".to_owned()));
    api.set_faults(broken(), broken());
    api.cut_watches();
    prometheus.fires("MiniLbPodsNotFollowed", router.name).await;
    api.set_faults(None, None);
    prometheus.ends("MiniLbPodsNotFollowed", router.name).await;
    // An event that Prometheus sees happen, for the dashboard.
    api.put(Pod { is_ready: false, ..Pod::ready("d-2", "decode", 4) });
    kit::with_timeout("an event in Prometheus", async {
        let query = "rate(mini_lb_kubernetes_events_total[$__rate_interval])";
        while !prometheus.panel_values(query).await.iter().any(|rate| *rate > 0.0) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}

/// Answers as a language-only server's list of encoders, or with 500.
struct Registry {
    fails: Arc<AtomicBool>,
    server: ScriptedServer,
}

impl Registry {
    async fn start(encoder: String) -> Self {
        let fails = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&fails);
        let server = ScriptedServer::start(move |_| {
            let status = if told.load(Relaxed) { "500 Internal Server Error" } else { "200 OK" };
            vec![Step::Send(json(status, &format!(r#"{{"encoder_urls":["{encoder}"]}}"#)))]
        });
        Self { fails, server: server.await }
    }
}

async fn with_hanging(
    name: &'static str,
    servers: Vec<Sim>,
    args: Vec<String>,
    policy: &str,
) -> Fault<Vec<Sim>> {
    Fault { router: Router::start(name, &args, &[policy, "round_robin"]).await, servers }
}

async fn down() -> Fault<([Sim; 1], [Sim; 1])> {
    let servers = (start_all::<1>(Role::Prefill).await, start_all::<1>(Role::Decode).await);
    Fault { router: Router::start("server-down", &pairs(&servers.0, &servers.1), &[]).await, servers }
}

async fn failing_prefill() -> Fault<(Arc<AtomicBool>, Vec<ScriptedServer>)> {
    let fails = Arc::default();
    let prefill = scripted(Duration::ZERO, &fails).await;
    let decode = scripted(Duration::from_millis(50), &Arc::default()).await;
    let router = Router::start("prefill-fails", &scripted_pair(&prefill, &decode), &[]).await;
    Fault { router, servers: (fails, vec![prefill, decode]) }
}

async fn failing_plain() -> Fault<(Arc<AtomicBool>, Vec<ScriptedServer>)> {
    let fails = Arc::default();
    let server = scripted(Duration::ZERO, &fails).await;
    let router = Router::start("plain-fails", &plain([server.url()]), &[]).await;
    Fault { router, servers: (fails, vec![server]) }
}

async fn slow_router() -> Fault<Vec<ScriptedServer>> {
    let servers = vec![
        scripted(Duration::ZERO, &Arc::default()).await,
        scripted(Duration::ZERO, &Arc::default()).await,
    ];
    let router = Router::start("slow-router", &scripted_pair(&servers[0], &servers[1]), &[]).await;
    Fault { router, servers }
}

async fn small_queue() -> Fault<Vec<ScriptedServer>> {
    let time = Duration::from_millis(300);
    let servers = vec![scripted(time, &Arc::default()).await, scripted(time, &Arc::default()).await];
    let limits = ["--max-concurrent-requests", "1", "--queue-size", "1"];
    let router = Router::start("small-queue", &scripted_pair(&servers[0], &servers[1]), &limits).await;
    Fault { router, servers }
}

async fn hanging_prefill() -> Fault<Vec<Sim>> {
    let [fast, decode] = [start(quick(Role::Prefill)).await, start(quick(Role::Decode)).await];
    let slow = start(SimConfig { prefill_time: FOREVER, ..quick(Role::Prefill) }).await;
    let prefill = [fast, slow];
    let args = pairs(&prefill, std::slice::from_ref(&decode));
    let servers = prefill.into_iter().chain([decode]).collect();
    with_hanging("prefill-hangs", servers, args, "--prefill-policy").await
}

async fn hanging_decode() -> Fault<Vec<Sim>> {
    let [prefill, fast] = [start(quick(Role::Prefill)).await, start(quick(Role::Decode)).await];
    let slow = start(SimConfig { first_token: FOREVER, ..quick(Role::Decode) }).await;
    let decode = [fast, slow];
    let args = pairs(std::slice::from_ref(&prefill), &decode);
    let servers = decode.into_iter().chain([prefill]).collect();
    with_hanging("decode-hangs", servers, args, "--decode-policy").await
}

async fn hanging_plain() -> Fault<Vec<Sim>> {
    let fast = start(quick(Role::Regular)).await;
    let slow = start(SimConfig { first_token: FOREVER, ..quick(Role::Regular) }).await;
    let args = plain([fast.url(), slow.url()]);
    with_hanging("plain-hangs", vec![fast, slow], args, "--policy").await
}

async fn cacheless() -> Fault<(Arc<AtomicBool>, Vec<ScriptedServer>)> {
    let is_empty = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&is_empty);
    let prefill = ScriptedServer::start(move |_| {
        let cached = if told.load(Relaxed) { 0 } else { 2_500 };
        let usage = format!(r#"{{"prompt_tokens":2500,"cached_tokens":{cached}}}"#);
        vec![Step::Send(json("200 OK", &format!(r#"{{"text":"hi","meta_info":{usage}}}"#)))]
    });
    let servers = vec![prefill.await, scripted(Duration::ZERO, &Arc::default()).await];
    let router = Router::start("no-cache", &scripted_pair(&servers[0], &servers[1]), &[]).await;
    Fault { router, servers: (is_empty, servers) }
}

async fn few_files() -> Fault<([Sim; 1], [Sim; 1])> {
    let servers = (start_all::<1>(Role::Prefill).await, start_all::<1>(Role::Decode).await);
    Fault { router: Router::start("few-files", &pairs(&servers.0, &servers.1), &[]).await, servers }
}

async fn encoding() -> Fault<([Sim; 1], [Sim; 1], Sim)> {
    let prefill = [start(SimConfig { language_only: true, ..quick(Role::Prefill) }).await];
    let (decode, encoder) = (start_all::<1>(Role::Decode).await, start(quick(Role::Encoder)).await);
    let router = Router::start("no-encoder", &pairs(&prefill, &decode), &["--encode", &encoder.url()]).await;
    Fault { router, servers: (prefill, decode, encoder) }
}

async fn unregistered() -> Fault<(Registry, [Sim; 1], [Sim; 1], Sim)> {
    let prefill = [start(SimConfig { language_only: true, ..quick(Role::Prefill) }).await];
    let (decode, encoder) = (start_all::<1>(Role::Decode).await, start(quick(Role::Encoder)).await);
    let (registry, url) = (Registry::start(encoder.url()).await, encoder.url());
    let port = registry.server.address().port().to_string();
    let args = ["--encode", &url, "--encoder-bootstrap-port", &port];
    let router = Router::start("no-registration", &pairs(&prefill, &decode), &args).await;
    Fault { router, servers: (registry, prefill, decode, encoder) }
}

/// A pair in pods, which the router finds by an API server.
async fn pods() -> Fault<(ApiServer, Vec<Sim>)> {
    let port = kit::free_port();
    let pods = [Pod::ready("p-1", "prefill", 2), Pod::ready("d-1", "decode", 3)];
    let mut servers = Vec::new();
    for (pod, role) in pods.into_iter().zip([Role::Prefill, Role::Decode]) {
        let addr = Some(SocketAddr::from((pod.address, port)));
        servers.push(start(SimConfig { addr, ..quick(role) }).await);
    }
    let api = ApiServer::start().await;
    api.put_all(pods);
    let (kubeconfig, port) = (api.kubeconfig(), port.to_string());
    let variables = [("KUBECONFIG", kubeconfig.to_str().unwrap())];
    let selectors = ["--prefill-selector", "sglang/role=prefill", "--decode-selector", "sglang/role=decode"];
    let args = [&["--service-discovery", "--service-discovery-port", &port][..], &selectors].concat();
    let router = Router::start_in(&variables, "pods-unseen", &[], &args).await;
    api.wait_for_watch().await;
    Fault { router, servers: (api, servers) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_alert_fires_for_its_fault_and_each_panel_has_data() {
    let steady = Steady::start().await;
    let (down, failing_prefill, failing_plain) =
        (down().await, failing_prefill().await, failing_plain().await);
    let (slow, queue) = (slow_router().await, small_queue().await);
    let hanging = [hanging_prefill().await, hanging_decode().await, hanging_plain().await];
    let (cacheless, files) = (cacheless().await, few_files().await);
    let (encoding, unregistered, pods) = (encoding().await, unregistered().await, pods().await);
    let mut targets = vec![(steady.router.name, steady.router.metrics)];
    targets.extend([down.target(), failing_prefill.target(), failing_plain.target(), slow.target()]);
    targets.extend(hanging.iter().map(Fault::target));
    targets.extend([queue.target(), cacheless.target(), files.target()]);
    targets.extend([encoding.target(), unregistered.target(), pods.target()]);
    let Some(prometheus) = Prometheus::start(&targets).await else { return };
    let _load = steady.load();

    let p = &prometheus;
    let [prefill, decode, of_plain] = hanging;
    // 16 MiB of prompts on one server take 42 requests of 400 kB.
    tokio::join!(
        server_down(p, down),
        server_fails(p, failing_prefill, "MiniLbPrefillFailing"),
        server_fails(p, failing_plain, "MiniLbPlainFailing"),
        large_bodies(p, slow),
        too_many_requests(p, queue),
        one_hangs(p, prefill, "MiniLbPrefillUnbalanced", 400_000),
        one_hangs(p, decode, "MiniLbDecodeUnbalanced", 300),
        one_hangs(p, of_plain, "MiniLbPlainUnbalanced", 300),
        no_cache(p, cacheless),
        idle_clients(p, files),
        no_encoder(p, encoding),
        no_registration(p, unregistered),
        pods_unseen(p, pods),
    );
    check_that_nothing_else_fired(&prometheus).await;
    check_panels(&prometheus, &targets).await;
    check_scaling(&prometheus).await;
}

/// A fault sets off its own alerts only, and none has been forgotten.
async fn check_that_nothing_else_fired(prometheus: &Prometheus) {
    let expected = [
        ("MiniLbNoHealthyServer", "server-down"),
        ("MiniLbDecodeFailing", "server-down"),
        ("MiniLbPrefillFailing", "prefill-fails"),
        ("MiniLbPlainFailing", "plain-fails"),
        ("MiniLbRouterSlow", "slow-router"),
        ("MiniLbQueueFull", "small-queue"),
        ("MiniLbPrefillUnbalanced", "prefill-hangs"),
        ("MiniLbDecodeUnbalanced", "decode-hangs"),
        ("MiniLbPlainUnbalanced", "plain-hangs"),
        ("MiniLbCacheMisjudged", "no-cache"),
        ("MiniLbFilesRunOut", "few-files"),
        ("MiniLbNoEncoder", "no-encoder"),
        ("MiniLbEncoderUnregistered", "no-registration"),
        ("MiniLbPodsNotFollowed", "pods-unseen"),
    ];
    let expected: BTreeSet<_> = expected.map(|(alert, of)| (alert.to_owned(), of.to_owned())).into();
    let mut fired = prometheus.fired().await;
    // A debug build on a busy machine has a millisecond now and then.
    fired.retain(|(alert, of)| alert != "MiniLbRouterSlow" || of == "slow-router");
    assert_eq!(fired, expected);
    let all: BTreeSet<&str> = include_str!("../docs/alerts.yaml")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert_eq!(all, expected.iter().map(|(alert, _)| alert.as_str()).collect());
}

async fn check_panels(prometheus: &Prometheus, targets: &[(&str, SocketAddr)]) {
    let dashboard: serde_json::Value =
        serde_json::from_str(include_str!("../docs/grafana.json")).expect("JSON");
    let mut names: Vec<&str> = targets.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(prometheus.label_values("mini_lb_build_info", "instance").await, names);
    let (mut checked, mut without) = (0, Vec::new());
    for panel in dashboard["panels"].as_array().expect("a list") {
        let title = panel["title"].as_str().expect("a title");
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().expect("a query");
            let values = prometheus.panel_values(query).await;
            // A gauge may be 0 at every scrape.
            let shows = |value: &f64| *value > 0.0 || !query.contains("rate(");
            if !values.iter().any(shows) {
                without.push(format!("{title}: {query}: {} values", values.len()));
            }
            checked += 1;
        }
    }
    assert!(without.is_empty(), "{without:#?}");
    assert!(checked > 45, "{checked}");
}

/// The query by which prometheus-adapter makes the metric that a HorizontalPodAutoscaler scales routers by.
async fn check_scaling(prometheus: &Prometheus) {
    let rule = include_str!("../deploy/kubernetes/adapter-rule.yaml");
    let query = rule.lines().find_map(|line| line.trim().strip_prefix("metricsQuery: ")).expect("a query");
    let query = query.trim_matches('\'').replace("<<.Series>>", "mini_lb_backend_in_flight_requests");
    let query =
        query.replace("<<.LabelMatchers>>", r#"instance="decode-hangs""#).replace("<<.GroupBy>>", "instance");
    let values = prometheus.panel_values(&query).await;
    // On one of two decode servers are more than 16 of them.
    let most = values.iter().copied().fold(0.0, f64::max);
    assert!(most > 16.0, "{query}: {values:?}");
}

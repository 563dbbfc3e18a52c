//! A rolling upgrade under load: two routers, processes of the built program, are replaced one after the
//! other behind clients that follow readiness as a Kubernetes service does; then two prefill and two decode
//! servers are terminated and started again one after the other. The routers have their default options. No
//! request is lost and none hangs.

mod kit;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kit::{Client, RouterProcess};
use loadtest::sim::{Role, Sim, SimConfig, hash_text, text::output_text};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// Requests a second. A debug build on two busy cores serves them beside its servers and clients.
const RATE: u32 = 300;
/// Tokens of a response.
const TOKENS: usize = 8;
/// A server has thirty requests at any moment, so that it never finds none while it gets new ones.
const PREFILL_TIME: Duration = Duration::from_millis(200);
const TOKEN_TIME: Duration = Duration::from_millis(10);
/// How often the service asks routers whether they are ready. The drain delay is 3 s by default.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);
const LAME_DUCK_SECS: &str = "3";
/// Longest time of a request. They take 0.3 s; what hangs takes SGLang's own timeouts, 9 s and more.
const LONGEST: Duration = Duration::from_secs(5);
const PROMPT: &str = "the of and to";

fn config(role: Role, addr: Option<SocketAddr>, bootstrap_port: Option<u16>) -> SimConfig {
    SimConfig {
        role,
        addr,
        bootstrap_port,
        prefill_time: PREFILL_TIME,
        first_token: TOKEN_TIME,
        inter_token: TOKEN_TIME,
        record: false,
        ..SimConfig::default()
    }
}

/// Starts `role` on any port.
async fn start(role: Role) -> Sim {
    Sim::start(config(role, None, None)).await.expect("a free port")
}

/// A router of the built program, with default options but for the threads.
async fn start_router(servers: &[String]) -> RouterProcess {
    let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
    let router = RouterProcess::spawn_with(&servers, &["--shutdown-lame-duck-secs", LAME_DUCK_SECS]);
    router.line("listening on ").await;
    router
}

/// What a service is to its clients: the addresses of the routers that are ready, asked one after the other.
struct Service {
    /// The routers there are, and whether each was ready when it was last asked.
    endpoints: std::sync::Mutex<Vec<(SocketAddr, bool)>>,
}

impl Service {
    fn add(&self, router: &RouterProcess) {
        self.endpoints.lock().expect("no panic").push((router.address(), false));
    }

    fn remove(&self, router: SocketAddr) {
        self.endpoints.lock().expect("no panic").retain(|(known, _)| *known != router);
    }

    fn ready(&self) -> Vec<SocketAddr> {
        let endpoints = self.endpoints.lock().expect("no panic");
        endpoints.iter().filter(|(_, is_ready)| *is_ready).map(|(router, _)| *router).collect()
    }

    async fn probe(self: Arc<Self>) {
        loop {
            let known = self.endpoints.lock().expect("no panic").clone();
            for (router, _) in known {
                // One that has exited since refuses the connection: then the task fails.
                let asked = async move { Client::connect(router).await.get("/ready").await.status() == 200 };
                let is_ready = tokio::spawn(asked).await.unwrap_or(false);
                let mut endpoints = self.endpoints.lock().expect("no panic");
                endpoints
                    .iter_mut()
                    .filter(|(known, _)| *known == router)
                    .for_each(|known| known.1 = is_ready);
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    async fn wait_for(&self, ready: usize) {
        kit::with_timeout("ready routers", async {
            while self.ready().len() != ready {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// Starts a new router for each and terminates the old one, as a deployment with `maxUnavailable: 0` does.
async fn replace_all(old: Vec<RouterProcess>, servers: &[String], service: &Service) -> Vec<RouterProcess> {
    let mut replaced = Vec::new();
    for mut router in old {
        let new = start_router(servers).await;
        service.add(&new);
        service.wait_for(3).await;
        router.send("TERM");
        // It is taken off the list while it still accepts requests.
        service.wait_for(2).await;
        service.remove(router.address());
        assert_eq!(router.exit_code().await, Some(0), "{:?}", router.lines());
        replaced.push(new);
    }
    replaced
}

/// Whether any of the routers gives new requests to a server.
async fn is_used(url: &str, routers: &[SocketAddr]) -> Vec<bool> {
    let mut used = Vec::new();
    for router in routers {
        let all = Client::connect(*router).await.get("/workers").await.json();
        let known =
            all["workers"].as_array().expect("a list").iter().find(|known| known["url"] == url).cloned();
        used.push(known.expect("a configured server")["is_healthy"] == true);
    }
    used
}

/// Terminates one server after the other, starts it again at the same address, and goes on when the routers
/// use it. Returns the new ones.
async fn restart_all(servers: Vec<Sim>, routers: &[SocketAddr]) -> Vec<Sim> {
    let mut restarted = Vec::new();
    for server in servers {
        let (url, addr) = (server.url(), server.addr());
        let again = config(server.role(), Some(addr), server.bootstrap_port());
        server.terminate().await;
        assert!(!is_used(&url, routers).await.contains(&true), "{url} has exited while a router uses it");
        let server = Sim::start(again).await.expect("the port is still free");
        kit::with_timeout("the routers to use it again", async {
            while is_used(&url, routers).await.contains(&false) || server.stats().completed == 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        restarted.push(server);
    }
    restarted
}

/// Clients that keep their connections, and what came of their requests.
#[derive(Default)]
struct Clients {
    idle: Mutex<Vec<(SocketAddr, Client)>>,
    sent: AtomicU64,
}

impl Clients {
    /// Sends a request at each tick until `is_over`, and returns the time of the slowest one.
    async fn load(self: Arc<Self>, service: Arc<Service>, is_over: Arc<AtomicBool>) -> Duration {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut requests, mut longest) = (JoinSet::new(), Duration::ZERO);
        while !is_over.load(Relaxed) {
            tokio::select! {
                _ = ticks.tick() => drop(requests.spawn(Arc::clone(&self).request(Arc::clone(&service)))),
                Some(time) = requests.join_next() => longest = longest.max(time.expect("a complete response")),
            }
        }
        // A request that fails ends the test: its panic is this one's.
        while let Some(time) = requests.join_next().await {
            longest = longest.max(time.expect("a complete response"));
        }
        longest
    }

    async fn request(self: Arc<Self>, service: Arc<Service>) -> Duration {
        let number = self.sent.fetch_add(1, Relaxed);
        let is_stream = number.is_multiple_of(2);
        let ready = service.ready();
        let target = ready[number as usize / 2 % ready.len()];
        let mut idle = self.idle.lock().await;
        let kept = idle.iter().position(|(router, _)| *router == target).map(|at| idle.swap_remove(at).1);
        drop(idle);
        let mut client = match kept {
            Some(client) => client,
            None => Client::connect(target).await,
        };
        let body = format!(
            r#"{{"text":"{PROMPT}","stream":{is_stream},"sampling_params":{{"max_new_tokens":{TOKENS},"ignore_eos":true}}}}"#
        );
        let begun = Instant::now();
        let response = client.post("/generate", body).await;
        let time = begun.elapsed();
        assert!(response.status() == 200 && response.complete, "{:?} {}", response.head, response.text());
        let events = response.text();
        assert_eq!(events.ends_with("data: [DONE]\n\n"), is_stream, "{events}");
        // The event before the last one. A text may have "data: ", too.
        let last = if is_stream { events.rsplit("\n\ndata: ").nth(1).unwrap_or_default() } else { events };
        let last: serde_json::Value =
            serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {events}"));
        assert_eq!(last["text"], output_text(hash_text(PROMPT), TOKENS), "{last}");
        if response.head.header("connection").is_none_or(|said| said != "close") {
            self.idle.lock().await.push((target, client));
        }
        time
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_upgrade_of_routers_and_servers_loses_no_request() {
    let prefill = vec![start(Role::Prefill).await, start(Role::Prefill).await];
    let decode = vec![start(Role::Decode).await, start(Role::Decode).await];
    let mut servers = Vec::new();
    for server in &prefill {
        let bootstrap = server.bootstrap_port().expect("a bootstrap port").to_string();
        servers.extend(["--prefill".to_owned(), server.url(), bootstrap]);
    }
    servers.extend(decode.iter().flat_map(|server| ["--decode".to_owned(), server.url()]));
    let service = Arc::new(Service { endpoints: std::sync::Mutex::default() });
    let routers = vec![start_router(&servers).await, start_router(&servers).await];
    routers.iter().for_each(|router| service.add(router));
    let probes = tokio::spawn(Arc::clone(&service).probe());
    service.wait_for(2).await;

    let (clients, is_over, begun) = (Arc::new(Clients::default()), Arc::default(), Instant::now());
    let load = tokio::spawn(Arc::clone(&clients).load(Arc::clone(&service), Arc::clone(&is_over)));
    let routers = replace_all(routers, &servers, &service).await;
    let addresses: Vec<SocketAddr> = routers.iter().map(RouterProcess::address).collect();
    let restarts = tokio::join!(restart_all(prefill, &addresses), restart_all(decode, &addresses));
    is_over.store(true, Relaxed);
    let longest = load.await.expect("every request is answered");
    assert!(longest < LONGEST, "{longest:?}");
    let least = begun.elapsed().as_secs_f64() * f64::from(RATE) * 0.5;
    assert!(clients.sent.load(Relaxed) as f64 > least, "the load stood still");
    for server in restarts.0.iter().chain(&restarts.1) {
        let stats = server.stats();
        assert_eq!((stats.failed, stats.aborted, stats.mismatches), (0, 0, 0), "{stats:?}");
    }
    probes.abort();
}

//! A rolling restart: two prefill and two decode servers are terminated and started again one after the other
//! under load, with the router's default options. No request is lost and none hangs.

mod kit;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kit::Client;
use loadtest::sim::{Role, Sim, SimConfig, hash_text, text::output_text};
use mini_lb::{MiniLbConfig, MiniLoadBalancer};
use tokio::net::TcpListener;
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

/// Terminates one server after the other, starts it again at the same address, and goes on when the router
/// uses it. Returns the new ones.
async fn restart_all(servers: Vec<Sim>, router: Arc<MiniLoadBalancer>) -> Vec<Sim> {
    let mut restarted = Vec::new();
    for server in servers {
        let (url, addr) = (server.url(), server.addr());
        let again = config(server.role(), Some(addr), server.bootstrap_port());
        let is_used = || {
            let known = router.servers().into_iter().find(|known| known.url() == url);
            known.expect("a configured server").is_healthy()
        };
        server.terminate().await;
        assert!(!is_used(), "{url} has exited while the router uses it");
        let server = Sim::start(again).await.expect("the port is still free");
        kit::with_timeout("the router to use it again", async {
            while !is_used() || server.stats().completed == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
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
    idle: Mutex<Vec<Client>>,
    sent: AtomicU64,
}

impl Clients {
    /// Sends a request at each tick until `is_over`, and returns the time of the slowest one.
    async fn load(self: Arc<Self>, target: SocketAddr, is_over: Arc<AtomicBool>) -> Duration {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut requests, mut longest) = (JoinSet::new(), Duration::ZERO);
        while !is_over.load(Relaxed) {
            tokio::select! {
                _ = ticks.tick() => drop(requests.spawn(Arc::clone(&self).request(target))),
                Some(time) = requests.join_next() => longest = longest.max(time.expect("a complete response")),
            }
        }
        // A request that fails ends the test: its panic is this one's.
        while let Some(time) = requests.join_next().await {
            longest = longest.max(time.expect("a complete response"));
        }
        longest
    }

    async fn request(self: Arc<Self>, target: SocketAddr) -> Duration {
        let idle = self.idle.lock().await.pop();
        let mut client = match idle {
            Some(client) => client,
            None => Client::connect(target).await,
        };
        let is_stream = self.sent.fetch_add(1, Relaxed).is_multiple_of(2);
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
        self.idle.lock().await.push(client);
        time
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_restart_loses_no_request() {
    let prefill = vec![start(Role::Prefill).await, start(Role::Prefill).await];
    let decode = vec![start(Role::Decode).await, start(Role::Decode).await];
    let with_ports = prefill.iter().map(|server| (server.url(), server.bootstrap_port())).collect();
    let urls = decode.iter().map(Sim::url).collect();
    let options = MiniLbConfig::new("127.0.0.1", 30_000, with_ports, urls, 60).worker_threads(1);
    let router = Arc::new(MiniLoadBalancer::new(kit::configure(options)).expect("a valid configuration"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let target = listener.local_addr().expect("a bound address");
    let served = Arc::clone(&router);
    tokio::spawn(async move { served.serve(listener, std::future::pending()).await });
    let mut client = Client::connect(target).await;
    kit::with_timeout("a ready router", async {
        while client.get("/ready").await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;

    let (clients, is_over, begun) = (Arc::new(Clients::default()), Arc::default(), Instant::now());
    let load = tokio::spawn(Arc::clone(&clients).load(target, Arc::clone(&is_over)));
    let restarts =
        tokio::join!(restart_all(prefill, Arc::clone(&router)), restart_all(decode, Arc::clone(&router)));
    is_over.store(true, Relaxed);
    let longest = load.await.expect("every request is answered");
    assert!(longest < LONGEST, "{longest:?}");
    let least = begun.elapsed().as_secs_f64() * f64::from(RATE) * 0.5;
    assert!(clients.sent.load(Relaxed) as f64 > least, "the load stood still");
    for server in restarts.0.iter().chain(&restarts.1) {
        let stats = server.stats();
        assert_eq!((stats.failed, stats.aborted, stats.mismatches), (0, 0, 0), "{stats:?}");
    }
}

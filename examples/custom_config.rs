//! A router with several servers, custom policies, and every other option.
//!
//! Two simulated prefill servers, each of which keeps its clients, and three simulated decode servers, the
//! last of which is slow. Six clients send ten requests each; then the example prints how they were
//! distributed.
//!
//! ```sh
//! cargo run --example custom_config
//! ```

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use loadtest::sim::{Sim, SimConfig};
use mini_lb::{
    Backend, Choice, MiniLbConfig, MiniLoadBalancer, Needs, Policy, Prompt, Role, Selection, SelectionReason,
};
use support::{Result, send, text};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Sends prompts that begin alike to the same server, unless that is far behind. What it remembers is one
/// number for each of 1,024 groups of beginnings.
struct SameBeginning {
    slots: Vec<AtomicUsize>,
}

impl SameBeginning {
    fn new() -> Self {
        Self { slots: (0..1_024).map(|_| AtomicUsize::new(usize::MAX)).collect() }
    }
}

impl Policy for SameBeginning {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        self.choose(choice).server()
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        // The bytes of prompt that each server, or each data-parallel rank of one, has still to compute.
        let least = (0..choice.servers().len()).min_by_key(|index| choice.work(*index)).unwrap_or(0);
        let Some(prompt) = choice.prompt().filter(|prompt| prompt.blocks() > 0) else {
            return choice.select(least).because(SelectionReason::Load);
        };
        // All worker threads call this concurrently, so the state is atomics.
        let remembered = &self.slots[prompt.block(0) as usize % self.slots.len()];
        let last = choice.index_of_slot(remembered.load(Ordering::Relaxed));
        // 100 KB are about 25,000 tokens.
        match last.filter(|last| choice.work(*last) < choice.work(least) + 100_000) {
            // What is believed cached does not count as work of the server.
            Some(last) => {
                choice.select(last).with_cached(Prompt::BLOCK_BYTES as u64).because(SelectionReason::Prefix)
            }
            None => {
                remembered.store(choice.slot(least), Ordering::Relaxed);
                choice.select(least).because(SelectionReason::Load)
            }
        }
    }

    fn name(&self) -> &'static str {
        "same_beginning"
    }

    fn needs(&self, _: Role) -> Needs {
        // Without this, `Choice::prompt` would be `None`: taking hashes costs 0.1 ns a byte.
        Needs { prompt: true, ..Needs::default() }
    }
}

/// Picks the server with the fewest requests in flight; round robin among equals.
#[derive(Default)]
struct LeastInFlight {
    next: AtomicUsize,
}

impl Policy for LeastInFlight {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        let servers = choice.servers();
        // Otherwise the first of several idle servers would receive all requests.
        let first = self.next.fetch_add(1, Ordering::Relaxed) % servers.len();
        let from_first = (first..servers.len()).chain(0..first);
        &servers[from_first.min_by_key(|index| choice.requests(*index)).unwrap_or(first)]
    }
}

fn config(prefill: &[Sim], decode: &[Sim]) -> MiniLbConfig {
    let with_port = |server: &Sim| (server.url(), server.bootstrap_port());
    let url = |server: &Sim| server.url();
    MiniLbConfig::new(
        "127.0.0.1",
        30_000,
        prefill.iter().map(with_port).collect(),
        decode.iter().map(url).collect(),
        // Request timeout in seconds.
        600,
    )
    .prefill_policy(SameBeginning::new())
    .decode_policy(LeastInFlight::default())
    // Decode servers may reach a prefill server by another host name than the router does.
    .bootstrap_host(prefill[0].url(), "127.0.0.1")
    .worker_threads(2)
    .max_payload_size(16 << 20)
    .max_merge_size(64 << 20)
    .connect_timeout(Duration::from_secs(2))
    .backend_idle_timeout(Duration::from_secs(3))
    .max_idle_per_backend(64)
    .health_check_interval(Duration::from_secs(2))
    .shutdown_lame_duck(Duration::ZERO)
    .shutdown_grace_period(Duration::from_secs(10))
}

#[tokio::main]
async fn main() -> Result<()> {
    let fast = Duration::from_millis(1);
    let slow = Duration::from_millis(20);
    let prefill = [Sim::start(SimConfig::prefill()).await?, Sim::start(SimConfig::prefill()).await?];
    let decode = [decode_server(fast).await?, decode_server(fast).await?, decode_server(slow).await?];

    let router = MiniLoadBalancer::new(config(&prefill, &decode))?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move { router.serve(listener, async { drop(stopped.await) }).await });

    let mut clients = JoinSet::new();
    for client in 0..6 {
        clients.spawn(send_ten_requests(url.clone(), client));
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }

    for (role, servers) in [("prefill", &prefill[..]), ("decode", &decode[..])] {
        for server in servers {
            // Requests with a room, and not the router's health checks.
            let requests = server.recorded_requests().iter().filter(|request| request.room.is_some()).count();
            println!("{role:<8} {} received {requests:>2} requests", server.url());
        }
    }

    drop(stop);
    serving.await??;
    Ok(())
}

async fn decode_server(inter_token: Duration) -> std::io::Result<Sim> {
    Sim::start(SimConfig { inter_token, ..SimConfig::decode() }).await
}

async fn send_ten_requests(url: String, client: usize) -> Result<()> {
    for question in 0..10 {
        // All prompts of a client begin alike, with more than one block of 2 KiB.
        let context = format!("What client {client} has said before. ").repeat(100);
        let body =
            format!(r#"{{"text":"{context}Question {question}.","sampling_params":{{"max_new_tokens":8}}}}"#);
        let response = send(&url, "POST", "/generate", body).await?;
        if !response.status().is_success() {
            return Err(format!("{}: {}", response.status(), text(response).await?).into());
        }
        text(response).await?;
    }
    Ok(())
}

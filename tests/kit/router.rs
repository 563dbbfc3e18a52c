//! The router under test, on a port of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mini_lb::{Backend, MiniLbConfig, MiniLoadBalancer};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Client, Upstream};

/// The bootstrap port that tests give their prefill servers.
pub const BOOTSTRAP_PORT: u16 = 8998;

pub struct Router {
    address: SocketAddr,
    balancer: Arc<MiniLoadBalancer>,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Router {
    /// A router with one worker, so that connections can be counted.
    pub async fn start(prefill: &[&Upstream], decode: &[&Upstream]) -> Self {
        Self::start_with(prefill, decode, |config| config).await
    }

    pub async fn start_with(
        prefill: &[&Upstream],
        decode: &[&Upstream],
        options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
    ) -> Self {
        let prefill = prefill.iter().map(|server| (server.url(), Some(BOOTSTRAP_PORT))).collect();
        let decode = decode.iter().map(|server| server.url()).collect();
        let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).worker_threads(1);
        Self::run(options(quiet(config))).await
    }

    pub async fn serve(config: MiniLbConfig) -> Self {
        Self::run(quiet(config)).await
    }

    async fn run(config: MiniLbConfig) -> Self {
        let balancer = Arc::new(MiniLoadBalancer::new(config).expect("a good configuration"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (shutdown, told) = oneshot::channel::<()>();
        let served = Arc::clone(&balancer);
        let serving = tokio::spawn(async move {
            // An error is a dropped sender: the test is over.
            served.serve(listener, async { drop(told.await) }).await
        });
        Self { address, balancer, shutdown: Some(shutdown), serving }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// Waits until no leg is under way on the first pair.
    pub async fn idle(&self) {
        let pair = self.balancer.select_pair().expect("servers of both roles");
        let busy = || pair.prefill().in_flight() + pair.decode().in_flight() > 0;
        super::patiently("both legs' end", async {
            while busy() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Gives the router another configuration.
    pub fn reload(&self, config: MiniLbConfig) -> Result<mini_lb::Reloaded, mini_lb::ConfigError> {
        self.balancer.reload(config)
    }

    /// Waits until so many requests wait for their turn.
    pub async fn queued(&self, count: usize) {
        super::patiently("the queue", async {
            while self.balancer.queued() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    /// What the router knows of a server.
    pub fn knows(&self, server: &super::Upstream) -> Arc<Backend> {
        let url = server.url();
        let known = self.balancer.servers().into_iter().find(|known| known.url() == url);
        known.expect("a server of this router's")
    }

    /// Begins a shutdown.
    pub fn shut_down(&mut self) {
        drop(self.shutdown.take());
    }

    /// Waits for the end of a shutdown.
    pub async fn ended(mut self) {
        self.shut_down();
        let serving = std::mem::replace(&mut self.serving, tokio::spawn(async { Ok(()) }));
        super::patiently("the router's end", serving).await.expect("no panic").expect("a clean end");
    }
}

/// Probes and the lame-duck time have tests of their own; elsewhere servers see requests only.
fn quiet(config: MiniLbConfig) -> MiniLbConfig {
    config.health_checks(false).shutdown_lame_duck(Duration::ZERO)
}

impl Drop for Router {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

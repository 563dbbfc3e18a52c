//! The router under test, on a port of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mini_lb::{Backend, MiniLbConfig, MiniLoadBalancer};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Client, ScriptedServer, engine};

/// The bootstrap port that tests give their prefill servers.
pub const BOOTSTRAP_PORT: u16 = 8998;

pub struct Router {
    address: SocketAddr,
    balancer: Arc<MiniLoadBalancer>,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Router {
    /// A router with one worker thread, so that connections can be counted.
    pub async fn start(prefill: &[&ScriptedServer], decode: &[&ScriptedServer]) -> Self {
        Self::start_with(prefill, decode, |config| config).await
    }

    pub async fn start_with(
        prefill: &[&ScriptedServer],
        decode: &[&ScriptedServer],
        options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
    ) -> Self {
        let prefill = prefill.iter().map(|server| (server.url(), Some(BOOTSTRAP_PORT))).collect();
        let decode = decode.iter().map(|server| server.url()).collect();
        let config = MiniLbConfig::new("127.0.0.1", 30_000, prefill, decode, 60).worker_threads(1);
        Self::run(options(without_probes(config))).await
    }

    /// A router in front of plain servers.
    pub async fn start_plain(
        servers: &[&ScriptedServer],
        options: impl FnOnce(MiniLbConfig) -> MiniLbConfig,
    ) -> Self {
        let config = MiniLbConfig::new("127.0.0.1", 30_000, Vec::new(), Vec::new(), 60).worker_threads(1);
        let config = config.worker_urls(servers.iter().map(|server| server.url()));
        Self::run(options(without_probes(config))).await
    }

    pub async fn start_with_config(config: MiniLbConfig) -> Self {
        Self::run(without_probes(config)).await
    }

    async fn run(config: MiniLbConfig) -> Self {
        let balancer =
            Arc::new(MiniLoadBalancer::new(engine::configure(config)).expect("a valid configuration"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (shutdown, notified) = oneshot::channel::<()>();
        let served = Arc::clone(&balancer);
        let serving = tokio::spawn(async move {
            // An error is a dropped sender: the test has ended.
            served.serve(listener, async { drop(notified.await) }).await
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

    /// Waits until no server has a request in flight, and then none may have work.
    pub async fn wait_idle(&self) {
        let servers = self.balancer.servers();
        super::with_timeout("all legs' end", async {
            while servers.iter().any(|server| server.in_flight() > 0) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        servers.iter().for_each(|server| assert_eq!(server.work(), 0, "{}", server.url()));
    }

    /// Reloads the router with another configuration.
    pub fn reload(&self, config: MiniLbConfig) -> Result<mini_lb::Reloaded, mini_lb::ConfigError> {
        self.balancer.reload(config)
    }

    /// Waits until exactly `count` requests are queued.
    pub async fn wait_queued(&self, count: usize) {
        super::with_timeout("the queue", async {
            while self.balancer.queued() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    /// The bytes that are reserved for request bodies.
    pub fn buffered_bytes(&self) -> usize {
        self.balancer.buffered_bytes()
    }

    /// Waits until exactly this many bytes are reserved for request bodies.
    pub async fn wait_buffered(&self, bytes: usize) {
        super::with_timeout("memory to be returned", async {
            while self.balancer.buffered_bytes() != bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    /// The router's state of a server.
    pub fn backend(&self, server: &super::ScriptedServer) -> Arc<Backend> {
        let url = server.url();
        let known = self.balancer.servers().into_iter().find(|known| known.url() == url);
        known.expect("a server of this router's")
    }

    /// Begins a shutdown without waiting for it.
    pub fn begin_shutdown(&mut self) {
        drop(self.shutdown.take());
    }

    /// Shuts down and waits for the end.
    pub async fn wait_shutdown(mut self) {
        self.begin_shutdown();
        let serving = std::mem::replace(&mut self.serving, tokio::spawn(async { Ok(()) }));
        super::with_timeout("the router's end", serving).await.expect("no panic").expect("a clean end");
    }
}

/// Turns off probes and the lame-duck time, which have their own tests, so that servers see nothing but
/// requests.
fn without_probes(config: MiniLbConfig) -> MiniLbConfig {
    config.health_checks(false).shutdown_lame_duck(Duration::ZERO)
}

impl Drop for Router {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

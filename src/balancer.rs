//! The router as a whole: its parts put together, and how it is started.

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{ConfigError, MiniLbConfig, Options, Settings};
use crate::server;
use crate::upstream::{Backend, Fleet, ServerPair};

/// A router in front of prefill and decode servers.
pub struct MiniLoadBalancer {
    host: String,
    port: u16,
    fleet: Arc<Fleet>,
    options: Options,
}

impl MiniLoadBalancer {
    /// Checks a configuration. No socket is opened yet.
    ///
    /// # Errors
    ///
    /// The first thing in the configuration that cannot work: no server of a role, a URL that is none, a server
    /// named twice, a port or a limit of 0.
    pub fn new(config: MiniLbConfig) -> Result<Self, ConfigError> {
        let Settings { host, port, prefill, decode, options } = config.settle()?;
        let policies = (Arc::clone(&options.prefill_policy), Arc::clone(&options.decode_policy));
        let fleet = Arc::new(Fleet::new(prefill, decode, policies.0, policies.1, &options.health));
        Ok(Self { host, port, fleet, options })
    }

    /// Listens on the configured address and [serves](Self::serve) until the process is told to end by SIGINT or
    /// SIGTERM. A second signal ends it at once.
    ///
    /// # Errors
    ///
    /// The address cannot be listened on, or the worker threads cannot be started.
    pub async fn start(&self) -> io::Result<()> {
        let listener = self.bind().await?;
        let first = signals(1)?;
        let second = signals(2)?;
        tokio::select! {
            served = self.serve(listener, first) => served,
            () = second => Ok(()),
        }
    }

    /// Listens on the configured address.
    ///
    /// # Errors
    ///
    /// The address is in use, not this machine's, or not allowed; the message names it.
    pub async fn bind(&self) -> io::Result<TcpListener> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let shown = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let bound = TcpListener::bind((host, self.port)).await;
        bound.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {shown}:{}: {error}", self.port))
        })
    }

    /// Serves clients of `listener` until `shutdown` ends. From then on `/ready` says 503; after the lame-duck time no
    /// connection is taken, and open requests have the grace period to finish.
    /// Dropping the future cuts everything off.
    ///
    /// # Errors
    ///
    /// The worker threads cannot be started.
    pub async fn serve(
        &self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        server::serve(listener, Arc::clone(&self.fleet), self.options.clone(), shutdown).await
    }

    /// Every server, prefill first: its health, and how requests end on it.
    pub fn servers(&self) -> impl Iterator<Item = &Arc<Backend>> {
        self.fleet.all()
    }

    /// Chooses two servers, as for a request.
    pub fn select_pair(&self) -> ServerPair {
        self.fleet.select_pair()
    }
}

/// Ends when the process has been told to end `count` times.
fn signals(count: usize) -> io::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        for _ in 0..count {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
    })
}

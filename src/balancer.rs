//! The router as a whole: its parts put together, and how it is started.

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{ConfigError, MiniLbConfig, Options, Settings};
use crate::server;
use crate::upstream::{Backend, LiveFleet, ServerPair};

/// A router in front of prefill and decode servers.
pub struct MiniLoadBalancer {
    host: String,
    port: u16,
    fleet: Arc<LiveFleet>,
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
        let Settings { host, port, wanted, options } = config.settle()?;
        Ok(Self { host, port, fleet: Arc::new(LiveFleet::new(wanted)), options })
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

    /// Takes over the servers and the policies of another configuration, while requests go on: a server that is in both
    /// keeps its connections and what is known of it, and one that is in the new one no more finishes what it has.
    /// Everything else of `config` is left alone.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); then nothing has changed.
    pub fn reload(&self, config: MiniLbConfig) -> Result<(), ConfigError> {
        self.fleet.become_as(config.settle()?.wanted);
        Ok(())
    }

    /// Every server that gets requests now, prefill first: its health, and how requests end on it.
    pub fn servers(&self) -> Vec<Arc<Backend>> {
        self.fleet.now().all().cloned().collect()
    }

    /// Chooses two servers, as for a request. `None`: a role has no server.
    pub fn select_pair(&self) -> Option<ServerPair> {
        self.fleet.now().select_pair().ok()
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

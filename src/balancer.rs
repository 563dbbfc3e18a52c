//! The router as a whole: its parts put together, and how it is started.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{ConfigError, ConfigSnapshot, MiniLbConfig, Options, Reloaded, Settings};
use crate::server::{self, Admission, LiveSettings};
use crate::upstream::{Backend, DesiredFleet, ServerPair};

/// A router in front of prefill and decode servers.
pub struct MiniLoadBalancer {
    host: String,
    port: u16,
    members: Arc<DesiredFleet>,
    settings: Arc<LiveSettings>,
    admission: Admission,
    options: Options,
    started_with: ConfigSnapshot,
    /// What `reload` compares with. Its lock lets one reload happen at a time.
    last: Mutex<ConfigSnapshot>,
}

impl MiniLoadBalancer {
    /// Checks a configuration. No socket is opened yet.
    ///
    /// # Errors
    ///
    /// The first thing in the configuration that cannot work: no server of a role, a URL that is none, a server
    /// named twice, a port or a limit of 0, a file of certificates or a key that is of no use.
    pub fn new(config: MiniLbConfig) -> Result<Self, ConfigError> {
        let settings = config.settle()?;
        let (started_with, last) = (ConfigSnapshot::of(&settings), Mutex::new(ConfigSnapshot::of(&settings)));
        let Settings { host, port, wanted, names, access, options } = settings;
        let members = Arc::new(DesiredFleet::new(wanted, names));
        let live = Arc::new(LiveSettings::new(&options));
        let admission = Admission::new(access, &options.gate);
        Ok(Self { host, port, members, settings: live, admission, options, started_with, last })
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
        server::listen(&self.host, self.port).await
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
        let (members, settings) = (Arc::clone(&self.members), Arc::clone(&self.settings));
        server::serve(listener, members, &self.admission, self.options.clone(), settings, shutdown).await
    }

    /// Takes over another configuration, while requests go on: its servers and policies, keys and origins, what a request
    /// may take and how many may be under way, how long clients may wait, how servers are watched, the times of a
    /// shutdown, and the files of certificates and keys as they are now. A server that is in both keeps its connections and what is known of it, and one that is in the new one no
    /// more finishes what it has. What operators have said since holds: servers that they added stay, and one that they
    /// removed, or whose role they switched, is as they want it until its entry in the configuration changes. A request keeps
    /// the limits that it began with, and a client's connection its timeouts. What cannot change without a restart is left as
    /// it is, and named in what is returned.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); then nothing has changed.
    pub fn reload(&self, config: MiniLbConfig) -> Result<Reloaded, ConfigError> {
        let settings = config.settle()?;
        let new = ConfigSnapshot::of(&settings);
        // Nothing below fails half-way.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.servers();
        // Everyone who takes over a part of it.
        self.options.take_certificates(&settings.options);
        self.settings.reload(&settings.options);
        self.admission.reload(settings.access, &settings.options.gate);
        self.members.configure(settings.wanted, settings.names);
        let after = self.servers();
        let reloaded = Reloaded {
            servers_added: missing(&after, &before),
            servers_removed: missing(&before, &after),
            changed: last.changed_at_once(&new),
            needs_restart: self.started_with.needs_restart(&new),
        };
        *last = new;
        Ok(reloaded)
    }

    /// Every server that gets requests now, prefill first: its health, and how requests end on it.
    pub fn servers(&self) -> Vec<Arc<Backend>> {
        self.members.fleet().now().all().cloned().collect()
    }

    /// Requests that wait for their turn now.
    pub fn queued(&self) -> usize {
        self.admission.gate.waiting()
    }

    /// Chooses two servers, as for a request. `None`: a role has no server.
    pub fn select_pair(&self) -> Option<ServerPair> {
        self.members.fleet().now().select_pair().ok()
    }
}

/// How many of `these` are not among `those`.
fn missing(these: &[Arc<Backend>], those: &[Arc<Backend>]) -> usize {
    these.iter().filter(|server| !those.iter().any(|other| Arc::ptr_eq(server, other))).count()
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

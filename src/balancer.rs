//! `MiniLoadBalancer`: assembles the parts of the router, starts it and reloads it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::FleetCheck;
use crate::config::{ConfigError, ConfigSnapshot, MiniLbConfig, Options, Reloaded, Settings};
use crate::server::{self, Admission, LiveSettings};
use crate::upstream::{Backend, Demand, DesiredFleet, ServerPair, difference};

/// The router in front of prefill and decode servers, or of plain servers.
///
/// ```
/// use mini_lb::{MiniLbConfig, MiniLoadBalancer};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let prefill = vec![("http://10.0.0.1:30000".into(), Some(8998))];
/// let decode = vec!["http://10.0.0.2:30000".into()];
/// let config = MiniLbConfig::new("127.0.0.1", 8000, prefill, decode, 1800)
///     .shutdown_lame_duck(std::time::Duration::ZERO);
/// let router = MiniLoadBalancer::new(config)?;
///
/// // A listener on a free port, and a shutdown that is requested at once.
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// router.serve(listener, async {}).await?;
/// # Ok(())
/// # }
/// ```
pub struct MiniLoadBalancer {
    desired_fleet: Arc<DesiredFleet>,
    settings: Arc<LiveSettings>,
    admission: Admission,
    options: Options,
    started_with: ConfigSnapshot,
    /// The configuration that the next reload is compared with. The lock serialises reloads.
    last: Mutex<ConfigSnapshot>,
}

impl MiniLoadBalancer {
    /// Makes a router from a configuration, and checks the configuration. It reads certificate files and
    /// opens no socket.
    ///
    /// # Errors
    ///
    /// The first error in the configuration: a role without a server, an invalid URL, a server that is named
    /// twice, a port or a limit of 0, an unreadable certificate file or key.
    pub fn new(config: MiniLbConfig) -> Result<Self, ConfigError> {
        let settings = config.validate()?;
        let Settings { fleet_spec, dns_names, encoders, access, options, snapshot, .. } = settings;
        let (started_with, last) = (snapshot.clone(), Mutex::new(snapshot));
        let desired_fleet = Arc::new(DesiredFleet::new(fleet_spec, dns_names));
        #[cfg(feature = "kubernetes")]
        desired_fleet.set_pod_source(settings.pod_source);
        desired_fleet.fleet().encoders().configure(encoders);
        let settings = Arc::new(LiveSettings::new(&options));
        let admission = Admission::new(access, &options.admission);
        Ok(Self { desired_fleet, settings, admission, options, started_with, last })
    }

    /// Listens on the configured address and [serves](Self::serve) until SIGINT or SIGTERM starts the
    /// shutdown. A second signal ends it at once. Returns when the shutdown is complete.
    ///
    /// # Errors
    ///
    /// The router cannot listen on the address or on the address of the admin listener, or cannot start its
    /// worker threads.
    pub async fn start(&self) -> io::Result<()> {
        let listener = self.bind().await?;
        let first = signals(1)?;
        let second = signals(2)?;
        tokio::select! {
            served = self.serve(listener, first) => served,
            () = second => Ok(()),
        }
    }

    /// Listens on the configured address, for [`serve`](Self::serve).
    ///
    /// # Errors
    ///
    /// The address is in use, is not an address of this machine, or needs privileges. The message names it.
    pub async fn bind(&self) -> io::Result<TcpListener> {
        let listening = server::listen(&self.options.host, self.options.port).await;
        listening.map_err(|error| io::Error::new(error.kind(), format!("{error} (--host, --port)")))
    }

    /// Serves clients of `listener` until `shutdown` completes, and then shuts down: `/ready` answers 503 at
    /// once; after the drain delay ([`MiniLbConfig::shutdown_lame_duck`]) no connection is accepted; requests
    /// in flight then have the grace period ([`MiniLbConfig::shutdown_grace_period`]) to finish.
    ///
    /// Dropping the future closes all connections at once.
    ///
    /// # Errors
    ///
    /// The router cannot start its worker threads, or cannot listen on the address of the admin listener.
    pub async fn serve(
        &self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let (desired_fleet, settings) = (Arc::clone(&self.desired_fleet), Arc::clone(&self.settings));
        server::serve(listener, desired_fleet, &self.admission, self.options.clone(), settings, shutdown)
            .await
    }

    /// Applies another configuration while the router serves: servers, policies, keys, origins, limits,
    /// timeouts, health checks, shutdown times, and the current content of certificate and key files.
    ///
    /// - A server that is in both configurations keeps its connections, counters and health. A server that is
    ///   not in the new one finishes its requests.
    /// - Changes that operators made stay: servers that they added remain, and a server that they removed or
    ///   whose role they switched stays so until its entry in the configuration changes.
    /// - A request keeps the limits that it started with, and a client connection its timeouts.
    /// - Options that need a restart keep their value and are listed in [`Reloaded::needs_restart`].
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and if one configuration has pairs and the other plain servers. Nothing has
    /// changed then.
    pub fn reload(&self, config: MiniLbConfig) -> Result<Reloaded, ConfigError> {
        let settings = config.validate()?;
        // What is sent to servers, and the routes, depend on it.
        if settings.fleet_spec.is_regular != self.desired_fleet.fleet().now().is_regular() {
            let why = "--worker-urls: a router between plain servers and pairs needs a restart to change";
            return Err(ConfigError::new(why.into()));
        }
        // Nothing below can fail, so a reload is applied completely or not at all.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.servers();
        // Each part of the router that holds a part of the configuration.
        self.options.take_certificates(&settings.options);
        self.settings.reload(&settings.options);
        self.admission.reload(settings.access, &settings.options.admission);
        self.desired_fleet.configure(settings.fleet_spec, settings.dns_names);
        #[cfg(feature = "kubernetes")]
        self.desired_fleet.set_pod_source(settings.pod_source);
        // After the servers, with whom the options of health checks come.
        self.desired_fleet.fleet().encoders().configure(settings.encoders);
        let after = self.servers();
        let reloaded = Reloaded {
            servers_added: difference(&after, &before).count(),
            servers_removed: difference(&before, &after).count(),
            changed: last.changed_now(&settings.snapshot),
            needs_restart: self.started_with.needs_restart(&settings.snapshot),
        };
        *last = settings.snapshot;
        Ok(reloaded)
    }

    /// Asks each configured server once, without serving, what it is, and says what does not fit: the
    /// configuration, or the other servers. Names are resolved for it. All are asked at the same time, 256 at
    /// most, and each answer is waited for as long as for a health check's
    /// ([`MiniLbConfig::health_check_timeout`]); encoders have 35 s.
    pub async fn check_servers(&self) -> FleetCheck {
        server::check_servers(&self.desired_fleet, &self.admission, &self.options).await
    }

    /// All current servers, prefill servers first. Servers that drain are not included.
    pub fn servers(&self) -> Vec<Arc<Backend>> {
        self.desired_fleet.fleet().servers()
    }

    /// The number of requests in the wait queue.
    pub fn queued(&self) -> usize {
        self.admission.controller.waiting()
    }

    /// The bytes that are reserved for request bodies, of those that
    /// [`max_buffered_bytes`](MiniLbConfig::max_buffered_bytes) allows.
    pub fn buffered_bytes(&self) -> usize {
        self.admission.controller.memory().reserved()
    }

    /// Chooses a prefill and a decode server, or a plain server, with the current policies, as for a request.
    /// Returns `None` if a role has no server.
    pub fn select_pair(&self) -> Option<ServerPair> {
        self.select_pair_for(Demand::default())
    }

    /// The servers and their policies, without requests.
    #[cfg(feature = "internals")]
    pub(crate) fn live_fleet(&self) -> &crate::upstream::LiveFleet {
        self.desired_fleet.fleet()
    }

    pub(crate) fn select_pair_for(&self, demand: Demand<'_>) -> Option<ServerPair> {
        self.desired_fleet.fleet().now().select_pair(demand).ok()
    }
}

/// Completes when SIGINT or SIGTERM has arrived `count` times.
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

//! What was asked for, and what it means.
//!
//! [`MiniLbConfig`] is what a user typed; [`Settings`] exists only if that made
//! sense, so nothing behind it checks again. No flag is read and no socket is
//! opened here.

mod access;
mod defaults;
mod discovery;
mod gate;
mod reload;
mod reports;
mod settings;
mod tls;

use std::any::type_name;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::admission::AdmissionOptions;
use crate::observe::report::ReportOptions;
use crate::transport::Http1Engine;
use crate::upstream::{HealthOptions, Policy, Random, SocketOptions};

pub use defaults::*;
pub(crate) use discovery::DiscoveryOptions;
pub use gate::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUE_TIMEOUT};
pub(crate) use reload::ConfigSnapshot;
pub use reload::Reloaded;
pub use settings::ConfigError;
pub(crate) use settings::Settings;
pub(crate) use tls::TlsOptions;

/// 136 years: what a longer timeout is taken for, so that no deadline overflows the clock.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(u32::MAX as u64);

/// What the router is to do: its address, its servers, its limits.
///
/// ```
/// use mini_lb::{MiniLbConfig, RoundRobin};
///
/// let config = MiniLbConfig::new(
///     "127.0.0.1",
///     30_000,
///     vec![("http://10.0.0.1:30000".into(), Some(8998)), ("http://10.0.0.2:30000".into(), None)],
///     vec!["http://10.0.0.3:30000".into()],
///     1_800,
/// )
/// .policy(RoundRobin::default)
/// .max_payload_size(64 << 20);
/// assert!(mini_lb::MiniLoadBalancer::new(config).is_ok());
/// ```
#[derive(Clone)]
pub struct MiniLbConfig {
    host: String,
    port: u16,
    prefill: Vec<(String, Option<u16>)>,
    decode: Vec<String>,
    bootstrap_hosts: Vec<(String, String)>,
    options: Options,
}

/// The part of a configuration that is taken over as it is.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) prefill_policy: Arc<dyn Policy>,
    /// The policy's type, to tell whether another one has come.
    pub(crate) prefill_policy_kind: &'static str,
    pub(crate) decode_policy: Arc<dyn Policy>,
    pub(crate) decode_policy_kind: &'static str,
    pub(crate) max_payload_size: usize,
    pub(crate) max_merge_size: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) stream_idle_timeout: Duration,
    pub(crate) max_retries: u32,
    /// Statuses, of which [`Settings`] has only what can be one.
    pub(crate) retry_on: Vec<u16>,
    pub(crate) request_head_timeout: Duration,
    pub(crate) request_body_idle_timeout: Duration,
    pub(crate) client_idle_timeout: Duration,
    pub(crate) shutdown_lame_duck: Duration,
    pub(crate) shutdown_grace_period: Duration,
    pub(crate) health: HealthOptions,
    pub(crate) sockets: SocketOptions,
    pub(crate) discovery: DiscoveryOptions,
    pub(crate) worker_threads: usize,
    /// How many requests may be under way.
    pub(crate) gate: AdmissionOptions,
    /// Who may ask.
    pub(crate) keys: access::Keys,
    /// Where operators are answered.
    pub(crate) admin: Option<AdminAddress>,
    pub(crate) tls: TlsOptions,
    /// What is told of requests.
    pub(crate) report: ReportOptions,
}

/// Where the admin listener listens.
#[derive(Debug, Clone)]
pub(crate) struct AdminAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Whether the router does not start if the port is taken.
    pub(crate) must: bool,
}

impl MiniLbConfig {
    /// A configuration with every option at its default.
    ///
    /// `prefill` holds each prefill server's URL and its bootstrap port (SGLang's
    /// `--disaggregation-bootstrap-port`); without a port, the server is asked for it, and `null` is sent
    /// until it is known. `timeout_secs` is the longest a request may take, in seconds. Nothing is checked before
    /// [`MiniLoadBalancer::new`](crate::MiniLoadBalancer::new).
    pub fn new(
        host: impl Into<String>,
        port: u16,
        prefill: Vec<(String, Option<u16>)>,
        decode: Vec<String>,
        timeout_secs: u64,
    ) -> Self {
        Self {
            host: host.into(),
            port,
            prefill,
            decode,
            bootstrap_hosts: Vec::new(),
            options: Options {
                prefill_policy: Arc::new(Random),
                prefill_policy_kind: type_name::<Random>(),
                decode_policy: Arc::new(Random),
                decode_policy_kind: type_name::<Random>(),
                max_payload_size: DEFAULT_MAX_PAYLOAD_SIZE,
                max_merge_size: DEFAULT_MAX_MERGE_SIZE,
                request_timeout: Duration::from_secs(timeout_secs).min(LONGEST_TIMEOUT),
                stream_idle_timeout: DEFAULT_STREAM_IDLE_TIMEOUT,
                max_retries: DEFAULT_MAX_RETRIES,
                retry_on: Vec::new(),
                request_head_timeout: DEFAULT_REQUEST_HEAD_TIMEOUT,
                request_body_idle_timeout: DEFAULT_REQUEST_BODY_IDLE_TIMEOUT,
                client_idle_timeout: DEFAULT_CLIENT_IDLE_TIMEOUT,
                shutdown_lame_duck: DEFAULT_SHUTDOWN_LAME_DUCK,
                shutdown_grace_period: DEFAULT_SHUTDOWN_GRACE_PERIOD,
                health: HealthOptions {
                    enabled: true,
                    interval: DEFAULT_HEALTH_CHECK_INTERVAL,
                    timeout: DEFAULT_HEALTH_CHECK_TIMEOUT,
                    failure_threshold: DEFAULT_HEALTH_FAILURE_THRESHOLD,
                    success_threshold: DEFAULT_HEALTH_SUCCESS_THRESHOLD,
                    startup_interval: DEFAULT_WORKER_STARTUP_CHECK_INTERVAL,
                    startup_timeout: DEFAULT_WORKER_STARTUP_TIMEOUT,
                },
                discovery: DiscoveryOptions::default(),
                sockets: SocketOptions {
                    engine: Http1Engine::default(),
                    connect_timeout: DEFAULT_CONNECT_TIMEOUT,
                    idle_timeout: DEFAULT_BACKEND_IDLE_TIMEOUT,
                    max_idle: DEFAULT_MAX_IDLE_PER_BACKEND,
                    buffer_size: None,
                    tls: Arc::default(),
                },
                gate: gate::no_limits(),
                keys: access::Keys::default(),
                admin: None,
                tls: TlsOptions::default(),
                report: ReportOptions::default(),
                worker_threads: std::thread::available_parallelism().map_or(1, usize::from),
            },
        }
    }

    /// Chooses servers of both roles by policies of one kind; `make` is called once a role, so that each keeps
    /// its own state. Default: [`Random`].
    #[must_use]
    pub fn policy<P: Policy>(self, make: impl Fn() -> P) -> Self {
        let prefill = make();
        self.prefill_policy(prefill).decode_policy(make())
    }

    /// Chooses prefill servers. Default: [`Random`].
    #[must_use]
    pub fn prefill_policy<P: Policy>(mut self, policy: P) -> Self {
        self.options.prefill_policy = Arc::new(policy);
        self.options.prefill_policy_kind = type_name::<P>();
        self
    }

    /// Chooses decode servers. Default: [`Random`].
    #[must_use]
    pub fn decode_policy<P: Policy>(mut self, policy: P) -> Self {
        self.options.decode_policy = Arc::new(policy);
        self.options.decode_policy_kind = type_name::<P>();
        self
    }

    /// Sends `host` as `bootstrap_host` for the prefill server at `url`, when decode servers reach it by
    /// another name than the router does. Default: the host in the URL. An IPv6 address may be given with or
    /// without brackets.
    #[must_use]
    pub fn bootstrap_host(mut self, url: impl Into<String>, host: impl Into<String>) -> Self {
        self.bootstrap_hosts.push((url.into(), host.into()));
        self
    }

    /// Refuses request bodies over this many bytes with 413. Default: [`DEFAULT_MAX_PAYLOAD_SIZE`].
    #[must_use]
    pub fn max_payload_size(mut self, bytes: usize) -> Self {
        self.options.max_payload_size = bytes;
        self
    }

    /// Fails a request with 502 when one server's answer, or one event of a stream, must be held for a logprob
    /// merge and exceeds this many bytes. Default: [`DEFAULT_MAX_MERGE_SIZE`].
    #[must_use]
    pub fn max_merge_size(mut self, bytes: usize) -> Self {
        self.options.max_merge_size = bytes;
        self
    }

    /// Cuts a stream off, with an error event, when decode sends nothing for this long. Default:
    /// [`DEFAULT_STREAM_IDLE_TIMEOUT`].
    #[must_use]
    pub fn stream_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.stream_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Sends a request again at most this often, in a new room and on another server where there is one, if no
    /// server can have seen it: a connection could not be opened, or a kept one had been closed. Default:
    /// [`DEFAULT_MAX_RETRIES`].
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.options.max_retries = retries;
        self
    }

    /// Sends a request again, within [`max_retries`](Self::max_retries), when a server has answered it with one of
    /// these statuses, of 400 to 599, and the client has seen nothing yet. Each attempt may cost a server work, so
    /// the default is none.
    #[must_use]
    pub fn retry_on_status(mut self, statuses: impl IntoIterator<Item = u16>) -> Self {
        self.options.retry_on = statuses.into_iter().collect();
        self
    }

    /// Refuses a request with 408, and closes its connection, when the rest of its head has not come this long
    /// after the first byte. Default: [`DEFAULT_REQUEST_HEAD_TIMEOUT`].
    #[must_use]
    pub fn request_head_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_head_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Refuses a request with 408, and closes its connection, when nothing more of its body comes for this long.
    /// A slow body may take any time in all. Default: [`DEFAULT_REQUEST_BODY_IDLE_TIMEOUT`].
    #[must_use]
    pub fn request_body_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_body_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Closes a client's connection on which no request has begun for this long, or of whose answer the client has taken
    /// nothing for this long. Default:
    /// [`DEFAULT_CLIENT_IDLE_TIMEOUT`].
    #[must_use]
    pub fn client_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.client_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Goes on taking connections and requests for this long after a shutdown began, while `/ready` says 503.
    /// Default: [`DEFAULT_SHUTDOWN_LAME_DUCK`].
    #[must_use]
    pub fn shutdown_lame_duck(mut self, time: Duration) -> Self {
        self.options.shutdown_lame_duck = time.min(LONGEST_TIMEOUT);
        self
    }

    /// Lets open requests go on for this long after the lame-duck time. Default:
    /// [`DEFAULT_SHUTDOWN_GRACE_PERIOD`].
    #[must_use]
    pub fn shutdown_grace_period(mut self, period: Duration) -> Self {
        self.options.shutdown_grace_period = period;
        self
    }

    /// Whether servers are probed and those that fail are left out. Default: yes. Without it every server counts as
    /// healthy.
    #[must_use]
    pub fn health_checks(mut self, enabled: bool) -> Self {
        self.options.health.enabled = enabled;
        self
    }

    /// Asks each healthy server for `/ready` (`/health` where that is 404) this often. One that has failed is asked
    /// once a second, if that is more often. Default: [`DEFAULT_HEALTH_CHECK_INTERVAL`].
    #[must_use]
    pub fn health_check_interval(mut self, interval: Duration) -> Self {
        self.options.health.interval = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// Takes a probe that is not answered within this time for a failure. Default:
    /// [`DEFAULT_HEALTH_CHECK_TIMEOUT`].
    #[must_use]
    pub fn health_check_timeout(mut self, timeout: Duration) -> Self {
        self.options.health.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Gives a server no more requests after this many failures in a row, of probes and of requests. Default:
    /// [`DEFAULT_HEALTH_FAILURE_THRESHOLD`].
    #[must_use]
    pub fn health_failure_threshold(mut self, failures: u32) -> Self {
        self.options.health.failure_threshold = failures;
        self
    }

    /// Gives it requests again after this many successes in a row. Default: [`DEFAULT_HEALTH_SUCCESS_THRESHOLD`].
    #[must_use]
    pub fn health_success_threshold(mut self, successes: u32) -> Self {
        self.options.health.success_threshold = successes;
        self
    }

    /// Gives up on opening a connection to a server after this long. Default: [`DEFAULT_CONNECT_TIMEOUT`].
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.sockets.connect_timeout = timeout;
        self
    }

    /// Closes a connection to a server that was idle for this long; keep it below the server's own keep-alive
    /// (5 s in SGLang). Default: [`DEFAULT_BACKEND_IDLE_TIMEOUT`].
    #[must_use]
    pub fn backend_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.sockets.idle_timeout = timeout;
        self
    }

    /// Keeps at most this many idle connections to one server in each worker. Default:
    /// [`DEFAULT_MAX_IDLE_PER_BACKEND`].
    #[must_use]
    pub fn max_idle_per_backend(mut self, connections: usize) -> Self {
        self.options.sockets.max_idle = connections;
        self
    }

    /// Which HTTP/1.1 implementation serves clients and calls servers. Default: [`Http1Engine::Native`].
    #[must_use]
    pub fn http1_engine(mut self, engine: Http1Engine) -> Self {
        self.options.sockets.engine = engine;
        self
    }

    /// Sets the kernel's send and receive buffer of every socket, in bytes. Default: unset, because a fixed size
    /// switches the kernel's own tuning off.
    #[must_use]
    pub fn socket_buffer_size(mut self, bytes: usize) -> Self {
        self.options.sockets.buffer_size = Some(bytes);
        self
    }

    /// Serves with this many threads, each with its own runtime and connections. Default: one a core.
    #[must_use]
    pub fn worker_threads(mut self, threads: usize) -> Self {
        self.options.worker_threads = threads;
        self
    }

    /// Answers operators (metrics, status) at this address, apart from clients. The router does not start if the port
    /// is taken. Default: nowhere.
    #[must_use]
    pub fn admin_address(mut self, host: impl Into<String>, port: u16) -> Self {
        self.options.admin = Some(AdminAddress { host: host.into(), port, must: true });
        self
    }

    /// As [`admin_address`](Self::admin_address), but does without if the port is taken.
    #[must_use]
    pub fn admin_address_if_free(mut self, host: impl Into<String>, port: u16) -> Self {
        self.options.admin = Some(AdminAddress { host: host.into(), port, must: false });
        self
    }
}

impl fmt::Debug for MiniLbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MiniLbConfig")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("prefill", &self.prefill)
            .field("decode", &self.decode)
            .finish_non_exhaustive()
    }
}

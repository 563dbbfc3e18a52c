//! The configuration of a router as a user of the library writes it, and checked.
//!
//! [`MiniLbConfig`] holds what was asked for; [`Settings`] exists only if that makes
//! sense, so nothing behind it checks again. Which options there are, and their
//! defaults, is in `options`. No flag is read and no socket is opened here.

mod access;
mod admission;
mod discovery;
mod encoders;
#[cfg(feature = "kubernetes")]
mod pods;
mod reload;
mod reports;
mod settings;
mod tls;

use std::fmt;
use std::time::Duration;

use crate::options::{AdminPort, NamedPolicy, WorkerUrls};
use crate::transport::Http1Engine;
use crate::upstream::Policy;

pub use crate::options::defaults::*;
pub(crate) use crate::options::{AdminAddress, Options, TlsOptions};
pub(crate) use reload::ConfigSnapshot;
pub use reload::Reloaded;
pub use settings::ConfigError;
pub(crate) use settings::Settings;

/// The longest timeout, 136 years: a deadline that is later could overflow the clock.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(u32::MAX as u64);

/// What a router is to do: its address, its servers, its limits.
///
/// The methods set one option each. [`set_option`](Self::set_option) sets any option by the name of its flag,
/// and [`option_sections`](crate::option_sections) lists them.
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
    options: Options,
}

impl MiniLbConfig {
    /// A configuration with every option at its default.
    ///
    /// `prefill` has the URL and the bootstrap port (SGLang's `--disaggregation-bootstrap-port`) of each
    /// prefill server. Without a port, the server is asked for it, and decode servers get `null` until it is
    /// known. `timeout_secs` is the longest a request may take, in seconds. Switch is checked before
    /// [`MiniLoadBalancer::new`](crate::MiniLoadBalancer::new).
    pub fn new(
        host: impl Into<String>,
        port: u16,
        prefill: Vec<(String, Option<u16>)>,
        decode: Vec<String>,
        timeout_secs: u64,
    ) -> Self {
        let mut options = Options::new();
        options.host = host.into();
        options.port = port;
        options.prefill = prefill;
        options.decode = decode;
        // A caller may pass `u64::MAX` for no timeout.
        options.request_timeout = Duration::from_secs(timeout_secs).min(LONGEST_TIMEOUT);
        Self { options }
    }

    /// Sets an option by name, as its flag does. `occurrences` has the values of each occurrence of the flag,
    /// all of which replace the option's present value; without any, a switch is off and a list is empty.
    ///
    /// ```
    /// # let config = mini_lb::MiniLbConfig::new("127.0.0.1", 30_000, vec![], vec![], 1_800);
    /// let config = config
    ///     .set_option("prefill", [vec!["http://10.0.0.1:30000", "8998"], vec!["http://10.0.0.2:30000"]])?
    ///     .set_option("max-payload-size", [["1048576"]])?
    ///     .set_option("http2", [["true"]])?;
    /// assert!(config.set_option("queue-size", [["many"]]).is_err());
    /// # Ok::<(), mini_lb::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// There is no option of this name, or a value is not of its type. Its
    /// [bounds](crate::OptionSpec::bounds) are checked with all else, by
    /// [`MiniLoadBalancer::new`](crate::MiniLoadBalancer::new).
    pub fn set_option<U, V>(
        mut self,
        name: &str,
        occurrences: impl IntoIterator<Item = U>,
    ) -> Result<Self, ConfigError>
    where
        U: IntoIterator<Item = V>,
        V: Into<String>,
    {
        let values = |values: U| values.into_iter().map(Into::into).collect();
        let occurrences: Vec<Vec<String>> = occurrences.into_iter().map(values).collect();
        self.options.set(name, &occurrences).map_err(ConfigError::new)?;
        Ok(self)
    }

    /// Sends each request to one of these servers, which run without disaggregation, and not to a pair. Not
    /// together with prefill and decode servers. None at all is possible: they can be added later.
    ///
    /// ```
    /// # use mini_lb::{MiniLbConfig, MiniLoadBalancer};
    /// let config = MiniLbConfig::new("127.0.0.1", 30_000, vec![], vec![], 1_800)
    ///     .worker_urls(["http://10.0.0.1:30000", "http://10.0.0.2:30000"]);
    /// assert!(MiniLoadBalancer::new(config).is_ok());
    /// ```
    #[must_use]
    pub fn worker_urls<U: Into<String>>(mut self, urls: impl IntoIterator<Item = U>) -> Self {
        let urls = urls.into_iter().map(Into::into).collect();
        self.options.worker_urls = WorkerUrls { is_given: true, urls };
        self
    }

    /// Chooses servers of all roles with policies of one type. `make` is called once for each role, so that
    /// each has its own state. Default: [`CacheAware`](crate::CacheAware).
    #[must_use]
    pub fn policy<P: Policy>(self, make: impl Fn() -> P) -> Self {
        // Two policies: with one counter for both roles and two servers each, round robin would choose the
        // same pair each time.
        let prefill = make();
        let mut config = self.prefill_policy(prefill).decode_policy(make());
        config.options.policies.regular = NamedPolicy::new(make());
        config
    }

    /// Chooses prefill servers. Default: [`CacheAware`](crate::CacheAware).
    #[must_use]
    pub fn prefill_policy<P: Policy>(mut self, policy: P) -> Self {
        self.options.policies.prefill = NamedPolicy::new(policy);
        self
    }

    /// Chooses decode servers. Default: [`LeastLoad`](crate::LeastLoad).
    #[must_use]
    pub fn decode_policy<P: Policy>(mut self, policy: P) -> Self {
        self.options.policies.decode = NamedPolicy::new(policy);
        self
    }

    /// Takes the name of a request's conversation, for [`ConsistentHash`](crate::ConsistentHash), from the
    /// first of these headers that is there. Default: [`DEFAULT_HASH_KEY_HEADERS`].
    #[must_use]
    pub fn hash_key_headers<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.options.hash_key_headers = names.into_iter().map(Into::into).collect();
        self
    }

    /// Bounds the memory in which [`CacheAware`](crate::CacheAware) remembers which server has which prompt.
    /// Default: [`DEFAULT_PREFIX_INDEX_BYTES`].
    #[must_use]
    pub fn prefix_index_bytes(mut self, bytes: usize) -> Self {
        self.options.prefix_index_bytes = bytes;
        self
    }

    /// Sends `host` as `bootstrap_host` for the prefill server at `url`, if decode servers reach it by
    /// another name than the router does. Default: the host in the URL. An IPv6 address may be given with or
    /// without brackets.
    #[must_use]
    pub fn bootstrap_host(mut self, url: impl Into<String>, host: impl Into<String>) -> Self {
        self.options.bootstrap_hosts.push((url.into(), host.into()));
        self
    }

    /// Rejects requests for more than this many samples of each prompt (`n`) with 400: at most 128. Default:
    /// [`DEFAULT_MAX_SAMPLES`].
    #[must_use]
    pub fn max_samples(mut self, samples: u32) -> Self {
        self.options.max_samples = samples;
        self
    }

    /// Rejects request bodies of more than this many bytes with 413. Default: [`DEFAULT_MAX_PAYLOAD_SIZE`].
    #[must_use]
    pub fn max_payload_size(mut self, bytes: usize) -> Self {
        self.options.max_payload_size = bytes;
        self
    }

    /// Fails a request with 502 if a response, or an event of a stream, must be buffered to merge logprobs
    /// and has more than this many bytes. Default: [`DEFAULT_MAX_MERGE_SIZE`].
    #[must_use]
    pub fn max_merge_size(mut self, bytes: usize) -> Self {
        self.options.max_merge_size = bytes;
        self
    }

    /// Ends a stream with an error event if decode sends nothing for this long. Default:
    /// [`DEFAULT_STREAM_IDLE_TIMEOUT`].
    #[must_use]
    pub fn stream_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.stream_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Sends a comment line (`: keep-alive`) into a stream of events that has been silent for this long, so
    /// that clients and proxies in front keep waiting. The head of a stream goes out without decode's if that
    /// is not there by then, and a refusal after that becomes an error event. Zero is off, the default.
    #[must_use]
    pub fn stream_keepalive(mut self, interval: Duration) -> Self {
        self.options.stream_keepalive = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// Asks both servers to abort a request whose client has left, or whose other leg has failed. Requests
    /// without a `rid` get one. Default: off.
    #[must_use]
    pub fn abort_on_disconnect(mut self, on: bool) -> Self {
        self.options.abort_on_disconnect = on;
        self
    }

    /// Sends a request to at most this many other pairs if a server cannot be connected, before anything was
    /// written to either. A retry has a new bootstrap room, and avoids that server if its role has another
    /// one. Default: [`DEFAULT_MAX_RETRIES`].
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        // The last call counts: a number of retries overrides an earlier `disable-retries`.
        self.options.disable_retries = false;
        self.options.max_retries = retries;
        self
    }

    /// Retries a request, within [`max_retries`](Self::max_retries), if a server responds with one of these
    /// statuses (400 to 599) and nothing has been sent to the client. Default: none, since each attempt may
    /// cost the server work.
    #[must_use]
    pub fn retry_on_status(mut self, statuses: impl IntoIterator<Item = u16>) -> Self {
        self.options.retry_on = statuses.into_iter().collect();
        self
    }

    /// Rejects a request with 408, and closes its connection, if its head is not complete this long after the
    /// head's first byte. Default: [`DEFAULT_REQUEST_HEAD_TIMEOUT`].
    #[must_use]
    pub fn request_head_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_head_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Rejects a request with 408, and closes its connection, if nothing of its body arrives for this long.
    /// Default: [`DEFAULT_REQUEST_BODY_IDLE_TIMEOUT`].
    #[must_use]
    pub fn request_body_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_body_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Rejects a request with 408, and closes its connection, if its body is not complete this long after the
    /// first wait for a part of it. Default: [`DEFAULT_REQUEST_BODY_TIMEOUT`].
    #[must_use]
    pub fn request_body_timeout(mut self, timeout: Duration) -> Self {
        self.options.request_body_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Closes a client's connection on which no request has begun, or whose response the client has not read
    /// from, for this long. Default: [`DEFAULT_CLIENT_IDLE_TIMEOUT`].
    #[must_use]
    pub fn client_idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.client_idle_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Drain delay: accepts connections and requests for this long after a shutdown began, while `/ready`
    /// says 503. Default: [`DEFAULT_SHUTDOWN_LAME_DUCK`].
    #[must_use]
    pub fn shutdown_lame_duck(mut self, time: Duration) -> Self {
        self.options.shutdown_lame_duck = time.min(LONGEST_TIMEOUT);
        self
    }

    /// Lets open requests finish for this long after the drain delay. Default:
    /// [`DEFAULT_SHUTDOWN_GRACE_PERIOD`].
    #[must_use]
    pub fn shutdown_grace_period(mut self, period: Duration) -> Self {
        self.options.shutdown_grace_period = period;
        self
    }

    /// Whether servers are checked, and those that fail are taken out of rotation. Default: yes. Without
    /// health checks every server counts as healthy.
    #[must_use]
    pub fn health_checks(mut self, enabled: bool) -> Self {
        // `validate` derives `health.enabled` from it, so that this method and the flag cannot contradict
        // each other.
        self.options.disable_health_check = !enabled;
        self
    }

    /// Checks a healthy server this often with `GET /ready`, and a tenth as often with `/health` where that
    /// is 404. One that has failed is checked once a second, if that is more often. Default:
    /// [`DEFAULT_HEALTH_CHECK_INTERVAL`].
    #[must_use]
    pub fn health_check_interval(mut self, interval: Duration) -> Self {
        self.options.health.interval = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// Counts a health check without a response within this time as failed. Default:
    /// [`DEFAULT_HEALTH_CHECK_TIMEOUT`].
    #[must_use]
    pub fn health_check_timeout(mut self, timeout: Duration) -> Self {
        self.options.health.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Takes a server out of rotation after this many consecutive failures, of health checks and of
    /// requests. Default: [`DEFAULT_HEALTH_FAILURE_THRESHOLD`].
    #[must_use]
    pub fn health_failure_threshold(mut self, failures: u32) -> Self {
        self.options.health.failure_threshold = failures;
        self
    }

    /// Puts it back into rotation after this many consecutive successes. Default:
    /// [`DEFAULT_HEALTH_SUCCESS_THRESHOLD`].
    #[must_use]
    pub fn health_success_threshold(mut self, successes: u32) -> Self {
        self.options.health.success_threshold = successes;
        self
    }

    /// Asks each prefill server this often with `GET /v1/loads` how many tokens wait there, so that policies
    /// count the work that others give to it ([`foreign_work`](crate::Backend::foreign_work)). What a server
    /// has told counts for three intervals. With it [`CacheAware`](crate::CacheAware) limits itself to
    /// servers upon which other routers come, too. Also without health checks. Zero is off, the default.
    #[must_use]
    pub fn load_poll_interval(mut self, interval: Duration) -> Self {
        self.options.health.load_poll_interval = interval.min(LONGEST_TIMEOUT);
        self
    }

    /// Chooses among the data-parallel ranks of decode servers too, and of prefill servers that do not follow
    /// the room, and tells them which one a request is for. Those of prefill servers that follow the room are
    /// chosen in any case. Off by default.
    #[must_use]
    pub fn dp_aware(mut self, is_on: bool) -> Self {
        self.options.is_dp_aware = is_on;
        self
    }

    /// Fails to connect to a server if the connection is not open after this long. Default:
    /// [`DEFAULT_CONNECT_TIMEOUT`].
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        // Not bounded as others: `tokio::time::timeout` takes any duration.
        self.options.sockets.connect_timeout = timeout;
        self
    }

    /// Closes a connection to a server that was idle for this long. Keep it below the server's own keep-alive
    /// timeout (5 s in SGLang). Default: [`DEFAULT_BACKEND_IDLE_TIMEOUT`].
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

    /// Sets the kernel's send and receive buffer of every socket, in bytes. Default: unset, because a fixed
    /// size turns the kernel's own tuning off.
    #[must_use]
    pub fn socket_buffer_size(mut self, bytes: usize) -> Self {
        self.options.sockets.buffer_size = Some(bytes);
        self
    }

    /// Whether each connection of a client must begin with a PROXY header (version 1 or 2 of haproxy's
    /// protocol), by which a load balancer in front says who the client is. The address is logged as
    /// `client`. Default: no, and a connection that begins with one is malformed.
    #[must_use]
    pub fn proxy_protocol(mut self, required: bool) -> Self {
        self.options.proxy_protocol = required;
        self
    }

    /// Which HTTP/1.1 implementation serves clients and calls servers. Default: [`Http1Engine::Native`].
    #[must_use]
    pub fn http1_engine(mut self, engine: Http1Engine) -> Self {
        self.options.sockets.engine = engine;
        self
    }

    /// Serves with this many threads, each with its own runtime and connections. Default: one per core.
    #[must_use]
    pub fn worker_threads(mut self, threads: usize) -> Self {
        self.options.worker_threads = threads;
        self
    }

    /// Serves metrics, the status page and the operators' endpoints at this address, apart from clients. The
    /// router does not start if the port is in use. Default: no such listener.
    #[must_use]
    pub fn admin_address(mut self, host: impl Into<String>, port: u16) -> Self {
        self.options.admin.host = host.into();
        self.options.admin.port = AdminPort::Required(port);
        self
    }

    /// As [`admin_address`](Self::admin_address), but starts without the listener if the port is in use.
    #[must_use]
    pub fn admin_address_if_free(mut self, host: impl Into<String>, port: u16) -> Self {
        self.options.admin.host = host.into();
        self.options.admin.port = AdminPort::IfFree(port);
        self
    }
}

impl fmt::Debug for MiniLbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No more than this: the keys are in the options.
        f.debug_struct("MiniLbConfig")
            .field("host", &self.options.host)
            .field("port", &self.options.port)
            .field("prefill", &self.options.prefill)
            .field("decode", &self.options.decode)
            .finish_non_exhaustive()
    }
}

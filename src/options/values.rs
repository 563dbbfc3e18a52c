//! The values of all options, in the form in which the parts of the router use them.

use std::any::{Any, type_name};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::available_memory::available_memory;
use crate::admission::AdmissionOptions;
use crate::observe::report::ReportOptions;
use crate::tls::{ClientFiles, KeyFiles, ServerTls};
use crate::upstream::{CacheAware, HealthOptions, Policy, Random, SocketOptions};
use crate::wire::shape::{FieldTreatment, InternalFields};

/// Which part of the memory request bodies may take if no option says so: the kernel's socket buffers,
/// responses, and what the allocator keeps need the rest.
const MEMORY_SHARE: usize = 4;

/// The value of every option. [`Options::new`] makes one with the defaults of the table.
#[derive(Clone, Default)]
pub(crate) struct Options {
    /// The address to listen on.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Clients' connections begin with a PROXY header.
    pub(crate) proxy_protocol: bool,
    /// URL and bootstrap port of each server.
    pub(crate) prefill: Vec<(String, Option<u16>)>,
    pub(crate) decode: Vec<String>,
    pub(crate) worker_urls: WorkerUrls,
    /// URL of a prefill server, and the host that decode servers know it by.
    pub(crate) bootstrap_hosts: Vec<(String, String)>,
    pub(crate) policies: Policies,
    pub(crate) hash_key_headers: Vec<String>,
    pub(crate) prefix_index_bytes: usize,
    /// Those for an orchestrator have their value once the configuration is validated.
    pub(crate) internal_fields: InternalFields,
    pub(crate) orchestration_fields: Option<FieldTreatment>,
    pub(crate) is_dp_aware: bool,
    pub(crate) abort_on_disconnect: bool,
    pub(crate) max_samples: u32,
    pub(crate) max_payload_size: usize,
    pub(crate) max_merge_size: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) stream_idle_timeout: Duration,
    /// Zero: off.
    pub(crate) stream_keepalive: Duration,
    /// 0 once the configuration is validated, if `disable_retries` is on.
    pub(crate) max_retries: u32,
    pub(crate) disable_retries: bool,
    pub(crate) retry_on: Vec<u16>,
    pub(crate) request_head_timeout: Duration,
    pub(crate) request_body_idle_timeout: Duration,
    pub(crate) request_body_timeout: Duration,
    pub(crate) client_idle_timeout: Duration,
    pub(crate) shutdown_lame_duck: Duration,
    pub(crate) shutdown_grace_period: Duration,
    pub(crate) disable_health_check: bool,
    /// `enabled` is set when the configuration is validated, from `disable_health_check`.
    pub(crate) health: HealthOptions,
    pub(crate) sockets: SocketOptions,
    pub(crate) discovery: DiscoveryOptions,
    pub(crate) encoders: EncoderOptions,
    pub(crate) worker_threads: usize,
    pub(crate) admission: AdmissionOptions,
    pub(crate) keys: Keys,
    pub(crate) admin: AdminOptions,
    pub(crate) tls: TlsOptions,
    pub(crate) report: ReportOptions,
    #[cfg(feature = "otel")]
    pub(crate) enable_trace: bool,
    #[cfg(feature = "kubernetes")]
    pub(crate) pods: PodOptions,
    #[cfg(not(feature = "otel"))]
    pub(crate) without_otel: NotBuilt,
    #[cfg(not(feature = "kubernetes"))]
    pub(crate) without_kubernetes: NotBuilt,
}

impl Options {
    /// What there is before the table's defaults are set.
    pub(super) fn unset() -> Self {
        // The CPU quota of a container counts, not only its cores. One thread if neither can be read.
        let worker_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut options = Self { worker_threads, ..Self::default() };
        options.admission.max_buffered = available_memory() / MEMORY_SHARE;
        #[cfg(not(feature = "otel"))]
        options.without_otel.set_feature("otel");
        #[cfg(not(feature = "kubernetes"))]
        options.without_kubernetes.set_feature("kubernetes");
        options
    }
}

impl Options {
    /// Whether the servers are plain ones, without disaggregation.
    pub(crate) fn is_regular(&self) -> bool {
        self.worker_urls.is_given || !self.discovery.regular.is_empty() || self.has_plain_pods()
    }

    /// Whether pods are plain servers.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn has_plain_pods(&self) -> bool {
        !self.pods.selector.is_empty()
    }

    /// A build without discovery has no pods.
    #[cfg(not(feature = "kubernetes"))]
    pub(crate) fn has_plain_pods(&self) -> bool {
        false
    }

    /// Sets what depends on the servers: the client of a plain one gets what the server alone would give it,
    /// unless an operator wants less.
    pub(crate) fn settle_internal_fields(&mut self) {
        let usual = if self.is_regular() { FieldTreatment::Pass } else { FieldTreatment::Strip };
        self.internal_fields.orchestration = self.orchestration_fields.unwrap_or(usual);
    }
}

/// URLs of plain servers.
#[derive(Debug, Clone, Default)]
pub(crate) struct WorkerUrls {
    /// Also if there is none: servers may be added later.
    pub(crate) is_given: bool,
    pub(crate) urls: Vec<String>,
}

impl Policies {
    /// Gives the policy that has a prefix index its bound, and tells it whether there are other routers.
    pub(crate) fn configure_cache_aware(&self, index_bytes: usize, has_peers: bool) {
        for NamedPolicy { policy, .. } in [&self.prefill, &self.decode, &self.regular] {
            let policy: &dyn Any = &**policy;
            if let Some(cache_aware) = policy.downcast_ref::<CacheAware>() {
                cache_aware.set_index_bytes(index_bytes);
                cache_aware.set_peers(has_peers);
            }
        }
    }
}

/// How servers of each role are chosen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Policies {
    pub(crate) prefill: NamedPolicy,
    pub(crate) decode: NamedPolicy,
    /// Set with both others only.
    pub(crate) regular: NamedPolicy,
}

/// A policy and the name of its type, by which a reload sees that it is another one.
#[derive(Clone)]
pub(crate) struct NamedPolicy {
    pub(crate) policy: Arc<dyn Policy>,
    name: &'static str,
}

impl NamedPolicy {
    pub(crate) fn new<P: Policy>(policy: P) -> Self {
        Self { policy: Arc::new(policy), name: type_name::<P>() }
    }
}

impl Default for NamedPolicy {
    fn default() -> Self {
        Self::new(Random)
    }
}

impl fmt::Debug for NamedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A reload compares this text: the same type of policy is no change.
        f.write_str(self.name)
    }
}

/// Names whose addresses are servers.
#[derive(Debug, Clone, Default)]
pub(crate) struct DiscoveryOptions {
    /// As `host:port`, with the bootstrap port of all servers of that name.
    pub(crate) prefill: Vec<(String, Option<u16>)>,
    pub(crate) decode: Vec<String>,
    pub(crate) regular: Vec<String>,
    pub(crate) interval: Duration,
}

/// Pods that are servers, as they were given.
#[cfg(feature = "kubernetes")]
#[derive(Debug, Clone, Default)]
pub(crate) struct PodOptions {
    pub(crate) is_on: bool,
    /// Labels as `key=value`, of plain servers and of those of pairs.
    pub(crate) selector: Vec<String>,
    pub(crate) prefill_selector: Vec<String>,
    pub(crate) decode_selector: Vec<String>,
    pub(crate) port: Option<u16>,
    pub(crate) namespace: Option<String>,
}

/// Encoders, and where prefill servers take their registrations.
#[derive(Debug, Clone, Default)]
pub(crate) struct EncoderOptions {
    pub(crate) urls: Vec<String>,
    /// Names whose addresses are encoders, as `host:port`.
    pub(crate) names: Vec<String>,
    /// If not the one that each prefill server says.
    pub(crate) bootstrap_port: Option<u16>,
}

/// Keys and origins as they were given, and the files that have keys.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    /// Those of `client_file` too, once the configuration is validated. The same holds for the two below.
    pub(crate) client: Vec<String>,
    pub(crate) client_file: Option<PathBuf>,
    pub(crate) admin: Option<String>,
    pub(crate) admin_file: Option<PathBuf>,
    pub(crate) worker: Option<String>,
    pub(crate) worker_file: Option<PathBuf>,
    /// Whether servers get the worker's key instead of what the client sent.
    pub(crate) worker_replaces: bool,
    pub(crate) origins: Vec<String>,
}

/// Where the admin listener listens.
#[derive(Debug, Clone, Default)]
pub(crate) struct AdminOptions {
    pub(crate) host: String,
    pub(crate) port: AdminPort,
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum AdminPort {
    /// There is no admin listener.
    #[default]
    Off,
    /// The router starts without it if the port is taken.
    IfFree(u16),
    Required(u16),
}

/// An address for the admin listener.
#[derive(Debug, Clone)]
pub(crate) struct AdminAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Whether the router does not start if the port is taken.
    pub(crate) is_required: bool,
}

impl AdminOptions {
    /// `None`: there is no admin listener.
    pub(crate) fn address(&self) -> Option<AdminAddress> {
        let (port, is_required) = match self.port {
            AdminPort::Off => return None,
            AdminPort::IfFree(port) => (port, false),
            AdminPort::Required(port) => (port, true),
        };
        Some(AdminAddress { host: self.host.clone(), port, is_required })
    }
}

/// TLS on both sides, and HTTP/2 towards clients.
#[derive(Clone, Default)]
pub(crate) struct TlsOptions {
    /// The certificate for clients; without it they speak plain HTTP.
    pub(crate) cert: PemFile,
    pub(crate) key: PemFile,
    /// The CAs of servers with `https`; without any, the system's.
    pub(crate) cas: PemFiles,
    /// The certificate for servers that ask for one.
    pub(crate) client_cert: PemFile,
    pub(crate) client_key: PemFile,
    /// From the files, once they have been read.
    pub(crate) server: Option<Arc<ServerTls>>,
    pub(crate) http2: bool,
    /// Requests at a time on one HTTP/2 connection.
    pub(crate) http2_max_streams: u32,
}

impl TlsOptions {
    /// The certificate for clients and its key, if both are given.
    pub(crate) fn server_files(&self) -> Option<KeyFiles> {
        pair(&self.cert, &self.key)
    }

    /// The files for connections to servers.
    pub(crate) fn client_files(&self) -> ClientFiles {
        ClientFiles { cas: self.cas.0.clone(), own: pair(&self.client_cert, &self.client_key) }
    }
}

fn pair(cert: &PemFile, key: &PemFile) -> Option<KeyFiles> {
    // Half a pair counts as none: `check_pairs` has rejected it before.
    Some(KeyFiles { cert: cert.0.clone()?, key: key.0.clone()? })
}

/// A file of certificates or with a key. Two are the same value if their contents are.
#[derive(Debug, Clone, Default)]
pub(crate) struct PemFile(pub(crate) Option<PathBuf>);

/// Files of certificates.
#[derive(Debug, Clone, Default)]
pub(crate) struct PemFiles(pub(crate) Vec<PathBuf>);

/// Stands for the value of an option that this build does not have.
#[cfg(not(all(feature = "otel", feature = "kubernetes")))]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NotBuilt {
    /// The feature of the build that has it.
    pub(crate) feature: &'static str,
}

#[cfg(not(all(feature = "otel", feature = "kubernetes")))]
impl NotBuilt {
    fn set_feature(&mut self, feature: &'static str) {
        self.feature = feature;
    }
}

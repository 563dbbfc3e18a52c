//! One server behind the router: where it is and what is known of it.
//!
//! No socket is opened here and no policy is kept.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::header::HeaderValue;

use super::Address;
use crate::wire::bootstrap::BootstrapFields;

/// What a server does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates the tokens.
    Decode,
}

impl Role {
    /// `prefill` or `decode`, as in error codes and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A prefill server and how decode servers find it.
#[derive(Debug, Clone)]
pub(crate) struct PrefillSpec {
    pub(crate) address: Address,
    pub(crate) bootstrap_host: String,
    pub(crate) bootstrap_port: Option<u16>,
}

/// A prefill or decode server.
#[derive(Debug)]
pub struct Backend {
    /// Position among all servers: where each worker's pool for it is.
    pub(super) index: usize,
    role: Role,
    address: Address,
    host_header: HeaderValue,
    bootstrap: Option<BootstrapFields>,
    in_flight: AtomicUsize,
}

impl Backend {
    pub(super) fn prefill(index: usize, spec: PrefillSpec) -> Self {
        let fields = BootstrapFields::new(spec.bootstrap_host, spec.bootstrap_port);
        Self::new(index, Role::Prefill, spec.address, Some(fields))
    }

    pub(super) fn decode(index: usize, address: Address) -> Self {
        Self::new(index, Role::Decode, address, None)
    }

    fn new(index: usize, role: Role, address: Address, bootstrap: Option<BootstrapFields>) -> Self {
        let host_header = HeaderValue::from_str(&address.authority).expect("a URL's authority is printable");
        Self { index, role, address, host_header, bootstrap, in_flight: AtomicUsize::new(0) }
    }

    /// The server's role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The server's URL, `http://host:port`.
    pub fn url(&self) -> &str {
        &self.address.url
    }

    /// What is sent as `bootstrap_host`; `None` for a decode server.
    pub fn bootstrap_host(&self) -> Option<&str> {
        self.bootstrap.as_ref().map(BootstrapFields::host)
    }

    /// What is sent as `bootstrap_port`; `None` is `null`, and for a decode server.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.bootstrap.as_ref().and_then(BootstrapFields::port)
    }

    /// Requests that are under way on this server, from choosing it to the end of its answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(crate) fn bootstrap(&self) -> Option<&BootstrapFields> {
        self.bootstrap.as_ref()
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The value of the `Host` header towards this server.
    pub(crate) fn host_header(&self) -> HeaderValue {
        self.host_header.clone()
    }
}

/// Counts one request on a server for as long as it lives.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Backend>);

impl InFlight {
    pub(crate) fn enter(backend: Arc<Backend>) -> Self {
        // Relaxed: a policy may read a count that is a moment old.
        backend.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(backend)
    }

    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

//! One entry of the desired fleet: a server, or a DNS name whose addresses are servers.

use super::{Address, Backend, PrefillSpec, Role};

/// A server that there should be.
#[derive(Debug, Clone)]
pub(crate) enum ServerSpec {
    Prefill(PrefillSpec),
    Decode(Address),
    /// A plain server.
    Regular(Address),
}

impl ServerSpec {
    /// A server at `address`, whose host is the bootstrap host too. The port is for prefill servers only.
    pub(crate) fn new(role: Role, address: Address, bootstrap_port: Option<u16>) -> Self {
        match role {
            Role::Decode => Self::Decode(address),
            Role::Regular => Self::Regular(address),
            // SGLang's bootstrap server listens on the same host unless an operator says otherwise.
            Role::Prefill => {
                Self::Prefill(PrefillSpec { bootstrap_host: address.host.clone(), address, bootstrap_port })
            }
        }
    }

    /// The same with another bootstrap host, if one is given. Only prefill servers have one.
    pub(crate) fn with_bootstrap_host(mut self, host: Option<String>) -> Self {
        if let (Self::Prefill(spec), Some(host)) = (&mut self, host) {
            spec.bootstrap_host = host;
        }
        self
    }

    /// Of a prefill server, unless it is asked for it.
    #[cfg(feature = "kubernetes")]
    pub(super) fn bootstrap_port(&self) -> Option<u16> {
        match self {
            Self::Prefill(spec) => spec.bootstrap_port,
            Self::Decode(_) | Self::Regular(_) => None,
        }
    }

    pub(crate) fn role(&self) -> Role {
        match self {
            Self::Prefill(_) => Role::Prefill,
            Self::Decode(_) => Role::Decode,
            Self::Regular(_) => Role::Regular,
        }
    }

    pub(super) fn address(&self) -> &Address {
        match self {
            Self::Prefill(spec) => &spec.address,
            Self::Decode(address) | Self::Regular(address) => address,
        }
    }

    /// The identity of a server: [`Address::key`].
    pub(super) fn key(&self) -> &str {
        self.address().key()
    }

    pub(super) fn matches(&self, server: &Backend) -> bool {
        self.role() == server.role() && self.key() == server.address().key()
    }

    /// Whether URL, role and bootstrap fields are the same.
    pub(super) fn is_same_as(&self, other: &Self) -> bool {
        let bootstrap = |spec: &Self| match spec {
            Self::Prefill(spec) => Some((spec.bootstrap_host.clone(), spec.bootstrap_port)),
            Self::Decode(_) | Self::Regular(_) => None,
        };
        self.role() == other.role()
            && self.address().url == other.address().url
            && bootstrap(self) == bootstrap(other)
    }
}

/// A DNS name: each of its addresses is a server of this role.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DnsName {
    pub(crate) role: Role,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) bootstrap_port: Option<u16>,
}

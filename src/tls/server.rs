//! TLS towards clients: the certificate that the router presents.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;

use super::files::{self, KeyPairFlags};
use super::{HTTP_1, HTTP_2, KeyFiles, TlsError};

const FLAGS: KeyPairFlags = ["--tls-cert-path", "--tls-key-path"];

/// The TLS configuration of the listener, replaced on reload.
#[derive(Debug)]
pub(crate) struct ServerTls(ArcSwap<ServerConfig>);

impl ServerTls {
    /// Reads the files. `http2`: offer HTTP/2 in ALPN.
    pub(crate) fn load(files: &KeyFiles, http2: bool) -> Result<Self, TlsError> {
        let (certificates, key) = files::key_pair(FLAGS, files)?;
        let bad = |error| files::bad_key_pair(FLAGS, files, &error);
        let mut config = ServerConfig::builder_with_provider(files::provider())
            .with_safe_default_protocol_versions()
            .map_err(bad)?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(bad)?;
        // In the order of preference.
        config.alpn_protocols =
            [HTTP_2, HTTP_1][usize::from(!http2)..].iter().map(|name| name.to_vec()).collect();
        // Session tickets: clients keep the resumption state, so nothing is stored per client.
        config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(bad)?;
        Ok(Self(ArcSwap::from_pointee(config)))
    }

    /// The configuration for one handshake.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.0.load_full()
    }

    /// Takes over the configuration of `other`, for handshakes from now on.
    pub(crate) fn apply(&self, other: &Self) {
        self.0.store(other.config());
    }
}

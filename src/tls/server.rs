//! What clients are shown.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;

use super::files::{self, Flags};
use super::{HTTP_1, HTTP_2, KeyFiles, TlsError};

const FLAGS: Flags = ["--tls-cert-path", "--tls-key-path"];

/// The certificate that clients are shown now.
#[derive(Debug)]
pub(crate) struct ServerTls(ArcSwap<ServerConfig>);

impl ServerTls {
    /// Reads the files. `http2`: clients may choose HTTP/2.
    pub(crate) fn load(files: &KeyFiles, http2: bool) -> Result<Self, TlsError> {
        let (certificates, key) = files::key_pair(FLAGS, files)?;
        let bad = |error| files::bad_pair(FLAGS, files, &error);
        let mut config = ServerConfig::builder_with_provider(files::provider())
            .with_safe_default_protocol_versions()
            .map_err(bad)?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(bad)?;
        config.alpn_protocols =
            [HTTP_2, HTTP_1][usize::from(!http2)..].iter().map(|name| name.to_vec()).collect();
        // Clients keep what a session needs to go on: nothing is stored here for each of them.
        config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(bad)?;
        Ok(Self(ArcSwap::from_pointee(config)))
    }

    /// For one handshake.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.0.load_full()
    }

    /// Shows from now on what `other` shows.
    pub(crate) fn become_as(&self, other: &Self) {
        self.0.store(other.config());
    }
}

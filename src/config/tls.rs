//! TLS on both sides, and HTTP/2 for clients: what was asked for.

use std::path::PathBuf;
use std::sync::Arc;

use super::{ConfigError, DEFAULT_HTTP2_MAX_STREAMS, MiniLbConfig, Options};
use crate::tls::{ClientFiles, ClientTls, KeyFiles, ServerTls, TlsError};

/// TLS and HTTP/2.
#[derive(Clone)]
pub(crate) struct TlsOptions {
    /// What clients are shown; without it they speak plain HTTP.
    pub(super) files: Option<KeyFiles>,
    /// For servers with https.
    pub(super) client_files: ClientFiles,
    /// From `files`, once they have been read.
    pub(crate) server: Option<Arc<ServerTls>>,
    /// Whether clients may speak HTTP/2.
    pub(crate) http2: bool,
    /// Requests at a time on one connection of HTTP/2.
    pub(crate) http2_max_streams: u32,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self {
            files: None,
            client_files: ClientFiles::default(),
            server: None,
            http2: false,
            http2_max_streams: DEFAULT_HTTP2_MAX_STREAMS,
        }
    }
}

impl MiniLbConfig {
    /// Speaks TLS 1.2 and 1.3 to clients, with the certificate (and what leads up to its CA) and the private key in
    /// these PEM files. [`MiniLoadBalancer::reload`](crate::MiniLoadBalancer::reload) reads them anew. Default: plain
    /// HTTP.
    #[must_use]
    pub fn tls(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.options.tls.files = Some(KeyFiles { cert: cert.into(), key: key.into() });
        self
    }

    /// Trusts only servers whose certificate comes from a CA in these PEM files, when their URL begins with `https`;
    /// each call adds files. Default: the system's CAs, from the file that `SSL_CERT_FILE` names or from the
    /// distribution's.
    #[must_use]
    pub fn backend_ca<P: Into<PathBuf>>(mut self, files: impl IntoIterator<Item = P>) -> Self {
        self.options.tls.client_files.cas.extend(files.into_iter().map(Into::into));
        self
    }

    /// Shows the certificate in these PEM files to servers that ask for one. Default: none.
    #[must_use]
    pub fn backend_client_cert(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.options.tls.client_files.own = Some(KeyFiles { cert: cert.into(), key: key.into() });
        self
    }

    /// Whether clients may speak HTTP/2: as they agree in the TLS handshake, or without TLS if they begin with it.
    /// Default: no.
    #[must_use]
    pub fn http2(mut self, enabled: bool) -> Self {
        self.options.tls.http2 = enabled;
        self
    }

    /// Lets a client have this many requests at a time on one connection of HTTP/2. Default:
    /// [`DEFAULT_HTTP2_MAX_STREAMS`].
    #[must_use]
    pub fn http2_max_streams(mut self, streams: u32) -> Self {
        self.options.tls.http2_max_streams = streams;
        self
    }

    /// The files of certificates and keys that were named. When one has changed, it is time to
    /// [reload](crate::MiniLoadBalancer::reload).
    pub fn tls_files(&self) -> Vec<PathBuf> {
        let tls = &self.options.tls;
        let pairs = tls.files.iter().chain(&tls.client_files.own);
        let pairs = pairs.flat_map(|pair| [pair.cert.clone(), pair.key.clone()]);
        pairs.chain(tls.client_files.cas.iter().cloned()).collect()
    }
}

impl Options {
    /// Reads the files. Those for servers only if they were named or are needed now; the system's may never be.
    pub(super) fn load_tls(&mut self, needs_client: bool) -> Result<(), ConfigError> {
        let bad = |error: TlsError| ConfigError::new(error.to_string());
        let tls = &mut self.tls;
        if let Some(files) = &tls.files {
            tls.server = Some(Arc::new(ServerTls::load(files, tls.http2).map_err(bad)?));
        }
        let client = ClientTls::new(tls.client_files.clone());
        if needs_client || !tls.client_files.cas.is_empty() || tls.client_files.own.is_some() {
            client.config().map_err(bad)?;
        }
        self.sockets.tls = Arc::new(client);
        Ok(())
    }

    /// Uses the certificates of other options from now on. Whether clients speak TLS stays as it is.
    pub(crate) fn take_certificates(&self, other: &Self) {
        if let (Some(present), Some(new)) = (&self.tls.server, &other.tls.server) {
            present.become_as(new);
        }
        self.sockets.tls.become_as(&other.sockets.tls);
    }
}

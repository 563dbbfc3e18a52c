//! TLS on both sides, and HTTP/2 towards clients.

use std::path::PathBuf;
use std::sync::Arc;

use super::{ConfigError, MiniLbConfig, Options, TlsOptions};
use crate::options::PemFile;
use crate::tls::{ClientTls, ServerTls, TlsError};

impl MiniLbConfig {
    /// Serves clients over TLS 1.2 and 1.3, with the certificate (and its intermediate CAs) and the private
    /// key in these PEM files. [`MiniLoadBalancer::reload`](crate::MiniLoadBalancer::reload) reads them
    /// again. Default: plain HTTP.
    #[must_use]
    pub fn tls(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.options.tls.cert = PemFile(Some(cert.into()));
        self.options.tls.key = PemFile(Some(key.into()));
        self
    }

    /// Trusts servers with `https` URLs only if a CA in these PEM files has signed their certificate; each
    /// call adds files. Default: the system's CAs, from the file that `SSL_CERT_FILE` names or from the
    /// distribution's.
    #[must_use]
    pub fn backend_ca<P: Into<PathBuf>>(mut self, files: impl IntoIterator<Item = P>) -> Self {
        self.options.tls.cas.0.extend(files.into_iter().map(Into::into));
        self
    }

    /// Sends the client certificate in these PEM files to servers that ask for one. Default: none.
    #[must_use]
    pub fn backend_client_cert(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.options.tls.client_cert = PemFile(Some(cert.into()));
        self.options.tls.client_key = PemFile(Some(key.into()));
        self
    }

    /// Whether clients may use HTTP/2: negotiated in the TLS handshake, or with prior knowledge without TLS.
    /// Default: no.
    #[must_use]
    pub fn http2(mut self, enabled: bool) -> Self {
        self.options.tls.http2 = enabled;
        self
    }

    /// Limits the concurrent requests on one HTTP/2 connection. Default:
    /// [`DEFAULT_HTTP2_MAX_STREAMS`](super::DEFAULT_HTTP2_MAX_STREAMS).
    #[must_use]
    pub fn http2_max_streams(mut self, streams: u32) -> Self {
        self.options.tls.http2_max_streams = streams;
        self
    }

    /// The files of certificates and private keys in this configuration. When one of them has changed,
    /// [reload](crate::MiniLoadBalancer::reload).
    pub fn tls_files(&self) -> Vec<PathBuf> {
        let TlsOptions { cert, key, cas, client_cert, client_key, .. } = &self.options.tls;
        let single = [cert, key, client_cert, client_key].into_iter().filter_map(|file| file.0.clone());
        single.chain(cas.0.iter().cloned()).collect()
    }
}

impl Options {
    /// Reads the files. The CAs for servers are read only if they were named or a server has an `https` URL:
    /// the system's take memory that a router without TLS should not need.
    pub(super) fn load_tls(&mut self, needs_client: bool) -> Result<(), ConfigError> {
        let bad = |error: TlsError| ConfigError::new(error.to_string());
        let tls = &mut self.tls;
        tls.check_pairs()?;
        if let Some(files) = tls.server_files() {
            tls.server = Some(Arc::new(ServerTls::load(&files, tls.http2).map_err(bad)?));
        }
        let files = tls.client_files();
        let is_named = !files.cas.is_empty() || files.own.is_some();
        let client = ClientTls::new(files);
        // Named files are read even if no server needs them yet: an operator may add one with https later,
        // and a wrong file should be found now.
        if needs_client || is_named {
            client.config().map_err(bad)?;
        }
        self.sockets.tls = Arc::new(client);
        Ok(())
    }

    /// Takes over the certificates of other options. Whether clients use TLS cannot change: the listener is
    /// the same.
    pub(crate) fn take_certificates(&self, other: &Self) {
        // If only one of the two configurations has TLS, the reload reports that a restart is needed.
        if let (Some(present), Some(new)) = (&self.tls.server, &other.tls.server) {
            present.apply(new);
        }
        self.sockets.tls.apply(&other.sockets.tls);
    }
}

impl TlsOptions {
    /// A certificate is of no use without its key.
    fn check_pairs(&self) -> Result<(), ConfigError> {
        for (flags, files) in [
            (["--tls-cert-path", "--tls-key-path"], [&self.cert, &self.key]),
            (["--client-cert-path", "--client-key-path"], [&self.client_cert, &self.client_key]),
        ] {
            let (flag, path, missing) = match files {
                [PemFile(Some(path)), PemFile(None)] => (flags[0], path, flags[1]),
                [PemFile(None), PemFile(Some(path))] => (flags[1], path, flags[0]),
                _ => continue,
            };
            return Err(ConfigError::new(format!("{flag} {}: {missing} must be given too", path.display())));
        }
        Ok(())
    }
}

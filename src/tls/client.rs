//! TLS towards backends: which CAs are trusted, and which client certificate is presented.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{ClientConfig, RootCertStore};

use super::files::{self, KeyPair, KeyPairFlags, bad_file};
use super::{HTTP_1, KeyFiles, TlsError};

const FLAGS: KeyPairFlags = ["--client-cert-path", "--client-key-path"];
const CA_FLAG: &str = "--ca-cert-paths";
/// Names a file of CA certificates, as for OpenSSL.
const CA_FILE_VARIABLE: &str = "SSL_CERT_FILE";

/// The files for connections to backends.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClientFiles {
    /// The CAs that backends' certificates are verified against. Empty: those of the system.
    pub(crate) cas: Vec<PathBuf>,
    /// The client certificate, for backends that request one.
    pub(crate) own: Option<KeyFiles>,
}

/// The TLS configuration for connections to backends, replaced on reload.
///
/// Files are read for the first handshake: the system's CAs (about 140) take memory that a router without
/// `https://` backends need not spend.
#[derive(Debug, Default)]
pub(crate) struct ClientTls {
    files: ArcSwap<ClientFiles>,
    config: ArcSwapOption<ClientConfig>,
}

impl ClientTls {
    pub(crate) fn new(files: ClientFiles) -> Self {
        Self { files: ArcSwap::from_pointee(files), config: ArcSwapOption::empty() }
    }

    /// The configuration for one handshake.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        if let Some(config) = self.config.load_full() {
            return Ok(config);
        }
        // Two first handshakes may both load the files, and either result may stay.
        let config = Arc::new(load(&self.files.load())?);
        self.config.store(Some(Arc::clone(&config)));
        Ok(config)
    }

    /// Takes over the configuration of `other`, for handshakes from now on.
    pub(crate) fn apply(&self, other: &Self) {
        self.files.store(other.files.load_full());
        self.config.store(other.config.load_full());
    }
}

fn load(files: &ClientFiles) -> Result<ClientConfig, TlsError> {
    let roots = if files.cas.is_empty() { system_cas()? } else { configured_cas(&files.cas)? };
    match &files.own {
        None => client_config(roots, None).map_err(|error| TlsError(error.to_string())),
        Some(own) => client_config(roots, Some(files::key_pair(FLAGS, own)?))
            .map_err(|error| files::bad_key_pair(FLAGS, own, &error)),
    }
}

/// The configuration for a client that trusts `roots`, and presents the certificate of `own`.
pub(crate) fn client_config(
    roots: RootCertStore,
    own: Option<KeyPair>,
) -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(files::provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some((certificates, key)) => builder.with_client_auth_cert(certificates, key)?,
    };
    // Our connections as a client are HTTP/1.1 only; without ALPN a server might choose HTTP/2.
    config.alpn_protocols = vec![HTTP_1.to_vec()];
    Ok(config)
}

/// The operator's own CAs: each must be valid, as a typing error must not go unnoticed.
fn configured_cas(paths: &[PathBuf]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for path in paths {
        for certificate in files::certificates(CA_FLAG, path)? {
            let added = roots.add(certificate);
            added.map_err(|error| bad_file(CA_FLAG, path, format_args!("not a CA certificate: {error}")))?;
        }
    }
    Ok(roots)
}

/// The CAs of the file in `SSL_CERT_FILE`, or else the system's. Invalid ones are skipped, as OpenSSL and
/// curl do: some distributions ship certificates that webpki does not accept.
pub(crate) fn system_cas() -> Result<RootCertStore, TlsError> {
    let found = match std::env::var_os(CA_FILE_VARIABLE) {
        // The file alone. `load_native_certs` would add the directories of SSL_CERT_DIR, where that is set
        // for the whole machine: a file that is to narrow what is trusted would then widen it.
        Some(file) => rustls_native_certs::load_certs_from_paths(Some(Path::new(&file)), None),
        None => rustls_native_certs::load_native_certs(),
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        // Errors beside valid certificates do no harm; without any they are the reason.
        let reason = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
        return Err(TlsError(format!(
            "no CA certificates found{reason}: set {CA_FLAG} or {CA_FILE_VARIABLE} to a PEM file"
        )));
    }
    Ok(roots)
}

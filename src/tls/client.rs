//! What servers are checked against, and shown.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{ClientConfig, RootCertStore};

use super::files::{self, Flags, bad};
use super::{HTTP_1, KeyFiles, TlsError};

const FLAGS: Flags = ["--client-cert-path", "--client-key-path"];
const CA_FLAG: &str = "--ca-cert-paths";

/// Names the file of the system's CAs, as for OpenSSL.
const SYSTEM_CAS_VARIABLE: &str = "SSL_CERT_FILE";
/// Where Linux distributions keep it.
const SYSTEM_CAS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The files for connections to servers.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClientFiles {
    /// The CAs that servers' certificates must come from; without any, those of the system.
    pub(crate) cas: Vec<PathBuf>,
    /// What servers are shown that ask for it.
    pub(crate) own: Option<KeyFiles>,
}

/// How servers are spoken to now. The files are read when they are needed first: the system's CAs take memory that a
/// router without https should not have to give.
#[derive(Debug, Default)]
pub(crate) struct ClientTls {
    files: ArcSwap<ClientFiles>,
    config: ArcSwapOption<ClientConfig>,
}

impl ClientTls {
    pub(crate) fn new(files: ClientFiles) -> Self {
        Self { files: ArcSwap::from_pointee(files), config: ArcSwapOption::empty() }
    }

    /// For one handshake.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        if let Some(config) = self.config.load_full() {
            return Ok(config);
        }
        let config = Arc::new(load(&self.files.load())?);
        self.config.store(Some(Arc::clone(&config)));
        Ok(config)
    }

    /// Speaks from now on as `other` does.
    pub(crate) fn become_as(&self, other: &Self) {
        self.files.store(other.files.load_full());
        self.config.store(other.config.load_full());
    }
}

fn load(files: &ClientFiles) -> Result<ClientConfig, TlsError> {
    let roots = if files.cas.is_empty() { system_cas()? } else { given_cas(&files.cas)? };
    let builder = ClientConfig::builder_with_provider(files::provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?
        .with_root_certificates(roots);
    let mut config = match &files.own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let (certificates, key) = files::key_pair(FLAGS, own)?;
            let built = builder.with_client_auth_cert(certificates, key);
            built.map_err(|error| files::bad_pair(FLAGS, own, &error))?
        }
    };
    config.alpn_protocols = vec![HTTP_1.to_vec()];
    Ok(config)
}

fn given_cas(paths: &[PathBuf]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for path in paths {
        for certificate in files::certificates(CA_FLAG, path)? {
            let added = roots.add(certificate);
            added.map_err(|error| bad(CA_FLAG, path, format_args!("not a CA's certificate: {error}")))?;
        }
    }
    Ok(roots)
}

/// Those that cannot be read are left out, as everyone does: some systems have one.
fn system_cas() -> Result<RootCertStore, TlsError> {
    let named = std::env::var_os(SYSTEM_CAS_VARIABLE).map(PathBuf::from);
    let found = || SYSTEM_CAS.iter().map(PathBuf::from).find(|path| Path::exists(path));
    let Some(path) = named.or_else(found) else {
        return Err(TlsError(format!("this system has no file of CA certificates; give {CA_FLAG}")));
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(files::certificates(SYSTEM_CAS_VARIABLE, &path)?);
    Ok(roots)
}

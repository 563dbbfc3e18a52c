//! PEM files, and what is wrong with them.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{KeyFiles, TlsError};

/// The cryptography of both sides.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A sentence on the file that was given with a flag.
pub(super) fn bad(flag: &str, path: &Path, why: impl Display) -> TlsError {
    TlsError(format!("{flag} {}: {why}", path.display()))
}

/// All certificates in a file, of which there must be one at least.
pub(super) fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = fs::read(path).map_err(|error| bad(flag, path, error))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(flag, path, format_args!("not a PEM file: {error}")))?;
    if certificates.is_empty() {
        return Err(bad(flag, path, "there is no certificate in it"));
    }
    Ok(certificates)
}

fn key(flag: &str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = fs::read(path).map_err(|error| bad(flag, path, error))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            bad(flag, path, "there is no private key in it that is not encrypted")
        }
        error => bad(flag, path, format_args!("not a PEM file: {error}")),
    })
}

/// The flags of a certificate and of its key.
pub(super) type Flags = [&'static str; 2];

/// A certificate and its key, which belong together.
pub(super) fn key_pair(
    [cert_flag, key_flag]: Flags,
    files: &KeyFiles,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    Ok((certificates(cert_flag, &files.cert)?, key(key_flag, &files.key)?))
}

/// Why a certificate and a key that could be read are of no use together.
pub(super) fn bad_pair([cert_flag, key_flag]: Flags, files: &KeyFiles, error: &rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            let why = format_args!("it is not the key of the certificate in {}", files.cert.display());
            bad(key_flag, &files.key, why)
        }
        rustls::Error::InvalidCertificate(error) => {
            bad(cert_flag, &files.cert, format_args!("the certificate cannot be used: {error}"))
        }
        error => bad(key_flag, &files.key, format_args!("the key cannot be used: {error}")),
    }
}

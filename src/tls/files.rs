//! Reading PEM files, with errors that name the file and the flag that it was given with.

use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{KeyFiles, TlsError};

/// The cryptography of both sides. Passed explicitly: the process may have no default provider, or another
/// one.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// An error about the file that was given with a flag.
pub(super) fn bad_file(flag: &str, path: &Path, why: impl Display) -> TlsError {
    TlsError(format!("{flag} {}: {why}", path.display()))
}

/// All certificates in a file; at least one.
pub(super) fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = fs::read(path).map_err(|error| bad_file(flag, path, error))?;
    // Read as a whole and not line by line: a file that is replaced meanwhile must not be mixed from both.
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| bad_file(flag, path, format_args!("not a PEM file: {error}")))?;
    // Any text without a PEM section parses as no certificate, such as a key file given by mistake.
    if certificates.is_empty() {
        return Err(bad_file(flag, path, "the file contains no certificate"));
    }
    Ok(certificates)
}

fn key(flag: &str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let pem = fs::read(path).map_err(|error| bad_file(flag, path, error))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        // `BEGIN ENCRYPTED PRIVATE KEY` is no section that rustls looks for.
        rustls::pki_types::pem::Error::NoItemsFound => {
            bad_file(flag, path, "the file contains no private key, or an encrypted one")
        }
        error => bad_file(flag, path, format_args!("not a PEM file: {error}")),
    })
}

/// The flags of a certificate and of its key.
pub(super) type KeyPairFlags = [&'static str; 2];

/// A certificate chain and its private key.
pub(crate) type KeyPair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Reads a certificate chain and its private key.
pub(super) fn key_pair([cert_flag, key_flag]: KeyPairFlags, files: &KeyFiles) -> Result<KeyPair, TlsError> {
    Ok((certificates(cert_flag, &files.cert)?, key(key_flag, &files.key)?))
}

/// Why rustls does not accept a certificate and a key that could be read.
pub(super) fn bad_key_pair(
    [cert_flag, key_flag]: KeyPairFlags,
    files: &KeyFiles,
    error: &rustls::Error,
) -> TlsError {
    match error {
        // The usual error of a renewal that has replaced one of the two files only.
        rustls::Error::InconsistentKeys(_) => {
            let why = format_args!("it is not the key of the certificate in {}", files.cert.display());
            bad_file(key_flag, &files.key, why)
        }
        rustls::Error::InvalidCertificate(error) => {
            bad_file(cert_flag, &files.cert, format_args!("the certificate cannot be used: {error}"))
        }
        error => bad_file(key_flag, &files.key, format_args!("the key cannot be used: {error}")),
    }
}

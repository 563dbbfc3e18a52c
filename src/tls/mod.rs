//! TLS: configurations for both sides, built from PEM files and rebuilt when the files
//! change, and the handshake with a backend.
//!
//! No socket is opened here. A configuration is replaced as a whole, so that a handshake
//! sees one state; open connections keep the configuration of their handshake.

mod client;
mod connection;
mod files;
mod server;

use std::fmt;
use std::path::PathBuf;

pub(crate) use client::{ClientFiles, ClientTls};
#[cfg(feature = "kubernetes")]
pub(crate) use client::{client_config, system_cas};
#[cfg(feature = "kubernetes")]
pub(crate) use connection::{HandshakeHints, handshake};
pub(crate) use connection::{TlsConnection, accept, connect};
pub(crate) use server::ServerTls;

/// The ALPN names of HTTP/1.1 and HTTP/2 (RFC 7301, RFC 9113).
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

/// The PEM files of a certificate chain and of its private key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyFiles {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// A configuration that cannot be built. The text names the file and the flag that it was given with.
#[derive(Debug, Clone)]
pub(crate) struct TlsError(String);

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TlsError {}

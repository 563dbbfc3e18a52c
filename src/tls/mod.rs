//! TLS: certificates and keys from files, read again when the files have changed, and
//! the handshake with a server.
//!
//! No socket is opened here. The configuration in use is replaced as a whole, so that a
//! handshake sees one state, and open connections keep the one they began with.

mod client;
mod connection;
mod files;
mod server;

use std::fmt;
use std::path::PathBuf;

pub(crate) use client::{ClientFiles, ClientTls};
pub(crate) use connection::{TlsConnection, accept, connect};
pub(crate) use server::ServerTls;

/// HTTP/1.1 and HTTP/2, as a handshake names them (RFC 7301).
const HTTP_1: &[u8] = b"http/1.1";
const HTTP_2: &[u8] = b"h2";

/// A certificate with what leads up to its CA, and its key, both in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyFiles {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// A file that is of no use: one sentence that names it, and the flag that it was given with.
#[derive(Debug, Clone)]
pub(crate) struct TlsError(String);

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TlsError {}

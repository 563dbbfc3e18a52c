//! TLS and HTTP/2, as typed.

use std::path::PathBuf;

use clap::Args;
use mini_lb::{DEFAULT_HTTP2_MAX_STREAMS, MiniLbConfig};

#[derive(Debug, Args)]
pub(super) struct Tls {
    /// Certificate for clients, in PEM, with what leads up to its CA [default: plain HTTP]
    #[arg(long, value_name = "FILE", requires = "tls_key_path")]
    tls_cert_path: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert_path")]
    tls_key_path: Option<PathBuf>,
    /// CAs of servers with https, in PEM [default: the system's]
    #[arg(long, value_name = "FILE", num_args = 1.., action = clap::ArgAction::Append)]
    ca_cert_paths: Vec<PathBuf>,
    /// Certificate for servers that ask for one, in PEM
    #[arg(long, value_name = "FILE", requires = "client_key_path")]
    client_cert_path: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "client_cert_path")]
    client_key_path: Option<PathBuf>,
    /// Speak HTTP/2 with clients that want it
    #[arg(long)]
    http2: bool,
    /// Requests at a time on one connection of HTTP/2
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_HTTP2_MAX_STREAMS)]
    http2_max_streams: u32,
}

impl Tls {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let mut config = config
            .backend_ca(&self.ca_cert_paths)
            .http2(self.http2)
            .http2_max_streams(self.http2_max_streams);
        if let (Some(cert), Some(key)) = (&self.tls_cert_path, &self.tls_key_path) {
            config = config.tls(cert, key);
        }
        if let (Some(cert), Some(key)) = (&self.client_cert_path, &self.client_key_path) {
            config = config.backend_client_cert(cert, key);
        }
        config
    }

    /// How clients' URLs begin.
    pub(super) fn scheme(&self) -> &'static str {
        if self.tls_cert_path.is_some() { "https" } else { "http" }
    }
}

//! What operators get, as typed.

use clap::Args;
use mini_lb::{DEFAULT_PROMETHEUS_PORT, MiniLbConfig};

#[derive(Debug, Args)]
pub(super) struct Operating {
    /// Address at which operators are answered
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    prometheus_host: String,
    /// Port at which operators are answered; 0 is none [default: 29000, or none if that is taken]
    #[arg(long, value_name = "PORT")]
    prometheus_port: Option<u16>,
}

impl Operating {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        match self.prometheus_port {
            None => config.admin_address_if_free(&self.prometheus_host, DEFAULT_PROMETHEUS_PORT),
            Some(0) => config,
            Some(port) => config.admin_address(&self.prometheus_host, port),
        }
    }
}

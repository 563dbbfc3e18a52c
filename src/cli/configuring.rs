//! Where the configuration comes from, as typed.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(super) struct Configuring {
    /// A TOML file with a key for each flag; environment variables MINI_LB_... are over it, and flags over both. It is read
    /// again on SIGHUP and when it changes. MINI_LB_CONFIG names it too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration, print what it comes to, and end
    #[arg(long)]
    pub(super) check_config: bool,
}

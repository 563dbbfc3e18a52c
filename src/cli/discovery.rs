//! Servers that are found by name, and servers that have not come up yet, as typed.

use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args};
use mini_lb::MiniLbConfig;

use super::servers::{bootstrap_port, occurrences};

/// Names that stand for servers. Built by hand, as `--prefill` is.
pub(super) struct Names {
    prefill: Vec<(String, Option<u16>)>,
    decode: Vec<String>,
}

pub(super) fn name_args() -> [Arg; 2] {
    let arg = |name| {
        let arg = Arg::new(name).long(name).action(ArgAction::Append).help_heading("Servers");
        arg.value_parser(NonEmptyStringValueParser::new())
    };
    [
        arg("prefill-dns").num_args(1..=2).value_names(["HOST:PORT", "BOOTSTRAP|none"]).help(
            "A name whose addresses are all prefill servers, such as a headless Kubernetes service, and their \
             bootstrap port. Changes are followed. May be repeated",
        ),
        arg("decode-dns").num_args(1).value_name("HOST:PORT").help(
            "A name whose addresses are all decode servers. Changes are followed. May be repeated",
        ),
    ]
}

impl Names {
    pub(super) fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let prefill = occurrences(matches, "prefill-dns")
            .map(|values| Ok((values[0].clone(), bootstrap_port("--prefill-dns", &values)?)));
        Ok(Self {
            prefill: prefill.collect::<Result<_, clap::Error>>()?,
            decode: occurrences(matches, "decode-dns").flatten().collect(),
        })
    }

    pub(super) fn count(&self) -> usize {
        self.prefill.len() + self.decode.len()
    }

    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let config = self.prefill.iter().fold(config, |config, (name, port)| config.prefill_dns(name, *port));
        self.decode.iter().fold(config, |config, name| config.decode_dns(name))
    }
}

#[derive(Debug, Args)]
pub(super) struct Discovery {
    /// Time from one lookup of the names to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    dns_interval_secs: u32,
    /// Time that servers have to come up; later ones are logged, and asked as seldom as healthy ones
    #[arg(long, value_name = "SECONDS", default_value_t = 1_800)]
    worker_startup_timeout_secs: u32,
    /// Time from one probe of a server to the next that has not come up yet
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    worker_startup_check_interval: u32,
}

impl Discovery {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        config
            .dns_interval(seconds(self.dns_interval_secs))
            .worker_startup_timeout(seconds(self.worker_startup_timeout_secs))
            .worker_startup_check_interval(seconds(self.worker_startup_check_interval))
    }
}

//! Which servers there are and how they are chosen, as typed.

use clap::builder::NonEmptyStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args};
use mini_lb::{MiniLbConfig, Random, RoundRobin};

use super::refusal;
use super::unsupported::POLICIES;

/// Built by hand: derive cannot keep the values of one `--prefill` apart from those of the next.
pub(super) struct Servers {
    pub(super) prefill: Vec<(String, Option<u16>)>,
    pub(super) decode: Vec<String>,
    /// A prefill server's URL and the host that decode servers know it by.
    bootstrap_hosts: Vec<(String, String)>,
}

pub(super) fn server_args() -> [Arg; 3] {
    let arg = |name| {
        let arg = Arg::new(name).long(name).action(ArgAction::Append).help_heading("Servers");
        arg.value_parser(NonEmptyStringValueParser::new())
    };
    [
        arg("prefill").num_args(1..=2).value_names(["URL", "PORT|none"]).help(
            "A prefill server and its --disaggregation-bootstrap-port; with none or nothing as PORT, the server \
             is asked for it. May be repeated",
        ),
        arg("decode").num_args(1).value_name("URL").help("A decode server. May be repeated"),
        arg("prefill-bootstrap-host").num_args(2).value_names(["URL", "HOST"]).help(
            "Tells decode servers to find the prefill server at URL under HOST instead of the URL's own \
             host. May be repeated",
        ),
    ]
}

impl Servers {
    pub(super) fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let prefill = occurrences(matches, "prefill").map(|values| prefill_server(&values));
        let pair = |values: Vec<String>| (values[0].clone(), values[1].clone());
        Ok(Self {
            prefill: prefill.collect::<Result<_, _>>()?,
            decode: occurrences(matches, "decode").flatten().collect(),
            bootstrap_hosts: occurrences(matches, "prefill-bootstrap-host").map(pair).collect(),
        })
    }

    pub(super) fn add_bootstrap_hosts(&self, config: MiniLbConfig) -> MiniLbConfig {
        self.bootstrap_hosts.iter().fold(config, |config, (url, host)| config.bootstrap_host(url, host))
    }
}

/// The values of each use of a flag; clap has checked how many there are.
pub(super) fn occurrences<'a>(
    matches: &'a ArgMatches,
    flag: &str,
) -> impl Iterator<Item = Vec<String>> + use<'a> {
    matches.get_occurrences::<String>(flag).into_iter().flatten().map(|values| values.cloned().collect())
}

fn prefill_server(values: &[String]) -> Result<(String, Option<u16>), clap::Error> {
    Ok((values[0].clone(), bootstrap_port("--prefill", values)?))
}

/// The second of a flag's values, if there is one.
pub(super) fn bootstrap_port(flag: &str, values: &[String]) -> Result<Option<u16>, clap::Error> {
    match values.get(1) {
        None => Ok(None),
        Some(port) if port.eq_ignore_ascii_case("none") => Ok(None),
        Some(port) => match port.parse() {
            Ok(port) => Ok(Some(port)),
            Err(_) => Err(refusal(format_args!(
                "{flag} {} {}: the bootstrap port must be between 1 and 65535, or none",
                values[0].escape_debug(),
                port.escape_debug(),
            ))),
        },
    }
}

#[derive(Debug, Args)]
pub(super) struct Choosing {
    /// How servers are chosen: random or round_robin
    #[arg(long, value_name = "POLICY", default_value = "random")]
    policy: String,
    /// How prefill servers are chosen [default: --policy]
    #[arg(long, value_name = "POLICY")]
    prefill_policy: Option<String>,
    /// How decode servers are chosen [default: --policy]
    #[arg(long, value_name = "POLICY")]
    decode_policy: Option<String>,
}

impl Choosing {
    /// The policies for prefill and for decode.
    pub(super) fn policies(&self) -> Result<(Policy, Policy), clap::Error> {
        let both = Policy::parse("--policy", &self.policy)?;
        let own =
            |flag, name: &Option<String>| name.as_ref().map_or(Ok(both), |name| Policy::parse(flag, name));
        Ok((own("--prefill-policy", &self.prefill_policy)?, own("--decode-policy", &self.decode_policy)?))
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Policy {
    Random,
    RoundRobin,
}

impl Policy {
    fn parse(flag: &str, name: &str) -> Result<Self, clap::Error> {
        match name {
            "random" => Ok(Self::Random),
            "round_robin" => Ok(Self::RoundRobin),
            theirs if POLICIES.contains(&theirs) => Err(refusal(format_args!(
                "{flag} {theirs} is not supported: \
                 use random, as sglang_router does under --mini-lb, or round_robin"
            ))),
            unknown => {
                let unknown = unknown.escape_debug();
                Err(refusal(format_args!("{flag} {unknown}: not a policy; use random or round_robin")))
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round_robin",
        }
    }

    pub(super) fn for_prefill(self, config: MiniLbConfig) -> MiniLbConfig {
        match self {
            Self::Random => config.prefill_policy(Random),
            Self::RoundRobin => config.prefill_policy(RoundRobin::default()),
        }
    }

    pub(super) fn for_decode(self, config: MiniLbConfig) -> MiniLbConfig {
        match self {
            Self::Random => config.decode_policy(Random),
            Self::RoundRobin => config.decode_policy(RoundRobin::default()),
        }
    }
}

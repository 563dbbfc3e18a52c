//! The layer of environment variables that begin with `MINI_LB_`.

use std::ffi::OsString;

use mini_lb::{OptionSpec, ValueKind};

use super::super::{options, refusal};
use super::{CONFIG_VARIABLE, Occurrence, Origin, Setting};

const PREFIX: &str = "MINI_LB_";

/// What the environment sets.
pub(super) struct Variables {
    pub(super) config: Option<OsString>,
    pub(super) settings: Vec<Setting>,
}

/// Reads all variables with the prefix. An empty one counts as unset, since a manifest or an image may be
/// unable to unset one.
pub(super) fn read(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Variables, clap::Error> {
    let mut variables = Variables { config: None, settings: Vec::new() };
    let mut ours: Vec<(String, OsString)> = environment
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, value)| name.starts_with(PREFIX) && !value.is_empty())
        .collect();
    // So that the same error is reported each time, if there are several.
    ours.sort_unstable();
    for (name, value) in ours {
        if name == CONFIG_VARIABLE {
            variables.config = Some(value);
            continue;
        }
        let Ok(value) = value.into_string() else {
            return Err(refusal(format_args!("{name}: the value is not UTF-8")));
        };
        let key = &name[PREFIX.len()..];
        // Variables are case-sensitive: `MINI_LB_port` is a typing error.
        let is_upper = !key.contains(|c: char| c.is_ascii_lowercase() || c == '-');
        let spec = options::by_key(&key.to_ascii_lowercase()).filter(|_| is_upper);
        // `MINI_LB_PORT=tcp://…` has an option's name, so only its value tells. The other variables of a
        // service are ignored where no option has their name.
        if is_url_of_a_service(&name, &value) || (spec.is_none() && is_of_a_service(&name)) {
            continue;
        }
        let Some(spec) = spec else {
            let spelled = |near: &str| format!("{PREFIX}{}", near.replace('-', "_").to_ascii_uppercase());
            let why = options::unknown(key, "variable", spelled);
            return Err(refusal(format_args!("{}: {why}", name.escape_debug())));
        };
        let occurrences = occurrences(spec, &name, &value)?;
        variables.settings.push(Setting { spec, origin: Origin::Place(name), occurrences });
    }
    Ok(variables)
}

/// A comma separates the occurrences of a flag that may be repeated, and a space the values of one.
fn occurrences(spec: &OptionSpec, name: &str, value: &str) -> Result<Vec<Occurrence>, clap::Error> {
    let occurrence = |values: Vec<String>| Occurrence { place: name.to_owned(), values };
    let parts = || value.split(',').map(str::trim).filter(|part| !part.is_empty());
    Ok(match spec.kind {
        ValueKind::Switch => match value {
            "1" | "true" => vec![occurrence(Vec::new())],
            // Set all the same: it must override `true` in the file.
            "0" | "false" => Vec::new(),
            _ => return Err(refusal(format_args!("{name}: must be 1, 0, true or false"))),
        },
        ValueKind::Single(_) => vec![occurrence(vec![value.to_owned()])],
        ValueKind::List(_) | ValueKind::WordList(_) | ValueKind::CommaList(_) => {
            parts().map(|part| occurrence(vec![part.to_owned()])).collect()
        }
        ValueKind::Groups { .. } => {
            parts().map(|part| occurrence(part.split_whitespace().map(str::to_owned).collect())).collect()
        }
    })
}

/// Kubernetes sets such variables in each pod for every service of its namespace, and one may well be called
/// `mini-lb`: `MINI_LB_SERVICE_HOST`, `MINI_LB_SERVICE_PORT_HTTP`, `MINI_LB_PORT_8000_TCP_ADDR`,
/// `MINI_LB_PORT=tcp://10.0.0.1:8000`.
fn is_of_a_service(name: &str) -> bool {
    let has_port = |protocol: &str| {
        let before = name.split(protocol).next().filter(|before| before.len() < name.len());
        let number = before.and_then(|before| before.rsplit_once("_PORT_"));
        number.is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| has_port(protocol))
}

fn is_url_of_a_service(name: &str, value: &str) -> bool {
    name.ends_with("_PORT") && ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}

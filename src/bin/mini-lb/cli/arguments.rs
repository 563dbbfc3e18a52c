//! The command line, built from the options.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, ArgMatches, Command};
use mini_lb::{OptionSpec, ValueKind};

use super::options;

const EXAMPLE: &str = "\
Examples:
  mini-lb --prefill http://10.0.0.1:30000 8998 --prefill http://10.0.0.2:30000 none \\
          --decode http://10.0.0.3:30000 --host 0.0.0.0 --port 8000
  mini-lb --config mini-lb.toml --check-config --probe    # do the servers fit? before traffic flows
  mini-lb top                                             # the numbers of a running router

The flags are those of `python -m sglang_router.launch_router --pd-disaggregation --mini-lb`.
One of its flags that mini-lb does not support is refused by name.";

/// The accepted flags that are in the help text: users who migrate type them.
const SHOWN: [&str; 2] = ["pd-disaggregation", "mini-lb"];

pub(super) fn command() -> Command {
    Command::new("mini-lb")
        .disable_help_flag(true)
        .disable_version_flag(true)
        // As in argparse, the last of several wins.
        .args_override_self(true)
        .args(options::all().map(|flag| arg(flag.section, &flag.spec)))
        .args(help_args())
        .version(env!("CARGO_PKG_VERSION"))
        .about("Routes SGLang requests to pairs of a prefill and a decode server, or to plain servers, byte for byte.")
        .override_usage(
            "mini-lb --prefill <URL> [PORT|none]... --decode <URL>... [OPTIONS]\n       mini-lb --worker-urls <URL>... \
             [OPTIONS]\n       mini-lb top [URL] [--once]",
        )
        .after_help(EXAMPLE)
}

/// clap splits words into flags and values. It has no types and no defaults: the library checks values,
/// whichever way they come, and an option that is not given must be seen as such by the layers.
fn arg(section: &'static str, spec: &OptionSpec) -> Arg {
    let hidden = section == options::COMPATIBILITY && !SHOWN.contains(&spec.name);
    let arg = Arg::new(spec.name).long(spec.name).help(help(spec)).help_heading(section).hide(hidden);
    match spec.kind {
        ValueKind::Switch => arg.action(ArgAction::SetTrue),
        ValueKind::Single(name) => {
            // Otherwise clap takes the `-1` of sglang_router's scripts for a flag.
            arg.action(ArgAction::Set).value_name(name).allow_negative_numbers(spec.minus_one_is_no_limit)
        }
        ValueKind::List(name) => arg.action(ArgAction::Append).value_name(name),
        ValueKind::WordList(name) | ValueKind::CommaList(name) => {
            // Several words after one flag, as in sglang_router's command lines.
            arg.action(ArgAction::Append).value_name(name).num_args(usize::from(!spec.may_be_empty)..)
        }
        ValueKind::Groups { names, required } => {
            arg.action(ArgAction::Append).value_names(names).num_args(required..=names.len())
        }
    }
}

/// The description with the default, where there is one.
fn help(spec: &OptionSpec) -> String {
    match spec.default.to_string() {
        default if default.is_empty() => spec.help.to_owned(),
        default => format!("{} [default: {default}]", spec.help),
    }
}

/// clap's own two would come first, before the headings.
fn help_args() -> [Arg; 2] {
    let arg = |name| Arg::new(name).long(name).help_heading("Help");
    [
        arg("help").short('h').action(ArgAction::Help).help("Print this text"),
        arg("version").short('V').action(ArgAction::Version).help("Print the version"),
    ]
}

/// The values of each occurrence of an option on the command line. `None`: there is none.
pub(super) fn occurrences(matches: &ArgMatches, spec: &OptionSpec) -> Option<Vec<Vec<String>>> {
    if spec.kind == ValueKind::Switch {
        // clap has a value for each switch, given or not: `false` is the default.
        return matches.get_flag(spec.name).then(|| vec![Vec::new()]);
    }
    let occurrences = matches.get_occurrences::<String>(spec.name)?;
    Some(occurrences.map(|values| values.cloned().collect()).collect())
}

/// The flag that clap suggests for one that it does not know, without its dashes.
pub(super) fn similar_flag(flag: &str) -> Option<String> {
    // clap suggests a flag only in its error for an unknown one, so it has to parse one.
    let words = [OsString::from("mini-lb"), OsString::from(flag)];
    let error = command().try_get_matches_from(words).err()?;
    let Some(ContextValue::String(near)) = error.get(ContextKind::SuggestedArg) else { return None };
    let name = near.trim_start_matches('-');
    (!options::COMMAND_LINE_ONLY.contains(&name)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_make_a_valid_command_line() {
        command().debug_assert();
    }
}

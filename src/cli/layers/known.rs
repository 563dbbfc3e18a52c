//! The flags that there are, by the names they have in files and in the environment.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use super::super::refusal;
use super::super::unsupported::REFUSED;
use super::{Use, is_secret};

/// Flags that are about a run, not about what the router does.
const ABOUT_A_RUN: [&str; 4] = ["config", "check-config", "help", "version"];

/// A field's name in files, where it is not the value's name in the help text.
const FIELDS: [(&str, &str, &str); 1] = [("prefill", "bootstrap_port", "port")];

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// It is there or not.
    Nothing,
    One,
    /// One each time, or several at once, and all of them are one list.
    List,
    /// Several that belong together, each time.
    Groups,
}

pub(super) struct Known {
    command: Command,
}

impl Known {
    pub(super) fn new(mut command: Command) -> Self {
        command.build();
        Self { command }
    }

    /// Every flag that has a key.
    pub(super) fn flags(command: &Command) -> impl Iterator<Item = (&str, &Arg)> {
        let named = command.get_arguments().filter_map(|arg| Some((arg.get_long()?, arg)));
        named.filter(|(name, _)| !ABOUT_A_RUN.contains(name))
    }

    /// The flag of a key, which has underscores or dashes.
    pub(super) fn flag(&self, key: &str) -> Option<(&str, &Arg)> {
        let name = key.replace('_', "-");
        Self::flags(&self.command).find(|(flag, _)| *flag == name)
    }

    /// What is said of a key that is none: that there is no such flag here, or which one is near.
    pub(super) fn unknown(&self, key: &str, what: &str, spelled: impl Fn(&str) -> String) -> String {
        let name = key.to_ascii_lowercase().replace('_', "-");
        let flag = format!("--{name}");
        if let Some((flag, instead)) = REFUSED.iter().find(|(refused, _)| *refused == flag) {
            return format!("{flag} is not supported: {instead}");
        }
        if ABOUT_A_RUN.contains(&name.as_str()) {
            return format!("{flag} is for the command line");
        }
        let same = self.flag(&name).map(|(same, _)| same.to_owned());
        match same.or_else(|| self.nearest(flag)) {
            Some(near) => format!("unknown {what}; did you mean {}?", spelled(&near)),
            None => format!("unknown {what}; each flag of --help has one, {} for --port", spelled("port")),
        }
    }

    /// As clap suggests it on a command line.
    fn nearest(&self, flag: String) -> Option<String> {
        let words = [OsString::from("mini-lb"), OsString::from(flag)];
        let error = self.command.clone().try_get_matches_from(words).err()?;
        let Some(ContextValue::String(near)) = error.get(ContextKind::SuggestedArg) else { return None };
        let name = near.trim_start_matches('-');
        (!ABOUT_A_RUN.contains(&name)).then(|| name.to_owned())
    }

    /// The flags that a command line names. A word that begins with `--` is never a value.
    pub(super) fn typed(&self, words: &[OsString]) -> Vec<String> {
        let words = words.iter().skip(1).filter_map(|word| word.to_str()).take_while(|word| *word != "--");
        let names: Vec<&str> = words
            .filter_map(|word| word.strip_prefix("--"))
            .map(|word| word.split_once('=').map_or(word, |(name, _)| name))
            .collect();
        let is_typed = |arg: &Arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            arg.get_long().into_iter().chain(aliases).any(|name| names.contains(&name))
        };
        Self::flags(&self.command).filter(|(_, arg)| is_typed(arg)).map(|(flag, _)| flag.to_owned()).collect()
    }

    /// A use of a flag as it would be typed, if it could be.
    pub(super) fn words(&self, flag: &str, used: &Use) -> Result<Vec<String>, clap::Error> {
        let words = match used.values.as_slice() {
            [] => vec![format!("--{flag}")],
            [value] => vec![format!("--{flag}={value}")],
            values => {
                if values.iter().any(|value| value.starts_with('-')) {
                    return Err(refusal(format_args!(
                        "{}: --{flag}: one of several values must not begin with a dash",
                        used.place
                    )));
                }
                [&[format!("--{flag}")], values].concat()
            }
        };
        let line = ["mini-lb"].into_iter().chain(words.iter().map(String::as_str));
        match self.command.clone().try_get_matches_from(line) {
            Err(error) if is_of_one_flag(error.kind()) => {
                let why = if is_secret(flag) { "not a value for it".to_owned() } else { sentence(&error) };
                Err(refusal(format_args!("{}: --{flag}: {why}", used.place)))
            }
            // What flags ask of each other is seen when all are together.
            _ => Ok(words),
        }
    }
}

fn is_of_one_flag(kind: ErrorKind) -> bool {
    !matches!(kind, ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict)
}

/// What clap says, without its advice.
pub(in super::super) fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
    first.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What a flag takes, of a command that is built.
pub(super) fn takes(arg: &Arg) -> Takes {
    let most = arg.get_num_args().map_or(1, |range| range.max_values());
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::SetFalse | ArgAction::Count => Takes::Nothing,
        // Names of its own say that the values of one use belong together.
        ArgAction::Append if most > 1 && fields(arg).len() > 1 => Takes::Groups,
        ArgAction::Append => Takes::List,
        _ if most > 1 => Takes::List,
        _ => Takes::One,
    }
}

/// What the values of one use are called in a table.
fn fields(arg: &Arg) -> Vec<String> {
    let names = arg.get_value_names().unwrap_or_default();
    names.iter().map(|name| name.split('|').next().unwrap_or_default().to_lowercase()).collect()
}

/// At which place of a use the field `name` is.
pub(super) fn field(arg: &Arg, name: &str) -> Option<usize> {
    let alias = FIELDS.iter().find(|(flag, alias, _)| arg.get_long() == Some(*flag) && *alias == name);
    let name = alias.map_or(name, |(_, _, name)| *name);
    fields(arg).iter().position(|field| field == name)
}

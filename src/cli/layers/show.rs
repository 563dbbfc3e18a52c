//! The effective configuration, as a file that would say the same.

use std::fmt::Write;

use clap::{Arg, ArgMatches, Command};

use super::super::unsupported::ACCEPTED;
use super::known::{Known, Takes, takes};
use super::{Layers, Origin, is_secret};

/// Every flag as a key with its value, and who says so.
pub(in super::super) fn show(mut command: Command, matches: &ArgMatches, layers: &Layers) -> String {
    command.build();
    let mut text = String::new();
    let mut heading = None;
    for (flag, arg) in Known::flags(&command) {
        let origin = layers.origin(flag);
        let without_effect = ACCEPTED.iter().any(|accepted| accepted.strip_prefix("--") == Some(flag));
        if without_effect && matches!(origin, Origin::Default) {
            continue;
        }
        if heading != arg.get_help_heading() {
            heading = arg.get_help_heading();
            let gap = if text.is_empty() { "" } else { "\n" };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{gap}# {}", heading.unwrap_or("Options"));
        }
        let _ = writeln!(text, "{}", line(flag, arg, matches, &origin));
    }
    text
}

fn line(flag: &str, arg: &Arg, matches: &ArgMatches, origin: &Origin<'_>) -> String {
    let key = flag.replace('-', "_");
    let origin = match origin {
        Origin::CommandLine => "command line",
        Origin::Place(place) => place,
        Origin::Default => "default",
    };
    match value(arg, matches) {
        None => format!("# {key} is not set: {}", without_value(arg)),
        Some(_) if is_secret(flag) => format!("# {key} = \"***\"  # {}", origin.escape_debug()),
        Some(value) => format!("{key} = {value}  # {}", origin.escape_debug()),
    }
}

/// What the help says of a flag that has no default of its own.
fn without_value(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let default = help.rsplit_once("[default: ").and_then(|(_, rest)| rest.strip_suffix(']'));
    default.unwrap_or("none").to_owned()
}

fn value(arg: &Arg, matches: &ArgMatches) -> Option<String> {
    let id = arg.get_id().as_str();
    let takes = takes(arg);
    if takes == Takes::Nothing {
        return Some(matches.get_flag(id).to_string());
    }
    let groups: Vec<Vec<String>> = matches
        .get_raw_occurrences(id)?
        .map(|values| values.map(|value| literal(&value.to_string_lossy())).collect())
        .collect();
    Some(match takes {
        Takes::Groups => list(groups.iter().map(|group| list(group.iter()))),
        Takes::List => list(groups.iter().flatten()),
        _ => groups.into_iter().flatten().next_back()?,
    })
}

fn list<T: AsRef<str>>(items: impl Iterator<Item = T>) -> String {
    let items: Vec<T> = items.collect();
    let items: Vec<&str> = items.iter().map(T::as_ref).collect();
    format!("[{}]", items.join(", "))
}

/// A number as a number, and all else as a string.
fn literal(value: &str) -> String {
    if value.parse::<i64>().is_ok_and(|number| number.to_string() == value) {
        return value.to_owned();
    }
    let mut text = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(text, "\\u{:04X}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text + "\""
}

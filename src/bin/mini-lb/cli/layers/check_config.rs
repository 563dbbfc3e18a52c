//! The effective configuration, as a file that has the same effect.

use std::fmt::Write;

use mini_lb::{OptionSpec, ValueKind};

use super::super::options;
use super::{Layers, Origin};

/// Every option as a key with its value, and where the value comes from.
pub(super) fn text(layers: &Layers) -> String {
    let mut text = String::new();
    let mut section = "";
    for flag in options::layered() {
        if flag.section == options::COMPATIBILITY && !layers.is_set(flag.spec.name) {
            continue;
        }
        if section != flag.section {
            section = flag.section;
            let gap = if text.is_empty() { "" } else { "\n" };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{gap}# {section}");
        }
        let _ = writeln!(text, "{}", line(&flag.spec, layers));
    }
    text
}

fn line(spec: &OptionSpec, layers: &Layers) -> String {
    let key = spec.key();
    let (occurrences, origin) = match layers.setting(spec.name) {
        Some(setting) => (
            layers.values(spec.name),
            match &setting.origin {
                Origin::CommandLine => "command line",
                Origin::Place(place) => place,
            },
        ),
        None => (spec.default.values().into_iter().map(|value| vec![value]).collect(), "default"),
    };
    // A file's name may hold a line break, which would end the comment.
    let origin = origin.escape_debug();
    // An empty list is not the default: without request_id_headers every id is generated.
    if spec.kind.is_list() && occurrences.is_empty() && layers.is_set(spec.name) {
        return format!("{key} = []  # {origin}");
    }
    match value(spec, &occurrences) {
        None => {
            let default = spec.default.to_string();
            format!("# {key} is not set: {}", if default.is_empty() { "none" } else { &default })
        }
        // As a comment: as a value, *** would be the key of a router that is started with this output.
        Some(_) if spec.secret => format!("# {key} = \"***\"  # {origin}"),
        Some(value) => format!("{key} = {value}  # {origin}"),
    }
}

/// `None`: there is no value.
fn value(spec: &OptionSpec, occurrences: &[Vec<String>]) -> Option<String> {
    let groups =
        occurrences.iter().map(|values| values.iter().map(|value| literal(value)).collect::<Vec<_>>());
    match spec.kind {
        ValueKind::Switch => Some((!occurrences.is_empty()).to_string()),
        _ if occurrences.is_empty() => None,
        ValueKind::Single(_) => groups.flatten().next_back(),
        ValueKind::Groups { .. } => Some(list(groups.map(|group| list(group.into_iter())))),
        _ => Some(list(groups.flatten())),
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A number as a number, and all else as a string.
fn literal(value: &str) -> String {
    // Not for `007` or `+7`, which a number would not give back as they were written.
    if value.parse::<i64>().is_ok_and(|number| number.to_string() == value) {
        return value.to_owned();
    }
    let mut text = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            // TOML's strings allow no control character but the tab.
            c if c.is_control() => {
                let _ = write!(text, "\\u{:04X}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text + "\""
}

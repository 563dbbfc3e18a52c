//! A word on the command line that belongs to no flag: which flag it follows, and what to write.
//!
//! clap says only that the word is unexpected.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use mini_lb::{OptionSpec, ValueKind};

use super::{options, refusal};

/// The error of clap, or a clearer one if it is about such a word.
pub(super) fn explained(error: clap::Error, args: &[OsString]) -> clap::Error {
    let word = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => word,
        _ => return error,
    };
    // For an unknown flag, clap suggests a similar one.
    if word.starts_with('-') {
        return error;
    }
    let words: Vec<&str> = args.iter().skip(1).map(|word| word.to_str().unwrap_or_default()).collect();
    let why = why(word, &words);
    refusal(format_args!("{}: {why}", word.escape_debug()))
}

fn why(word: &str, words: &[&str]) -> String {
    // clap stops at the first word that it cannot place; the same word before it may be a value.
    let places = words.iter().enumerate().filter(|(_, known)| **known == word).map(|(place, _)| place);
    let strays = places.filter_map(|place| Some((place, flag_before(&words[..place])?)));
    let mut strays = strays.filter(|(_, (_, spec, values))| values.len() >= most_values(spec));
    let Some((_, (flag, spec, values))) = strays.next() else {
        return "there is no such command; the router takes flags (see --help)".to_owned();
    };
    let takes = match most_values(spec) {
        0 => return format!("{flag} takes no value"),
        1 => "one value".to_owned(),
        most => format!("up to {most} values"),
    };
    let again = if spec.kind.is_list() { format!("; write {flag} before each value") } else { String::new() };
    let values = values.iter().map(|value| value.escape_debug().to_string()).collect::<Vec<_>>().join(" ");
    format!("{flag} takes {takes}, and has {values}{again}")
}

/// The last flag of these words, and what follows it.
fn flag_before<'a>(words: &[&'a str]) -> Option<(&'a str, &'static OptionSpec, Vec<&'a str>)> {
    let place = words.iter().rposition(|word| word.starts_with("--"))?;
    let (flag, first) = match words[place].split_once('=') {
        Some((flag, value)) => (flag, Some(value)),
        None => (words[place], None),
    };
    let spec = options::all().map(|flag| &flag.spec).find(|spec| spec.name == &flag[2..])?;
    Some((flag, spec, first.into_iter().chain(words[place + 1..].iter().copied()).collect()))
}

fn most_values(spec: &OptionSpec) -> usize {
    match spec.kind {
        ValueKind::Switch => 0,
        ValueKind::Single(_) | ValueKind::List(_) => 1,
        ValueKind::WordList(_) | ValueKind::CommaList(_) => usize::MAX,
        ValueKind::Groups { names, .. } => names.len(),
    }
}

//! Flags over environment over file: what the layers below the command line set, as words before those that were typed.
//!
//! Nothing here has a list of flags: clap's own is asked, so each flag has its key and its variable as soon as it
//! exists. What a value means is left to clap too, which is why a layer becomes words and not values.

mod environment;
mod file;
mod known;
mod show;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgMatches, Command};

use super::refusal;
use known::Known;
pub(super) use known::sentence;
pub(super) use show::show;

/// Where a configuration file is named if not on the command line.
const CONFIG_VARIABLE: &str = "MINI_LB_CONFIG";

/// One flag, as a lower layer sets it.
#[derive(Debug)]
struct Setting {
    /// Without dashes before it.
    flag: String,
    /// Where it is said: a variable, or a file and a line.
    place: String,
    /// Each use of the flag; none if it is switched off, or an empty list.
    uses: Vec<Use>,
}

/// One use of a flag and its values.
#[derive(Debug)]
struct Use {
    place: String,
    values: Vec<String>,
}

/// What was typed, over what the environment and the file say.
pub(crate) struct Layers {
    /// A whole command line, program name first.
    pub(super) words: Vec<OsString>,
    pub(super) file: Option<PathBuf>,
    typed: Vec<String>,
    settings: Vec<Setting>,
}

impl Layers {
    /// Only what was typed.
    pub(super) fn none(typed: Vec<OsString>) -> Self {
        Self { words: typed, file: None, typed: Vec::new(), settings: Vec::new() }
    }

    /// Reads the layers below `typed`, a command line without a request for help.
    pub(super) fn read(
        command: Command,
        typed: Vec<OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, clap::Error> {
        let known = Known::new(command);
        let variables = environment::read(&known, environment)?;
        let file = typed_value(&typed, "--config").or(variables.config).map(PathBuf::from);
        let from_file = file.as_deref().map_or(Ok(Vec::new()), |path| file::read(&known, path))?;
        let named = known.typed(&typed);
        let mut settings = variables.settings;
        for setting in from_file {
            if !settings.iter().any(|higher| higher.flag == setting.flag) {
                settings.push(setting);
            }
        }
        // A list is replaced as a whole, by whoever is higher.
        settings.retain(|setting| !named.contains(&setting.flag));
        let mut words: Vec<OsString> = typed.first().cloned().into_iter().collect();
        for setting in &settings {
            for used in &setting.uses {
                words.extend(known.words(&setting.flag, used)?.into_iter().map(OsString::from));
            }
        }
        words.extend(typed.into_iter().skip(1));
        Ok(Self { words, file, typed: named, settings })
    }

    /// Who says what a flag is.
    fn origin(&self, flag: &str) -> Origin<'_> {
        if self.typed.iter().any(|typed| typed == flag) {
            return Origin::CommandLine;
        }
        match self.settings.iter().find(|setting| setting.flag == flag) {
            Some(setting) => Origin::Place(&setting.place),
            None => Origin::Default,
        }
    }

    /// Puts the place before a sentence that begins with a flag, if a lower layer is to blame for it.
    pub(crate) fn placed(&self, sentence: &str) -> String {
        let flag = sentence.strip_prefix("--").and_then(|rest| rest.split([' ', ':', '=']).next());
        let Some(setting) = flag.and_then(|flag| self.settings.iter().find(|one| one.flag == flag)) else {
            return sentence.to_owned();
        };
        let said = |used: &&Use| {
            let words = format!("--{} {}", setting.flag, used.values.join(" "));
            sentence.strip_prefix(&words).is_some_and(|rest| rest.starts_with([' ', ':']))
        };
        let place = setting.uses.iter().find(said).map_or(&setting.place, |used| &used.place);
        format!("{place}: {sentence}")
    }

    /// The same for an error of ours that clap carries.
    pub(super) fn placed_error(&self, error: clap::Error) -> clap::Error {
        let text = error.to_string();
        match text.strip_prefix("error: ").map(str::trim_end) {
            Some(sentence) if error.kind() == ErrorKind::ValueValidation && sentence.starts_with("--") => {
                refusal(self.placed(sentence))
            }
            _ => error,
        }
    }
}

/// The files that a configuration is made of: its own, and those that flags name.
pub(super) fn files(command: &Command, matches: &ArgMatches, layers: &Layers) -> Vec<PathBuf> {
    let is_file = |flag: &str| ["-path", "-paths", "-file"].iter().any(|end| flag.ends_with(end));
    let args = Known::flags(command).filter(|(flag, _)| is_file(flag));
    let named = args.flat_map(|(_, arg)| matches.get_raw(arg.get_id().as_str()).into_iter().flatten());
    layers.file.clone().into_iter().chain(named.map(PathBuf::from)).collect()
}

enum Origin<'a> {
    CommandLine,
    Place(&'a str),
    Default,
}

/// The value of the last use of a flag on a command line.
fn typed_value(typed: &[OsString], flag: &str) -> Option<OsString> {
    let mut value = None;
    let mut words = typed.iter().skip(1).take_while(|word| *word != "--").peekable();
    while let Some(word) = words.next() {
        if word == OsStr::new(flag) {
            value = words.peek().map(|next| (*next).clone()).or(value);
        } else if let Some(rest) = word.to_str().and_then(|word| word.strip_prefix(flag)?.strip_prefix('=')) {
            value = Some(rest.into());
        }
    }
    value
}

/// Whether a flag's value is shown to nobody.
fn is_secret(flag: &str) -> bool {
    flag.ends_with("api-key") || flag.ends_with("api-keys")
}

#[cfg(test)]
mod tests;

//! Flags over environment over file: for each option, the values of the highest layer that has it.
//!
//! Nothing here has a list of options, and nothing knows what a value means: each
//! layer becomes occurrences of flags, as if they had been typed.

mod check_config;
mod environment;
mod file;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ArgMatches;
use mini_lb::OptionSpec;

use super::{arguments, options};

/// Names the configuration file if the command line does not.
const CONFIG_VARIABLE: &str = "MINI_LB_CONFIG";

/// An option that a layer sets. Not `Debug`, as the values may be keys.
struct Setting {
    spec: &'static OptionSpec,
    origin: Origin,
    /// Each occurrence of the flag; none if a switch is off or a list is empty.
    occurrences: Vec<Occurrence>,
}

/// One occurrence of a flag.
struct Occurrence {
    /// The variable, or the file and the line. Of no use for a flag that was typed.
    place: String,
    values: Vec<String>,
}

/// Which layer a value comes from.
enum Origin {
    CommandLine,
    /// A variable, or a file and a line.
    Place(String),
}

/// The options that are set, each by the highest layer that sets it.
pub(crate) struct Layers {
    file: Option<PathBuf>,
    settings: Vec<Setting>,
}

impl Layers {
    /// Puts the environment and the file below a command line.
    pub(super) fn read(
        matches: &ArgMatches,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, clap::Error> {
        let variables = environment::read(environment)?;
        let typed_file = matches.get_one::<String>("config").map(Into::into);
        // One file only: which of two wins would have to be known for each option.
        let file = typed_file.or(variables.config).map(PathBuf::from);
        let from_file = file.as_deref().map_or(Ok(Vec::new()), file::read)?;
        let mut layers = Self { file, settings: typed(matches) };
        for setting in variables.settings.into_iter().chain(from_file) {
            // Lists, too, are replaced as a whole: a file that adds servers to those that were typed would
            // surprise.
            if !layers.is_set(setting.spec.name) {
                layers.settings.push(setting);
            }
        }
        Ok(layers)
    }

    fn setting(&self, name: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.spec.name == name)
    }

    /// Whether any layer sets this option.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.setting(name).is_some()
    }

    /// The values of each occurrence of an option; none if it is not set.
    pub(super) fn values(&self, name: &str) -> Vec<Vec<String>> {
        let Some(setting) = self.setting(name) else { return Vec::new() };
        let occurrences: Vec<_> =
            setting.occurrences.iter().map(|occurrence| occurrence.values.clone()).collect();
        setting.spec.split(&occurrences)
    }

    /// The value of an option that takes one.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.setting(name)?.occurrences.last()?.values.first().map(String::as_str)
    }

    /// Puts the place before a sentence that begins with a flag, if the value comes from a file or a
    /// variable.
    pub(crate) fn placed(&self, sentence: &str) -> String {
        let flag = sentence.strip_prefix("--").and_then(|rest| rest.split([' ', ':', '=']).next());
        let Some(Setting { spec, origin: Origin::Place(place), occurrences }) =
            flag.and_then(|flag| self.setting(flag))
        else {
            return sentence.to_owned();
        };
        // A list in a file has a line for each item.
        let is_it = |occurrence: &&Occurrence| {
            let rest = sentence.strip_prefix(&spec.shown(&occurrence.values));
            // Otherwise the place of `http://a` would be found for an error about `http://ab`.
            rest.is_some_and(|rest| rest.starts_with([' ', ':']))
        };
        let place = occurrences.iter().find(is_it).map_or(place, |occurrence| &occurrence.place);
        format!("{place}: {sentence}")
    }

    /// The files that the configuration is made of: its own, and those that options name.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let specs = options::layered().map(|flag| &flag.spec).filter(|spec| spec.names_files());
        let named = specs.flat_map(|spec| self.values(spec.name)).flatten().map(PathBuf::from);
        self.file.clone().into_iter().chain(named).collect()
    }

    /// The whole configuration as a file, for `--check-config`.
    pub(super) fn effective_configuration(&self) -> String {
        check_config::text(self)
    }
}

fn typed(matches: &ArgMatches) -> Vec<Setting> {
    let setting = |spec: &'static OptionSpec| {
        let occurrences = arguments::occurrences(matches, spec)?.into_iter();
        let occurrences = occurrences.map(|values| Occurrence { place: String::new(), values }).collect();
        Some(Setting { spec, origin: Origin::CommandLine, occurrences })
    };
    options::layered().filter_map(|flag| setting(&flag.spec)).collect()
}

#[cfg(test)]
mod tests;

//! Every option once: its name, value, default, bounds, description, and when a changed value takes effect.
//!
//! The command line, the configuration file, the environment variables, the checks, the comparison at a
//! reload and `docs/CONFIGURATION.md` all come from [`table`]. To add an option: a field in [`Options`] (or
//! in the struct of the part that uses it), one entry in the table, and the code that reads the field.
//!
//! Nothing here reads the command line, a file or the environment (the program does), and checks that involve
//! more than one option are in `config`.

pub(crate) mod defaults;
mod field;
mod spec;
mod table;
mod values;

pub(crate) use field::BAD_BOOTSTRAP_PORT;
pub use spec::{Bounds, OptionDefault, OptionSpec, Reload, ValueKind};
pub(crate) use values::{
    AdminAddress, AdminPort, DiscoveryOptions, Keys, NamedPolicy, Options, PemFile, TlsOptions,
};

use field::OptionField;
use table::SECTIONS;

/// Options that belong together, under one heading of `--help` and of the documentation.
#[derive(Debug)]
pub struct OptionSection {
    /// The heading.
    pub title: &'static str,
    entries: &'static [Entry],
}

impl OptionSection {
    /// The options of this section, in the order of `--help`.
    pub fn options(&self) -> impl Iterator<Item = &'static OptionSpec> + use<> {
        self.entries.iter().map(|entry| &entry.spec)
    }
}

/// All options of the router, by section. Options of the program alone, such as `--log-level`, are not among
/// them.
///
/// ```
/// let sections = mini_lb::option_sections().iter();
/// let port = sections.flat_map(|section| section.options()).find(|option| option.name == "port").unwrap();
/// assert_eq!((port.default.to_string(), port.reload), ("30000".into(), mini_lb::Reload::AfterRestart));
/// ```
pub fn option_sections() -> &'static [OptionSection] {
    SECTIONS
}

/// A row of the table.
#[derive(Debug)]
struct Entry {
    spec: OptionSpec,
    /// Where the value is kept.
    field: for<'a> fn(&'a mut Options) -> &'a mut dyn OptionField,
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    SECTIONS.iter().flat_map(|section| section.entries)
}

/// What the table does to the values.
impl Options {
    /// Every option at its default.
    pub(crate) fn new() -> Self {
        let mut options = Self::unset();
        for Entry { spec, .. } in entries() {
            let occurrences: Vec<Vec<String>> =
                spec.default.values().into_iter().map(|value| vec![value]).collect();
            if !occurrences.is_empty() {
                let set = options.set(spec.name, &occurrences);
                debug_assert!(set.is_ok(), "a default that is not a value: {set:?}");
            }
        }
        options
    }

    /// Replaces the value of an option. `occurrences` has the values of each occurrence of its flag; without
    /// any the option is unset: a switch is off, a list is empty. The error is a sentence that begins with
    /// the flag.
    pub(crate) fn set(&mut self, name: &str, occurrences: &[Vec<String>]) -> Result<(), String> {
        let Some(Entry { spec, field }) = entries().find(|entry| entry.spec.name == name) else {
            return Err(format!("--{}: there is no such option", name.escape_debug()));
        };
        let field = field(self);
        // A field that always has a value keeps it here.
        field.clear();
        for values in spec.split(occurrences) {
            let checked = spec.check(&values);
            let set = checked.and_then(|()| match spec.is_unlimited(&values) {
                true => {
                    field.clear();
                    Ok(())
                }
                false => field.add(&values),
            });
            set.map_err(|why| format!("{}: {why}", spec.shown(&values)))?;
        }
        Ok(())
    }

    /// Checks each value against the bounds of its option. They may have been set without a flag, too.
    pub(crate) fn check_bounds(&mut self) -> Result<(), String> {
        for Entry { spec, field } in entries() {
            for number in field(self).numbers() {
                spec.bounds.check(number).map_err(|why| format!("--{} {number}: {why}", spec.name))?;
            }
        }
        Ok(())
    }

    /// Each option that is compared at a reload, and its value as text that is only compared, never shown: it
    /// may be a secret.
    pub(crate) fn snapshot(&mut self) -> Vec<(&'static OptionSpec, String)> {
        let compared = entries().filter(|entry| entry.spec.reported_as.is_none());
        compared.map(|Entry { spec, field }| (spec, field(self).snapshot())).collect()
    }
}

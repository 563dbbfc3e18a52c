//! Every option once: its name, value, default, bounds, description, and when a changed value takes effect.
//!
//! The command line, the configuration file, the environment variables, the checks, the comparison at a
//! reload and `docs/CONFIGURATION.md` all come from [`table`]. To add an option: a field in [`Options`] (or
//! in the struct of the part that uses it), one entry in the table, and the code that reads the field.
//!
//! Nothing here reads the command line, a file or the environment (the program does), and checks that involve
//! more than one option are in `config`.

mod available_memory;
pub(crate) mod defaults;
mod field;
mod spec;
mod table;
mod values;

pub(crate) use field::BAD_BOOTSTRAP_PORT;
pub use spec::{Bounds, OptionDefault, OptionSpec, Reload, ValueKind};
#[cfg(feature = "kubernetes")]
pub(crate) use values::PodOptions;
pub(crate) use values::{
    AdminAddress, AdminPort, DiscoveryOptions, EncoderOptions, Keys, NamedPolicy, Options, PemFile,
    TlsOptions, WorkerUrls,
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
            // Without a default an option keeps what `unset` gave it: a thread for each core, for example.
            if !occurrences.is_empty() {
                // Through its text, so that a default is parsed and checked as a typed value is.
                let set = options.set(spec.name, &occurrences);
                // The table is constant, so it is enough that each test checks it.
                debug_assert!(set.is_ok(), "a default that is not a value: {set:?}");
            }
        }
        options
    }

    /// Replaces the value of an option. `occurrences` has the values of each occurrence of its flag; without
    /// any the option is unset: a switch is off, a list is empty. The error is a sentence that begins with
    /// the flag.
    pub(crate) fn set(&mut self, name: &str, occurrences: &[Vec<String>]) -> Result<(), String> {
        // A search of about 60 entries, which only the start and a reload do.
        let Some(Entry { spec, field }) = entries().find(|entry| entry.spec.name == name) else {
            return Err(format!("--{}: there is no such option", name.escape_debug()));
        };
        let field = field(self);
        // A field that always has a value keeps it here.
        field.clear();
        for values in spec.split(occurrences) {
            let checked = spec.check(&values);
            // -1 does not reach `add`, whose numbers have no sign.
            let set = checked.and_then(|()| match spec.is_unlimited(&values) {
                true => {
                    field.clear();
                    Ok(())
                }
                false => field.add(&values),
            });
            set.map_err(|why| format!("{}: {why}{}", spec.shown(&values), unit(spec, &why)))?;
        }
        Ok(())
    }

    /// Checks each value against the bounds of its option. They may have been set without a flag, too.
    pub(crate) fn check_bounds(&mut self) -> Result<(), String> {
        for Entry { spec, field } in entries() {
            // `&mut` because that is all that the table can lend; nothing is changed here or in `snapshot`.
            for number in field(self).numbers() {
                spec.bounds.check(number).map_err(|why| format!("--{} {number}: {why}", spec.name))?;
            }
        }
        Ok(())
    }

    /// Each option that is compared at a reload, and its value as text that is only compared, never shown: it
    /// may be a secret.
    pub(crate) fn snapshot(&mut self) -> Vec<(&'static OptionSpec, String)> {
        // The others are reported as the option that they set, or, for servers, as counts.
        let compared = entries().filter(|entry| entry.spec.reported_as.is_none());
        compared.map(|Entry { spec, field }| (spec, field(self).snapshot())).collect()
    }
}

/// Of what a number was wanted where something else was given, such as `5m` or `10MB`.
fn unit(spec: &OptionSpec, why: &str) -> &'static str {
    match spec.kind {
        _ if why != field::NOT_A_NUMBER => "",
        ValueKind::Single("SECONDS") => " of seconds",
        ValueKind::Single("BYTES") => " of bytes",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(options: &mut Options, name: &str, occurrences: &[&[&str]]) -> Result<(), String> {
        let owned = |values: &&[&str]| values.iter().map(|value| (*value).to_owned()).collect();
        options.set(name, &occurrences.iter().map(owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_value_replaces_the_one_before_and_a_list_the_whole_list() {
        let mut options = Options::new();
        for _ in 0..2 {
            set(&mut options, "retry-on-status", &[&["429,503"], &["500"]]).unwrap();
            set(&mut options, "max-concurrent-requests", &[&["5"], &["-1"]]).unwrap();
            set(&mut options, "http2", &[&[]]).unwrap();
        }
        assert_eq!(options.retry_on, [429, 503, 500]);
        assert_eq!((options.admission.max_concurrent, options.tls.http2), (None, true));
        set(&mut options, "retry-on-status", &[]).unwrap();
        set(&mut options, "http2", &[]).unwrap();
        assert_eq!((options.retry_on.len(), options.tls.http2), (0, false));
    }

    #[test]
    fn an_error_names_the_option_and_its_value_unless_that_is_secret() {
        let mut options = Options::new();
        for (name, occurrences, error) in [
            ("nothing", &[&["1"][..]][..], "--nothing: there is no such option"),
            ("port", &[&["\n"]], "--port \\n: not a whole number"),
            ("port", &[&[""]], "--port \"\": not a whole number"),
            ("request-timeout-secs", &[&["5m"]], "--request-timeout-secs 5m: not a whole number of seconds"),
            ("max-payload-size", &[&["10MB"]], "--max-payload-size 10MB: not a whole number of bytes"),
            ("port", &[&["1", "2"]], "--port 1 2: the values must be <PORT>"),
            ("http2", &[&["yes"]], "--http2 yes: must be true or false"),
            ("admin-api-key", &[&["a", "b"]], "--admin-api-key *** ***: the values must be <KEY>"),
            (
                "prefill",
                &[&["http://a", "0"]],
                "--prefill http://a 0: the bootstrap port must be between 1 and 65535, or none",
            ),
        ] {
            assert_eq!(set(&mut options, name, occurrences), Err(error.to_owned()));
        }
    }
}

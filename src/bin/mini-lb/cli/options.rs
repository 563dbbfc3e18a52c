//! All options: the library's, and those that only the program knows.
//!
//! Names, defaults and help texts are in the library's table and in [`super::program_options`].
//! What a value means is not known here.

use std::sync::LazyLock;

use mini_lb::ValueKind::{Groups, Single, Switch};
use mini_lb::{OptionSpec, option_sections};

use super::arguments;
pub(super) use super::program_options::COMMAND_LINE_ONLY;
use super::program_options::{COMPATIBILITY_HELP, PROGRAM};
use super::unsupported::{ACCEPTED, REFUSED, WITHOUT_EFFECT};

/// Where the flags of sglang_router are that have no effect.
pub(super) const COMPATIBILITY: &str = "Compatibility";

/// Another name of a field in a file: the flag, that name, and the name of the value in the help text.
const FIELD_ALIASES: [(&str, &str, &str); 1] = [("prefill", "bootstrap_port", "port")];

/// An option, and where it belongs.
#[derive(Clone, Copy)]
pub(super) struct Flag {
    /// The heading in `--help`.
    pub(super) section: &'static str,
    pub(super) spec: OptionSpec,
    /// Whether the library has it; otherwise it is the program's own.
    pub(super) is_library: bool,
}

/// Sorted once: every key of a file and every variable is looked up here.
static FLAGS: LazyLock<Vec<Flag>> = LazyLock::new(|| {
    let library = option_sections().iter().flat_map(|section| {
        section.options().map(|spec| Flag { section: section.title, spec: *spec, is_library: true })
    });
    let own = |section, spec| Flag { section, spec, is_library: false };
    let program = PROGRAM.iter().flat_map(|(section, specs)| specs.iter().map(|spec| own(section, *spec)));
    let without_effect = WITHOUT_EFFECT.iter().map(|(flag, why)| own(COMPATIBILITY, ignored(flag, why)));
    let accepted = ACCEPTED.iter().map(|flag| own(COMPATIBILITY, accepted(flag))).chain(without_effect);
    let unsorted: Vec<Flag> = library.chain(program).chain(accepted).collect();
    // Both the library and the program have options in some sections.
    let mut sections: Vec<&str> = Vec::new();
    for flag in &unsorted {
        if !sections.contains(&flag.section) {
            sections.push(flag.section);
        }
    }
    let of_section = |section| unsorted.iter().copied().filter(move |flag| flag.section == section);
    sections.into_iter().flat_map(of_section).collect()
});

fn accepted(flag: &'static str) -> OptionSpec {
    OptionSpec::new(flag.trim_start_matches('-'), Switch).help(COMPATIBILITY_HELP)
}

fn ignored(flag: &'static str, why: &'static str) -> OptionSpec {
    OptionSpec::new(flag.trim_start_matches('-'), Single("VALUE")).help(why)
}

/// Every option, in the order of `--help`.
pub(super) fn all() -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter()
}

/// Every option that has a key and a variable.
pub(super) fn layered() -> impl Iterator<Item = &'static Flag> {
    all().filter(|flag| !COMMAND_LINE_ONLY.contains(&flag.spec.name))
}

/// The option of a key, which may be written with underscores or dashes.
pub(super) fn by_key(key: &str) -> Option<&'static OptionSpec> {
    let name = key.replace('_', "-");
    layered().map(|flag| &flag.spec).find(|spec| spec.name == name)
}

/// The error for a key or a variable (`what`) that there is not: why, or which one is similar. `spelled`
/// writes the name of a flag as such a key.
pub(super) fn unknown(key: &str, what: &str, spelled: impl Fn(&str) -> String) -> String {
    let name = key.to_ascii_lowercase().replace('_', "-");
    let flag = format!("--{name}");
    // Before a similar name is searched for: a flag of sglang_router may be similar to one that does
    // something else.
    if let Some((flag, instead)) = REFUSED.iter().find(|(refused, _)| *refused == flag) {
        return format!("{flag} is not supported: {instead}");
    }
    if COMMAND_LINE_ONLY.contains(&name.as_str()) {
        return format!("{flag} can be given on the command line only");
    }
    // Only the case differs, or a variable has dashes.
    let same = by_key(&name).map(|spec| spec.name.to_owned());
    match same.or_else(|| arguments::similar_flag(&flag)) {
        Some(near) => format!("unknown {what}; did you mean {}?", spelled(&near)),
        None => {
            format!("unknown {what}; each flag of --help has one, such as {} for --port", spelled("port"))
        }
    }
}

/// The index of a value, by its name in a table of a file.
pub(super) fn field(spec: &OptionSpec, name: &str) -> Option<usize> {
    let alias = FIELD_ALIASES.iter().find(|(flag, alias, _)| *flag == spec.name && *alias == name);
    let name = alias.map_or(name, |(_, _, name)| *name);
    let Groups { names, .. } = spec.kind else { return None };
    // The value `PORT|none` is the field `port`.
    let plain = |value: &str| value.split('|').next().unwrap_or_default().to_lowercase();
    names.iter().position(|value| plain(value) == name)
}

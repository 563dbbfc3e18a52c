//! The description of an option: name, kind of value, default, bounds. No values are kept here.

use std::fmt;
use std::time::Duration;

/// One option of the router: a flag on the command line, a key in a configuration file (`_` for `-`), and an
/// environment variable (`MINI_LB_` and the key in capitals).
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct OptionSpec {
    /// The flag without its dashes, such as `max-payload-size`.
    pub name: &'static str,
    /// How many values it takes, and what `--help` calls them.
    pub kind: ValueKind,
    /// What holds if it is not given.
    pub default: OptionDefault,
    /// What a number may be.
    pub bounds: Bounds,
    /// When a changed value takes effect.
    pub reload: Reload,
    /// Under which names a reload reports a change of this option, if not under its own.
    pub reported_as: Option<&'static str>,
    /// Whether the value must not be shown, as it is a key.
    pub secret: bool,
    /// Whether `-1` stands for no limit.
    pub minus_one_is_no_limit: bool,
    /// Whether the flag of a list may be given without a value, which is an empty list.
    pub may_be_empty: bool,
    /// What it does, in one or two sentences.
    pub help: &'static str,
}

/// How many values an option takes, and their names in `--help`. A name is the unit where there is one:
/// `SECONDS`, `BYTES`. `FILE` is a file that is read again on a reload. Words in small letters stand for
/// themselves: `text|json` is one of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// No value: it is on if it is given.
    Switch,
    /// One value; of several, the last counts.
    Single(&'static str),
    /// A list, with one item for each occurrence of the flag.
    List(&'static str),
    /// A list, with one or more items after the flag.
    WordList(&'static str),
    /// The same, where a comma separates items too.
    CommaList(&'static str),
    /// A list whose items are groups of values; of each, the first `required` must be given.
    Groups {
        /// The name of each value.
        names: &'static [&'static str],
        /// How many must be given.
        required: usize,
    },
}

impl ValueKind {
    /// The names of the values of one occurrence.
    pub fn names(&self) -> &[&'static str] {
        match self {
            Self::Switch => &[],
            Self::Single(name) | Self::List(name) | Self::WordList(name) | Self::CommaList(name) => {
                std::slice::from_ref(name)
            }
            Self::Groups { names, .. } => names,
        }
    }

    /// Whether the option may be given more than once.
    pub fn is_list(&self) -> bool {
        !matches!(self, Self::Switch | Self::Single(_))
    }
}

/// As a usage text has it, such as `<URL> [PORT|none]`.
impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch => Ok(()),
            // A list takes one value at a time, and its flag is repeated for more.
            Self::Single(name) | Self::List(name) => write!(f, "<{name}>"),
            Self::WordList(name) | Self::CommaList(name) => write!(f, "<{name}>..."),
            Self::Groups { names, required } => {
                for (place, name) in names.iter().enumerate() {
                    let gap = if place == 0 { "" } else { " " };
                    match place < *required {
                        true => write!(f, "{gap}<{name}>")?,
                        false => write!(f, "{gap}[{name}]")?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// What holds if an option is not given. As text it is the value as one would write it, or words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionDefault {
    /// No value of its own; the words say what happens instead. Empty: nothing.
    Unset(&'static str),
    /// A number.
    Number(u64),
    /// A time, in whole seconds.
    Seconds(Duration),
    /// A word.
    Text(&'static str),
    /// A list of words.
    Words(&'static [&'static str]),
}

impl OptionDefault {
    /// The default as values that could be given. None if the option is unset by default.
    pub fn values(&self) -> Vec<String> {
        match self {
            Self::Unset(_) => Vec::new(),
            Self::Number(number) => vec![number.to_string()],
            Self::Seconds(time) => vec![time.as_secs().to_string()],
            Self::Text(text) => vec![(*text).to_owned()],
            Self::Words(words) => words.iter().map(|word| (*word).to_owned()).collect(),
        }
    }
}

impl fmt::Display for OptionDefault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unset(words) => f.write_str(words),
            other => f.write_str(&other.values().join(" ")),
        }
    }
}

/// What a number may be, both ends included. As text it is such as `at least 1`, and empty if there are no
/// bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
}

impl Bounds {
    const NONE: Self = Self { min: 0, max: u64::MAX };

    pub(super) fn check(&self, number: u64) -> Result<(), String> {
        match (self.min..=self.max).contains(&number) {
            true => Ok(()),
            false => Err(format!("the value must be {self}")),
        }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            // Before the next pattern, which matches it too.
            Self::NONE => Ok(()),
            Self { min, max: u64::MAX } => write!(f, "at least {min}"),
            Self { min, max } => write!(f, "between {min} and {max}"),
        }
    }
}

/// When a value that has changed in the configuration takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// With the reload, for requests and connections that begin after it.
    Now,
    /// When the program is started again. A reload only names the option.
    AfterRestart,
}

/// To write a table with; the defaults are: no default, no bounds, reloadable, not secret.
impl OptionSpec {
    /// An option of this name, without a description.
    #[must_use]
    pub const fn new(name: &'static str, kind: ValueKind) -> Self {
        Self {
            name,
            kind,
            default: OptionDefault::Unset(""),
            bounds: Bounds::NONE,
            reload: Reload::Now,
            reported_as: None,
            secret: false,
            minus_one_is_no_limit: false,
            may_be_empty: false,
            help: "",
        }
    }

    /// Sets its description.
    #[must_use]
    pub const fn help(mut self, help: &'static str) -> Self {
        self.help = help;
        self
    }

    /// Sets its default.
    #[must_use]
    pub const fn default(mut self, default: OptionDefault) -> Self {
        self.default = default;
        self
    }

    /// Sets its least value.
    #[must_use]
    pub const fn at_least(self, min: u64) -> Self {
        self.between(min, u64::MAX)
    }

    /// Sets its least and its largest value.
    #[must_use]
    pub const fn between(mut self, min: u64, max: u64) -> Self {
        self.bounds = Bounds { min, max };
        self
    }

    /// A changed value takes effect after a restart only.
    #[must_use]
    pub const fn after_restart(mut self) -> Self {
        self.reload = Reload::AfterRestart;
        self
    }

    /// A reload reports a changed value under these names.
    #[must_use]
    pub const fn reported_as(mut self, names: &'static str) -> Self {
        self.reported_as = Some(names);
        self
    }

    /// The value is never shown.
    #[must_use]
    pub const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    /// `-1` stands for no limit.
    #[must_use]
    pub const fn minus_one_is_no_limit(mut self) -> Self {
        self.minus_one_is_no_limit = true;
        self
    }

    /// The flag may be given without a value.
    #[must_use]
    pub const fn may_be_empty(mut self) -> Self {
        self.may_be_empty = true;
        self
    }

    /// Its key in a configuration file.
    pub fn key(&self) -> String {
        self.name.replace('-', "_")
    }

    /// Its environment variable.
    pub fn variable(&self) -> String {
        format!("MINI_LB_{}", self.key().to_ascii_uppercase())
    }

    /// Whether its values are files that a reload reads again.
    pub fn names_files(&self) -> bool {
        // The folder of log files is a FOLDER: the program writes it, so its changes must not reload
        // anything.
        self.kind.names() == ["FILE"]
    }

    /// The occurrences of this option, with each item of a list as one of its own.
    pub fn split(&self, occurrences: &[Vec<String>]) -> Vec<Vec<String>> {
        let items = occurrences.iter().flatten();
        match self.kind {
            ValueKind::WordList(_) => items.map(|item| vec![item.clone()]).collect(),
            ValueKind::CommaList(_) => {
                let parts = items.flat_map(|item| item.split(',')).map(str::trim);
                // `429,503,` has two items, not an empty third.
                parts.filter(|part| !part.is_empty()).map(|part| vec![part.to_owned()]).collect()
            }
            _ => occurrences.to_vec(),
        }
    }

    /// One occurrence of the flag, as it can be shown.
    pub fn shown(&self, values: &[String]) -> String {
        let values = match self.secret {
            // One for each value, as their number may be the error.
            true => values.iter().map(|_| "***".to_owned()).collect::<Vec<_>>(),
            false => values.iter().map(|value| plain(value)).collect(),
        };
        [&[format!("--{}", self.name)], values.as_slice()].concat().join(" ")
    }

    /// Whether this is the `-1` that stands for no limit.
    pub(super) fn is_unlimited(&self, values: &[String]) -> bool {
        // This spelling only: any other negative number is more likely a mistake.
        self.minus_one_is_no_limit && values == ["-1"]
    }

    /// Checks the number of values of one occurrence. The command line cannot get it wrong, a file can.
    pub(super) fn check(&self, values: &[String]) -> Result<(), String> {
        let (least, most) = match self.kind {
            // The one is `true` or `false`, which `set_option` allows and a flag does not.
            ValueKind::Switch => (0, 1),
            ValueKind::Groups { names, required } => (required, names.len()),
            _ => (1, 1),
        };
        match (least..=most).contains(&values.len()) {
            true => Ok(()),
            false => Err(format!("the values must be {}", self.kind)),
        }
    }
}

/// A value in one line of text. An empty one would not be seen.
fn plain(value: &str) -> String {
    if value.is_empty() { "\"\"".to_owned() } else { value.escape_debug().to_string() }
}

//! The layer of a TOML file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use mini_lb::{OptionSpec, ValueKind};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::super::{options, refusal};
use super::{Occurrence, Origin, Setting};

/// Largest configuration file. One with 10,000 servers has about a third of that.
const MAX_SIZE: u64 = 1 << 20;

/// Reads all keys of a file.
pub(super) fn read(path: &Path) -> Result<Vec<Setting>, clap::Error> {
    let name = path.display().to_string();
    let text = load(path).map_err(|why| refusal(format_args!("{name}: {why}")))?;
    let source = Source { name: &name, text: &text };
    let table = DeTable::parse(&text).map_err(|error| {
        let begin = error.span().map_or(0, |span| span.start);
        // TOML's message may have several lines, and a failed reload has one log line.
        let why = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        refusal(format_args!("{}: not TOML: {why}", source.place(begin)))
    })?;
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    // In the order of the file, so that the first error is reported.
    entries.sort_unstable_by_key(|(key, _)| key.span().start);
    let mut settings: Vec<Setting> = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let place = source.place(key.span().start);
        let key = key.get_ref();
        let shown = key.escape_debug();
        let Some(spec) = options::by_key(key) else {
            let why = options::unknown(key, "key", |near| near.replace('-', "_"));
            return Err(refusal(format_args!("{place}: {shown}: {why}")));
        };
        // The TOML parser rejects the same spelling twice, but `a-b` and `a_b` are one option.
        if settings.iter().any(|other| other.spec.name == spec.name) {
            return Err(refusal(format_args!("{place}: {shown}: duplicate key")));
        }
        let occurrences = source.occurrences(spec, value).map_err(|error| {
            refusal(format_args!("{}: {shown}: {}", source.place(error.begin), error.why))
        })?;
        settings.push(Setting { spec, origin: Origin::Place(place), occurrences });
    }
    Ok(settings)
}

fn load(path: &Path) -> Result<String, String> {
    let read = || {
        let mut bytes = Vec::new();
        // One byte more shows that a file is too large, without reading one that has no end, such as a
        // device.
        File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(format!("larger than {MAX_SIZE} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())
}

/// What is wrong with a value, and at which byte of the file.
struct BadValue {
    begin: usize,
    why: String,
}

struct Source<'a> {
    name: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, begin: usize) -> String {
        let before = &self.text.as_bytes()[..begin.min(self.text.len())];
        format!("{}:{}", self.name, before.iter().filter(|byte| **byte == b'\n').count() + 1)
    }

    fn occurrences(
        &self,
        spec: &OptionSpec,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Vec<Occurrence>, BadValue> {
        let one =
            |item: &Spanned<DeValue<'_>>, values| Occurrence { place: self.place(item.span().start), values };
        match (spec.kind, value.get_ref()) {
            (ValueKind::Switch, DeValue::Boolean(true)) => Ok(vec![one(value, Vec::new())]),
            (ValueKind::Switch, DeValue::Boolean(false)) => Ok(Vec::new()),
            (ValueKind::Switch, _) => Err(bad(value, "must be true or false")),
            (ValueKind::Single(_), _) => Ok(vec![one(value, vec![word(value)?])]),
            (ValueKind::Groups { .. }, DeValue::Array(items)) => {
                items.iter().map(|item| Ok(one(item, group(spec, item)?))).collect()
            }
            (ValueKind::Groups { .. }, _) => Ok(vec![one(value, group(spec, value)?)]),
            // A list of one item may be written without brackets.
            (_, DeValue::Array(items)) => items.iter().map(|item| Ok(one(item, vec![word(item)?]))).collect(),
            _ => Ok(vec![one(value, vec![word(value)?])]),
        }
    }
}

fn bad(value: &Spanned<DeValue<'_>>, why: impl Into<String>) -> BadValue {
    BadValue { begin: value.span().start, why: why.into() }
}

/// The values of one occurrence: one alone, a list, or a table with their names.
fn group(spec: &OptionSpec, value: &Spanned<DeValue<'_>>) -> Result<Vec<String>, BadValue> {
    match value.get_ref() {
        DeValue::Array(items) => words(items, value),
        DeValue::Table(table) => named(spec, table, value),
        _ => Ok(vec![word(value)?]),
    }
}

fn words(items: &DeArray<'_>, whole: &Spanned<DeValue<'_>>) -> Result<Vec<String>, BadValue> {
    // `prefill = [[]]` would be a server without a URL.
    if items.is_empty() {
        return Err(bad(whole, "must not be empty"));
    }
    items.iter().map(word).collect()
}

fn named(
    spec: &OptionSpec,
    table: &DeTable<'_>,
    whole: &Spanned<DeValue<'_>>,
) -> Result<Vec<String>, BadValue> {
    let mut values: Vec<(usize, String)> = Vec::with_capacity(table.len());
    for (key, value) in table {
        let name = key.get_ref();
        let Some(place) = options::field(spec, name) else {
            let why = format!("unknown field {}", name.escape_debug());
            return Err(BadValue { begin: key.span().start, why });
        };
        values.push((place, word(value)?));
    }
    // A table has no order, the values of an occurrence do.
    values.sort_unstable();
    // A gap is a missing field before a given one, such as a port without a URL. The same place twice is a
    // field and its other name.
    if values.is_empty() || values.iter().enumerate().any(|(wanted, (place, _))| wanted != *place) {
        return Err(bad(whole, "a field is missing or given twice"));
    }
    Ok(values.into_iter().map(|(_, value)| value).collect())
}

/// A value as it would be typed on the command line.
fn word(value: &Spanned<DeValue<'_>>) -> Result<String, BadValue> {
    match value.get_ref() {
        // No argument or variable can hold a NUL, and a file name with one fails only when it is opened.
        DeValue::String(text) if text.contains('\0') => Err(bad(value, "must not have a NUL character")),
        DeValue::String(text) => Ok(text.to_string()),
        // TOML has hexadecimal, octal and binary numbers too. i128 is wider than any option, so that the
        // error is about the option's own bound.
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map(|number| number.to_string())
            .map_err(|_| bad(value, "the number is too large")),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        DeValue::Boolean(yes) => Ok(yes.to_string()),
        other => Err(bad(value, format!("must be a string or a number, not a {}", kind(other)))),
    }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::Array(_) => "list",
        DeValue::Table(_) => "table",
        _ => "date",
    }
}

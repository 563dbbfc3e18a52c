//! Strategies that generate JSON as text: the router must not depend on how a value is written.

use std::fmt::Write;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::wire::shape::FieldChange;

/// Names that steer the router on one API or another.
const STEERING: [&str; 10] = [
    "stream",
    "n",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_routed_experts",
    "token_ids_logprob",
    "echo",
    "logprobs",
];

/// Names of fields that are removed.
const BOOTSTRAP: [&str; 6] = [
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "bootstrap_",
    "bootstrap_\u{e9}\"\u{1f600}",
];

/// Names of fields that a plan may change.
const PLANNED: [&str; 2] = ["rid", "request_id"];

/// Names that resemble the others and mean nothing.
const SIMILAR: [&str; 14] = [
    "",
    "bootstrap",
    "bootstrap-room",
    "Bootstrap_room",
    " bootstrap_room",
    "_bootstrap_room",
    "\\u0062ootstrap_room",
    "streams",
    "Stream",
    "strea",
    "stream\0",
    "N",
    "sampling_param",
    "return_logprobs",
];

const NUMBERS: [&str; 12] = ["0", "-0", "1", "2", "-1", "1.0", "0.50", "1e0", "10E-1", "1E+2", "3", "1e-5"];

/// Numbers over 64 bits, which serde_json and simd-json read differently.
const LARGE_NUMBERS: [&str; 4] =
    ["123456789012345678901234567890", "1E+400", "-1e400", "-18446744073709551616"];

/// One field of the object: its parts, as they are written.
#[derive(Debug, Clone)]
pub(super) struct WrittenField {
    name: String,
    before: String,
    quoted: String,
    colon: String,
    value: String,
    after: String,
}

impl WrittenField {
    /// The field from its name to its value.
    fn bare(&self) -> String {
        [&*self.quoted, &self.colon, &self.value].concat()
    }

    /// The same with this value.
    fn with_value(&self, value: &[u8]) -> String {
        [&*self.quoted, &self.colon, std::str::from_utf8(value).unwrap()].concat()
    }
}

/// A body and its parts.
#[derive(Debug, Clone)]
pub(super) struct WrittenObject {
    before: String,
    fields: Vec<WrittenField>,
    /// White space of an object without fields.
    inside: String,
    after: String,
}

impl WrittenObject {
    pub(super) fn text(&self) -> String {
        let fields: Vec<_> =
            self.fields.iter().map(|field| [&*field.before, &field.bare(), &field.after].concat()).collect();
        let inside = if fields.is_empty() { self.inside.clone() } else { fields.join(",") };
        format!("{}{{{inside}}}{}", self.before, self.after)
    }

    /// The expected body without the fields that are removed, once `added` is added.
    pub(super) fn rewritten(&self, added: &str) -> String {
        self.changed(|name| name.starts_with("bootstrap_").then_some(FieldChange::Cut), added)
    }

    /// The expected body with these changes by name, once `added` is added. White space before a run of cut
    /// fields stays, and so does that before the closing brace; what is between is cut, with one comma a
    /// field.
    pub(super) fn changed(&self, change: impl Fn(&str) -> Option<FieldChange>, added: &str) -> String {
        let change = |at: usize| change(&self.fields[at].name).unwrap_or(FieldChange::Keep);
        let kept: Vec<_> = (0..self.fields.len()).filter(|&at| change(at) != FieldChange::Cut).collect();
        let mut inside = String::new();
        let mut next = 0;
        for &at in &kept {
            inside += &self.fields[next].before;
            inside += &match change(at) {
                FieldChange::Replace(value) => self.fields[at].with_value(&value),
                FieldChange::Keep | FieldChange::Cut => self.fields[at].bare(),
            };
            if Some(&at) != kept.last() {
                inside += &self.fields[at].after;
                inside += ",";
            }
            next = at + 1;
        }
        if kept.is_empty() {
            inside += self.fields.first().map_or(&*self.inside, |first| &first.before);
        }
        inside += self.fields.last().map_or("", |last| &last.after);
        let comma = if kept.is_empty() { "" } else { "," };
        format!("{}{{{inside}{comma}{added}}}{}", self.before, self.after)
    }
}

pub(super) fn object() -> impl Strategy<Value = WrittenObject> {
    let any_value = value(any_number().boxed());
    let other = characters().prop_filter("a steering name", |name| !STEERING.contains(&&**name));
    object_of(prop_oneof![
        3 => steering(),
        3 => (select(&BOOTSTRAP[..]).prop_map(str::to_owned), any_value.clone()),
        2 => (select(&PLANNED[..]).prop_map(str::to_owned), any_value.clone()),
        1 => (select(&SIMILAR[..]).prop_map(str::to_owned), any_value.clone()),
        2 => (other, any_value),
    ])
}

/// An object whose fields all steer the router; some are duplicates.
pub(super) fn steering_object() -> impl Strategy<Value = WrittenObject> {
    object_of(steering())
}

/// An object of fields with these names and values.
fn object_of(named: impl Strategy<Value = (String, String)>) -> impl Strategy<Value = WrittenObject> {
    let field = (white_space(), named, escaping(), colon(), white_space()).prop_map(
        |(before, (name, value), escaping, colon, after)| {
            let quoted = escaped(&name, &escaping);
            WrittenField { name, before, quoted, colon, value, after }
        },
    );
    (around(), vec(field, 0..8), white_space(), around())
        .prop_map(|(before, fields, inside, after)| WrittenObject { before, fields, inside, after })
}

/// An object whose only value is nested this deeply, with brackets of both kinds.
pub(super) fn deep(levels: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = String> {
    let name = prop_oneof![select(&STEERING[..]), select(&BOOTSTRAP[..2]), Just("a")];
    let level = any::<u8>().prop_map(|bits| (bits & 1 == 0, ["", "", " ", "\r\n\t"][usize::from(bits >> 6)]));
    (name, vec(level, levels)).prop_map(|(name, levels)| {
        let mut text = format!("{{\"{name}\":");
        for (brace, space) in &levels {
            text += space;
            text += if *brace { "{\"]\":" } else { "[" };
        }
        text += "\"}\"";
        for (brace, space) in levels.iter().rev() {
            text += space;
            text.push(if *brace { '}' } else { ']' });
        }
        text + "}"
    })
}

/// White space around the object; sometimes so much that the body is too large to be copied.
fn around() -> impl Strategy<Value = String> {
    prop_oneof![12 => white_space(), 1 => (1_000_usize..5_000).prop_map(|length| " ".repeat(length))]
}

fn white_space() -> impl Strategy<Value = String> {
    prop_oneof![3 => Just(String::new()), 1 => "[ \t\r\n]{1,3}"]
}

fn colon() -> impl Strategy<Value = String> {
    (white_space(), white_space()).prop_map(|(before, after)| [&*before, ":", &after].concat())
}

/// Steering names, with values of every kind whose numbers all parsers can read.
fn steering() -> impl Strategy<Value = (String, String)> {
    let any_value = prop_oneof![
        4 => small_scalar(),
        1 => sampling_params(),
        2 => vec(small_scalar(), 0..4).prop_map(|items| format!("[{}]", items.join(" ,"))),
        1 => any_number(),
        1 => value(small_number().boxed()),
    ];
    prop_oneof![
        1 => (Just("sampling_params"), sampling_params()),
        4 => (select(&STEERING[..]), any_value),
    ]
    .prop_map(|(name, value)| (name.to_owned(), value))
}

/// An object that may have an `n`, or a list of such objects.
fn sampling_params() -> impl Strategy<Value = String> {
    let name = select(&["\"n\"", "\"\\u006e\"", "\"N\"", "\"m\""][..]);
    let field = (name, colon(), small_scalar()).prop_map(|(name, colon, n)| [name, &colon, &n].concat());
    let object = vec(field, 0..4).prop_map(|fields| format!("{{{}}}", fields.join(","))).boxed();
    let list = vec(object.clone(), 0..3).prop_map(|items| format!("[{}]", items.join(", ")));
    prop_oneof![2 => object, 1 => list]
}

fn small_scalar() -> impl Strategy<Value = String> {
    let flag = select(&["true", "false", "null", "\"true\"", "\"1\"", "[]", "{}"][..]);
    prop_oneof![flag.prop_map(str::to_owned), small_number()]
}

fn value(number: BoxedStrategy<String>) -> BoxedStrategy<String> {
    let scalar =
        prop_oneof![select(&["true", "false", "null"][..]).prop_map(str::to_owned), number, string()];
    let nested = scalar.prop_recursive(5, 32, 5, |inner| {
        let item = (white_space(), inner.clone(), white_space());
        let items = vec(item.prop_map(|(before, item, after)| before + &item + &after), 0..5);
        let name = prop_oneof![string(), select(&BOOTSTRAP[..]).prop_map(|name| escaped(name, &[0]))];
        let field = (white_space(), name, colon(), inner, white_space());
        let fields = vec(
            field.prop_map(|(before, name, colon, value, after)| before + &name + &colon + &value + &after),
            0..5,
        );
        prop_oneof![
            (items, white_space()).prop_map(|(items, space)| bracketed('[', &items, &space, ']')),
            (fields, white_space()).prop_map(|(fields, space)| bracketed('{', &fields, &space, '}')),
        ]
    });
    nested.boxed()
}

fn bracketed(open: char, items: &[String], space: &str, close: char) -> String {
    let inside = if items.is_empty() { space.to_owned() } else { items.join(",") };
    format!("{open}{inside}{close}")
}

fn small_number() -> impl Strategy<Value = String> {
    select(&NUMBERS[..]).prop_map(str::to_owned)
}

fn any_number() -> impl Strategy<Value = String> {
    prop_oneof![
        small_number(),
        select(&LARGE_NUMBERS[..]).prop_map(str::to_owned),
        "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?",
    ]
}

fn string() -> impl Strategy<Value = String> {
    (characters(), escaping()).prop_map(|(text, escaping)| escaped(&text, &escaping))
}

fn characters() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z_]{0,9}",
        "\\PC{0,6}",
        "[\\[\\]{}\":,\\\\/]{0,6}",
        "[\0-\u{20}\u{7f}-\u{a0}\u{1f600}]{0,4}"
    ]
}

/// How the characters of a string are written, in turn; often without escapes.
fn escaping() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![Just(vec![0]), vec(any::<u8>(), 1..6)]
}

fn escaped(text: &str, escaping: &[u8]) -> String {
    let mut out = String::from("\"");
    for (character, choice) in text.chars().zip(escaping.iter().cycle()) {
        write_character(&mut out, character, *choice);
    }
    out + "\""
}

fn write_character(out: &mut String, character: char, choice: u8) {
    let short = match character {
        '"' | '\\' | '/' => Some(character),
        '\u{8}' => Some('b'),
        '\u{c}' => Some('f'),
        '\n' => Some('n'),
        '\r' => Some('r'),
        '\t' => Some('t'),
        _ => None,
    };
    let plain = character >= ' ' && !matches!(character, '"' | '\\');
    match (choice % 3, short) {
        (0, _) if plain => out.push(character),
        (0 | 1, Some(short)) => out.extend(['\\', short]),
        _ => {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let hex = format!("{unit:04x}");
                let hex = if choice < 128 { hex } else { hex.to_uppercase() };
                write!(out, "\\u{hex}").unwrap();
            }
        }
    }
}

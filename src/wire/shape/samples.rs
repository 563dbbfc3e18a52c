//! How many samples of each prompt a body requests (`n`).
//!
//! Read as a regular server of sglang 0.5.23 reads it: chat and completions as pydantic converts integers,
//! `/generate` as a strict parser does. A value that it rejects is rejected here with the same status, since
//! the pair's servers would each do it, or not at all.

use std::borrow::Cow;

use bytes::Bytes;
use simd_json::BorrowedValue;
use simd_json::prelude::ValueAsScalar;

use crate::wire::json::{JsonValue, MalformedJson, is_whitespace, walk_members};

/// How many samples of each prompt a body requests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum RequestedSamples {
    /// One, or a number that SGLang takes for it. The body goes to one pair as it is.
    #[default]
    One,
    Many(Box<ManySamples>),
    /// A regular server rejects the request.
    Refused(&'static RefusedSamples),
}

/// More than one sample of each prompt, which SGLang's pairs cannot generate: it runs all in one bootstrap
/// room, and decode hangs (#24223, #26486).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ManySamples {
    /// At least 2. A number over 32 bits is their maximum.
    pub(crate) count: u32,
    /// `/generate`: the value of `sampling_params` without `n`.
    pub(crate) sampling_params: Bytes,
}

/// Why a regular server rejects a request for samples.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RefusedSamples {
    pub(crate) status: u16,
    /// Names the field, and then what a regular server says.
    pub(crate) message: &'static str,
}

impl RefusedSamples {
    const fn new(message: &'static str) -> Self {
        Self { status: 400, message }
    }

    /// What a regular server says of a list in the [`ListField`] of this number.
    pub(super) fn list(field: usize) -> &'static Self {
        &LISTS[field]
    }

    /// What it says of a list of ids for a single prompt: there must be one for each prompt.
    pub(super) fn ids() -> &'static Self {
        &IDS
    }
}

static NOT_AN_INTEGER: RefusedSamples = RefusedSamples::new("n: Input should be a valid integer");
static FRACTION: RefusedSamples =
    RefusedSamples::new("n: Input should be a valid integer, got a number with a fractional part");
static NOT_FINITE: RefusedSamples = RefusedSamples::new("n: Input should be a finite number");
static NOT_PARSED: RefusedSamples =
    RefusedSamples::new("n: Input should be a valid integer, unable to parse string as an integer");
static ZERO: RefusedSamples = RefusedSamples::new("n must not be 0: range() arg 3 must not be zero");
static INVALID_TYPE: RefusedSamples = RefusedSamples::new("sampling_params.n: invalid type, expected i64");
static NULL: RefusedSamples = RefusedSamples {
    // A regular server compares null with 1, and fails.
    status: 500,
    message: "sampling_params.n must not be null: Internal Server Error",
};
static DIFFERENT: RefusedSamples = RefusedSamples::new(
    "sampling_params: The parallel_sample_num should be the same for all samples in sample params.",
);
static IDS: RefusedSamples =
    RefusedSamples::new("rid: The specified rids length mismatch with the batch_size for batch processing.");
static LISTS: [RefusedSamples; ListField::COUNT] = [
    RefusedSamples::new("Cannot use list return_logprob with parallel_sample_num > 1"),
    RefusedSamples::new("Cannot use list logprob_start_len with parallel_sample_num > 1"),
    RefusedSamples::new("Cannot use list top_logprobs_num with parallel_sample_num > 1"),
    RefusedSamples::new("Cannot use list token_ids_logprob with parallel_sample_num > 1"),
];

/// Fields of `/generate` that may have a list with an element for each prompt, but not with more than one
/// sample, in the order in which a regular server checks them.
#[derive(Clone, Copy)]
pub(super) enum ListField {
    ReturnLogprob,
    LogprobStartLen,
    TopLogprobsNum,
    TokenIdsLogprob,
}

impl ListField {
    pub(super) const COUNT: usize = 4;
}

impl RequestedSamples {
    /// This many, with these sampling params. SGLang takes a negative number for 1.
    fn of(count: i64, sampling_params: impl FnOnce() -> Bytes) -> Self {
        if count <= 1 {
            return Self::One;
        }
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Self::Many(Box::new(ManySamples { count, sampling_params: sampling_params() }))
    }

    /// By `n` of chat and completions. `None` is no JSON, which SGLang rejects as such.
    pub(super) fn of_openai(value: Option<&BorrowedValue<'_>>) -> Self {
        let Some(value) = value else { return Self::One };
        match pydantic_integer(value) {
            Ok(0) => Self::Refused(&ZERO),
            Ok(count) => Self::of(count, Bytes::new),
            Err(refused) => Self::Refused(refused),
        }
    }

    /// By `sampling_params` of `/generate`: an object, or a list with one for each prompt. Of a malformed one
    /// SGLang gets to say what is wrong.
    pub(super) fn of_sampling_params(text: &[u8]) -> Self {
        Self::read_sampling_params(text).unwrap_or_default()
    }

    fn read_sampling_params(text: &[u8]) -> Result<Self, MalformedJson> {
        let root = JsonValue::root(text)?;
        let mut counts = Vec::new();
        if root.is_array() {
            for params in root.elements() {
                counts.push(count_in(params?)?);
            }
        } else {
            counts.push(count_in(root)?);
        }
        if counts.contains(&Count::Invalid) {
            return Ok(Self::Refused(&INVALID_TYPE));
        }
        let Some(first) = counts.first() else { return Ok(Self::One) };
        if counts.iter().any(|count| count != first) {
            return Ok(Self::Refused(&DIFFERENT));
        }
        match *first {
            Count::Number(count) if count > 1 => {
                let params = without_counts(text, root)?;
                Ok(Self::of(count, || params.into()))
            }
            Count::Null => Ok(Self::Refused(&NULL)),
            Count::Number(_) | Count::Invalid => Ok(Self::One),
        }
    }
}

/// An integer as pydantic converts one from JSON, cut to 64 bits.
fn pydantic_integer(value: &BorrowedValue<'_>) -> Result<i64, &'static RefusedSamples> {
    if let Some(text) = value.as_str() {
        return integer_in(text).ok_or(&NOT_PARSED);
    }
    if let Some(is_one) = value.as_bool() {
        return Ok(i64::from(is_one));
    }
    match value.cast_f64() {
        Some(number) if !number.is_finite() => Err(&NOT_FINITE),
        Some(number) if number.fract() != 0.0 => Err(&FRACTION),
        // Saturates.
        Some(number) => Ok(number as i64),
        None => Err(&NOT_AN_INTEGER),
    }
}

/// `"2"`, `" +2 "`, `"2.00"` and `"1_000"`, as pydantic takes them.
fn integer_in(text: &str) -> Option<i64> {
    let text = text.trim();
    let digits = match text.split_once('.') {
        Some((digits, fraction)) if fraction.bytes().all(|digit| digit == b'0') => digits,
        Some(_) => return None,
        None => text,
    };
    let is_separated = digits.split('_').all(|part| !part.is_empty());
    let digits: Cow<'_, str> =
        if digits.contains('_') && is_separated { digits.replace('_', "").into() } else { digits.into() };
    match digits.parse() {
        Ok(number) => Some(number),
        Err(error) => match error.kind() {
            std::num::IntErrorKind::PosOverflow => Some(i64::MAX),
            std::num::IntErrorKind::NegOverflow => Some(i64::MIN),
            _ => None,
        },
    }
}

/// `n` of one prompt's sampling params.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Count {
    Number(i64),
    Null,
    /// A string, a float, or anything else.
    Invalid,
}

/// `n` of an object, 1 if it has none. Of several the last counts, as Python's parsers read duplicates.
fn count_in(params: JsonValue<'_>) -> Result<Count, MalformedJson> {
    let mut count = Count::Number(1);
    if !params.is_object() {
        return Ok(count);
    }
    for member in params.members() {
        let member = member?;
        if member.name.is("n") {
            count = match member.value.raw() {
                b"null" => Count::Null,
                number => {
                    let number = str::from_utf8(number).ok().and_then(|number| number.parse().ok());
                    number.map_or(Count::Invalid, Count::Number)
                }
            };
        }
    }
    Ok(count)
}

/// Sampling params without `n`. A list of one becomes its element: it is the same to a batch, and a list is
/// none that a server takes for a single prompt, which a regular server turns into a batch by `n`.
fn without_counts(text: &[u8], params: JsonValue<'_>) -> Result<Vec<u8>, MalformedJson> {
    if params.is_object() {
        return without_count(text, params);
    }
    let elements = params.elements().collect::<Result<Vec<_>, _>>()?;
    if let [only] = elements[..] {
        return without_count(text, only);
    }
    let mut cut = Vec::with_capacity(text.len());
    let mut done = params.span().start;
    for element in elements {
        cut.extend_from_slice(&text[done..element.span().start]);
        cut.extend_from_slice(&without_count(text, element)?);
        done = element.span().end;
    }
    cut.extend_from_slice(&text[done..params.span().end]);
    Ok(cut)
}

/// A value without its members called `n`, if it is an object.
fn without_count(text: &[u8], params: JsonValue<'_>) -> Result<Vec<u8>, MalformedJson> {
    if !params.is_object() {
        return Ok(params.raw().to_vec());
    }
    let start = params.span().start;
    let mut cut = Vec::with_capacity(params.raw().len());
    cut.push(b'{');
    // The end of the member before, and whether one was kept: the comma behind it stays only then.
    let (mut done, mut is_first) = (start + 1, true);
    let end = walk_members(text, start, |name, at| {
        let value = JsonValue::at(text, at)?;
        if !name.is("n") {
            let member = &text[done..value.span().end];
            let comma = member.iter().take_while(|byte| is_whitespace(**byte) || **byte == b',').count();
            cut.extend_from_slice(if is_first { &member[comma..] } else { member });
            is_first = false;
        }
        done = value.span().end;
        Ok(done)
    })?;
    cut.extend_from_slice(&text[done..end]);
    Ok(cut)
}

//! What the fields that matter say: which names they have, and what their
//! values ask for.

use simd_json::BorrowedValue;
use simd_json::prelude::{ValueAsArray, ValueAsObject, ValueAsScalar};

use super::{BodyShape, Dialect, Edit};
use crate::wire::logprobs::Merge;

/// Bytes kept of a value that steers the router or is cut. A longer one is passed on or cut unread.
pub(super) const MAX_VALUE: usize = 1 << 20;

/// The names that matter at the top level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Bootstrap,
    Stream,
    N,
    SamplingParams,
    ReturnLogprob,
    LogprobStartLen,
    TokenIdsLogprob,
    Echo,
    Logprobs,
    Other,
}

impl Name {
    pub(super) fn of(name: &[u8], dialect: Dialect) -> Self {
        match (name, dialect) {
            (b"stream", _) => Self::Stream,
            (b"n", Dialect::Chat | Dialect::Completions) => Self::N,
            (b"sampling_params", Dialect::Generate) => Self::SamplingParams,
            (b"return_logprob", Dialect::Generate) => Self::ReturnLogprob,
            (b"logprob_start_len", Dialect::Generate) => Self::LogprobStartLen,
            (b"token_ids_logprob", Dialect::Generate) => Self::TokenIdsLogprob,
            (b"echo", Dialect::Completions) => Self::Echo,
            (b"logprobs", Dialect::Completions) => Self::Logprobs,
            _ if name.starts_with(b"bootstrap_") => Self::Bootstrap,
            _ => Self::Other,
        }
    }
}

/// The text of one value, up to a bound.
#[derive(Debug, Default)]
pub(super) struct Kept {
    wanted: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) too_long: bool,
}

impl Kept {
    pub(super) fn begin(&mut self, wanted: bool) {
        self.wanted = wanted;
        self.too_long = false;
        self.bytes.clear();
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.wanted || self.too_long {
            return;
        }
        self.too_long = self.bytes.len() + bytes.len() > MAX_VALUE;
        if !self.too_long {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

/// What the values that matter say. A field that comes twice counts as its last, as in every parser SGLang uses.
#[derive(Debug, Default)]
pub(super) struct Facts {
    stream: bool,
    many_samples: bool,
    return_logprob: bool,
    prompt_logprobs_from: bool,
    token_ids: bool,
    echo: bool,
    logprobs: bool,
}

impl Facts {
    pub(super) fn note(&mut self, name: Name, kept: &mut Kept) {
        // A value too long to keep is a long list or object. As such it can ask for logprobs, and merging when it
        // did not is harmless: the lists are empty on both sides. It can't be refused for its `n`.
        let long = kept.too_long;
        let value = parse(&mut kept.bytes);
        let is = |test: fn(&BorrowedValue<'_>) -> bool| {
            value.as_ref().is_some_and(|value| match value.as_array() {
                Some(items) => items.iter().any(test),
                None => test(value),
            })
        };
        match name {
            Name::Stream => self.stream = is(truthy),
            Name::N => self.many_samples = is(over_one),
            Name::SamplingParams => self.many_samples = is(|params| last(params, "n").is_some_and(over_one)),
            Name::ReturnLogprob => self.return_logprob = long || is(truthy),
            Name::LogprobStartLen => {
                self.prompt_logprobs_from = long || is(|from| number(from).is_some_and(|from| from >= 0.0));
            }
            Name::TokenIdsLogprob => self.token_ids = long || is(|ids| ids.as_null().is_none()),
            Name::Echo => self.echo = is(truthy),
            Name::Logprobs => self.logprobs = is(|count| number(count).is_some_and(|count| count > 0.0)),
            Name::Bootstrap | Name::Other => {}
        }
    }

    pub(super) fn into_shape(self, dialect: Dialect, edit: Edit) -> BodyShape {
        let merge = match dialect {
            // With the default start of -1 prefill's lists are empty too.
            Dialect::Generate if self.return_logprob && (self.prompt_logprobs_from || self.token_ids) => {
                Some(Merge::Generate)
            }
            // The only way to prompt logprobs on this route.
            Dialect::Completions if self.echo && self.logprobs => Some(Merge::Echo),
            // Chat never computes prompt logprobs.
            _ => None,
        };
        BodyShape { stream: self.stream, merge, many_samples: self.many_samples, edit }
    }
}

/// Reads a kept value; one that SGLang will refuse says nothing. Literals and numbers, the usual case, are spared
/// the parser's buffers.
fn parse(text: &mut [u8]) -> Option<BorrowedValue<'_>> {
    match &*text {
        b"true" => Some(true.into()),
        b"false" => Some(false.into()),
        b"null" => Some(().into()),
        [b'-' | b'0'..=b'9', ..] => str::from_utf8(text).ok()?.parse::<f64>().ok().map(Into::into),
        _ => simd_json::to_borrowed_value(text).ok(),
    }
}

/// SGLang reads its flags with pydantic, which takes more than `true` for true.
fn truthy(value: &BorrowedValue<'_>) -> bool {
    let word = |word: &str| ["true", "t", "yes", "y", "on"].iter().any(|yes| word.eq_ignore_ascii_case(yes));
    value.as_str().is_some_and(word) || number(value).is_some_and(|number| number != 0.0)
}

fn over_one(value: &BorrowedValue<'_>) -> bool {
    number(value).is_some_and(|number| number > 1.0)
}

/// A number, also as pydantic takes it from a string or from true and false.
fn number(value: &BorrowedValue<'_>) -> Option<f64> {
    let spelled = || value.as_str()?.trim().parse().ok();
    value.cast_f64().or_else(|| value.as_bool().map(f64::from)).or_else(spelled)
}

/// The field of this name; the last of them, where `get` finds the first.
fn last<'a>(object: &'a BorrowedValue<'_>, name: &str) -> Option<&'a BorrowedValue<'a>> {
    object.as_object()?.iter().filter(|(other, _)| *other == name).last().map(|(_, value)| value)
}

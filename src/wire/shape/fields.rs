//! The top-level fields that matter to the router, and what their values request.

use simd_json::BorrowedValue;
use simd_json::prelude::{ValueAsArray, ValueAsScalar};

use super::samples::{ListField, RefusedSamples, RequestedSamples};
use super::{BodyFields, BodyShape, ChangedField, ClientRanks, Dialect};
use crate::wire::json::is_whitespace;
use crate::wire::logprobs::Merge;

/// The most bytes that are kept of a value that steers the router or is removed. A longer one is forwarded or
/// removed unread.
pub(super) const MAX_VALUE: usize = 1 << 20;

/// A field of the body's top level, by what it means to the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TopLevelField {
    /// Any `bootstrap_*`, not only those that the router sets: SGLang's others are for its own use.
    Bootstrap,
    /// Another one of SGLang's for its own use, which is removed.
    Stripped,
    /// A rank that the client may choose: of the server that gets the request, or of prefill.
    RoutedDpRank,
    PrefillDpRank,
    Rid,
    RequestId,
    PreviousResponseId,
    Stream,
    N,
    SamplingParams,
    ReturnLogprob,
    LogprobStartLen,
    TopLogprobsNum,
    TokenIdsLogprob,
    Echo,
    Logprobs,
    ReturnRoutedExperts,
    /// The prompt on `/generate`: only whether it is a single one matters, which its first bytes say.
    Prompt,
    Other,
}

impl TopLevelField {
    /// The field of this name, without escapes. The same name means nothing on another API: chat's
    /// `logprobs`, for one, is about output only.
    pub(super) fn of(name: &[u8], dialect: Dialect) -> Self {
        match (name, dialect) {
            (b"stream", _) => Self::Stream,
            (b"n", Dialect::Chat | Dialect::Completions) => Self::N,
            (b"sampling_params", Dialect::Generate) => Self::SamplingParams,
            (b"return_logprob", Dialect::Generate) => Self::ReturnLogprob,
            (b"logprob_start_len", Dialect::Generate) => Self::LogprobStartLen,
            (b"top_logprobs_num", Dialect::Generate) => Self::TopLogprobsNum,
            (b"token_ids_logprob", Dialect::Generate) => Self::TokenIdsLogprob,
            (b"echo", Dialect::Completions) => Self::Echo,
            (b"logprobs", Dialect::Completions) => Self::Logprobs,
            (b"rid", _) => Self::Rid,
            (b"request_id", _) => Self::RequestId,
            (b"previous_response_id", Dialect::Responses) => Self::PreviousResponseId,
            (b"return_routed_experts", Dialect::Generate | Dialect::Chat | Dialect::Completions) => {
                Self::ReturnRoutedExperts
            }
            (b"text" | b"input_ids", Dialect::Generate) => Self::Prompt,
            _ if name.starts_with(b"bootstrap_") => Self::Bootstrap,
            _ => Self::Other,
        }
    }

    /// An internal field that is passed on.
    pub(super) fn passed(name: &str) -> Self {
        match name {
            "routed_dp_rank" | "data_parallel_rank" => Self::RoutedDpRank,
            "disagg_prefill_dp_rank" => Self::PrefillDpRank,
            _ => Self::Other,
        }
    }

    /// Whether its value is read as a whole.
    pub(super) fn is_read(self) -> bool {
        !matches!(self, Self::Prompt | Self::Other)
    }

    /// What it is to a plan, which may change it.
    pub(super) fn changed(self) -> Option<ChangedField> {
        match self {
            Self::Bootstrap | Self::Stripped => Some(ChangedField::Internal),
            Self::Rid => Some(ChangedField::Rid),
            Self::RequestId => Some(ChangedField::RequestId),
            _ => None,
        }
    }
}

/// The text of one value, of up to [`MAX_VALUE`] bytes.
#[derive(Debug, Default)]
pub(super) struct ValueBuffer {
    is_kept: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) is_too_long: bool,
}

impl ValueBuffer {
    /// Starts a value, of which nothing is kept unless `is_kept`. The memory of the last one is reused.
    pub(super) fn start(&mut self, is_kept: bool) {
        self.is_kept = is_kept;
        self.is_too_long = false;
        self.bytes.clear();
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.is_kept || self.is_too_long {
            return;
        }
        self.is_too_long = self.bytes.len() + bytes.len() > MAX_VALUE;
        if !self.is_too_long {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

/// What the values that matter request. The last of duplicate fields counts, as in every JSON parser that
/// SGLang uses (json, orjson and msgspec).
#[derive(Debug, Default)]
pub(super) struct RequestedFeatures {
    stream: bool,
    samples: RequestedSamples,
    /// Whether these have lists, which a request for several samples may not.
    lists: [bool; ListField::COUNT],
    return_logprob: bool,
    has_logprob_start: bool,
    token_ids_logprob: bool,
    echo: bool,
    logprobs: bool,
    rids: Vec<String>,
    /// The number of ids in a list.
    rid_list: Option<usize>,
    /// There is one prompt, and no list of them.
    has_single_prompt: bool,
    has_rid: bool,
    request_ids: Vec<String>,
    has_request_id: bool,
    has_previous_response: bool,
    routed_experts: bool,
    ranks: ClientRanks,
}

/// Most ids of one request that are known, and the longest of them: a batch with more can be aborted by its
/// servers only.
const MAX_RIDS: usize = 64;
const MAX_RID: usize = 256;

impl RequestedFeatures {
    /// Reads a field's value. Batches have lists: one element that requests something is enough. Returns what
    /// the field is to a plan if that depends on its value.
    pub(super) fn set(&mut self, field: TopLevelField, value: &mut ValueBuffer) -> Option<ChangedField> {
        match field {
            TopLevelField::N => return self.set_n(value),
            TopLevelField::SamplingParams => return self.set_sampling_params(value),
            _ => {}
        }
        // A value too long to keep is a long list or object, which may request logprobs. Merging if it does
        // not is harmless: the lists are empty on both legs.
        let is_too_long = value.is_too_long;
        let is_list = value.bytes.first() == Some(&b'[');
        let value = parse(&mut value.bytes);
        let any = |test: fn(&BorrowedValue<'_>) -> bool| {
            value.as_ref().is_some_and(|value| match value.as_array() {
                Some(items) => items.iter().any(test),
                None => test(value),
            })
        };
        match field {
            TopLevelField::Stream => self.stream = any(is_true),
            TopLevelField::ReturnLogprob => {
                self.return_logprob = is_too_long || any(is_true);
                self.lists[ListField::ReturnLogprob as usize] = is_list;
            }
            TopLevelField::TopLogprobsNum => self.lists[ListField::TopLogprobsNum as usize] = is_list,
            TopLevelField::LogprobStartLen => {
                // -1 is the default: no prompt logprobs. Any other negative number counts as 0 (seen with
                // sglang 0.5.23).
                self.has_logprob_start =
                    is_too_long || any(|start| number(start).is_some_and(|start| start != -1.0));
                self.lists[ListField::LogprobStartLen as usize] = is_list;
            }
            TopLevelField::TokenIdsLogprob => {
                self.token_ids_logprob = is_too_long || any(|ids| ids.as_null().is_none());
                // A flat list is of the ids that each prompt is asked for.
                let first = value.as_ref().and_then(|ids| ids.as_array()?.first());
                self.lists[ListField::TokenIdsLogprob as usize] =
                    first.and_then(|ids| ids.as_array()).is_some();
            }
            TopLevelField::Echo => self.echo = any(is_true),
            TopLevelField::Logprobs => {
                self.logprobs = any(|count| number(count).is_some_and(|count| count > 0.0));
            }
            TopLevelField::Rid => {
                self.has_rid = is_too_long || value.as_ref().is_some_and(is_not_null);
                self.rid_list = value.as_ref().and_then(|rids| rids.as_array()).map(|rids| rids.len());
                self.rids = value.as_ref().map(rids).unwrap_or_default();
            }
            TopLevelField::RequestId => {
                self.has_request_id = is_too_long || value.as_ref().is_some_and(is_not_null);
                self.request_ids = value.as_ref().map(rids).unwrap_or_default();
            }
            TopLevelField::PreviousResponseId => {
                self.has_previous_response = any(|id| id.as_null().is_none());
            }
            TopLevelField::ReturnRoutedExperts => self.routed_experts = is_too_long || any(is_true),
            TopLevelField::RoutedDpRank => {
                self.ranks.is_set = true;
                self.ranks.routed = value.as_ref().and_then(rank);
            }
            TopLevelField::PrefillDpRank => {
                self.ranks.is_set = true;
                self.ranks.prefill = value.as_ref().and_then(rank);
            }
            // The first two were read above.
            TopLevelField::N
            | TopLevelField::SamplingParams
            | TopLevelField::Bootstrap
            | TopLevelField::Stripped
            | TopLevelField::Prompt
            | TopLevelField::Other => {}
        }
        None
    }

    /// Reads the first bytes of the prompt's value, as far as the current chunk has them. A list is one
    /// prompt of token ids, or several prompts.
    pub(super) fn set_prompt(&mut self, value: &[u8]) {
        let mut bytes = value.iter().copied().filter(|byte| !is_whitespace(*byte));
        self.has_single_prompt = match bytes.next() {
            Some(b'"') => true,
            Some(b'[') => bytes.next().is_some_and(|byte| byte.is_ascii_digit()),
            _ => self.has_single_prompt,
        };
    }

    fn set_n(&mut self, value: &mut ValueBuffer) -> Option<ChangedField> {
        // What nearly all clients send that send it. No server reads a number of a million digits.
        if value.bytes == b"1" || value.is_too_long {
            self.samples = RequestedSamples::One;
            return None;
        }
        self.samples = RequestedSamples::of_openai(parse(&mut value.bytes).as_ref());
        // Also one that counts for nothing: if a later one does, a copy must have neither.
        Some(ChangedField::Samples)
    }

    fn set_sampling_params(&mut self, value: &ValueBuffer) -> Option<ChangedField> {
        // Of a value that is too long to keep nothing is known. Rejecting it for an `n` that it may not have
        // would not be harmless.
        self.samples = if value.is_too_long {
            RequestedSamples::One
        } else {
            RequestedSamples::of_sampling_params(&value.bytes)
        };
        matches!(self.samples, RequestedSamples::Many(_)).then_some(ChangedField::SamplingParams)
    }

    /// What becomes of the samples by fields that do not go with them.
    fn take_samples(&mut self) -> RequestedSamples {
        let samples = std::mem::take(&mut self.samples);
        if !matches!(samples, RequestedSamples::Many(_)) {
            return samples;
        }
        let refused = match self.rid_list {
            Some(ids) if self.has_single_prompt && ids != 1 => Some(RefusedSamples::ids()),
            _ => self.lists.iter().position(|is_list| *is_list).map(RefusedSamples::list),
        };
        refused.map_or(samples, RequestedSamples::Refused)
    }

    pub(super) fn into_shape(mut self, dialect: Dialect, fields: BodyFields) -> BodyShape {
        let samples = self.take_samples();
        let merge = match dialect {
            // With the default start of -1 prefill's lists are empty, too, so that the common
            // `return_logprob: true` alone needs no merge.
            Dialect::Generate
                if self.return_logprob && (self.has_logprob_start || self.token_ids_logprob) =>
            {
                Some(Merge::Generate)
            }
            Dialect::Generate => self.routed_experts.then_some(Merge::GenerateExperts),
            // The only request for prompt logprobs on this route.
            Dialect::Completions if self.echo && self.logprobs => Some(Merge::Echo),
            // SGLang never computes prompt logprobs for chat: it sets the start to -1.
            _ => self.routed_experts.then_some(Merge::Experts),
        };
        BodyShape {
            stream: self.stream,
            merge,
            samples,
            // On `/v1/responses` it is what servers know a request by.
            rids: if dialect == Dialect::Responses { self.request_ids } else { self.rids },
            has_rid: self.has_rid,
            has_request_id: self.has_request_id,
            has_previous_response: self.has_previous_response,
            ranks: self.ranks,
            fields,
            prompt: None,
        }
    }
}

/// Parses a value. One that is malformed requests nothing: SGLang will reject it. Literals and numbers, the
/// usual case, are read without the parser, which allocates buffers.
fn parse(text: &mut [u8]) -> Option<BorrowedValue<'_>> {
    match &*text {
        b"true" => Some(true.into()),
        b"false" => Some(false.into()),
        b"null" => Some(().into()),
        [b'-' | b'0'..=b'9', ..] => str::from_utf8(text).ok()?.parse::<f64>().ok().map(Into::into),
        _ => simd_json::to_borrowed_value(text).ok(),
    }
}

/// The ids in a value of `rid`: one, or a list. None if there are too many, or one is too long.
fn rids(value: &BorrowedValue<'_>) -> Vec<String> {
    let one = |value: &BorrowedValue<'_>| Some(value.as_str().filter(|rid| rid.len() <= MAX_RID)?.to_owned());
    match value.as_array() {
        Some(items) if items.len() > MAX_RIDS => Vec::new(),
        Some(items) => items.iter().map(one).collect::<Option<_>>().unwrap_or_default(),
        None => one(value).into_iter().collect(),
    }
}

fn is_not_null(value: &BorrowedValue<'_>) -> bool {
    value.as_null().is_none()
}

/// SGLang reads its flags with pydantic, which accepts more than `true`.
fn is_true(value: &BorrowedValue<'_>) -> bool {
    let is_yes =
        |text: &str| ["true", "t", "yes", "y", "on"].iter().any(|yes| text.eq_ignore_ascii_case(yes));
    value.as_str().is_some_and(is_yes) || number(value).is_some_and(|number| number != 0.0)
}

/// A number that can be one of a rank.
fn rank(value: &BorrowedValue<'_>) -> Option<u16> {
    let number = number(value).filter(|number| number.fract() == 0.0)?;
    (0.0..=f64::from(u16::MAX)).contains(&number).then_some(number as u16)
}

/// A number, also from a string or a boolean, as pydantic accepts them.
fn number(value: &BorrowedValue<'_>) -> Option<f64> {
    let from_str = || value.as_str()?.trim().parse().ok();
    value.cast_f64().or_else(|| value.as_bool().map(f64::from)).or_else(from_str)
}

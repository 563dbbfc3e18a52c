//! `/v1/completions` with `echo` and `logprobs`: one choice per prompt, whose `logprobs` has the lists.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::Edit;
use crate::wire::json::{MalformedJson, Value};

/// The lists in a choice's `logprobs`. They have one element per token each.
const LISTS: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];

/// The prompt's elements of each list: raw, commas between them, no brackets around them.
type Prompt = [Option<Bytes>; LISTS.len()];

/// The prompts' elements by choice.
#[derive(Default)]
pub(super) struct Choices {
    by_index: BTreeMap<u64, Prompt>,
}

/// What to change in an answer or an event of decode's.
pub(super) struct Found {
    pub(super) edits: Vec<Edit>,
    /// The choices that have their prompt by these edits.
    indices: Vec<u64>,
}

impl Choices {
    pub(super) fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }

    /// Adds the lists of an answer or of a stream's event. A choice's first lists begin with the prompt's
    /// elements and end with the one token that prefill makes; lists in later events are output.
    pub(super) fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        if !Value::root(json)?.is_object() {
            return Err(MalformedJson::new("not an object"));
        }
        for_each_choice(json, |index, logprobs| {
            if self.by_index.contains_key(&index) {
                return Ok(());
            }
            let mut prompt = Prompt::default();
            for (list, elements) in LISTS.iter().zip(&mut prompt) {
                let Some(value) = logprobs.member(list)?.filter(|value| value.is_array()) else {
                    continue;
                };
                *elements = all_but_last(json, value)?;
            }
            if prompt.iter().any(Option::is_some) {
                self.by_index.insert(index, prompt);
            }
            Ok(())
        })
    }

    /// What to change in decode's answer.
    pub(super) fn edits(&self, json: &[u8]) -> Result<Found, MalformedJson> {
        let mut found = Found { edits: Vec::new(), indices: Vec::new() };
        for_each_choice(json, |index, logprobs| {
            let Some(prompt) = self.by_index.get(&index) else {
                return Ok(());
            };
            found.indices.push(index);
            if has_prompt(logprobs)? {
                return Ok(());
            }
            for member in logprobs.members() {
                let member = member?;
                let list = LISTS.iter().position(|list| member.is_named(list));
                if let Some(elements) = list.and_then(|list| prompt[list].as_ref()) {
                    prepend(elements, member.value, &mut found.edits)?;
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// What to change in an event of decode's. The prompt belongs to the first event of a choice, so the
    /// choices in this one are done with.
    pub(super) fn take_edits(&mut self, json: &[u8]) -> Result<Vec<Edit>, MalformedJson> {
        let found = self.edits(json)?;
        for index in &found.indices {
            self.by_index.remove(index);
        }
        Ok(found.edits)
    }
}

/// Calls `visit` with each choice's index and `logprobs` object. Choices whose `logprobs` is null, as in a
/// stream's usage event, are passed over.
fn for_each_choice<'a>(
    json: &'a [u8],
    mut visit: impl FnMut(u64, Value<'a>) -> Result<(), MalformedJson>,
) -> Result<(), MalformedJson> {
    let Some(choices) = Value::root(json)?.member("choices")?.filter(|value| value.is_array()) else {
        return Ok(());
    };
    for choice in choices.elements() {
        let choice = choice?;
        let index = choice.member("index")?.and_then(Value::as_u64);
        let logprobs = choice.member("logprobs")?.filter(|value| value.is_object());
        if let (Some(index), Some(logprobs)) = (index, logprobs) {
            visit(index, logprobs)?;
        }
    }
    Ok(())
}

/// The raw elements of a list up to the last but one; none if there is no such.
fn all_but_last(json: &Bytes, list: Value<'_>) -> Result<Option<Bytes>, MalformedJson> {
    let first = list.span().start + 1;
    let (mut last_but_one, mut last) = (None, None);
    for element in list.elements() {
        last_but_one = last.replace(element?.span().end);
    }
    Ok(last_but_one.map(|end| json.slice(first..end)))
}

/// Whether decode's lists begin with the prompt already, as they would if SGLang handed prefill's over:
/// nothing comes before a prompt's first token, so its logprob is null, and that of an output token never is.
fn has_prompt(logprobs: Value<'_>) -> Result<bool, MalformedJson> {
    let first = match logprobs.member("token_logprobs")?.filter(|value| value.is_array()) {
        Some(list) => list.elements().next().transpose()?,
        None => None,
    };
    Ok(first.is_some_and(|first| first.raw() == b"null"))
}

/// Puts `elements` at the front of a list.
fn prepend(elements: &Bytes, list: Value<'_>, edits: &mut Vec<Edit>) -> Result<(), MalformedJson> {
    if !list.is_array() {
        return Ok(());
    }
    let front = list.span().start + 1;
    edits.push(Edit { at: front..front, with: elements.clone() });
    if list.elements().next().transpose()?.is_some() {
        edits.push(Edit { at: front..front, with: Bytes::from_static(b",") });
    }
    Ok(())
}

//! `/v1/completions` with `echo` and `logprobs`: one choice per prompt, whose `logprobs` has the lists.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::splicer::Insertion;
use crate::wire::json::{JsonValue, MalformedJson};

/// The lists in a choice's `logprobs`, with one element per token each.
const LISTS: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];

/// The prompt's elements of each of [`LISTS`]: raw, with commas between them and no brackets around them.
type PromptElements = [Option<Bytes>; LISTS.len()];

/// The prompts' elements, by choice.
#[derive(Default)]
pub(super) struct PromptsByChoice {
    by_index: BTreeMap<u64, PromptElements>,
}

/// What to insert into a response body or an event of decode's.
pub(super) struct ChoiceInsertions {
    pub(super) insertions: Vec<Insertion>,
    /// The choices whose prompt is complete after these insertions.
    indices: Vec<u64>,
}

impl PromptsByChoice {
    pub(super) fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }

    /// Adds the lists of a response body or of one event. A choice's first lists are the prompt's elements
    /// and then the one token that prefill generates; lists in later events are output.
    pub(super) fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        if !JsonValue::root(json)?.is_object() {
            return Err(MalformedJson::new("not an object"));
        }
        for_each_choice(json, |index, logprobs| {
            if self.by_index.contains_key(&index) {
                return Ok(());
            }
            let mut prompt = PromptElements::default();
            for (list, elements) in LISTS.iter().zip(&mut prompt) {
                let Some(value) = logprobs.member(list)?.filter(|value| value.is_array()) else {
                    continue;
                };
                *elements = all_but_last(json, value)?;
            }
            // A prompt without tokens has nothing to insert, and must not count as something to merge.
            if prompt.iter().any(Option::is_some) {
                self.by_index.insert(index, prompt);
            }
            Ok(())
        })
    }

    /// What to insert into decode's response body or the data of an event.
    pub(super) fn insertions(&self, json: &[u8]) -> Result<ChoiceInsertions, MalformedJson> {
        let mut found = ChoiceInsertions { insertions: Vec::new(), indices: Vec::new() };
        for_each_choice(json, |index, logprobs| {
            let Some(prompt) = self.by_index.get(&index) else {
                return Ok(());
            };
            // Also if nothing is inserted: this was the choice's first event with logprobs.
            found.indices.push(index);
            if has_prompt(logprobs)? {
                return Ok(());
            }
            for member in logprobs.members() {
                let member = member?;
                let list = LISTS.iter().position(|list| member.name.is(list));
                if let Some(elements) = list.and_then(|list| prompt[list].as_ref()) {
                    prepend(elements, member.value, &mut found.insertions)?;
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// What to insert into the data of one of decode's events. A prompt belongs to its choice's first event,
    /// so the choices of this event are removed.
    pub(super) fn take_insertions(&mut self, json: &[u8]) -> Result<Vec<Insertion>, MalformedJson> {
        let found = self.insertions(json)?;
        for index in &found.indices {
            self.by_index.remove(index);
        }
        Ok(found.insertions)
    }
}

/// Calls `visit` with each choice's index and `logprobs` object. Choices whose `logprobs` is null are
/// skipped.
fn for_each_choice<'a>(
    json: &'a [u8],
    mut visit: impl FnMut(u64, JsonValue<'a>) -> Result<(), MalformedJson>,
) -> Result<(), MalformedJson> {
    // An error object has no choices, and the list of a stream's usage event is empty.
    let Some(choices) = JsonValue::root(json)?.member("choices")?.filter(|value| value.is_array()) else {
        return Ok(());
    };
    for choice in choices.elements() {
        let choice = choice?;
        let index = choice.member("index")?.and_then(JsonValue::as_u64);
        let logprobs = choice.member("logprobs")?.filter(|value| value.is_object());
        if let (Some(index), Some(logprobs)) = (index, logprobs) {
            visit(index, logprobs)?;
        }
    }
    Ok(())
}

/// A list's raw elements without the last one; `None` if there are fewer than two.
fn all_but_last(json: &Bytes, list: JsonValue<'_>) -> Result<Option<Bytes>, MalformedJson> {
    let first = list.span().start + 1;
    let (mut second_to_last, mut last) = (None, None);
    for element in list.elements() {
        second_to_last = last.replace(element?.span().end);
    }
    Ok(second_to_last.map(|end| json.slice(first..end)))
}

/// Whether decode's lists have the prompt already, as they would if SGLang transferred prefill's lists. A
/// prompt's first token has no context, so its logprob is null; an output token's never is.
fn has_prompt(logprobs: JsonValue<'_>) -> Result<bool, MalformedJson> {
    let first = match logprobs.member("token_logprobs")?.filter(|value| value.is_array()) {
        Some(list) => list.elements().next().transpose()?,
        None => None,
    };
    Ok(first.is_some_and(|first| first.raw() == b"null"))
}

/// Inserts `elements` at the front of a list.
fn prepend(
    elements: &Bytes,
    list: JsonValue<'_>,
    insertions: &mut Vec<Insertion>,
) -> Result<(), MalformedJson> {
    if !list.is_array() {
        return Ok(());
    }
    let front = list.span().start + 1;
    insertions.push(Insertion { replaced: front..front, list: elements.clone() });
    // With `max_tokens` 0 decode's list is empty: no comma then.
    if list.elements().next().transpose()?.is_some() {
        insertions.push(Insertion { replaced: front..front, list: Bytes::from_static(b",") });
    }
    Ok(())
}

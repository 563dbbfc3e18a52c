//! `/generate`: one item per prompt, whose `meta_info` has the lists.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem;

use super::Edit;
use crate::wire::json::{
    MalformedJson, Value, end_of_value, is_whitespace, skip_whitespace, trim_end, walk_elements, walk_members,
};

/// What all keys begin with, so that one search finds any of them.
const PREFIX: &[u8] = b"\"input_to";
/// Made once: that costs more than to search through a small event.
static KEY: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(PREFIX));

/// The keys in an item's `meta_info`, and whether decode's value gives way.
const KEYS: [(&str, Replaces); 9] = [
    ("input_token_logprobs", Replaces::EmptyList),
    ("input_top_logprobs", Replaces::EmptyList),
    ("input_token_ids_logprobs", Replaces::EmptyList),
    // The flat form of `input_top_logprobs` (`return_flat_raw_top_logprobs`). Without logprobs these are `[]`
    // or `""`, `[0,k]` and `0`, of which the latter two can as well be part of a full answer.
    ("input_top_logprobs_val_flat", Replaces::Anything),
    ("input_top_logprobs_idx_flat", Replaces::Anything),
    ("input_top_logprobs_val_flat_b64", Replaces::Anything),
    ("input_top_logprobs_idx_flat_b64", Replaces::Anything),
    ("input_top_logprobs_shape", Replaces::Anything),
    ("input_top_logprobs_null_prefix", Replaces::Anything),
];

/// A server that hands prefill's lists over to decode would send full lists: those stay.
#[derive(Clone, Copy, PartialEq)]
enum Replaces {
    EmptyList,
    Anything,
}

/// Prefill's value of each key, raw.
type Item = [Option<Bytes>; KEYS.len()];

/// Prefill's lists by item.
#[derive(Default)]
pub(super) struct Items {
    by_index: BTreeMap<u64, Item>,
    /// Whether items are told apart at all: by position in an array, or by `"index"` in a stream.
    batch: bool,
}

impl Items {
    pub(super) fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }

    /// All lists, of all items.
    #[cfg(test)]
    pub(super) fn lists(&self) -> impl Iterator<Item = &Bytes> {
        self.by_index.values().flatten().flatten()
    }

    /// Adds the lists of an answer or of a stream's event. Every event has the full lists, so the last one
    /// wins.
    pub(super) fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        let start = skip_whitespace(json, 0);
        let end = match json.get(start) {
            Some(b'{') => self.read_item(json, start, None)?,
            Some(b'[') => {
                self.batch = true;
                let mut index = 0..;
                walk_elements(json, start, |item| match json.get(item) {
                    Some(b'{') => self.read_item(json, item, index.next()),
                    _ => {
                        index.next();
                        end_of_value(json, item)
                    }
                })?
            }
            _ => return Err(MalformedJson::new("neither an object nor an array")),
        };
        if skip_whitespace(json, end) == json.len() {
            Ok(())
        } else {
            Err(MalformedJson::new("more than one value"))
        }
    }

    /// Reads the item that starts at `start`, and returns where it ends. `position` is its place in an array; in a
    /// stream the item itself tells its index.
    fn read_item(
        &mut self,
        json: &Bytes,
        start: usize,
        position: Option<u64>,
    ) -> Result<usize, MalformedJson> {
        let (mut index, mut lists) = (position, Item::default());
        let end = walk_members(json, start, |name, value| {
            if name.is("meta_info") {
                lists = Item::default();
                if json.get(value) == Some(&b'{') {
                    return read_lists(json, value, &mut lists);
                }
            } else if position.is_none() && name.is("index") {
                let value = Value::at(json, value)?;
                index = value.as_u64();
                self.batch = true;
                return Ok(value.span().end);
            }
            end_of_value(json, value)
        })?;
        for (list, of) in lists.into_iter().zip(0..).filter(|(list, _)| list.is_some()) {
            self.by_index.entry(index.unwrap_or(0)).or_default()[of] = list;
        }
        Ok(end)
    }

    /// What to change in decode's answer, which is an item or an array of items in the order of the prompts.
    pub(super) fn edits_of_body(&self, body: &[u8]) -> Result<Vec<Edit>, MalformedJson> {
        let answer = Value::root(body)?;
        let mut edits = Vec::new();
        if answer.is_object() {
            self.find_edits(0, body, answer.span(), &mut edits);
        } else if answer.is_array() {
            for (item, index) in answer.elements().zip(0..) {
                self.find_edits(index, body, item?.span(), &mut edits);
            }
        }
        Ok(edits)
    }

    /// What to change in an event of decode's, which is one item: an object and nothing around it.
    pub(super) fn edits_of_event(&self, event: &[u8]) -> Vec<Edit> {
        let index = if self.batch { index_of(event) } else { Some(0) };
        let mut edits = Vec::new();
        if let Some(index) = index {
            self.find_edits(index, event, 0..event.len(), &mut edits);
        }
        edits
    }

    /// Finds the places for an item's lists by searching for the keys, not by walking the item: a stream
    /// repeats the whole output in every event, which makes 9 MB of 1,500 tokens.
    ///
    /// A hit is the key in `meta_info` and nothing else, for two reasons. A quote that begins a key has no
    /// backslash before it, and one within a string always has (see [`key_at`]), so what a model writes is
    /// never hit. And of all objects in an item, `meta_info` alone has these keys: the others
    /// (`finish_reason`, `weight_versions`, `cached_tokens_details`) have fixed ones, and lists of logprobs
    /// have no objects.
    fn find_edits(&self, index: u64, text: &[u8], item: Range<usize>, edits: &mut Vec<Edit>) {
        let Some(lists) = self.by_index.get(&index) else {
            return;
        };
        let mut missing = lists.iter().flatten().count();
        for hit in KEY.find_iter(&text[item.clone()]) {
            let Some((key, value)) = key_at(text, item.start + hit) else {
                continue;
            };
            let Some(list) = &lists[key] else {
                continue;
            };
            if let Some(end) = end_of_replaced(text, value, KEYS[key].1) {
                edits.push(Edit { at: value..end, with: list.clone() });
            }
            missing -= 1;
            if missing == 0 {
                return;
            }
        }
    }
}

/// Reads the lists of the `meta_info` that starts at `start`, and returns where it ends.
fn read_lists(json: &Bytes, start: usize, lists: &mut Item) -> Result<usize, MalformedJson> {
    walk_members(json, start, |name, start| {
        let value = Value::at(json, start)?;
        let span = value.span();
        if let Some(key) = KEYS.iter().position(|(key, _)| name.is(key))
            && (KEYS[key].1 == Replaces::Anything || is_filled_list(value))
        {
            lists[key] = Some(json.slice(span.clone()));
        }
        Ok(span.end)
    })
}

/// Prefill has empty lists, too, where no prompt logprobs were asked for: nothing to splice then.
fn is_filled_list(value: Value<'_>) -> bool {
    value.is_array() && value.elements().next().is_some()
}

/// Which of the keys begins at `quote`, and where its value starts.
fn key_at(text: &[u8], quote: usize) -> Option<(usize, usize)> {
    let before = *text.get(quote.checked_sub(1)?)?;
    if !(is_whitespace(before) || matches!(before, b'{' | b',')) {
        return None;
    }
    let rest = &text[quote + 1..];
    let is_key = |(name, _): &(&str, Replaces)| {
        rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"\""))
    };
    let key = KEYS.iter().position(is_key)?;
    let colon = skip_whitespace(text, quote + KEYS[key].0.len() + 2);
    (text.get(colon) == Some(&b':')).then(|| (key, skip_whitespace(text, colon + 1)))
}

/// The end of decode's value at `start`, if it is to be replaced.
fn end_of_replaced(text: &[u8], start: usize, replaces: Replaces) -> Option<usize> {
    match replaces {
        Replaces::Anything => Value::at(text, start).ok().map(|value| value.span().end),
        Replaces::EmptyList => {
            let inside = text.get(start..)?.strip_prefix(b"[")?;
            let end = skip_whitespace(inside, 0);
            (inside.get(end) == Some(&b']')).then_some(start + 1 + end + 1)
        }
    }
}

/// Which item of a batch an event is of. An event that is of none, such as an error, does not say.
fn index_of(event: &[u8]) -> Option<u64> {
    index_at_end(event).or_else(|| Value::root(event).ok()?.member("index").ok()??.as_u64())
}

/// The same from the event's last bytes: SGLang's servers put `"index"` last. The object's last `}` ends the
/// event, so the member before it is the object's own; that the name begins there shows as in [`key_at`].
fn index_at_end(event: &[u8]) -> Option<u64> {
    let member = trim_end(event.strip_suffix(b"}")?);
    let digits = member.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (member, index) = member.split_at(member.len() - digits);
    let name = trim_end(trim_end(member).strip_suffix(b":")?);
    let before = *name.strip_suffix(b"\"index\"")?.last()?;
    (is_whitespace(before) || matches!(before, b'{' | b',')).then_some(())?;
    std::str::from_utf8(index).ok()?.parse().ok()
}

//! `/generate`: the response is one item per prompt, and each item's `meta_info` has the lists.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem;

use super::splicer::Insertion;
use crate::wire::json::{
    JsonValue, MalformedJson, end_of_value, is_whitespace, skip_whitespace, trim_end, walk_elements,
    walk_members,
};

/// The common prefix of all names below, so that one search finds any of them.
const NAME_PREFIX: &[u8] = b"\"input_to";
/// Built once: building it costs more than searching a small event.
static NAME_FINDER: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(NAME_PREFIX));

/// The lists' names in an item's `meta_info`, and which of decode's values they replace.
const LISTS: [(&str, Replaces); 9] = [
    ("input_token_logprobs", Replaces::EmptyList),
    ("input_top_logprobs", Replaces::EmptyList),
    ("input_token_ids_logprobs", Replaces::EmptyList),
    // The flat form of `input_top_logprobs` (`return_flat_raw_top_logprobs`). Without logprobs these are `[]`
    // or `""`, `[0,k]` and `0`; the latter two also occur with logprobs, so there is no empty value to test.
    ("input_top_logprobs_val_flat", Replaces::AnyValue),
    ("input_top_logprobs_idx_flat", Replaces::AnyValue),
    ("input_top_logprobs_val_flat_b64", Replaces::AnyValue),
    ("input_top_logprobs_idx_flat_b64", Replaces::AnyValue),
    ("input_top_logprobs_shape", Replaces::AnyValue),
    ("input_top_logprobs_null_prefix", Replaces::AnyValue),
];

/// Decode's list is empty today. Should SGLang transfer prefill's lists to decode one day, decode's would
/// be complete, and must not be replaced.
#[derive(Clone, Copy, PartialEq)]
enum Replaces {
    EmptyList,
    AnyValue,
}

/// Prefill's raw value for each of [`LISTS`].
type ItemLists = [Option<Bytes>; LISTS.len()];

/// Prefill's lists, by item.
#[derive(Default)]
pub(super) struct ListsByItem {
    by_index: BTreeMap<u64, ItemLists>,
    /// Whether items have an index: their position in an array, or `"index"` in a stream.
    is_batch: bool,
}

impl ListsByItem {
    pub(super) fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }

    /// All lists of all items.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.by_index.values().flatten().flatten()
    }

    /// Adds the lists of a response body or of one event. Every event repeats the complete lists (seen with
    /// sglang 0.5.23), so a later list replaces an earlier one.
    pub(super) fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        let start = skip_whitespace(json, 0);
        let end = match json.get(start) {
            Some(b'{') => self.read_item(json, start, None)?,
            Some(b'[') => {
                self.is_batch = true;
                let mut index = 0..;
                walk_elements(json, start, |item| match json.get(item) {
                    Some(b'{') => self.read_item(json, item, index.next()),
                    // Not an item, but it has a position.
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

    /// Reads the item that starts at `start` and returns its end. `position` is its position in an array; an
    /// item of a stream has its index as a member.
    fn read_item(
        &mut self,
        json: &Bytes,
        start: usize,
        position: Option<u64>,
    ) -> Result<usize, MalformedJson> {
        let (mut index, mut lists) = (position, ItemLists::default());
        let end = walk_members(json, start, |name, value| {
            if name.is("meta_info") {
                // The last of duplicate names counts, as in the parsers of Python.
                lists = ItemLists::default();
                if json.get(value) == Some(&b'{') {
                    return read_lists(json, value, &mut lists);
                }
            } else if position.is_none() && name.is("index") {
                let value = JsonValue::at(json, value)?;
                index = value.as_u64();
                self.is_batch = true;
                return Ok(value.span().end);
            }
            end_of_value(json, value)
        })?;
        for (list, slot) in lists.into_iter().zip(0..).filter(|(list, _)| list.is_some()) {
            self.by_index.entry(index.unwrap_or(0)).or_default()[slot] = list;
        }
        Ok(end)
    }

    /// What to insert into decode's response body: an item, or an array of items in the prompts' order.
    pub(super) fn insertions_in_body(&self, body: &[u8]) -> Result<Vec<Insertion>, MalformedJson> {
        let root = JsonValue::root(body)?;
        let mut insertions = Vec::new();
        if root.is_object() {
            self.find_insertions(0, body, root.span(), &mut insertions);
        } else if root.is_array() {
            for (item, index) in root.elements().zip(0..) {
                self.find_insertions(index, body, item?.span(), &mut insertions);
            }
        }
        Ok(insertions)
    }

    /// What to insert into the data of one of decode's events, which is one item without white space
    /// around it.
    pub(super) fn insertions_in_event(&self, data: &[u8]) -> Vec<Insertion> {
        let index = if self.is_batch { index_of(data) } else { Some(0) };
        let mut insertions = Vec::new();
        if let Some(index) = index {
            self.find_insertions(index, data, 0..data.len(), &mut insertions);
        }
        insertions
    }

    /// Finds the values that an item's lists replace by searching for their names instead of walking the
    /// item: a cumulative stream repeats all output in every event, which makes 9 MB for 1,500 tokens.
    ///
    /// A hit is a member of `meta_info` and nothing else, for two reasons. The quote that opens a name has
    /// no backslash before it, and a quote within a string always has one (see [`list_at`]), so generated
    /// text is never hit. And of an item's objects only `meta_info` has these names: the other objects
    /// (`finish_reason`, `weight_versions`, `cached_tokens_details`) have fixed names, and lists of logprobs
    /// contain no objects.
    fn find_insertions(&self, index: u64, text: &[u8], item: Range<usize>, insertions: &mut Vec<Insertion>) {
        let Some(lists) = self.by_index.get(&index) else {
            return;
        };
        let mut missing = lists.iter().flatten().count();
        for hit in NAME_FINDER.find_iter(&text[item.clone()]) {
            let Some((slot, value)) = list_at(text, item.start + hit) else {
                continue;
            };
            let Some(list) = &lists[slot] else {
                continue;
            };
            if let Some(end) = end_of_replaced(text, value, LISTS[slot].1) {
                insertions.push(Insertion { replaced: value..end, list: list.clone() });
            }
            missing -= 1;
            // SGLang writes these before the output's lists, which are most of the event.
            if missing == 0 {
                return;
            }
        }
    }
}

/// Reads the lists of the `meta_info` that starts at `start` and returns its end.
fn read_lists(json: &Bytes, start: usize, lists: &mut ItemLists) -> Result<usize, MalformedJson> {
    walk_members(json, start, |name, start| {
        let value = JsonValue::at(json, start)?;
        let span = value.span();
        if let Some(slot) = LISTS.iter().position(|(list, _)| name.is(list))
            && (LISTS[slot].1 == Replaces::AnyValue || is_filled_list(value))
        {
            lists[slot] = Some(json.slice(span.clone()));
        }
        Ok(span.end)
    })
}

/// Prefill's lists are empty, too, if no prompt logprobs were requested: then there is nothing to splice.
fn is_filled_list(value: JsonValue<'_>) -> bool {
    value.is_array() && value.elements().next().is_some()
}

/// The list whose name starts with the quote at `quote`, as a position in [`LISTS`], and the start of its
/// value.
fn list_at(text: &[u8], quote: usize) -> Option<(usize, usize)> {
    // Only these bytes precede a member's name; a quote within a string is preceded by a backslash.
    let before = *text.get(quote.checked_sub(1)?)?;
    if !(is_whitespace(before) || matches!(before, b'{' | b',')) {
        return None;
    }
    let rest = &text[quote + 1..];
    // With the closing quote: one name can be another's prefix.
    let is_name = |(name, _): &(&str, Replaces)| {
        rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"\""))
    };
    let slot = LISTS.iter().position(is_name)?;
    let colon = skip_whitespace(text, quote + LISTS[slot].0.len() + 2);
    // Without a colon it is a string in a list.
    (text.get(colon) == Some(&b':')).then(|| (slot, skip_whitespace(text, colon + 1)))
}

/// The end of decode's value at `start`, if it is to be replaced.
fn end_of_replaced(text: &[u8], start: usize, replaces: Replaces) -> Option<usize> {
    match replaces {
        Replaces::AnyValue => JsonValue::at(text, start).ok().map(|value| value.span().end),
        Replaces::EmptyList => {
            let inside = text.get(start..)?.strip_prefix(b"[")?;
            let end = skip_whitespace(inside, 0);
            (inside.get(end) == Some(&b']')).then_some(start + 1 + end + 1)
        }
    }
}

/// The index of an event's item. Events without an item, such as errors, have none.
fn index_of(data: &[u8]) -> Option<u64> {
    index_at_end(data).or_else(|| JsonValue::root(data).ok()?.member("index").ok()??.as_u64())
}

/// The index, if it is the last member: SGLang's servers append it to each item of a batch. The event's last
/// `}` closes the item, so the member before it is the item's own; that its name starts there is checked as
/// in [`list_at`].
fn index_at_end(data: &[u8]) -> Option<u64> {
    let member = trim_end(data.strip_suffix(b"}")?);
    let digits = member.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (member, index) = member.split_at(member.len() - digits);
    let name = trim_end(trim_end(member).strip_suffix(b":")?);
    let before = *name.strip_suffix(b"\"index\"")?.last()?;
    (is_whitespace(before) || matches!(before, b'{' | b',')).then_some(())?;
    std::str::from_utf8(index).ok()?.parse().ok()
}

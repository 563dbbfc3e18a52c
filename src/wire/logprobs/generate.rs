//! `/generate`: the response is one item per prompt, and each item's `meta_info` has what is merged.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use memchr::memchr;

use super::experts::PromptRows;
use super::splicer::Insertion;
use crate::wire::json::{
    JsonValue, MalformedJson, end_of_value, is_whitespace, skip_whitespace, trim_end, walk_elements,
    walk_members,
};

/// A member of an item's `meta_info` that is merged.
struct Field {
    name: &'static str,
    /// A comma, the quoted name and a colon, to insert the member where decode has none.
    key: &'static str,
    takes: Takes,
}

/// What is taken from prefill, and for which of decode's values.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// A list of the prompt's logprobs, for decode's empty one. Should SGLang transfer prefill's lists to
    /// decode one day, decode's would be complete, and must not be replaced.
    List,
    /// A flat form of a list, for any value.
    AnyValue,
    /// The first element of a list, for decode's null: the first token's logprobs are lost in the transfer.
    FirstElement,
    /// Rows of the prompt's tokens, for those of decode's.
    Rows,
    /// A measurement, for decode's null or none.
    Measurement,
}

macro_rules! field {
    ($name:literal, $takes:ident) => {
        Field { name: $name, key: concat!(",\"", $name, "\":"), takes: Takes::$takes }
    };
}

/// The fields by the offset of their slot in [`ItemValues`].
const FIELDS: [Field; 14] = [
    field!("input_token_logprobs", List),
    field!("input_top_logprobs", List),
    field!("input_token_ids_logprobs", List),
    // The flat form of `input_top_logprobs` (`return_flat_raw_top_logprobs`). Without logprobs these are `[]`
    // or `""`, `[0,k]` and `0`; the latter two also occur with logprobs, so there is no empty value to test.
    field!("input_top_logprobs_val_flat", AnyValue),
    field!("input_top_logprobs_idx_flat", AnyValue),
    field!("input_top_logprobs_val_flat_b64", AnyValue),
    field!("input_top_logprobs_idx_flat_b64", AnyValue),
    field!("input_top_logprobs_shape", AnyValue),
    field!("input_top_logprobs_null_prefix", AnyValue),
    field!("output_token_ids_logprobs", FirstElement),
    field!("routed_experts", Rows),
    field!("prefill_finished_time", Measurement),
    field!("storage_prefetch_wait", Measurement),
    field!("storage_staging_wait", Measurement),
];

/// The list that every item with logprobs has, also where decode leaves out the other empty ones (SGLang's
/// Rust front end does). Those are inserted behind it.
const ANCHOR: usize = 0;
/// The slot of `routed_experts`.
const ROWS: usize = 10;

/// Prefill's raw value for each of [`FIELDS`].
#[derive(Default)]
struct ItemValues {
    values: [Option<Bytes>; FIELDS.len()],
    rows: Option<PromptRows>,
}

/// Prefill's lists, by item.
#[derive(Default)]
pub(super) struct ListsByItem {
    by_index: BTreeMap<u64, ItemValues>,
    /// Whether there is more than measurements, for which alone decode's response is not read.
    has_lists: bool,
    /// Whether items have an index: their position in an array, or `"index"` in a stream.
    is_batch: bool,
}

impl ListsByItem {
    pub(super) fn is_empty(&self) -> bool {
        !self.has_lists
    }

    /// All values of all items.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.by_index.values().flat_map(|item| item.values.iter().flatten())
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
        let (mut index, mut read) = (position, ItemValues::default());
        let end = walk_members(json, start, |name, value| {
            if name.is("meta_info") {
                // The last of duplicate names counts, as in the parsers of Python.
                read = ItemValues::default();
                if json.get(value) == Some(&b'{') {
                    return read_meta_info(json, value, &mut read);
                }
            } else if position.is_none() && name.is("index") {
                let value = JsonValue::at(json, value)?;
                index = value.as_u64();
                self.is_batch = true;
                return Ok(value.span().end);
            }
            end_of_value(json, value)
        })?;
        self.add(index.unwrap_or(0), read);
        Ok(end)
    }

    fn add(&mut self, index: u64, read: ItemValues) {
        for (slot, value) in read.values.into_iter().enumerate() {
            let Some(value) = value else { continue };
            self.has_lists |= FIELDS[slot].takes != Takes::Measurement;
            self.by_index.entry(index).or_default().values[slot] = Some(value);
        }
        if read.rows.is_some() {
            self.has_lists = true;
            self.by_index.entry(index).or_default().rows = read.rows;
        }
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

    /// Finds the values that an item's lists replace by the quotes around names instead of walking the
    /// item: a cumulative stream repeats all output in every event, which makes 9 MB for 1,500 tokens, and
    /// lists of numbers have no quotes.
    ///
    /// A name behind `"meta_info":{` is a member of it and nothing else: strings are skipped as a whole, so
    /// generated text is never hit. And of an item's objects only `meta_info` has these names: the other
    /// objects (`finish_reason`, `weight_versions`, `cached_tokens_details`) have fixed names, and lists
    /// of logprobs contain no objects.
    fn find_insertions(&self, index: u64, text: &[u8], item: Range<usize>, insertions: &mut Vec<Insertion>) {
        let Some(prefill) = self.by_index.get(&index).filter(|_| self.has_lists) else {
            return;
        };
        let mut names = MemberNames { text: &text[..item.end], at: item.start };
        let is_meta_info =
            |(name, value): &(&[u8], usize)| name == b"meta_info" && text[*value..].starts_with(b"{");
        let Some((_, start)) = names.find(is_meta_info) else { return };
        let mut merged = MergedItem::new(text, start, prefill, insertions);
        for (name, value) in names {
            if let Some(slot) = FIELDS.iter().position(|field| field.name.as_bytes() == name) {
                merged.splice(slot, value);
                // SGLang writes most of these before the output's lists, which are most of the event.
                if merged.missing == 0 {
                    return;
                }
            }
        }
        merged.insert_missing();
    }
}

/// One item of decode's, in which prefill's values are put.
struct MergedItem<'a> {
    text: &'a [u8],
    prefill: &'a ItemValues,
    insertions: &'a mut Vec<Insertion>,
    /// How many of prefill's values have no counterpart of decode's yet.
    missing: usize,
    has: [bool; FIELDS.len()],
    /// Where measurements can be inserted, and logprobs.
    front: Place,
    behind_anchor: Option<Place>,
}

/// An offset in decode's text, and how many insertions are before it.
#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    before: usize,
}

impl<'a> MergedItem<'a> {
    /// The item's `meta_info` starts at `start`.
    fn new(
        text: &'a [u8],
        start: usize,
        prefill: &'a ItemValues,
        insertions: &'a mut Vec<Insertion>,
    ) -> Self {
        let missing = prefill.values.iter().flatten().count() + usize::from(prefill.rows.is_some());
        let front = Place { offset: start + 1, before: insertions.len() };
        Self { text, prefill, insertions, missing, has: [false; _], front, behind_anchor: None }
    }

    /// Merges a field whose value in decode's item starts at `start`.
    fn splice(&mut self, slot: usize, start: usize) {
        if slot == ROWS {
            let Some(rows) = &self.prefill.rows else { return };
            rows.insert(self.text, start, self.insertions);
        } else {
            let replaced = replaced(self.text, start, FIELDS[slot].takes);
            let Some(value) = &self.prefill.values[slot] else { return };
            if let Some(replaced) = replaced {
                let end = replaced.end;
                self.insertions.push(Insertion { replaced, list: value.clone() });
                if slot == ANCHOR {
                    self.behind_anchor = Some(Place { offset: end, before: self.insertions.len() });
                }
            }
        }
        self.missing -= usize::from(!std::mem::replace(&mut self.has[slot], true));
    }

    /// Inserts the members that decode leaves out.
    fn insert_missing(&mut self) {
        // From the back, so that the places before stay where they are.
        if let Some(place) = self.behind_anchor {
            self.insert(place, |takes| matches!(takes, Takes::List | Takes::AnyValue), false);
        }
        let is_empty = self.text.get(skip_whitespace(self.text, self.front.offset)) == Some(&b'}');
        if !is_empty {
            self.insert(self.front, |takes| takes == Takes::Measurement, true);
        }
    }

    /// Inserts members at one place: at the front with a comma behind each, else with one before each.
    fn insert(&mut self, place: Place, is_inserted: fn(Takes) -> bool, is_front: bool) {
        let (at, mut inserted) = (place.offset..place.offset, Vec::new());
        for (slot, field) in FIELDS.iter().enumerate().filter(|(_, field)| is_inserted(field.takes)) {
            if let Some(value) = self.prefill.values[slot].as_ref().filter(|_| !self.has[slot]) {
                let key = Bytes::from_static(&field.key.as_bytes()[usize::from(is_front)..]);
                let comma = is_front.then(|| Bytes::from_static(b","));
                let parts = [Some(key), Some(value.clone()), comma].into_iter().flatten();
                inserted.extend(parts.map(|list| Insertion { replaced: at.clone(), list }));
            }
        }
        self.insertions.splice(place.before..place.before, inserted);
    }
}

/// The names of members in a text at any depth, without their quotes, and where their values start.
struct MemberNames<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Iterator for MemberNames<'a> {
    type Item = (&'a [u8], usize);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let start = self.at + memchr(b'"', self.text.get(self.at..)?)?;
            let end = end_of_value(self.text, start).ok()?;
            let colon = skip_whitespace(self.text, end);
            // Without a colon it is a string, in a list or as a value.
            if self.text.get(colon) == Some(&b':') {
                self.at = skip_whitespace(self.text, colon + 1);
                return Some((&self.text[start + 1..end - 1], self.at));
            }
            self.at = end;
        }
    }
}

/// Reads what is merged of the `meta_info` that starts at `start` and returns its end.
fn read_meta_info(json: &Bytes, start: usize, read: &mut ItemValues) -> Result<usize, MalformedJson> {
    walk_members(json, start, |name, start| {
        let value = JsonValue::at(json, start)?;
        if let Some(slot) = FIELDS.iter().position(|field| name.is(field.name)) {
            if slot == ROWS {
                read.rows = PromptRows::read(json, start);
            } else if let Some(taken) = taken(value, FIELDS[slot].takes)? {
                read.values[slot] = Some(json.slice(taken));
            }
        }
        Ok(value.span().end)
    })
}

/// Which part of prefill's value is taken.
fn taken(value: JsonValue<'_>, takes: Takes) -> Result<Option<Range<usize>>, MalformedJson> {
    let is_null = |value: &JsonValue<'_>| value.raw() == b"null";
    Ok(match takes {
        Takes::AnyValue => Some(value.span()),
        // Empty if no prompt logprobs were requested: then there is nothing to splice.
        Takes::List => (value.is_array() && value.elements().next().is_some()).then(|| value.span()),
        Takes::FirstElement if value.is_array() => {
            let first = value.elements().next().transpose()?;
            first.filter(|first| !is_null(first)).map(JsonValue::span)
        }
        Takes::Measurement => (!is_null(&value)).then(|| value.span()),
        Takes::FirstElement | Takes::Rows => None,
    })
}

/// Which part of decode's value at `start` is replaced.
fn replaced(text: &[u8], start: usize, takes: Takes) -> Option<Range<usize>> {
    let rest = |at: usize| text.get(at..).unwrap_or_default();
    match takes {
        Takes::AnyValue => JsonValue::at(text, start).ok().map(JsonValue::span),
        Takes::List => {
            rest(start).starts_with(b"[").then_some(())?;
            let end = skip_whitespace(text, start + 1);
            rest(end).starts_with(b"]").then_some(start..end + 1)
        }
        Takes::FirstElement => {
            rest(start).starts_with(b"[").then_some(())?;
            let first = skip_whitespace(text, start + 1);
            rest(first).starts_with(b"null").then_some(first..first + b"null".len())
        }
        Takes::Measurement => rest(start).starts_with(b"null").then_some(start..start + b"null".len()),
        Takes::Rows => None,
    }
}

/// The index of an event's item. Events without an item, such as errors, have none.
fn index_of(data: &[u8]) -> Option<u64> {
    index_at_end(data).or_else(|| JsonValue::root(data).ok()?.member("index").ok()??.as_u64())
}

/// The index, if it is the last member: SGLang's servers append it to each item of a batch. The event's last
/// `}` closes the item, so the member before it is the item's own. That its name starts there is seen from
/// the byte before: a quote within a string has a backslash there.
fn index_at_end(data: &[u8]) -> Option<u64> {
    let member = trim_end(data.strip_suffix(b"}")?);
    let digits = member.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (member, index) = member.split_at(member.len() - digits);
    let name = trim_end(trim_end(member).strip_suffix(b":")?);
    let before = *name.strip_suffix(b"\"index\"")?.last()?;
    (is_whitespace(before) || matches!(before, b'{' | b',')).then_some(())?;
    std::str::from_utf8(index).ok()?.parse().ok()
}

//! Merging the responses to the copies of one request, each of which asked for one sample of each prompt.
//!
//! The client sees what a regular server answers to a request with `n`: sample k of prompt p has the index
//! `p * n + k`, tokens of a prompt are counted once, and there is one id, one `usage` and one `[DONE]`. Each
//! sample's bytes are its server's own: only indexes, ids and counts are replaced. Which requests ask for
//! several samples is for [`shape`](super::shape), what the copies get for [`plan`](super::plan), and where
//! they run for `proxy`.

mod splice;
mod stream;
mod usage;

pub(crate) use stream::{MergeProgress, StreamMergeError, StreamMerger};

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use self::splice::CopiedText;
use self::usage::UsageTotal;
use super::json::{JsonValue, MalformedJson};
use super::shape::Dialect;

/// Why copies are not merged that disagree about their prompts.
const UNEVEN: MalformedJson = MalformedJson::new("the copies have different numbers of samples");

/// Merges the whole 200 responses of all copies, in the order of the copies.
pub(crate) fn merge_bodies(dialect: Dialect, bodies: Vec<Bytes>) -> Result<Bytes, &'static str> {
    let merged = match dialect {
        Dialect::Generate => merge_answers(&bodies),
        Dialect::Chat | Dialect::Completions => merge_choices(&bodies),
        // `n` is no field of theirs.
        Dialect::Responses | Dialect::Messages => return Err("this API has one sample a prompt"),
    };
    merged.map_err(|error| error.reason)
}

/// `/generate`: an array of the answers of all prompts. Each copy has one, or an object for a single prompt.
fn merge_answers(bodies: &[Bytes]) -> Result<Bytes, MalformedJson> {
    let mut copies = Vec::with_capacity(bodies.len());
    for body in bodies {
        let root = JsonValue::root(body)?;
        let answers = if root.is_array() { root.elements().collect::<Result<_, _>>()? } else { vec![root] };
        copies.push(answers);
    }
    let prompts = copies.first().map_or(0, Vec::len);
    if copies.iter().any(|answers| answers.len() != prompts) {
        return Err(UNEVEN);
    }
    let mut merged = BytesMut::with_capacity(bodies.iter().map(|body| body.len() + 1).sum());
    merged.put_u8(b'[');
    for prompt in 0..prompts {
        for answers in &copies {
            if merged.len() > 1 {
                merged.put_u8(b',');
            }
            merged.put_slice(answers[prompt].raw());
        }
    }
    merged.put_u8(b']');
    Ok(merged.freeze())
}

/// A choice of one copy's.
struct Choice<'a> {
    /// Its place in the merged list.
    index: u64,
    /// With the index of the copy's own in it, at this place.
    text: &'a [u8],
    own_index: Range<usize>,
}

impl<'a> Choice<'a> {
    fn read(choice: JsonValue<'a>, copy: usize, copies: usize) -> Result<Self, MalformedJson> {
        let index = choice.member("index")?.ok_or(MalformedJson::new("a choice has no index"))?;
        let (start, span) = (choice.span().start, index.span());
        let own_index = span.start - start..span.end - start;
        Ok(Self { index: merged_index(index, copy, copies)?, text: choice.raw(), own_index })
    }
}

/// Chat and completions: the first copy's response, with the choices of all and their usage.
fn merge_choices(bodies: &[Bytes]) -> Result<Bytes, MalformedJson> {
    let mut total = UsageTotal::default();
    let mut merged = Vec::new();
    for (copy, body) in bodies.iter().enumerate() {
        let root = JsonValue::root(body)?;
        let choices = root.member("choices")?.ok_or(MalformedJson::new("a response has no choices"))?;
        for choice in choices.elements() {
            merged.push(Choice::read(choice?, copy, bodies.len())?);
        }
        if let Some(usage) = root.member("usage")?.filter(|usage| usage.is_object()) {
            total.add(usage)?;
        }
    }
    merged.sort_by_key(|choice| choice.index);
    // Every prompt has as many as there are copies, and every copy has one of every prompt.
    let is_even = merged.len().is_multiple_of(bodies.len().max(1));
    if !is_even || merged.iter().zip(0..).any(|(choice, place)| choice.index != place) {
        return Err(UNEVEN);
    }
    let Some(first) = bodies.first() else { return Err(UNEVEN) };
    let mut out = BytesMut::with_capacity(bodies.iter().map(|body| body.len()).sum());
    let mut text = CopiedText::new(first, &mut out);
    for member in JsonValue::root(first)?.members() {
        let member = member?;
        if member.name.is("choices") {
            text.replace_with(member.value.span(), |out| write_choices(&merged, out));
        } else if member.name.is("usage") && member.value.is_object() {
            total.write(member.value, &mut text)?;
        }
    }
    text.finish();
    Ok(out.freeze())
}

/// Appends the array of these choices.
fn write_choices(choices: &[Choice<'_>], out: &mut BytesMut) {
    out.put_u8(b'[');
    for (place, choice) in choices.iter().enumerate() {
        if place > 0 {
            out.put_u8(b',');
        }
        let mut text = CopiedText::new(choice.text, out);
        text.replace_by_number(choice.own_index.clone(), choice.index);
        text.finish();
    }
    out.put_u8(b']');
}

/// The index of a copy's sample of the prompt that it says itself.
fn merged_index(prompt: JsonValue<'_>, copy: usize, copies: usize) -> Result<u64, MalformedJson> {
    const NO_INDEX: MalformedJson = MalformedJson::new("an index is no number");
    let (copy, copies) = (copy as u64, copies as u64);
    let index = prompt.as_u64().and_then(|prompt| prompt.checked_mul(copies)?.checked_add(copy));
    index.ok_or(NO_INDEX)
}

#[cfg(test)]
mod tests;

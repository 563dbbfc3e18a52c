//! `usage` of a response to which several copies of a request have contributed.

use super::splice::CopiedText;
use crate::wire::json::{JsonValue, MalformedJson};

/// What is counted for each copy: the names in `usage`.
const COUNTED: [&str; 2] = ["completion_tokens", "reasoning_tokens"];
/// The same within `completion_tokens_details`.
const COUNTED_DETAILS: [&str; 4] =
    ["accepted_prediction_tokens", "rejected_prediction_tokens", "reasoning_tokens", "audio_tokens"];

/// The sums of all copies. What is said of the prompt is the first copy's: a regular server counts each
/// prompt once, and so what was cached of it.
#[derive(Debug, Default)]
pub(super) struct UsageTotal {
    /// How many copies were added.
    pub(super) copies: usize,
    counted: [u64; COUNTED.len()],
    details: [u64; COUNTED_DETAILS.len()],
}

impl UsageTotal {
    /// Adds a copy's `usage`.
    pub(super) fn add(&mut self, usage: JsonValue<'_>) -> Result<(), MalformedJson> {
        self.copies += 1;
        for member in usage.members() {
            let member = member?;
            if member.name.is("completion_tokens_details") && member.value.is_object() {
                for detail in member.value.members() {
                    let detail = detail?;
                    let position = COUNTED_DETAILS.iter().position(|name| detail.name.is(name));
                    if let (Some(position), Some(count)) = (position, detail.value.as_u64()) {
                        self.details[position] = self.details[position].saturating_add(count);
                    }
                }
            }
            let position = COUNTED.iter().position(|name| member.name.is(name));
            if let (Some(position), Some(count)) = (position, member.value.as_u64()) {
                self.counted[position] = self.counted[position].saturating_add(count);
            }
        }
        Ok(())
    }

    /// Copies a text up to the end of the first copy's `usage`, with the sums in it.
    pub(super) fn write(&self, usage: JsonValue<'_>, text: &mut CopiedText<'_>) -> Result<(), MalformedJson> {
        let prompt = usage.member("prompt_tokens")?.and_then(JsonValue::as_u64).unwrap_or_default();
        for member in usage.members() {
            let member = member?;
            if member.name.is("total_tokens") {
                text.replace_by_number(member.value.span(), prompt.saturating_add(self.counted[0]));
            } else if member.name.is("completion_tokens_details") && member.value.is_object() {
                for detail in member.value.members() {
                    let detail = detail?;
                    let position = COUNTED_DETAILS.iter().position(|name| detail.name.is(name));
                    if let Some(position) = position.filter(|_| detail.value.as_u64().is_some()) {
                        text.replace_by_number(detail.value.span(), self.details[position]);
                    }
                }
            } else if let Some(position) = COUNTED.iter().position(|name| member.name.is(name))
                && member.value.as_u64().is_some()
            {
                text.replace_by_number(member.value.span(), self.counted[position]);
            }
        }
        text.copy_to(usage.span().end);
        Ok(())
    }
}

//! `sglext` of chat and completions: SGLang's additions to the response as a whole. Its `routed_experts` are
//! merged. In a stream they come in a late event of their own, without choices.

use bytes::Bytes;

use super::experts::PromptRows;
use super::splicer::Insertion;
use crate::wire::json::{JsonValue, MalformedJson};

/// Prefill's rows of the one prompt that they are sent for.
#[derive(Default)]
pub(super) struct ResponseRows {
    rows: Option<PromptRows>,
    has_more_choices: bool,
}

impl ResponseRows {
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_none()
    }

    /// Reads a response body or one event.
    pub(super) fn read(&mut self, json: &Bytes) -> Result<(), MalformedJson> {
        let root = JsonValue::root(json)?;
        if let Some(choices) = root.member("choices")?.filter(|choices| choices.is_array()) {
            for choice in choices.elements() {
                let index = choice?.member("index")?.and_then(JsonValue::as_u64);
                self.has_more_choices |= index.is_some_and(|index| index > 0);
            }
        }
        if let Some(value) = routed_experts(root)? {
            self.rows = PromptRows::read(json, value.span().start);
        }
        Ok(())
    }

    /// Ends a stream. A batch's stream has the rows of whichever prompt came first, and that may be
    /// another one on decode.
    pub(super) fn end_stream(&mut self) {
        if self.has_more_choices {
            self.rows = None;
        }
    }

    /// What to insert into decode's response body.
    pub(super) fn insertions(&self, json: &[u8]) -> Result<Vec<Insertion>, MalformedJson> {
        let mut insertions = Vec::new();
        if let (Some(rows), Some(value)) = (&self.rows, routed_experts(JsonValue::root(json)?)?) {
            rows.insert(json, value.span().start, &mut insertions);
        }
        Ok(insertions)
    }

    /// What to insert into the data of one of decode's events. There is one with rows in a stream.
    pub(super) fn take_insertions(&mut self, json: &[u8]) -> Result<Vec<Insertion>, MalformedJson> {
        let insertions = self.insertions(json)?;
        if !insertions.is_empty() {
            self.rows = None;
        }
        Ok(insertions)
    }
}

fn routed_experts(root: JsonValue<'_>) -> Result<Option<JsonValue<'_>>, MalformedJson> {
    match root.member("sglext")? {
        Some(sglext) => sglext.member("routed_experts"),
        None => Ok(None),
    }
}

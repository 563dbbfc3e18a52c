//! Where the fields that the router changes lie in a body, and what becomes of its bytes when it does.
//!
//! Which fields a leg gets is for [`plan`](crate::wire::plan).

use std::ops::Range;

use bytes::Bytes;

use super::error::{BodyError, MAX_CHANGED_PLACES};

/// A field of the top level that the router may cut or replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangedField {
    /// Not for clients to send: `bootstrap_*` and SGLang's other internal fields.
    Internal,
    /// `rid`
    Rid,
    /// `request_id`
    RequestId,
    /// `n` of chat and completions, unless it is 1.
    Samples,
    /// `sampling_params`, if they have an `n` over 1.
    SamplingParams,
}

/// What a plan does with a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FieldChange {
    Keep,
    Cut,
    /// By this JSON value. Not for internal fields, of which adjacent ones are one span.
    Replace(Bytes),
}

/// Where a field is, or several adjacent internal ones. Offsets count from the body's first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldSpan {
    field: ChangedField,
    /// The quote before the (first) name.
    name: usize,
    /// The (last) value.
    value: Range<usize>,
    /// The end of the value before it, if it is not the first field.
    previous_end: Option<usize>,
    /// The quote before the next name, if it is not the last field.
    next: Option<usize>,
    /// How many adjacent fields.
    fields: usize,
}

/// The fields of a body that the router may change, and where others can be inserted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct BodyFields {
    /// In order.
    spans: Vec<FieldSpan>,
    /// All fields of the top level.
    count: usize,
    /// The object's closing brace: fields are inserted before it.
    close: usize,
}

/// Bytes of a body that are replaced, or cut if there is nothing in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RangeChange {
    pub(crate) range: Range<usize>,
    pub(crate) by: Bytes,
}

/// How a body becomes that of a leg.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BodyEdit {
    /// In order, and disjoint.
    pub(crate) changes: Vec<RangeChange>,
    /// Where fields are inserted.
    pub(crate) close: usize,
    /// Whether a field stays before those that are inserted.
    pub(crate) needs_comma: bool,
}

impl BodyFields {
    /// Whether the body has this field.
    pub(crate) fn has(&self, field: ChangedField) -> bool {
        self.spans.iter().any(|span| span.field == field)
    }

    /// The edit that makes these changes. A field is cut with one comma, so that the others stay well-formed.
    pub(crate) fn edit(&self, change: impl Fn(ChangedField) -> FieldChange) -> BodyEdit {
        let mut edit = BodyEdit { changes: Vec::new(), close: self.close, needs_comma: self.count > 0 };
        let mut kept = self.count;
        let mut rest = &self.spans[..];
        while let [first, others @ ..] = rest {
            rest = others;
            match change(first.field) {
                FieldChange::Keep => continue,
                FieldChange::Replace(by) => {
                    edit.changes.push(RangeChange { range: first.value.clone(), by });
                    continue;
                }
                FieldChange::Cut => kept -= first.fields,
            }
            // Adjacent fields that are cut, too, are one range.
            let mut last = first;
            while let [next, others @ ..] = rest
                && last.next == Some(next.name)
                && change(next.field) == FieldChange::Cut
            {
                kept -= next.fields;
                (last, rest) = (next, others);
            }
            let range = match last.next {
                // With the commas after them.
                Some(next) => first.name..next,
                // No name follows: with the comma before them, if there is one.
                None => first.previous_end.unwrap_or(first.name)..last.value.end,
            };
            edit.changes.push(RangeChange { range, by: Bytes::new() });
        }
        edit.needs_comma = kept > 0;
        edit
    }
}

/// Finds the [`BodyFields`] of a body while it is scanned.
#[derive(Debug, Default)]
pub(super) struct FieldFinder {
    found: BodyFields,
    /// Where the current field's name starts.
    name_start: usize,
    /// Where the last field's value ended.
    last_end: Option<usize>,
    /// The current field is the last span.
    is_recorded: bool,
}

impl FieldFinder {
    pub(super) fn name_started(&mut self, offset: usize) {
        self.name_start = offset;
        if self.is_recorded
            && let Some(last) = self.found.spans.last_mut()
        {
            last.next = Some(offset);
        }
    }

    pub(super) fn name_start(&self) -> usize {
        self.name_start
    }

    /// The name is that of `field`, or of none that matters here.
    pub(super) fn name_ended(&mut self, field: Option<ChangedField>) -> Result<(), BodyError> {
        self.found.count += 1;
        self.is_recorded = field.is_some();
        match field {
            Some(field) => self.record(field),
            None => Ok(()),
        }
    }

    fn record(&mut self, field: ChangedField) -> Result<(), BodyError> {
        let name = self.name_start;
        if field == ChangedField::Internal
            && let Some(last) = self.found.spans.last_mut()
            && last.field == field
            && last.next == Some(name)
        {
            last.next = None;
            last.fields += 1;
            return Ok(());
        }
        if self.found.spans.len() >= MAX_CHANGED_PLACES {
            return Err(BodyError::TooManyChangedPlaces);
        }
        let (previous_end, value) = (self.last_end, name..name);
        self.found.spans.push(FieldSpan { field, name, value, previous_end, next: None, fields: 1 });
        Ok(())
    }

    /// The current field, whose value starts at `value`, matters for what its value is. To be called before
    /// [`value_ended`](Self::value_ended).
    pub(super) fn value_matters(&mut self, field: ChangedField, value: usize) -> Result<(), BodyError> {
        self.is_recorded = true;
        self.record(field)?;
        self.value_started(value);
        Ok(())
    }

    pub(super) fn value_started(&mut self, offset: usize) {
        if self.is_recorded
            && let Some(last) = self.found.spans.last_mut()
        {
            last.value = offset..offset;
        }
    }

    pub(super) fn value_ended(&mut self, offset: usize) {
        self.last_end = Some(offset);
        if self.is_recorded
            && let Some(last) = self.found.spans.last_mut()
        {
            last.value.end = offset;
        }
    }

    pub(super) fn object_closed(&mut self, offset: usize) {
        self.found.close = offset;
    }

    pub(super) fn finish(self) -> BodyFields {
        self.found
    }
}

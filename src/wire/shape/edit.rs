//! Which bytes of a body are removed, and where the bootstrap fields are inserted.

use std::ops::Range;

use super::error::{BodyError, MAX_REMOVED_RANGES};

/// How a body becomes that of the legs. Offsets count from the body's first byte.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct BodyEdit {
    /// The client's own `bootstrap_*` fields with one comma each, in order.
    pub(crate) removed: Vec<Range<usize>>,
    /// The object's closing brace: the bootstrap fields go before it.
    pub(crate) close: usize,
    /// Whether a field stays before the bootstrap fields.
    pub(crate) needs_comma: bool,
}

/// Builds a [`BodyEdit`] from the positions of fields.
#[derive(Debug, Default)]
pub(super) struct EditBuilder {
    edit: BodyEdit,
    /// Where the current field's name starts.
    name_start: usize,
    /// Where the last field's value ended.
    last_end: usize,
    /// Where the value of the last field that stays ended.
    last_kept_end: Option<usize>,
    /// Where the current run of fields to be removed starts.
    run_start: Option<usize>,
    is_removed: bool,
}

impl EditBuilder {
    pub(super) fn name_started(&mut self, offset: usize) {
        self.name_start = offset;
    }

    pub(super) fn name_start(&self) -> usize {
        self.name_start
    }

    pub(super) fn name_ended(&mut self, is_removed: bool) -> Result<(), BodyError> {
        self.is_removed = is_removed;
        if is_removed {
            // Adjacent fields are one run.
            self.run_start.get_or_insert(self.name_start);
        } else if let Some(start) = self.run_start.take() {
            // Up to the next name: a run is removed with the commas after its fields.
            self.remove(start..self.name_start)?;
        }
        Ok(())
    }

    pub(super) fn value_ended(&mut self, offset: usize) {
        self.last_end = offset;
        if !self.is_removed {
            self.last_kept_end = Some(offset);
        }
    }

    pub(super) fn object_closed(&mut self, offset: usize) -> Result<(), BodyError> {
        if let Some(start) = self.run_start.take() {
            // No name follows: the last run is removed with the comma before it, if there is one.
            self.remove(self.last_kept_end.unwrap_or(start)..self.last_end)?;
        }
        // Not the last field's fate but any that stays: `{"a":1,"bootstrap_room":2}` needs a comma.
        self.edit.needs_comma = self.last_kept_end.is_some();
        self.edit.close = offset;
        Ok(())
    }

    pub(super) fn finish(self) -> BodyEdit {
        self.edit
    }

    fn remove(&mut self, range: Range<usize>) -> Result<(), BodyError> {
        if self.edit.removed.len() >= MAX_REMOVED_RANGES {
            return Err(BodyError::TooManyRemovedRanges);
        }
        self.edit.removed.push(range);
        Ok(())
    }
}

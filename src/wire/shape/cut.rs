//! Which bytes of a body are left out.

use std::ops::Range;

use super::{BodyError, Edit};

/// Separate runs of `bootstrap_*` fields that are cut out of one body.
pub(super) const MAX_CUTS: usize = 64;

/// Decides what to leave out of the body.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    pub(super) edit: Edit,
    /// Where the name of the present field begins.
    pub(super) name_at: usize,
    /// Where the last field's value ended.
    last_end: usize,
    /// Where the last kept field's value ended.
    kept_end: Option<usize>,
    /// Where the run of fields to be cut begins that is being read now.
    run_from: Option<usize>,
    cutting: bool,
}

impl Cutter {
    pub(super) fn named(&mut self, cut: bool) -> Result<(), BodyError> {
        self.cutting = cut;
        if cut {
            self.run_from.get_or_insert(self.name_at);
        } else if let Some(from) = self.run_from.take() {
            // Up to the next name: a run is cut with the commas behind its fields.
            self.cut(from..self.name_at)?;
        }
        Ok(())
    }

    pub(super) fn value_ended(&mut self, end: usize) {
        self.last_end = end;
        if !self.cutting {
            self.kept_end = Some(end);
        }
    }

    pub(super) fn object_closed(&mut self, close: usize) -> Result<(), BodyError> {
        if let Some(from) = self.run_from.take() {
            // A run at the end is cut with the comma before it, if there is one.
            self.cut(self.kept_end.unwrap_or(from)..self.last_end)?;
        }
        self.edit.after_others = self.kept_end.is_some();
        self.edit.close = close;
        Ok(())
    }

    fn cut(&mut self, range: Range<usize>) -> Result<(), BodyError> {
        if self.edit.cuts.len() >= MAX_CUTS {
            return Err(BodyError::TooManyCuts);
        }
        self.edit.cuts.push(range);
        Ok(())
    }
}

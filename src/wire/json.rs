//! Navigating JSON text without parsing it.
//!
//! String contents, digits and token ids are skipped at memory speed: at 8 MB a simd-json tape alone costs
//! more CPU than relaying the request does. Nothing here converts text into numbers, maps or lists, or
//! validates more than a walk needs; SGLang validates the rest.
//!
//! [`search`] finds the next significant byte and keeps no state. For text that is in memory as a whole,
//! [`skip`] finds where a value ends, [`walk`] visits each byte of an object or array once, and [`value`]
//! looks members up by name.

mod masks;
mod search;
mod skip;
mod value;
mod walk;

use std::fmt;

pub(crate) use masks::{BLOCK, MaskScan};
pub(crate) use search::{find_near_string_special, find_string_special, find_structural};
pub(crate) use skip::{end_of_value, is_whitespace, skip_whitespace, trim_end};
pub(crate) use value::JsonValue;
pub(crate) use walk::{walk_elements, walk_members};

/// The text is not valid JSON, as far as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MalformedJson {
    /// What is wrong, without a full stop.
    pub(crate) reason: &'static str,
}

impl MalformedJson {
    pub(crate) const fn new(reason: &'static str) -> Self {
        Self { reason }
    }
}

impl fmt::Display for MalformedJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed JSON: {}", self.reason)
    }
}

impl std::error::Error for MalformedJson {}

#[cfg(test)]
mod tests;

//! What the router must know of a request body, and where its fields are inserted.
//!
//! [`BodyInspector`] reads a body once, while it arrives. It reads the names at the top level and the few
//! values that steer the router; everything nested is skipped, because SGLang validates it. But it must not
//! read another top level than a strict parser does, or a client could pass `bootstrap_*` fields by it: names
//! are unescaped, brackets must match, scalars must be JSON, and the text must be UTF-8.
//!
//! What follows from a body's shape is decided in `proxy`.

mod edit;
mod error;
mod fields;
mod inspector;
mod prompt;
mod strict;

pub(crate) use edit::BodyEdit;
pub(crate) use error::BodyError;
pub(crate) use inspector::BodyInspector;
pub use prompt::Prompt;
pub(crate) use prompt::{HashKey, key_hash};

use super::logprobs::Merge;

/// The API of a generation request: each names differently what the router must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `/generate`
    Generate,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What the router must know of a request body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BodyShape {
    /// The client requests server-sent events.
    pub(crate) stream: bool,
    /// The client requests prompt logprobs, which only prefill has.
    pub(crate) merge: Option<Merge>,
    /// The client requests more than one sample a prompt (`n` > 1).
    pub(crate) parallel_sampling: bool,
    /// Where the bootstrap fields go.
    pub(crate) edit: BodyEdit,
    /// The prompt, if it was asked for.
    pub(crate) prompt: Option<Prompt>,
}

#[cfg(test)]
mod tests;

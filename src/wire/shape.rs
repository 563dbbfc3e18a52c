//! What the router must know of a request body, and where the fields lie that it changes.
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
mod internal_fields;
mod media;
mod prompt;
mod ranks;
mod samples;
mod strict;

pub(crate) use edit::{BodyEdit, BodyFields, ChangedField, FieldChange, RangeChange};
pub(crate) use error::BodyError;
pub(crate) use inspector::BodyInspector;
pub(crate) use internal_fields::{FieldTreatment, InternalFields};
pub(crate) use media::MediaFinder;
pub use prompt::Prompt;
pub(crate) use prompt::{HashKey, key_hash};
pub(crate) use ranks::ClientRanks;
pub(crate) use samples::{ManySamples, RefusedSamples, RequestedSamples};

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
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`, Anthropic's API
    Messages,
}

/// What the router must know of a request body.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct BodyShape {
    /// The client requests server-sent events.
    pub(crate) stream: bool,
    /// The client requests prompt logprobs, which only prefill has.
    pub(crate) merge: Option<Merge>,
    /// How many samples of each prompt the client requests (`n`).
    pub(crate) samples: RequestedSamples,
    /// The client's ids of the request (`rid`), one for each prompt of a batch that lists them; none of too
    /// many, or too long ones.
    pub(crate) rids: Vec<String>,
    /// The client has set `rid`, which is not null, whatever it is.
    pub(crate) has_rid: bool,
    /// The client has set `request_id`, which is not null.
    pub(crate) has_request_id: bool,
    /// The client refers to an earlier response (`previous_response_id`).
    pub(crate) has_previous_response: bool,
    /// The data-parallel ranks that the client has chosen, if that is left to it.
    pub(crate) ranks: ClientRanks,
    /// Where the fields lie that the router may change.
    pub(crate) fields: BodyFields,
    /// The prompt, if it was asked for.
    pub(crate) prompt: Option<Prompt>,
}

#[cfg(test)]
mod tests;

//! A server's answer: its head, and its body out of its framing.
//!
//! Bytes may come cut anywhere. RFC 9112 is read strictly: what two parties could
//! read in two ways is no answer. Nothing here knows what an answer means.

mod body;
mod head;
#[cfg(test)]
mod tests;

pub(crate) use body::Decoder;
pub(crate) use head::{Answer, Head, read_head};

/// Largest head, of all that come before a body together.
pub(crate) const MAX_HEAD: usize = 64 << 10;
/// Most headers of an answer, as hyper has it.
const MAX_HEADERS: usize = 100;
/// Most bytes of an answer's chunk extensions and trailers, all in all: SGLang sends neither.
const MAX_IGNORED: usize = 16 << 10;

/// What came is not an answer: what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadAnswer(pub(crate) &'static str);

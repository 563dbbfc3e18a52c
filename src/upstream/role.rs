//! What servers do: the two roles of prefill-decode disaggregation, and that of a server without it.

use std::fmt;

/// What a server does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates the tokens.
    Decode,
    /// Does both, without disaggregation.
    Regular,
}

impl Role {
    /// `prefill`, `decode` or `regular`, as in error codes and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Regular => "regular",
        }
    }

    /// The place of its leg among the two that a request may have: a plain server's is the one that
    /// generates.
    pub(crate) fn leg(self) -> usize {
        match self {
            Self::Prefill => 0,
            Self::Decode | Self::Regular => 1,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

//! What a policy has selected, and why: one server of a role, and how much of the prompt it is believed to
//! have.
//!
//! How a server is selected is for `policy`, and what is counted of it for `observe`.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use super::ranks::DpRank;
use super::{Backend, Role};
use crate::wire::plan::ToldRanks;

/// What a request costs beside its bytes: a prefill that finds the whole prompt in its cache takes about as
/// long as one of 256 tokens. Without it, requests that are all cached would count as no work, and meet.
pub(super) const REQUEST_WORK: u64 = 1 << 10;

/// Why a [`Policy`](super::Policy) has selected a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SelectionReason {
    /// There was no other server to select.
    Only,
    /// It is believed to have the beginning of the prompt in its cache.
    Prefix,
    /// It has less load than others.
    Load,
    /// It is the first server for the key of the request's conversation.
    Key,
    /// The first server for that key has too much load, and this is the next one that has not.
    KeyOverflow,
    /// It is the next one in turn.
    Turn,
    /// At random.
    Random,
    /// The policy does not say.
    #[default]
    Unknown,
}

impl SelectionReason {
    /// The reason in metrics and logs, for example `prefix`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Only => "only",
            Self::Prefix => "prefix",
            Self::Load => "load",
            Self::Key => "key",
            Self::KeyOverflow => "key_overflow",
            Self::Turn => "turn",
            Self::Random => "random",
            Self::Unknown => "unknown",
        }
    }
}

/// A server that a policy has selected.
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    pub(super) server: &'a Arc<Backend>,
    /// Which of the candidates it is, or [`ANY_RANK`].
    pub(super) index: u32,
    pub(super) cached: u64,
    pub(super) reason: SelectionReason,
    pub(super) memo: u128,
}

/// The policy has selected a server, and any of its ranks will do.
pub(super) const ANY_RANK: u32 = u32::MAX;

impl<'a> Selection<'a> {
    /// This server, which is not believed to have any of the prompt. If it has data-parallel ranks, the one
    /// with the least load gets the request, and of equal ones each in turn;
    /// [`Choice::select`](super::Choice::select) selects one.
    pub fn new(server: &'a Arc<Backend>) -> Self {
        Self { server, index: ANY_RANK, cached: 0, reason: SelectionReason::Unknown, memo: 0 }
    }

    /// The server is believed to have this many bytes of the prompt in its cache.
    #[must_use]
    pub fn with_cached(self, bytes: u64) -> Self {
        Self { cached: bytes, ..self }
    }

    /// The server was selected for this reason, which metrics and logs tell.
    #[must_use]
    pub fn because(self, reason: SelectionReason) -> Self {
        Self { reason, ..self }
    }

    /// A number that comes back in [`CompletedPrefill::memo`](super::CompletedPrefill::memo): whatever the
    /// policy wants to remember until then.
    #[must_use]
    pub fn with_memo(self, memo: u128) -> Self {
        Self { memo, ..self }
    }

    /// The server.
    pub fn server(&self) -> &'a Arc<Backend> {
        self.server
    }
}

/// How the server of one leg was selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SelectedBy {
    /// [`Policy::name`](super::Policy::name).
    pub(crate) policy: &'static str,
    pub(crate) reason: SelectionReason,
    /// The size of the prompt, or of the whole body if no policy needs more.
    pub(crate) prompt_bytes: u64,
    /// How many bytes of the prompt the server is believed to have in its cache.
    pub(crate) cached: u64,
    /// The rank that the request is for, if the server has several and the router chooses.
    pub(super) rank: Option<DpRank>,
}

impl SelectedBy {
    /// What the request adds to the server's work.
    pub(super) fn work(&self) -> u64 {
        REQUEST_WORK + self.prompt_bytes.saturating_sub(self.cached)
    }
}

/// The prefill and the decode server that serve one request together, or the plain server that serves it
/// alone.
#[derive(Debug, Clone)]
pub struct ServerPair {
    prefill: Arc<Backend>,
    decode: Arc<Backend>,
    /// By leg.
    selected_by: [SelectedBy; 2],
    /// How long the selection took, if it was measured.
    pub(super) selection_nanos: Option<u32>,
}

impl ServerPair {
    pub(super) fn new(
        (prefill, prefill_by): (Arc<Backend>, SelectedBy),
        (decode, decode_by): (Arc<Backend>, SelectedBy),
    ) -> Self {
        Self { prefill, decode, selected_by: [prefill_by, decode_by], selection_nanos: None }
    }

    /// A plain server, which serves a request alone.
    pub(super) fn single(server: Arc<Backend>, by: SelectedBy) -> Self {
        let prefill = Arc::clone(&server);
        Self { prefill, decode: server, selected_by: [by; 2], selection_nanos: None }
    }

    /// Whether one server does both: then [`prefill`](Self::prefill) and [`decode`](Self::decode) are the
    /// same.
    pub fn is_single(&self) -> bool {
        self.decode.role() == Role::Regular
    }

    /// The servers, each once.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &Arc<Backend>> {
        let decode = (!self.is_single()).then_some(&self.decode);
        std::iter::once(&self.prefill).chain(decode)
    }

    /// The server that computes the prompt's KV cache.
    pub fn prefill(&self) -> &Arc<Backend> {
        &self.prefill
    }

    /// The server that generates the tokens.
    pub fn decode(&self) -> &Arc<Backend> {
        &self.decode
    }

    /// The data-parallel rank of the prefill server that gets the request. `None` if it has one rank, or if
    /// its own load balancer chooses.
    pub fn prefill_rank(&self) -> Option<usize> {
        self.rank_number(Role::Prefill)
    }

    /// The same of the decode server.
    pub fn decode_rank(&self) -> Option<usize> {
        self.rank_number(Role::Decode)
    }

    fn rank_number(&self, role: Role) -> Option<usize> {
        self.selected_by(role).rank.map(|rank| rank.number().into())
    }

    /// The bootstrap room of the pair that takes the place of a random one: prefill's rank follows from it.
    pub(crate) fn bootstrap_room(&self, random: u64) -> u64 {
        self.selected_by(Role::Prefill).rank.map_or(random, |rank| rank.bootstrap_room(random))
    }

    /// The ranks that the servers are told by fields of the request.
    pub(crate) fn told_ranks(&self) -> ToldRanks {
        let told = |role| self.selected_by(role).rank.and_then(DpRank::told);
        ToldRanks { prefill: told(Role::Prefill), decode: told(Role::Decode) }
    }

    pub(crate) fn selected_by(&self, role: Role) -> &SelectedBy {
        &self.selected_by[role.leg()]
    }

    /// How long both policies took, of the requests of which it was measured.
    pub(crate) fn selection_nanos(&self) -> Option<u64> {
        self.selection_nanos.map(u64::from)
    }

    /// Why the request goes to these servers.
    pub(crate) fn summary(&self) -> SelectionSummary {
        SelectionSummary::new(&self.selected_by, self.is_single())
    }
}

/// Why a request went to its two servers, for logs: prefill's [reason](SelectionReason), how many bytes of
/// the prompt were believed to be in its cache and how many there are, and decode's reason. Of a plain server
/// the first three.
///
/// `prefix:45056/47210,load` is a prefill server that is believed to have 45,056 of 47,210 bytes, and the
/// decode server with the least load.
// No `String`, as an access log has one for each request.
#[derive(Clone, Copy)]
pub struct SelectionSummary {
    text: [u8; MAX_SUMMARY],
    length: usize,
}

/// Two reasons, two numbers of 64 bits and three separators.
const MAX_SUMMARY: usize = 2 * "key_overflow".len() + 2 * 20 + 3;

impl SelectionSummary {
    fn new([prefill, decode]: &[SelectedBy; 2], is_single: bool) -> Self {
        let mut summary = Self { text: [0; MAX_SUMMARY], length: 0 };
        let (cached, bytes) = (prefill.cached, prefill.prompt_bytes);
        // It fits.
        let _ = write!(summary, "{}:{cached}/{bytes}", prefill.reason.as_str());
        if !is_single {
            let _ = write!(summary, ",{}", decode.reason.as_str());
        }
        summary
    }

    /// The text: ASCII without blanks and quotes.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.text[..self.length]).unwrap_or_default()
    }
}

impl fmt::Write for SelectionSummary {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let rest = self.text.get_mut(self.length..self.length + part.len()).ok_or(fmt::Error)?;
        rest.copy_from_slice(part.as_bytes());
        self.length += part.len();
        Ok(())
    }
}

impl fmt::Display for SelectionSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SelectionSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_summary_fits() {
        let by =
            |reason| SelectedBy { policy: "", reason, prompt_bytes: u64::MAX, cached: u64::MAX, rank: None };
        let summary = SelectionSummary::new(&[SelectionReason::KeyOverflow; 2].map(by), false);
        let number = u64::MAX;
        assert_eq!(summary.as_str(), format!("key_overflow:{number}/{number},key_overflow"));
    }
}

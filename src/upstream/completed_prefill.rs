//! What is learned when a prefill leg has ended well: the counts of its server, and what its policy is told.
//!
//! Reading numbers off a response is for [`wire::usage`](crate::wire::usage). What follows from them for the
//! next choice is for each [`Policy`](super::Policy).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::Backend;
use super::ranks::RankSlot;
use crate::wire::usage::{CachedTokens, Usage};

/// A prompt has at most as many tokens as bytes, and these: a chat template, tools and images add some that
/// are in no text.
const MAX_ADDED_TOKENS: u64 = 1 << 16;

/// Bytes of JSON a token: English text has about 4.
const BYTES_PER_TOKEN: u64 = 4;
const MIN_BYTES_PER_TOKEN: u64 = 1;
const MAX_BYTES_PER_TOKEN: u64 = 64;
/// From how many tokens of a server on their own mean is used.
const ENOUGH_TOKENS: u64 = 100_000;

/// What was known of a request when its prefill server was chosen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Expectation {
    pub(super) prompt_bytes: u64,
    pub(super) cached_bytes: u64,
    /// Work of the server before this request.
    pub(super) work_before: u64,
    pub(super) memo: u128,
}

impl Expectation {
    /// Of a server that no policy has chosen for this prompt.
    pub(super) fn of_bytes(prompt_bytes: u64) -> Self {
        Self { prompt_bytes, ..Self::default() }
    }
}

/// A prefill leg that has ended well: what was believed when its server was chosen, and what the server has
/// said since.
#[derive(Debug)]
pub struct CompletedPrefill<'a> {
    pub(super) server: &'a Arc<Backend>,
    pub(super) rank: Option<&'a RankSlot>,
    pub(super) expected: Expectation,
    pub(super) prompt_tokens: Option<u64>,
    pub(super) cached_tokens: Option<u64>,
    pub(super) time: Option<Duration>,
}

impl<'a> CompletedPrefill<'a> {
    /// The prefill server.
    pub fn server(&self) -> &'a Arc<Backend> {
        self.server
    }

    /// Its [`Choice::slot`](super::Choice::slot).
    pub fn slot(&self) -> usize {
        usize::from(self.rank.map_or(self.server.slot(), |rank| rank.slot().index()))
    }

    /// The data-parallel rank that has computed it, if the server has several.
    pub fn rank(&self) -> Option<usize> {
        self.rank.map(|rank| rank.rank().number().into())
    }

    /// The size of the prompt in bytes, as [`Choice::prompt_bytes`](super::Choice::prompt_bytes).
    pub fn prompt_bytes(&self) -> u64 {
        self.expected.prompt_bytes
    }

    /// How many of them the server was [believed](super::Selection::with_cached) to have in its cache.
    pub fn believed_cached_bytes(&self) -> u64 {
        self.expected.cached_bytes
    }

    /// The [work](super::Choice::work) of the server, or of its rank, when it was chosen, without this
    /// request.
    pub fn work_before(&self) -> u64 {
        self.expected.work_before
    }

    /// The policy's [own number](super::Selection::with_memo); 0 without one. After a reload it may be that
    /// of the policy before.
    pub fn memo(&self) -> u128 {
        self.expected.memo
    }

    /// How many tokens the prompt had, if the server has said so: on `/generate` always, on the OpenAI
    /// endpoints in all responses but streams without `include_usage`. Of a batch on `/generate` it is not
    /// known.
    pub fn prompt_tokens(&self) -> Option<u64> {
        self.prompt_tokens
    }

    /// How many of those were in its cache, if the server has said so: on the OpenAI endpoints only with
    /// `--enable-cache-report`. At least the last token is always computed, and SGLang caches whole pages.
    pub fn cached_tokens(&self) -> Option<u64> {
        self.cached_tokens
    }

    /// How many bytes of the prompt it has computed: as it has said, or else as was believed.
    pub fn new_bytes(&self) -> u64 {
        let bytes = self.expected.prompt_bytes;
        let cached = match (self.prompt_tokens, self.cached_tokens) {
            (Some(tokens), Some(cached)) if tokens > 0 => bytes.saturating_mul(cached) / tokens,
            _ => self.expected.cached_bytes,
        };
        bytes.saturating_sub(cached)
    }

    /// From writing the request to the end of the response. Not to its head, which comes with a stream of
    /// `/generate` before any work.
    pub fn time(&self) -> Option<Duration> {
        self.time
    }
}

/// What a prefill server has said in its responses.
#[derive(Debug, Default)]
pub(super) struct ToldTokens {
    prompt_tokens: AtomicU64,
    prompt_bytes: AtomicU64,
    cached_tokens: AtomicU64,
    /// It runs with `--enable-cache-report`.
    reports_cached: AtomicBool,
}

impl ToldTokens {
    /// Counts what a response has said, as far as it can be true. Returns the tokens of the prompt, and those
    /// of them that were cached.
    pub(super) fn count(&self, usage: Usage, prompt_bytes: u64) -> (Option<u64>, Option<u64>) {
        let Usage { prompt_tokens, cached } = usage;
        if prompt_tokens > prompt_bytes.saturating_add(MAX_ADDED_TOKENS) {
            return (None, None);
        }
        let cached = match cached {
            CachedTokens::Told(cached) => Some(cached),
            CachedTokens::Reported(cached) => {
                // A line that is not written stays in the caches of all cores.
                if !self.reports_cached.load(Relaxed) {
                    self.reports_cached.store(true, Relaxed);
                }
                Some(cached)
            }
            // SGLang leaves a 0 out. From the first report on it is known to be one.
            CachedTokens::NoneOrUnreported => self.reports_cached.load(Relaxed).then_some(0),
            CachedTokens::Untold => None,
        };
        self.prompt_tokens.fetch_add(prompt_tokens, Relaxed);
        self.prompt_bytes.fetch_add(prompt_bytes, Relaxed);
        self.cached_tokens.fetch_add(cached.unwrap_or(0), Relaxed);
        (Some(prompt_tokens), cached)
    }

    /// How many bytes of prompts so many tokens are, by the mean of those that were told.
    pub(super) fn bytes_of(&self, tokens: u64) -> u64 {
        let (all, bytes) = (self.prompt_tokens(), self.prompt_bytes());
        if all < ENOUGH_TOKENS {
            return tokens.saturating_mul(BYTES_PER_TOKEN);
        }
        let bytes = u128::from(tokens) * u128::from(bytes) / u128::from(all);
        let least = tokens.saturating_mul(MIN_BYTES_PER_TOKEN);
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(least, tokens.saturating_mul(MAX_BYTES_PER_TOKEN))
    }

    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Relaxed)
    }

    pub(super) fn prompt_bytes(&self) -> u64 {
        self.prompt_bytes.load(Relaxed)
    }

    pub(super) fn cached_tokens(&self) -> u64 {
        self.cached_tokens.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cached_tokens_are_none_once_the_server_has_reported_some() {
        let told = ToldTokens::default();
        let count = |cached| told.count(Usage { prompt_tokens: 10, cached }, 40);
        assert_eq!(count(CachedTokens::NoneOrUnreported), (Some(10), None));
        assert_eq!(count(CachedTokens::Told(4)), (Some(10), Some(4)));
        assert_eq!(count(CachedTokens::NoneOrUnreported), (Some(10), None), "/generate always tells");
        assert_eq!(count(CachedTokens::Reported(5)), (Some(10), Some(5)));
        assert_eq!(count(CachedTokens::NoneOrUnreported), (Some(10), Some(0)));
        assert_eq!((told.prompt_tokens(), told.cached_tokens(), told.prompt_bytes()), (50, 9, 200));
    }

    #[test]
    fn tokens_are_as_many_bytes_as_those_of_the_prompts_before() {
        let told = |prompt_tokens, bytes| {
            let told = ToldTokens::default();
            told.count(Usage { prompt_tokens, cached: CachedTokens::Untold }, bytes);
            told.bytes_of(1_000)
        };
        assert_eq!(told(99_999, 300_000), 4_000, "not enough yet");
        assert_eq!(told(100_000, 300_000), 3_000);
        assert_eq!(told(100_000, 100_000_000), 64_000);
        assert_eq!(told(100_000, 50_000), 1_000);
        assert_eq!(ToldTokens::default().bytes_of(u64::MAX), u64::MAX);
    }

    #[test]
    fn more_tokens_than_a_prompt_can_have_are_not_believed() {
        let told = ToldTokens::default();
        let count = |prompt_tokens| told.count(Usage { prompt_tokens, cached: CachedTokens::Told(1) }, 40);
        assert_eq!(count(41 + MAX_ADDED_TOKENS), (None, None));
        assert_eq!(told.prompt_tokens(), 0);
        assert_eq!(count(40 + MAX_ADDED_TOKENS), (Some(40 + MAX_ADDED_TOKENS), Some(1)));
    }
}

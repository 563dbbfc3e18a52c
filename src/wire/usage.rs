//! How many tokens a server says that a prompt had, and how many of them it had cached.
//!
//! `/generate` says it in `meta_info`, the OpenAI endpoints in `usage`. Nothing is parsed: the names are
//! searched in a few KiB of a response while it passes. What is believed of it is for `upstream`.
//!
//! The names are searched with their quotes and a colon, which the text of a JSON string cannot contain. A
//! key of a client's own that a server repeats could be taken for one; the endpoints that are read repeat
//! none.

use std::sync::LazyLock;

use memchr::memmem::Finder;

/// How much of a body is searched from its first byte on. `meta_info` is within 500 bytes unless the response
/// has logprobs.
const HEAD: usize = 2 << 10;
/// How much of each piece of a body is searched before its end. `cached_tokens` of `meta_info`, behind
/// logprobs, and `usage` are in the last 500 bytes, or in the last event but one.
const TAIL: usize = 1 << 10;
/// How much of a piece is kept for what it has the beginning of: longer than a name with its number.
const OVERLAP: usize = 64;
/// Longest number that is read: of 999,999,999 tokens.
const MAX_DIGITS: usize = 9;

/// Ends each name, or goes on in `_tokens_details`.
static TOKENS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("_tokens"));
static META_INFO: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"meta_info\":"));

/// What a response says of one prompt, or of all prompts of a batch together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) cached: CachedTokens,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CachedTokens {
    /// By `meta_info`, which always does.
    Told(u64),
    /// By `usage`: the server runs with `--enable-cache-report`.
    Reported(u64),
    /// `"prompt_tokens_details":null` is in `usage` if there are none, or if they are not reported.
    NoneOrUnreported,
    Untold,
}

/// Reads the usage off a body that arrives in pieces.
#[derive(Debug)]
pub(crate) struct UsageReader {
    /// How many bytes of the body have passed.
    seen: usize,
    /// The last bytes of those.
    kept: [u8; OVERLAP],
    /// The body is a list of answers: to a batch, or several to one prompt.
    is_list: bool,
    /// How many `meta_info` were found.
    answers: u8,
    /// The last numbers that were found.
    prompt_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    /// Whether the last `prompt_tokens_details` was an object.
    has_details: Option<bool>,
}

impl Default for UsageReader {
    fn default() -> Self {
        Self {
            seen: 0,
            kept: [0; OVERLAP],
            is_list: false,
            answers: 0,
            prompt_tokens: None,
            cached_tokens: None,
            has_details: None,
        }
    }
}

impl UsageReader {
    /// Searches the next piece.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        let Some(first) = piece.first() else { return };
        if self.seen == 0 {
            self.is_list = *first == b'[';
        } else {
            self.search_across(piece);
        }
        let head = HEAD.saturating_sub(self.seen).min(piece.len());
        let tail = piece.len().saturating_sub(TAIL);
        if tail <= head {
            self.search(piece, None);
        } else {
            self.search(&piece[..head], None);
            self.search(&piece[tail..], None);
        }
        self.seen = self.seen.saturating_add(piece.len());
        self.keep(piece);
    }

    /// What the body has said. Of several answers none is read: each speaks of its own prompt.
    pub(crate) fn usage(&self) -> Option<Usage> {
        let prompt_tokens = self.prompt_tokens.filter(|_| !self.is_list && self.answers < 2)?;
        let cached = match (self.cached_tokens, self.has_details) {
            // More than there are is no truth about the prompt either.
            (Some(cached), _) if cached > prompt_tokens => return None,
            (Some(cached), None) => CachedTokens::Told(cached),
            (Some(cached), Some(_)) => CachedTokens::Reported(cached),
            (None, Some(false)) => CachedTokens::NoneOrUnreported,
            (None, _) => CachedTokens::Untold,
        };
        Some(Usage { prompt_tokens, cached })
    }

    /// Searches what begins in the last piece and ends in this one.
    fn search_across(&mut self, piece: &[u8]) {
        let (before, after) = (self.seen.min(OVERLAP), piece.len().min(OVERLAP));
        let mut joined = [0; 2 * OVERLAP];
        joined[..before].copy_from_slice(&self.kept[OVERLAP - before..]);
        joined[before..][..after].copy_from_slice(&piece[..after]);
        self.search(&joined[..before + after], Some(before));
    }

    /// Searches `text`. Where two pieces meet `at` an offset, only what lies across it is counted: the rest
    /// is found in one of them. A number that is found twice is the same.
    fn search(&mut self, text: &[u8], at: Option<usize>) {
        for start in META_INFO.find_iter(text) {
            let is_counted = at.is_none_or(|at| start < at && start + META_INFO.needle().len() > at);
            self.answers = self.answers.saturating_add(u8::from(is_counted));
        }
        for start in TOKENS.find_iter(text) {
            let (before, rest) = (&text[..start], &text[start + TOKENS.needle().len()..]);
            let is_prompt = before.ends_with(b"\"prompt");
            if let Some(value) = rest.strip_prefix(b"_details\":").filter(|_| is_prompt) {
                match value.trim_ascii_start().first() {
                    Some(b'{') => self.has_details = Some(true),
                    Some(b'n') => self.has_details = Some(false),
                    _ => {}
                }
            }
            let Some(value) = rest.strip_prefix(b"\":") else { continue };
            let Some(number) = number(value) else { continue };
            if is_prompt {
                self.prompt_tokens = Some(number);
            } else if before.ends_with(b"\"cached") {
                self.cached_tokens = Some(number);
            }
        }
    }

    fn keep(&mut self, piece: &[u8]) {
        if let Some(last) = piece.last_chunk() {
            self.kept = *last;
        } else {
            self.kept.copy_within(piece.len().., 0);
            self.kept[OVERLAP - piece.len()..].copy_from_slice(piece);
        }
    }
}

/// The number at the start of `text`. It is complete only if something follows it.
fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let digits = text.iter().take(MAX_DIGITS + 1).take_while(|byte| byte.is_ascii_digit()).count();
    let is_whole = digits > 0 && matches!(text.get(digits), Some(b',' | b'}' | b' ' | b'\r' | b'\n'));
    is_whole.then(|| text[..digits].iter().fold(0, |sum, digit| 10 * sum + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests;

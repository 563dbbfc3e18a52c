//! Finding brackets, and ends of strings, in long texts: 64 bytes at a time, as masks with a bit for each
//! byte, the way of simdjson's first stage (Langdale and Lemire, "Parsing Gigabytes of JSON per Second").
//!
//! In which of the processor's vector instructions is decided when the program runs: AVX-512, AVX2, SSE or
//! NEON. Like [`search`](super::search) it keeps no JSON: what brackets mean is the caller's business.

use fearless_simd::prelude::*;
use fearless_simd::{Level, Simd, dispatch, mask8x64, u8x64};

/// Bytes that are read at once: a bit each in a word.
pub(crate) const BLOCK: usize = 64;

/// After so many blocks without a quote, backslash or bracket, the next ones are only searched for one: much
/// faster in a long string of base64, a little slower where prose has a backslash in most blocks.
const CLEAN_BLOCKS: u32 = 4;

/// Where a text is read, and what is known of it there. It may continue in another text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskScan {
    /// The next byte that is read.
    pub(crate) at: usize,
    /// All bits are set within a string.
    inside: u64,
    /// 1 if the last byte is a backslash that escapes the next.
    escaped: u64,
    /// How many blocks in a row had neither quotes nor backslashes.
    clean: u32,
    /// No byte that was read is outside ASCII. It may be `false` for one up to a block before the start.
    pub(crate) is_ascii: bool,
}

/// What ends a search: brackets outside strings, or the quote that ends a string. Constants, and not
/// variants, so that each search is compiled by itself.
const BRACKETS: u8 = 0;
const QUOTE: u8 = 1;

impl MaskScan {
    /// Starts at this place. `escaped` is `None` outside a string.
    pub(crate) fn new(at: usize, escaped: Option<bool>) -> Self {
        let inside = if escaped.is_some() { !0 } else { 0 };
        Self { at, inside, escaped: u64::from(escaped == Some(true)), clean: 0, is_ascii: true }
    }

    /// Whether this is within a string, and if so, whether the next byte is escaped.
    pub(crate) fn escaped(&self) -> Option<bool> {
        (self.inside != 0).then_some(self.escaped != 0)
    }

    /// Reads up to the end of the next block with braces or brackets outside strings. Returns the block's
    /// start and a mask of them, or `None` at the text's end. The text must have at least [`BLOCK`] bytes.
    pub(crate) fn next_brackets(&mut self, text: &[u8]) -> Option<(usize, u64)> {
        self.search::<BRACKETS>(Level::new(), text)
    }

    /// Reads up to the string's end, which must not have been read. Returns the offset of its closing quote,
    /// or `None` at the text's end. The text must have at least [`BLOCK`] bytes.
    pub(crate) fn end_of_string(&mut self, text: &[u8]) -> Option<usize> {
        self.search::<QUOTE>(Level::new(), text).map(|(start, mask)| start + mask.trailing_zeros() as usize)
    }

    /// Reads up to the end of an object or list, of which `depth` brackets are open here. Returns the offset
    /// of the bracket that closes the last of them, or `None` at the text's end. Braces are brackets, too.
    pub(crate) fn end_of_nested(&mut self, text: &[u8], depth: usize) -> Option<usize> {
        self.end_of_nested_by(Level::new(), text, depth)
    }

    fn end_of_nested_by(&mut self, level: Level, text: &[u8], depth: usize) -> Option<usize> {
        assert!(text.len() >= BLOCK, "a text shorter than a block");
        dispatch!(level, simd => end_of_nested(simd, text, self, depth))
    }

    /// Reads up to the end of the next block with targets. `level` says what the processor has.
    fn search<const TARGET: u8>(&mut self, level: Level, text: &[u8]) -> Option<(usize, u64)> {
        // Else a loop of searches would not end.
        assert!(text.len() >= BLOCK, "a text shorter than a block");
        dispatch!(level, simd => search::<_, TARGET>(simd, text, self))
    }

    /// Takes the next block, or the end of one: `text`. Returns a mask of the targets in it.
    #[inline(always)]
    fn advance<S: Simd, const TARGET: u8>(&mut self, block: u8x64<S>, text: &[u8]) -> u64 {
        let mask = |of_all: mask8x64<S>| of_all.to_bitmask() >> (BLOCK - text.len());
        let backslashes = mask(block.simd_eq(b'\\'));
        let (escapes, escaped) = escapes(backslashes, self.escaped);
        let quotes = mask(block.simd_eq(b'"')) & !escaped;
        self.clean = if quotes | backslashes == 0 { self.clean + 1 } else { 0 };
        if TARGET == QUOTE || (quotes == 0 && self.inside != 0) {
            self.escaped = escapes >> (text.len() - 1);
            return quotes;
        }
        let inside = prefix_xor(quotes) ^ self.inside;
        // Outside strings no backslash escapes anything (and none is JSON). If there is one, the masks from
        // there on are wrong; if there is none, each that was taken for an escape is one.
        if backslashes & !inside != 0 {
            let (state, brackets) = self.advanced_by_bytes(text);
            *self = state;
            return brackets;
        }
        self.escaped = escapes >> (text.len() - 1);
        // Behind the end of a short block there are no quotes: the last bit is that of its last byte.
        self.inside = (inside.cast_signed() >> (BLOCK - 1)).cast_unsigned();
        mask(brackets(block)) & !inside
    }

    /// The same for any bytes, one at a time. By value: a reference would keep the caller's state in memory.
    #[cold]
    #[inline(never)]
    fn advanced_by_bytes(mut self, bytes: &[u8]) -> (Self, u64) {
        let mut brackets = 0;
        for (number, byte) in bytes.iter().enumerate() {
            match (self.escaped(), byte) {
                (Some(true), _) => self.escaped = 0,
                (Some(false), b'\\') => self.escaped = 1,
                (_, b'"') => self.inside = !self.inside,
                (None, b'{' | b'}' | b'[' | b']') => brackets |= 1 << number,
                _ => {}
            }
        }
        (self, brackets)
    }
}

/// `{` and `[`, and `}` and `]`, differ in bit 0x20 only, and no other byte maps to a brace.
#[inline(always)]
fn brackets<S: Simd>(bytes: u8x64<S>) -> mask8x64<S> {
    (bytes | 0x20).simd_eq(b'{') | closing(bytes)
}

/// The closing ones of them.
#[inline(always)]
fn closing<S: Simd>(bytes: u8x64<S>) -> mask8x64<S> {
    (bytes | 0x20).simd_eq(b'}')
}

/// Compiled once for each set of vector instructions, so everything it calls is `inline(always)`.
#[inline(always)]
fn search<S: Simd, const TARGET: u8>(simd: S, text: &[u8], scan: &mut MaskScan) -> Option<(usize, u64)> {
    // A copy, so that the loop keeps it in registers.
    let mut state = *scan;
    let (mut blocks, rest) = text[state.at..].as_chunks::<BLOCK>();
    // All bits that any byte has.
    let mut bits = u8x64::splat(simd, 0);
    let mut targets = 0;
    while let [block, others @ ..] = blocks {
        let bytes = u8x64::simd_from(simd, *block);
        bits |= bytes;
        targets = state.advance::<S, TARGET>(bytes, block);
        if targets != 0 {
            break;
        }
        blocks = others;
        if state.clean >= CLEAN_BLOCKS {
            let within_string = TARGET == QUOTE || state.inside != 0;
            (blocks, bits) = skip_clean(simd, blocks, within_string, bits);
            state.clean = 0;
        }
    }
    state.at = text.len() - rest.len() - blocks.len() * BLOCK;
    let found = if targets != 0 {
        state.at += BLOCK;
        Some((state.at - BLOCK, targets))
    // The bytes behind the last whole block: as the end of a block that begins before them.
    } else if let Some(last) = text.last_chunk::<BLOCK>()
        && !rest.is_empty()
    {
        let bytes = u8x64::simd_from(simd, *last);
        bits |= bytes;
        targets = state.advance::<S, TARGET>(bytes, rest);
        state.at = text.len();
        (targets != 0).then_some((text.len() - rest.len(), targets))
    } else {
        None
    };
    state.is_ascii &= !bits.simd_ge(0x80).any_true();
    *scan = state;
    found
}

/// The same for the end of an object or list: in lists of lists most blocks have brackets, which are counted
/// here.
#[inline(always)]
fn end_of_nested<S: Simd>(simd: S, text: &[u8], scan: &mut MaskScan, mut depth: usize) -> Option<usize> {
    let mut state = *scan;
    let (blocks, rest) = text[state.at..].as_chunks::<BLOCK>();
    for block in blocks {
        let bytes = u8x64::simd_from(simd, *block);
        let brackets = state.advance::<S, BRACKETS>(bytes, block);
        if brackets != 0
            && let Some(end) = closes_last(brackets, closing(bytes).to_bitmask(), &mut depth)
        {
            return Some(state.at + end);
        }
        state.at += BLOCK;
    }
    if let Some(last) = text.last_chunk::<BLOCK>()
        && !rest.is_empty()
    {
        let bytes = u8x64::simd_from(simd, *last);
        let brackets = state.advance::<S, BRACKETS>(bytes, rest);
        let closing = closing(bytes).to_bitmask() >> (BLOCK - rest.len());
        if let Some(end) = closes_last(brackets, closing, &mut depth) {
            return Some(state.at + end);
        }
        state.at = text.len();
    }
    *scan = state;
    None
}

/// Which of a block's brackets closes the last of `depth` open ones; if none does, `depth` counts them.
#[inline(always)]
fn closes_last(brackets: u64, closing: u64, depth: &mut usize) -> Option<usize> {
    let opening = brackets & !closing;
    let mut closing = brackets & closing;
    let closed = closing.count_ones() as usize;
    // Else all of them leave one open.
    if closed >= *depth {
        for number in 1..=closed {
            let before = closing ^ (closing - 1);
            if *depth + (opening & before).count_ones() as usize == number {
                return Some(closing.trailing_zeros() as usize);
            }
            closing &= closing - 1;
        }
    }
    *depth = *depth + opening.count_ones() as usize - closed;
    None
}

/// Skips pairs of blocks that have nothing a search stops at. Returns what is left, and `bits` with theirs.
#[inline(always)]
fn skip_clean<S: Simd>(
    simd: S,
    mut blocks: &[[u8; BLOCK]],
    within_string: bool,
    mut bits: u8x64<S>,
) -> (&[[u8; BLOCK]], u8x64<S>) {
    while let [first, second, others @ ..] = blocks {
        let (first, second) = (u8x64::simd_from(simd, *first), u8x64::simd_from(simd, *second));
        let quotes = first.simd_eq(b'"') | second.simd_eq(b'"');
        let special = if within_string {
            first.simd_eq(b'\\') | second.simd_eq(b'\\')
        } else {
            brackets(first) | brackets(second)
        };
        if (quotes | special).any_true() {
            break;
        }
        bits |= first | second;
        blocks = others;
    }
    (blocks, bits)
}

/// Which backslashes escape the next byte, and which bytes are escaped, of a block with these backslashes.
/// `escaped` is 1 if its first byte is escaped.
///
/// Of a run of backslashes every second one escapes: the runs are found by a subtraction whose borrow passes
/// through them (simdjson's `json_escape_scanner`).
#[inline(always)]
fn escapes(backslashes: u64, escaped: u64) -> (u64, u64) {
    const ODD: u64 = 0xAAAA_AAAA_AAAA_AAAA;
    let candidates = backslashes & !escaped;
    let alternating = ((candidates << 1) | ODD).wrapping_sub(candidates) ^ ODD;
    (alternating & backslashes, alternating ^ (backslashes | escaped))
}

/// Each bit becomes the parity of itself and those below it.
#[inline(always)]
fn prefix_xor(mut bits: u64) -> u64 {
    for shift in [1, 2, 4, 8, 16, 32] {
        bits ^= bits << shift;
    }
    bits
}

#[cfg(test)]
mod tests;

//! Finding the bytes that structure JSON: quotes, backslashes, braces and brackets.
//!
//! Short distances are searched eight bytes at a time in an ordinary register, long ones with vector
//! instructions, which take longer to set up than the name of a field takes to skip.

/// Bytes that [`find_structural`] tests at once. The test of a block has no branches, so that the compiler
/// turns it into vector comparisons.
const BLOCK: usize = 32;
/// Bytes that are searched a word at a time first: most names and short strings end within them, before a
/// vector search would have been set up.
const WORD_SEARCH_LIMIT: usize = 32;
/// Bytes in a word.
pub(super) const WORD: usize = size_of::<u64>();
/// 0x01 in each byte of a word.
const ONES: u64 = u64::from_ne_bytes([1; WORD]);

/// The offset of the first quote or backslash: the only bytes that can end a string or escape its end.
#[inline]
pub(crate) fn find_string_special(bytes: &[u8]) -> Option<usize> {
    let (found, at) = find_in_first_words(bytes, |word| equal(word, b'"') | equal(word, b'\\'));
    found.or_else(|| memchr::memchr2(b'"', b'\\', &bytes[at..]).map(|offset| at + offset))
}

/// The same, if it is one of the first bytes.
#[inline]
pub(crate) fn find_near_string_special(bytes: &[u8]) -> Option<usize> {
    find_in_first_words(bytes, |word| equal(word, b'"') | equal(word, b'\\')).0
}

/// The offset of the first quote, brace or bracket.
#[inline]
pub(crate) fn find_structural(bytes: &[u8]) -> Option<usize> {
    let (found, mut at) = find_in_first_words(bytes, |word| {
        // As in `is_structural`: this bit maps brackets to braces, so three comparisons find five bytes.
        let folded = word | (ONES * 0x20);
        equal(folded, b'{') | equal(folded, b'}') | equal(word, b'"')
    });
    if found.is_some() {
        return found;
    }
    for block in bytes[at..].chunks_exact(BLOCK) {
        // A fold instead of `any`, which would stop at the first hit and so not be vectorised.
        if block.iter().fold(false, |hit, &byte| hit | is_structural(byte)) {
            break;
        }
        at += BLOCK;
    }
    bytes[at..].iter().position(|&byte| is_structural(byte)).map(|offset| at + offset)
}

/// Searches the first words. `marks` sets the highest bit of each byte that matches; bits above the lowest
/// match may be wrong (see [`zeros`]) and are not used. Returns the first match, or how far there is none.
#[inline]
fn find_in_first_words(bytes: &[u8], marks: impl Fn(u64) -> u64) -> (Option<usize>, usize) {
    let mut at = 0;
    while at < WORD_SEARCH_LIMIT
        && let Some(word) = bytes[at..].first_chunk::<WORD>()
    {
        let marks = marks(u64::from_le_bytes(*word));
        if marks != 0 {
            return (Some(at + marks.trailing_zeros() as usize / 8), at);
        }
        at += WORD;
    }
    (None, at)
}

/// Marks the bytes of a word that equal `byte`; see [`zeros`].
#[inline]
fn equal(word: u64, byte: u8) -> u64 {
    zeros(word ^ (ONES * u64::from(byte)))
}

/// Sets the highest bit of each byte that is zero ("Determine if a word has a zero byte", Bit Twiddling
/// Hacks): subtracting 1 borrows there. The borrow can mark bytes above the lowest zero byte wrongly.
#[inline]
fn zeros(word: u64) -> u64 {
    word.wrapping_sub(ONES) & !word & (ONES * 0x80)
}

/// `{` and `[`, and `}` and `]`, differ in bit 0x20 only, and no other byte of JSON's syntax maps to them.
#[inline]
pub(super) fn is_structural(byte: u8) -> bool {
    let folded = byte | 0x20;
    (folded == b'{') | (folded == b'}') | (byte == b'"')
}

/// The first word of a text, padded with zeros.
pub(super) fn first_word(text: &[u8]) -> u64 {
    let bytes = text.first_chunk().copied().unwrap_or_else(|| {
        let mut bytes = [0; WORD];
        bytes[..text.len()].copy_from_slice(text);
        bytes
    });
    u64::from_le_bytes(bytes)
}

/// Marks every quote, brace and bracket of a word, and a few other bytes: the caller must check each mark.
/// This takes about 12 instructions for 8 bytes, and most words of a list of numbers have at most one mark.
pub(super) fn structural_candidates(word: u64) -> u64 {
    // The four braces and brackets differ in bits 0x26 only. The other bytes that match then (`Y`, `_`, `y`
    // and DEL) are rare in lists of numbers.
    let brackets = (word | (ONES * 0x26)) ^ (ONES * 0x7f);
    zeros(brackets) | equal(word, b'"')
}

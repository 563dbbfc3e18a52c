//! What the masks find, with each set of vector instructions that this processor has, against one byte at a
//! time.

use proptest::prelude::*;

use super::*;

/// The sets of instructions for which the search is compiled, as far as this processor has them.
fn levels() -> Vec<Level> {
    let best = Level::new();
    #[cfg(target_arch = "x86_64")]
    let others =
        [best.as_avx2().map(Simd::level), best.as_sse4_2().map(Simd::level), best.as_sse2().map(Simd::level)];
    #[cfg(not(target_arch = "x86_64"))]
    let others = [None; 0];
    [best].into_iter().chain(others.into_iter().flatten()).collect()
}

/// The offsets of all brackets outside strings from `at` on, and what the text ends within.
fn brackets_of(text: &[u8], at: usize, mut escaped: Option<bool>) -> (Vec<usize>, Option<bool>) {
    let mut brackets = Vec::new();
    for (offset, byte) in text.iter().enumerate().skip(at) {
        escaped = match (escaped, byte) {
            (Some(true), _) => Some(false),
            (Some(false), b'\\') => Some(true),
            (Some(false), b'"') => None,
            (None, b'"') => Some(false),
            (None, b'{' | b'}' | b'[' | b']') => {
                brackets.push(offset);
                None
            }
            _ => escaped,
        };
    }
    (brackets, escaped)
}

/// The offset of the quote that ends the string, or whether the next byte of the text is escaped.
fn end_of_string_of(text: &[u8], at: usize, mut escaped: bool) -> Result<usize, bool> {
    for (offset, byte) in text.iter().enumerate().skip(at) {
        match (escaped, byte) {
            (false, b'"') => return Ok(offset),
            _ => escaped = !escaped && *byte == b'\\',
        }
    }
    Err(escaped)
}

/// Pieces of text of a block's size and more, and what falls between two blocks.
fn text() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => "[ -~]{0,20}".prop_map(String::into_bytes),
        4 => r#"[\[\]{}"\\a]{0,70}"#.prop_map(String::into_bytes),
        2 => (0_usize..140).prop_map(|length| vec![b'\\'; length]),
        2 => (0_usize..700).prop_map(|length| vec![b'x'; length]),
        1 => "[é😀]{1,40}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..80),
        // Bytes that differ in one bit from those that are looked for.
        1 => Just(b"\x02\x22\xa2\x5b\x7b\xfb\x5d\x7d\xdd\x5c\xdc\x7c\x1b\x3b".to_vec()),
    ];
    let enough = (0_usize..64).prop_map(|more| vec![b' '; BLOCK + more]);
    (enough, prop::collection::vec(piece, 0..12))
        .prop_map(|(first, pieces)| [first, pieces.concat()].concat())
}

/// All brackets from `at` on, by searches in pieces that end at these places.
fn search_brackets(level: Level, text: &[u8], ends: &[usize], scan: &mut MaskScan) -> Vec<usize> {
    let mut brackets = Vec::new();
    for end in ends.iter().chain([&text.len()]) {
        while scan.at < *end {
            let Some((block, mut mask)) = scan.search::<BRACKETS>(level, &text[..*end]) else { break };
            while mask != 0 {
                brackets.push(block + mask.trailing_zeros() as usize);
                mask &= mask - 1;
            }
        }
    }
    brackets
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn brackets_outside_strings_are_found_as_by_single_bytes(
        text in text(), at in any::<prop::sample::Index>(), escaped: Option<bool>,
        ends in prop::collection::vec(BLOCK..900, 0..3),
    ) {
        let at = at.index(text.len());
        let mut ends = ends;
        ends.retain(|end| *end <= text.len());
        ends.sort_unstable();
        let (expected, end) = brackets_of(&text, at, escaped);
        for level in levels() {
            let mut scan = MaskScan::new(at, escaped);
            prop_assert_eq!(&search_brackets(level, &text, &ends, &mut scan), &expected, "{:?}", level);
            prop_assert_eq!(scan.escaped(), end, "{:?}", level);
            prop_assert_eq!(scan.at, text.len());
            // Bytes before the start count or not.
            prop_assert!(!scan.is_ascii || text[at..].is_ascii(), "{:?}", level);
            prop_assert!(scan.is_ascii || !text[at.saturating_sub(BLOCK)..].is_ascii(), "{:?}", level);
        }
    }

    #[test]
    fn a_strings_end_is_found_as_by_single_bytes(
        text in text(), at in any::<prop::sample::Index>(), escaped: bool,
    ) {
        let at = at.index(text.len());
        let expected = end_of_string_of(&text, at, escaped);
        for level in levels() {
            let mut scan = MaskScan::new(at, Some(escaped));
            let found = scan.search::<QUOTE>(level, &text);
            let found = found.map(|(block, mask)| block + mask.trailing_zeros() as usize);
            prop_assert_eq!(found.ok_or(scan.escaped == 1), expected, "{:?}", level);
            let read = &text[at..expected.map_or(text.len(), |quote| quote + 1)];
            prop_assert!(!scan.is_ascii || read.is_ascii(), "{:?}", level);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_end_of_nested_text_is_found_as_by_counting(
        text in text(), depth in 1_usize..40, at in any::<prop::sample::Index>(),
    ) {
        let at = at.index(text.len());
        let (brackets, end) = brackets_of(&text, at, None);
        let mut open = depth;
        let last = brackets.into_iter().find(|&offset| {
            if matches!(text[offset], b'{' | b'[') { open += 1 } else { open -= 1 }
            open == 0
        });
        for level in levels() {
            let mut scan = MaskScan::new(at, None);
            prop_assert_eq!(scan.end_of_nested_by(level, &text, depth), last, "{:?}", level);
            if last.is_none() {
                prop_assert_eq!((scan.at, scan.escaped()), (text.len(), end), "{:?}", level);
            }
        }
    }
}

#[test]
fn every_byte_is_told_from_the_five_that_matter() {
    for level in levels() {
        for byte in 0..=u8::MAX {
            let text = [byte; BLOCK];
            let mut scan = MaskScan::new(0, None);
            let found = scan.search::<BRACKETS>(level, &text);
            let is_bracket = matches!(byte, b'{' | b'}' | b'[' | b']');
            assert_eq!(found, is_bracket.then_some((0, !0)), "{byte:#x} {level:?}");
            assert_eq!(scan.is_ascii, byte.is_ascii());
            // An even number of quotes.
            assert_eq!(scan.escaped(), None);
        }
    }
}

#[test]
#[should_panic(expected = "shorter than a block")]
fn a_text_shorter_than_a_block_is_a_mistake() {
    MaskScan::new(0, None).next_brackets(&[b' '; BLOCK - 1]);
}

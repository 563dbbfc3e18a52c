//! Deterministic text: the prompt's hash and a token's position determine every token and every
//! log-probability, so that a test can predict a response.

/// Size of the vocabulary.
pub const VOCABULARY: u32 = 1024;

/// Every word contains an `e`, so that a request with `"stop":["e"]` does stop. The last ones break careless
/// parsers of streams: quotes, line ends, multi-byte characters, and markers inside a text.
const WORDS: [&str; 64] = [
    " the",
    " were",
    " even",
    " here",
    " these",
    " there",
    " where",
    " before",
    " tree",
    " green",
    " see",
    " be",
    " he",
    " me",
    " we",
    " she",
    " one",
    " time",
    " like",
    " over",
    " new",
    " make",
    " water",
    " people",
    " her",
    " more",
    " write",
    " number",
    " side",
    " been",
    " come",
    " made",
    "ever",
    "est",
    "er",
    "ted",
    "else",
    " after",
    " under",
    " never",
    " letter",
    " mother",
    " answer",
    " need",
    " house",
    " picture",
    " change",
    " spell",
    " animale",
    " page",
    " well",
    " large",
    " must\"e",
    " even\\e",
    "e\n",
    " é e",
    " 你e",
    " 🙂e",
    " data: e\n\n",
    " [DONE]e",
    " \"input_token_logprobs\":[]e",
    "{e",
    "]e",
    "e\t",
];

/// Mixes all bits (the finaliser of SplitMix64).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Hashes bytes, eight at a time: a prompt may have megabytes.
#[must_use]
pub fn hash_bytes(seed: u64, bytes: &[u8]) -> u64 {
    let mut hash = seed ^ (bytes.len() as u64);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = chunk.iter().rev().fold(0, |word, &byte| (word << 8) | u64::from(byte));
        hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
    for &byte in chunks.remainder() {
        hash = (hash.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
    mix(hash)
}

/// The id of the `index`-th token that follows a prompt.
#[must_use]
pub fn token_id(hash: u64, index: usize) -> u32 {
    (mix(hash ^ (index as u64).wrapping_mul(0xA24B_AED4_963E_E407)) % u64::from(VOCABULARY)) as u32
}

/// The text of a token.
#[must_use]
pub fn token_text(id: u32) -> &'static str {
    WORDS[id as usize % WORDS.len()]
}

/// The whole text of the first `tokens` tokens that follow a prompt.
#[must_use]
pub fn output_text(hash: u64, tokens: usize) -> String {
    (0..tokens).map(|index| token_text(token_id(hash, index))).collect()
}

/// The id of the `rank`-th best alternative to a token; rank 0 is the token itself.
#[must_use]
pub fn alternative(id: u32, rank: usize) -> u32 {
    ((u64::from(id) + rank as u64) % u64::from(VOCABULARY)) as u32
}

/// A log-probability in millionths, without its sign.
pub(crate) type Micros = u32;

pub(crate) fn output_micros(hash: u64, index: usize, rank: usize) -> Micros {
    (mix(hash ^ mix(index as u64)) % 5_000_000) as Micros + 1 + 250_000 * rank as Micros
}

pub(crate) fn input_micros(hash: u64, position: usize, rank: usize) -> Micros {
    (mix(!hash ^ mix(position as u64)) % 9_000_000) as Micros + 1 + 250_000 * rank as Micros
}

/// The log-probability of the `index`-th token of a response.
#[must_use]
pub fn output_logprob(hash: u64, index: usize) -> f64 {
    -f64::from(output_micros(hash, index, 0)) / 1e6
}

/// The log-probability of the prompt's token at `position`. The first token that is requested has none.
#[must_use]
pub fn input_logprob(hash: u64, position: usize) -> f64 {
    -f64::from(input_micros(hash, position, 0)) / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_contains_an_e_and_is_unique() {
        for (at, word) in WORDS.iter().enumerate() {
            assert!(word.contains('e'), "{word}");
            assert!(!WORDS[..at].contains(word), "{word}");
        }
    }

    #[test]
    fn a_hash_depends_on_every_byte_and_on_the_length() {
        let text = b"the of and to a in is";
        for at in 0..text.len() {
            let mut other = *text;
            other[at] ^= 1;
            assert_ne!(hash_bytes(0, text), hash_bytes(0, &other));
        }
        assert_ne!(hash_bytes(0, b"a"), hash_bytes(0, b"a\0"));
    }
}

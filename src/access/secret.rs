//! A key, compared without telling anything by the time it takes, and never shown.

use std::fmt;
use std::hint::black_box;

use hyper::header::HeaderValue;

/// Longest key, in bytes. All comparisons take as long as one of this length.
const MAX_KEY: usize = 256;
const WORDS: usize = MAX_KEY / 8;

/// A key.
#[derive(Clone)]
pub(crate) struct Secret {
    padded: [u64; WORDS],
    length: usize,
    /// `Bearer` and the key.
    header: HeaderValue,
}

/// Why something cannot be a key. It does not say what was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadKey {
    Empty,
    TooLong,
    /// Not printable ASCII, or a space at an end: such a key could not be sent.
    NotText,
}

impl Secret {
    pub(crate) fn new(key: &str) -> Result<Self, BadKey> {
        let bytes = key.as_bytes();
        if bytes.is_empty() {
            return Err(BadKey::Empty);
        }
        if !bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) || bytes.trim_ascii() != bytes {
            return Err(BadKey::NotText);
        }
        let padded = padded(bytes).ok_or(BadKey::TooLong)?;
        let mut header = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| BadKey::NotText)?;
        header.set_sensitive(true);
        Ok(Self { padded, length: bytes.len(), header })
    }

    /// Whether this is the key. The time depends on the length of what is shown, which whoever shows it knows, and on
    /// nothing of the key: all words are looked at, and the lengths are two more.
    pub(crate) fn is(&self, shown: &[u8]) -> bool {
        let Some(padded) = padded(shown) else { return false };
        let words = self.padded.iter().zip(&padded);
        let lengths = (self.length ^ shown.len()) as u64;
        let difference = words.fold(lengths, |difference, (a, b)| difference | (a ^ b));
        // So that no compiler ends the comparison at the first difference.
        black_box(difference) == 0
    }

    /// `Bearer` and the key, not shown by `Debug`.
    pub(crate) fn to_header(&self) -> HeaderValue {
        self.header.clone()
    }
}

/// The bytes, and zeros up to the longest key's length. `None`: they are longer.
fn padded(bytes: &[u8]) -> Option<[u64; WORDS]> {
    let mut all = [0; MAX_KEY];
    all.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let mut words = [0; WORDS];
    for (word, eight) in words.iter_mut().zip(all.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*eight);
    }
    Some(words)
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for BadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the key is empty"),
            Self::TooLong => write!(f, "the key is longer than {MAX_KEY} bytes"),
            Self::NotText => f.write_str("the key is not printable ASCII, or has a space at an end"),
        }
    }
}

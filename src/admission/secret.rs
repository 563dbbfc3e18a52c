//! A key, compared without telling anything by the time it takes, and never shown.

use std::fmt;
use std::hint::black_box;

use hyper::header::HeaderValue;

/// Longest key, in bytes. All comparisons take as long as one of this length.
const MAX_KEY: usize = 256;

/// A key.
#[derive(Clone)]
pub(crate) struct Secret {
    key: Shown,
    /// `Bearer` and the key.
    header: HeaderValue,
}

/// What is compared with keys.
#[derive(Clone)]
pub(crate) struct Shown {
    /// With zeros up to the longest key's length.
    padded: [u8; MAX_KEY],
    length: usize,
}

impl Shown {
    /// `None`: it is longer than any key.
    pub(crate) fn new(bytes: &[u8]) -> Option<Self> {
        let mut padded = [0; MAX_KEY];
        padded.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { padded, length: bytes.len() })
    }
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
        let mut header = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| BadKey::NotText)?;
        let key = Shown::new(bytes).ok_or(BadKey::TooLong)?;
        header.set_sensitive(true);
        Ok(Self { key, header })
    }

    /// Whether this is the key. The time depends on nothing of either: all bytes are looked at, and the lengths are two
    /// more.
    pub(crate) fn is(&self, shown: &Shown) -> bool {
        let bytes = self.key.padded.iter().zip(&shown.padded);
        let difference = bytes.fold(0, |difference, (a, b)| difference | (a ^ b));
        // So that no compiler ends the comparison at the first difference.
        black_box(usize::from(difference) | (self.key.length ^ shown.length)) == 0
    }

    /// `Bearer` and the key, not shown by `Debug`.
    pub(crate) fn to_header(&self) -> HeaderValue {
        self.header.clone()
    }
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

//! API keys: compared in constant time and never printed.

use std::fmt;
use std::hint::black_box;

use hyper::header::HeaderValue;

/// Longest key, in bytes. Every comparison takes as long as one of this length.
const MAX_KEY: usize = 256;

/// A configured key.
#[derive(Clone)]
pub(crate) struct Secret {
    key: PresentedKey,
    /// `Bearer` and the key.
    header: HeaderValue,
}

/// A key as a client presents it, padded for the comparison.
#[derive(Clone)]
pub(crate) struct PresentedKey {
    /// Zero-padded to the longest key's length.
    padded: [u8; MAX_KEY],
    length: usize,
}

impl PresentedKey {
    /// `None` if it is longer than any key can be.
    pub(crate) fn new(bytes: &[u8]) -> Option<Self> {
        let mut padded = [0; MAX_KEY];
        padded.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { padded, length: bytes.len() })
    }
}

/// Why a text is not usable as a key. Never contains the text: the error is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InvalidKey {
    Empty,
    TooLong,
    /// Not printable ASCII, or a space at an end: no HTTP header can carry it unchanged (RFC 9110, section
    /// 5.5).
    NotPrintable,
}

impl Secret {
    pub(crate) fn new(key: &str) -> Result<Self, InvalidKey> {
        let bytes = key.as_bytes();
        if bytes.is_empty() {
            return Err(InvalidKey::Empty);
        }
        if !bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) || bytes.trim_ascii() != bytes {
            return Err(InvalidKey::NotPrintable);
        }
        let mut header =
            HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| InvalidKey::NotPrintable)?;
        // Built once: the header is sent with every request to a backend.
        let key = PresentedKey::new(bytes).ok_or(InvalidKey::TooLong)?;
        // `Debug` prints "Sensitive" instead of the key.
        header.set_sensitive(true);
        Ok(Self { key, header })
    }

    /// Compares in constant time: all 256 bytes are read, and the lengths are compared as if they were two
    /// more.
    pub(crate) fn matches(&self, presented: &PresentedKey) -> bool {
        let bytes = self.key.padded.iter().zip(&presented.padded);
        let difference = bytes.fold(0, |difference, (a, b)| difference | (a ^ b));
        // Keeps the compiler from ending the comparison at the first difference.
        black_box(usize::from(difference) | (self.key.length ^ presented.length)) == 0
    }

    /// `Bearer` and the key; `Debug` of the value does not print it.
    pub(crate) fn to_header(&self) -> HeaderValue {
        self.header.clone()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the key is empty"),
            Self::TooLong => write!(f, "the key is longer than {MAX_KEY} bytes"),
            Self::NotPrintable => f.write_str("the key is not printable ASCII, or has a space at an end"),
        }
    }
}

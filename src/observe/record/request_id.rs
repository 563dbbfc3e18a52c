//! What a request is called.

use std::fmt;

use hyper::Method;
use hyper::http::uri::PathAndQuery;

/// Longest id of a client's that is taken over.
pub(crate) const MAX_REQUEST_ID: usize = 128;

/// A request as its head names it.
pub(crate) struct RequestIdentity {
    pub(crate) id: RequestId,
    pub(crate) method: Method,
    pub(crate) target: PathAndQuery,
}

/// A request's id. It can be written into headers and logs as it is: bounded, printable ASCII, and nothing that would have
/// to be quoted.
pub(crate) struct RequestId(Id);

enum Id {
    Given(Box<str>),
    /// Hexadecimal digits.
    Made([u8; 32]),
}

impl RequestId {
    /// A client's, if it is good.
    pub(crate) fn given(id: &[u8]) -> Option<Self> {
        let is_plain = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\'' | b'`' | b'\\');
        let is_good = (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(is_plain);
        let text = std::str::from_utf8(id).ok().filter(|_| is_good)?;
        Some(Self(Id::Given(text.into())))
    }

    /// A new one: 128 random bits.
    pub(crate) fn make() -> Self {
        let mut digits = [0; 32];
        for (eight, bits) in
            digits.as_chunks_mut().0.iter_mut().zip(fastrand::u128(..).to_le_bytes().as_chunks().0)
        {
            *eight = hexadecimal(u32::from_le_bytes(*bits));
        }
        Self(Id::Made(digits))
    }

    pub(crate) fn as_str(&self) -> &str {
        match &self.0 {
            Id::Given(text) => text,
            Id::Made(digits) => std::str::from_utf8(digits).unwrap_or("-"),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Id::Given(text) => text.as_bytes(),
            Id::Made(digits) => digits,
        }
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The digits of a number, the least one first, all at once: a byte each.
fn hexadecimal(bits: u32) -> [u8; 8] {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    let mut digits = u64::from(bits);
    digits = (digits | digits << 16) & 0x0000_ffff_0000_ffff;
    digits = (digits | digits << 8) & 0x00ff_00ff_00ff_00ff;
    digits = (digits | digits << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let letters = (digits + 6 * EACH) >> 4 & EACH;
    (digits + u64::from(b'0') * EACH + letters * u64::from(b'a' - b'0' - 10)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_number() {
        for bits in [0, 1, 0x89ab_cdef, 0x0123_4567, u32::MAX, 0x9a9a_9a9a] {
            let mut digits = hexadecimal(bits);
            digits.reverse();
            assert_eq!(std::str::from_utf8(&digits).unwrap(), format!("{bits:08x}"));
        }
    }

    #[test]
    fn an_id_that_was_made_is_a_good_one_and_its_own() {
        let ids: std::collections::HashSet<_> =
            (0..1_000).map(|_| RequestId::make().as_str().to_owned()).collect();
        assert_eq!(ids.len(), 1_000);
        assert!(ids.iter().all(|id| id.len() == 32 && RequestId::given(id.as_bytes()).is_some()));
    }
}

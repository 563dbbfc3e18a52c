//! The id of a request: the client's, or a generated one.

use std::fmt;

use hyper::Method;
use hyper::http::uri::PathAndQuery;

/// Longest id of a client that is accepted, in bytes. A longer one would make up most of a log line.
pub(crate) const MAX_REQUEST_ID: usize = 128;

/// What identifies a request in logs. Without a method and a target, its head was not parsed.
pub(crate) struct RequestIdentity {
    pub(crate) id: RequestId,
    pub(crate) method: Option<Method>,
    pub(crate) target: Option<PathAndQuery>,
}

/// A request's id. It goes into headers and log lines without escaping: at most [`MAX_REQUEST_ID`] bytes of
/// printable ASCII, without what a shell, JSON or a log format would need quoted.
#[derive(Clone)]
pub(crate) struct RequestId(Id);

#[derive(Clone)]
enum Id {
    FromClient(Box<str>),
    /// Hexadecimal digits, held in place: most requests come without an id, and an allocation less is
    /// measurable.
    Generated([u8; 32]),
}

impl RequestId {
    /// Takes a client's id over, if it is valid.
    pub(crate) fn from_client(id: &[u8]) -> Option<Self> {
        // Not even a backtick: operators paste ids into shells to search their logs.
        let is_plain = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\'' | b'`' | b'\\');
        let is_valid = (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(is_plain);
        let text = std::str::from_utf8(id).ok().filter(|_| is_valid)?;
        Some(Self(Id::FromClient(text.into())))
    }

    /// Makes a new id of 128 random bits, as long as a UUID or a W3C trace id.
    pub(crate) fn generate() -> Self {
        let mut digits = [0; 32];
        for (eight, bits) in
            digits.as_chunks_mut().0.iter_mut().zip(fastrand::u128(..).to_le_bytes().as_chunks().0)
        {
            *eight = hexadecimal(u32::from_le_bytes(*bits));
        }
        Self(Id::Generated(digits))
    }

    pub(crate) fn as_str(&self) -> &str {
        match &self.0 {
            Id::FromClient(text) => text,
            // Digits are ASCII; the compiler does not know it, and `unsafe` is forbidden.
            Id::Generated(digits) => std::str::from_utf8(digits).unwrap_or("-"),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Id::FromClient(text) => text.as_bytes(),
            Id::Generated(digits) => digits,
        }
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The hexadecimal digits of a number, least significant first. The nibbles are spread to a byte each and
/// turned into ASCII all at once, without a loop: every request without an id pays for four of these.
fn hexadecimal(bits: u32) -> [u8; 8] {
    const EACH: u64 = u64::from_ne_bytes([1; 8]);
    let mut digits = u64::from(bits);
    digits = (digits | digits << 16) & 0x0000_ffff_0000_ffff;
    digits = (digits | digits << 8) & 0x00ff_00ff_00ff_00ff;
    digits = (digits | digits << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    // 1 in each byte whose digit is a letter: 10 + 6 carries into the upper half.
    let letters = (digits + 6 * EACH) >> 4 & EACH;
    (digits + u64::from(b'0') * EACH + letters * u64::from(b'a' - b'0' - 10)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_those_of_the_number() {
        for bits in [0, 1, 0x89ab_cdef, 0x0123_4567, u32::MAX, 0x9a9a_9a9a] {
            let mut digits = hexadecimal(bits);
            digits.reverse();
            assert_eq!(std::str::from_utf8(&digits).unwrap(), format!("{bits:08x}"));
        }
    }

    #[test]
    fn a_generated_id_is_valid_and_unique() {
        let ids: std::collections::HashSet<_> =
            (0..1_000).map(|_| RequestId::generate().as_str().to_owned()).collect();
        assert_eq!(ids.len(), 1_000);
        assert!(ids.iter().all(|id| id.len() == 32 && RequestId::from_client(id.as_bytes()).is_some()));
    }
}

//! Assigns each request an id: the client's, if it sent a valid one, or a generated one.

use std::cell::LazyCell;

use hyper::header::HeaderName;

use crate::http1::{HeaderId, RawHeaders, name_bit};
use crate::observe::record::RequestId;
use crate::wire::headers::REQUEST_ID;

/// The default of `--request-id-headers`, which is that of sglang-router.
pub(crate) const DEFAULT_HEADERS: [&str; 4] =
    ["x-request-id", "x-correlation-id", "x-trace-id", "request-id"];

/// Headers that must not hold the id: it is written into the log.
const SECRET: [&str; 5] = ["authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"];

/// The headers in which a client may send an id, the first one preferred.
pub(super) struct RequestIdHeaders {
    headers: Vec<IdHeader>,
    /// The bits that [`RawHeaders`] keeps of names, of all but `x-request-id`.
    name_bits: u64,
}

enum IdHeader {
    /// `x-request-id`, in which backends get the id. [`RawHeaders`] knows its place without a search.
    Forwarded,
    Other(HeaderName),
}

impl RequestIdHeaders {
    pub(super) fn new(headers: &[String]) -> Self {
        let names = headers.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
        let header = |name| if name == REQUEST_ID { IdHeader::Forwarded } else { IdHeader::Other(name) };
        let headers: Vec<_> = names.map(header).collect();
        let bits = |header: &IdHeader| match header {
            IdHeader::Forwarded => 0,
            IdHeader::Other(name) => name_bit(name.as_str().as_bytes()),
        };
        Self { name_bits: headers.iter().map(bits).fold(0, |all, bit| all | bit), headers }
    }

    /// Returns the id of a request, and makes it the only `x-request-id` among its headers.
    pub(super) fn assign(&self, request_headers: &mut RawHeaders) -> RequestId {
        // Most requests have none of the other headers, and one look at a bit set shows it. Most of the rest
        // have an id in the first header, and need not even that.
        let may_have_others = LazyCell::new(|| request_headers.may_have(self.name_bits));
        let found = self.headers.iter().find_map(|header| {
            let (is_forwarded, id) = match header {
                IdHeader::Forwarded => (true, request_headers.get(HeaderId::RequestId)),
                IdHeader::Other(name) if *may_have_others => (false, request_headers.get(name.as_str())),
                IdHeader::Other(_) => (false, None),
            };
            Some((is_forwarded, RequestId::from_client(id?)?))
        });
        let (is_in_place, id) = found.unwrap_or_else(|| (false, RequestId::generate()));
        // Not written if it is there already: to replace a header costs a search, and an allocation if the
        // block grows.
        if !is_in_place || request_headers.all(HeaderId::RequestId).nth(1).is_some() {
            request_headers.set(REQUEST_ID.as_str(), id.as_bytes());
        }
        id
    }
}

/// Checks a name of `--request-id-headers`. The error says what is wrong with it.
pub(crate) fn check_header(name: &str) -> Result<(), &'static str> {
    let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| "not the name of a header")?;
    match SECRET.contains(&parsed.as_str()) {
        true => Err("that header holds a secret, which would be in the log"),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::record::MAX_REQUEST_ID;

    fn assign(pairs: &[(&'static str, &[u8])]) -> (String, RawHeaders) {
        let ids = RequestIdHeaders::new(&DEFAULT_HEADERS.map(str::to_owned));
        let mut headers = pairs.iter().copied().collect();
        let id = ids.assign(&mut headers).as_str().to_owned();
        (id, headers)
    }

    #[test]
    fn the_first_valid_id_is_taken_and_is_the_only_one() {
        let longest = [b'a'; MAX_REQUEST_ID];
        for (pairs, expected) in [
            (&[("x-request-id", &b"r-1"[..]), ("x-request-id", b"r-2")][..], "r-1"),
            (&[("x-trace-id", b"t"), ("x-correlation-id", b"c")], "c"),
            (&[("x-request-id", b"not valid"), ("request-id", b"r")], "r"),
            (&[("x-request-id", &longest)], std::str::from_utf8(&longest).unwrap()),
        ] {
            let (id, headers) = assign(pairs);
            assert_eq!(id, expected);
            assert!(headers.all("x-request-id").eq([expected.as_bytes()]));
        }
    }

    #[test]
    fn a_missing_or_invalid_id_is_replaced() {
        let too_long = [b'a'; MAX_REQUEST_ID + 1];
        let bad: [&[u8]; 8] = [b"", b"a b", b"a\"b", b"a'b", b"a\\b", b"a\tb", b"\xc3\xa4", &too_long];
        let mut seen = std::collections::HashSet::new();
        for id in bad.map(|bad| assign(&[("x-request-id", bad)]).0).into_iter().chain([assign(&[]).0]) {
            assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
            assert!(seen.insert(id));
        }
    }

    #[test]
    fn a_header_that_holds_a_secret_is_refused() {
        assert_eq!(check_header("x-my-id"), Ok(()));
        assert!(check_header("Authorization").is_err_and(|why| why.contains("secret")));
        assert!(check_header("a b").is_err_and(|why| why.contains("not the name")));
    }
}

//! The name of a request: the client's, or one that is made here.

use std::cell::LazyCell;

use hyper::header::HeaderName;

use crate::http1::{HeaderId, RawHeaders, name_bit};
use crate::observe::record::RequestId;
use crate::wire::headers::REQUEST_ID;

/// The headers that are looked at, in this order, unless a configuration says otherwise.
pub(crate) const DEFAULT_HEADERS: [&str; 4] =
    ["x-request-id", "x-correlation-id", "x-trace-id", "request-id"];

/// What is never a name: it would be written into the log.
const SECRET: [&str; 5] = ["authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"];

/// Finds names, or makes them.
pub(super) struct RequestIds {
    headers: Vec<Header>,
    /// Of all others' names.
    shapes: u64,
}

/// Where a client may have written it.
enum Header {
    /// Where servers read it.
    Own,
    Other(HeaderName),
}

impl RequestIds {
    pub(super) fn new(headers: &[String]) -> Self {
        let names = headers.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
        let header = |name| if name == REQUEST_ID { Header::Own } else { Header::Other(name) };
        let headers: Vec<_> = names.map(header).collect();
        let shape = |header: &Header| match header {
            Header::Own => 0,
            Header::Other(name) => name_bit(name.as_str().as_bytes()),
        };
        Self { shapes: headers.iter().map(shape).fold(0, |all, shape| all | shape), headers }
    }

    /// A request's name, which is its only `x-request-id` from now on.
    pub(super) fn settle(&self, fields: &mut RawHeaders) -> RequestId {
        // Not looked for if the first header has it.
        let others = LazyCell::new(|| fields.may_have(self.shapes));
        let given = self.headers.iter().find_map(|header| {
            let (is_own, id) = match header {
                Header::Own => (true, fields.get(HeaderId::RequestId)),
                Header::Other(name) if *others => (false, fields.get(name.as_str())),
                Header::Other(_) => (false, None),
            };
            Some((is_own, RequestId::given(id?)?))
        });
        let (is_there, id) = given.unwrap_or_else(|| (false, RequestId::make()));
        // Most clients have given one name, in the right place.
        if !is_there || fields.all(HeaderId::RequestId).nth(1).is_some() {
            fields.set(REQUEST_ID.as_str(), id.as_bytes());
        }
        id
    }
}

/// What is wrong with a header that names are to be taken from.
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

    fn settled(pairs: &[(&'static str, &[u8])]) -> (String, RawHeaders) {
        let ids = RequestIds::new(&DEFAULT_HEADERS.map(str::to_owned));
        let mut fields = pairs.iter().copied().collect();
        let id = ids.settle(&mut fields).as_str().to_owned();
        (id, fields)
    }

    #[test]
    fn the_first_good_name_is_taken_and_is_the_only_one() {
        let longest = [b'a'; MAX_REQUEST_ID];
        for (pairs, expected) in [
            (&[("x-request-id", &b"r-1"[..]), ("x-request-id", b"r-2")][..], "r-1"),
            (&[("x-trace-id", b"t"), ("x-correlation-id", b"c")], "c"),
            (&[("x-request-id", b"not good"), ("request-id", b"r")], "r"),
            (&[("x-request-id", &longest)], std::str::from_utf8(&longest).unwrap()),
        ] {
            let (id, fields) = settled(pairs);
            assert_eq!(id, expected);
            assert!(fields.all("x-request-id").eq([expected.as_bytes()]));
        }
    }

    #[test]
    fn a_name_that_is_missing_or_bad_is_made() {
        let too_long = [b'a'; MAX_REQUEST_ID + 1];
        let bad: [&[u8]; 8] = [b"", b"a b", b"a\"b", b"a'b", b"a\\b", b"a\tb", b"\xc3\xa4", &too_long];
        let mut seen = std::collections::HashSet::new();
        for id in bad.map(|bad| settled(&[("x-request-id", bad)]).0).into_iter().chain([settled(&[]).0]) {
            assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
            assert!(seen.insert(id));
        }
    }

    #[test]
    fn a_secret_is_no_name() {
        assert_eq!(check_header("x-my-id"), Ok(()));
        assert!(check_header("Authorization").is_err_and(|why| why.contains("secret")));
        assert!(check_header("a b").is_err_and(|why| why.contains("not the name")));
    }
}

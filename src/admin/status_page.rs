//! The status page: one constant document that makes all it shows from `/metrics`.
//!
//! It is sent as it is. What browsers do that other programs do not, is here too: they
//! can show a key by HTTP Basic authentication only.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};

use crate::error::OwnResponse;
use crate::http1::{HeaderId, RawHeaders};

const PAGE: &str = include_str!("ui.html");

/// Nothing but the page's own script and style, and questions to this router. The hashes are of what is between the
/// tags; a browser says which ones it wants (`tests/ui.rs`).
const POLICY: &str = concat!(
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; ",
    "frame-ancestors 'none'; script-src 'sha256-5tcZCZBANVanGX/gJZNDXTlcij326sn9FVpcow2VEl0='; ",
    "style-src 'sha256-bApIiYi/462w7aMWn2VvB2MaUHZU8Ryi8gKPORNmV4U='",
);

const AUTHORIZATION: &str = "authorization";

const HEADERS: [(HeaderName, &str); 5] = [
    (CONTENT_TYPE, "text/html; charset=utf-8"),
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CACHE_CONTROL, "no-store"),
    (REFERRER_POLICY, "no-referrer"),
];

/// The page.
pub(super) fn page() -> OwnResponse {
    let mut reply = Response::new(Full::new(Bytes::from_static(PAGE.as_bytes()).into()));
    for (name, value) in HEADERS {
        reply.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    reply
}

/// A refusal. Whoever has no key that is good is asked for one, as browsers understand it.
pub(super) fn refusal(mut reply: OwnResponse) -> OwnResponse {
    const BASIC: HeaderValue = HeaderValue::from_static(r#"Basic realm="mini-lb", charset="UTF-8""#);
    if reply.status() == StatusCode::UNAUTHORIZED {
        reply.headers_mut().insert(WWW_AUTHENTICATE, BASIC);
    }
    reply
}

/// The headers, with the password of Basic authentication as the key: `Bearer`. Only for the page, which changes
/// nothing: browsers add a password by themselves, whichever page has made the request.
pub(super) fn with_bearer(fields: &RawHeaders) -> RawHeaders {
    let mut changed = fields.clone();
    let mut shown = fields.all(HeaderId::Authorization);
    if let (Some(Some(bearer)), None) = (shown.next().map(bearer), shown.next()) {
        changed.set(AUTHORIZATION, &bearer);
    }
    changed
}

/// RFC 7617. The user's name may be anything.
fn bearer(value: &[u8]) -> Option<Vec<u8>> {
    let (scheme, rest) = value.split_at_checked(6)?;
    let encoded = rest.trim_ascii();
    let both = if scheme.eq_ignore_ascii_case(b"basic ") { decode(encoded)? } else { return None };
    let colon = both.iter().position(|byte| *byte == b':')?;
    let bearer = [b"Bearer ", &both[colon + 1..]].concat();
    // What no header can be is no key.
    HeaderValue::from_bytes(&bearer).is_ok().then_some(bearer)
}

/// Base64 (RFC 4648, section 4), with or without its padding.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let end = text.len() - text.iter().rev().take(2).take_while(|byte| **byte == b'=').count();
    let mut bytes = Vec::with_capacity(text.len());
    let (mut bits, mut count) = (0_u32, 0);
    for byte in &text[..end] {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xfff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(values: &[&str]) -> Vec<String> {
        let fields = values.iter().map(|value| (AUTHORIZATION, value.as_bytes())).collect();
        let shown = with_bearer(&fields);
        shown.all(HeaderId::Authorization).map(|value| String::from_utf8(value.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_password_is_a_key() {
        for (shown, key) in [
            ("Basic YWRtaW46c2VjcmV0", "Bearer secret"),
            ("bASIC  OnNlY3JldA==", "Bearer secret"),
            ("Basic OnNlY3JldA", "Bearer secret"),
            ("Basic YTpiOmM=", "Bearer b:c"),
            ("Basic YTo/Pz8+fn4=", "Bearer ???>~~"),
            ("Basic YTo=", "Bearer "),
        ] {
            assert_eq!(key_of(&[shown]), [key], "{shown}");
        }
    }

    #[test]
    fn whoever_has_no_key_is_asked_for_one() {
        let asked = |status| {
            let mut reply = OwnResponse::default();
            *reply.status_mut() = status;
            refusal(reply).headers().get(WWW_AUTHENTICATE).cloned()
        };
        assert_eq!(asked(StatusCode::UNAUTHORIZED).unwrap(), r#"Basic realm="mini-lb", charset="UTF-8""#);
        assert_eq!(asked(StatusCode::FORBIDDEN), None);
    }

    #[test]
    fn anything_else_is_left_as_it_is() {
        // The last one's password has a line feed.
        let others =
            ["Bearer secret", "Basic", "Basic ", "Basic YTpi*A==", "Basic YWRtaW4=", "Basic YToKYg=="];
        for shown in others {
            assert_eq!(key_of(&[shown]), [shown]);
        }
        assert_eq!(key_of(&["Basic YTpi", "Basic YTpi"]), ["Basic YTpi", "Basic YTpi"]);
        assert!(key_of(&[]).is_empty());
    }
}

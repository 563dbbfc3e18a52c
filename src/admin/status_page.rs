//! The status page: one constant HTML document, which draws everything it shows from
//! `/metrics`.
//!
//! It has no state and no template. Authentication of browsers is here too: they can send a
//! key as the password of HTTP Basic authentication only.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Response, StatusCode};

use crate::error::OwnResponse;
use crate::http1::{HeaderId, RawHeaders};

const PAGE: &str = include_str!("../../assets/status.html");

/// Allows the page's own script and style, by the SHA-256 of what is between their tags, and requests to this
/// router. A test below prints the hashes after a change of the page.
const POLICY: &str = concat!(
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; ",
    "frame-ancestors 'none'; script-src 'sha256-/w1uXdiDJ9K3KGMyZvmzWQGvYqbVl22FnZRcht8FgFY='; ",
    "style-src 'sha256-jE7ftPOEVBkovMaBL3z9/b8Z1t7wA+43YIAMHKxOrs0='",
);

const AUTHORIZATION: &str = "authorization";

const HEADERS: [(HeaderName, &str); 5] = [
    (CONTENT_TYPE, "text/html; charset=utf-8"),
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CACHE_CONTROL, "no-store"),
    (REFERRER_POLICY, "no-referrer"),
];

/// Standard base64 (RFC 4648, section 4), with or without padding: clients differ in it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The page.
pub(super) fn page() -> OwnResponse {
    let mut response = Response::new(Full::new(Bytes::from_static(PAGE.as_bytes()).into()));
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Makes a browser ask its user for the key, if the response is 401.
pub(super) fn challenge(mut response: OwnResponse) -> OwnResponse {
    const BASIC: HeaderValue = HeaderValue::from_static(r#"Basic realm="mini-lb", charset="UTF-8""#);
    // Not with 403: without an admin key no password would help.
    if response.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, BASIC);
    }
    response
}

/// The headers with the password of Basic authentication turned into a `Bearer` key. For the page only, which
/// changes nothing: browsers send a stored password with any page's requests, so elsewhere it would allow
/// request forgery.
pub(super) fn with_bearer(headers: &RawHeaders) -> RawHeaders {
    let mut changed = headers.clone();
    let mut values = headers.all(HeaderId::Authorization);
    if let (Some(Some(bearer)), None) = (values.next().map(bearer_from_basic), values.next()) {
        changed.set(AUTHORIZATION, &bearer);
    }
    changed
}

/// `Bearer` and the password of Basic authentication (RFC 7617). The user name is ignored.
fn bearer_from_basic(value: &[u8]) -> Option<Vec<u8>> {
    let (scheme, rest) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"basic ") {
        return None;
    }
    let credentials = BASE64.decode(rest.trim_ascii()).ok()?;
    // The first colon: a user name cannot contain one, a password can (RFC 7617, section 2).
    let colon = credentials.iter().position(|byte| *byte == b':')?;
    let bearer = [b"Bearer ", &credentials[colon + 1..]].concat();
    // A password that is no header value cannot be a key, and must not be written into a header.
    HeaderValue::from_bytes(&bearer).is_ok().then_some(bearer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The `Authorization` headers after [`with_bearer`].
    fn authorization(values: &[&str]) -> Vec<String> {
        let headers = values.iter().map(|value| (AUTHORIZATION, value.as_bytes())).collect();
        let changed = with_bearer(&headers);
        changed.all(HeaderId::Authorization).map(|value| String::from_utf8(value.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_basic_password_becomes_a_bearer_key() {
        for (basic, bearer) in [
            ("Basic YWRtaW46c2VjcmV0", "Bearer secret"),
            ("bASIC  OnNlY3JldA==", "Bearer secret"),
            ("Basic OnNlY3JldA", "Bearer secret"),
            ("Basic YTpiOmM=", "Bearer b:c"),
            ("Basic YTo/Pz8+fn4=", "Bearer ???>~~"),
            ("Basic YTo=", "Bearer "),
        ] {
            assert_eq!(authorization(&[basic]), [bearer], "{basic}");
        }
    }

    #[test]
    fn only_a_401_response_carries_the_challenge() {
        let challenged = |status| {
            let mut response = OwnResponse::default();
            *response.status_mut() = status;
            challenge(response).headers().get(WWW_AUTHENTICATE).cloned()
        };
        assert_eq!(
            challenged(StatusCode::UNAUTHORIZED).unwrap(),
            r#"Basic realm="mini-lb", charset="UTF-8""#
        );
        assert_eq!(challenged(StatusCode::FORBIDDEN), None);
    }

    #[test]
    fn other_authorization_headers_are_unchanged() {
        // The password of the last one contains a line feed.
        let others =
            ["Bearer secret", "Basic", "Basic ", "Basic YTpi*A==", "Basic YWRtaW4=", "Basic YToKYg=="];
        for value in others {
            assert_eq!(authorization(&[value]), [value]);
        }
        assert_eq!(authorization(&["Basic YTpi", "Basic YTpi"]), ["Basic YTpi", "Basic YTpi"]);
        assert!(authorization(&[]).is_empty());
    }

    #[test]
    fn the_policy_has_the_hashes_of_the_pages_script_and_style() {
        let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
        let sha256 = suite.tls13().expect("a suite of TLS 1.3").common.hash_provider;
        for tag in ["script", "style"] {
            let (_, rest) = PAGE.split_once(&format!("<{tag}>")).expect("the tag");
            let (content, _) = rest.split_once(&format!("</{tag}>")).expect("its end");
            let hash = BASE64.encode(sha256.hash(content.as_bytes()).as_ref());
            let source = format!("{tag}-src 'sha256-{hash}'");
            assert!(POLICY.contains(&source), "the page has changed: {source}");
        }
    }
}

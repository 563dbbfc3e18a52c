use std::net::SocketAddr;

use super::*;

fn secret(key: &str) -> Secret {
    Secret::new(key).unwrap()
}

fn headers(pairs: &[(&'static str, &'static str)]) -> RawHeaders {
    pairs.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
}

fn with_keys(keys: &[&str]) -> AccessControl {
    let client_keys = keys.iter().map(|key| secret(key)).collect();
    AccessControl::new(AccessOptions { client_keys, ..AccessOptions::default() })
}

/// The status of the response, as in the documentation.
fn status(result: Result<(), AuthError>) -> u16 {
    match result {
        Ok(()) => 200,
        Err(AuthError::AmbiguousKey) => 400,
        Err(AuthError::MissingKey) => 401,
        Err(AuthError::AdminForbidden(_)) => 403,
    }
}

fn matches(key: &Secret, presented: &[u8]) -> bool {
    PresentedKey::new(presented).is_some_and(|presented| key.matches(&presented))
}

#[test]
fn only_the_exact_key_matches() {
    let key = secret("sk-0123456789");
    assert!(matches(&key, b"sk-0123456789"));
    for wrong in
        ["", "s", "sk-012345678", "sk-0123456788", "tk-0123456789", "sk-01234567890", "SK-0123456789"]
    {
        assert!(!matches(&key, wrong.as_bytes()), "{wrong}");
    }
    // The padding byte of keys must not match as part of one.
    assert!(!matches(&key, b"sk-0123456789\0"));
    assert!(!matches(&key, &[b'a'; 10_000]));
    assert!(matches(&secret(&"a".repeat(256)), &[b'a'; 256]));
    assert!(!matches(&secret(&"a".repeat(256)), &[b'a'; 257]));
}

#[test]
fn a_key_that_no_header_can_carry_is_invalid() {
    for invalid in ["", " a", "a ", "a\nb", "ключ", "a\0", &"a".repeat(257)] {
        assert!(Secret::new(invalid).is_err(), "{invalid:?}");
    }
    assert!(Secret::new("a key with spaces").is_ok());
}

#[test]
fn debug_output_never_contains_a_key() {
    let options = AccessOptions {
        client_keys: vec![secret("hidden-1")],
        admin_key: Some(secret("hidden-2")),
        worker_key: Some(secret("hidden-3")),
        worker_key_replaces: true,
        ..AccessOptions::default()
    };
    let printed = format!("{options:?} {:?}", options.worker_key.as_ref().unwrap().to_header());
    let access = AccessControl::new(options);
    let printed = format!(
        "{printed} {access:?} {:?} {:?}",
        access.backend_headers(),
        access.authorize(&RawHeaders::default())
    );
    assert!(!printed.contains("hidden"), "{printed}");
}

#[test]
fn a_client_needs_one_of_the_keys() {
    let access = with_keys(&["old", "new"]);
    for (value, expected) in [
        ("Bearer old", 200),
        ("Bearer new", 200),
        ("bearer new", 200),
        ("BEARER   new", 200),
        ("Bearernew", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer newer", 401),
        ("Bearer ne", 401),
        ("Bearer New", 401),
        ("Bearer old, Bearer new", 401),
        ("Basic new", 401),
        ("new", 401),
        ("", 401),
    ] {
        assert_eq!(
            status(access.authorize(&headers(&[("authorization", value)])).check()),
            expected,
            "{value}"
        );
    }
    assert_eq!(status(access.authorize(&RawHeaders::default()).check()), 401);
    let twice = headers(&[("authorization", "Bearer old"), ("authorization", "Bearer old")]);
    assert_eq!(status(access.authorize(&twice).check()), 400);
    access.reload(AccessOptions::default());
    assert_eq!(status(access.authorize(&RawHeaders::default()).check()), 200);
}

#[test]
fn admin_requests_need_loopback_or_the_admin_key() {
    let local = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"];
    let remote = ["10.0.0.1:1", "[::ffff:10.0.0.1]:1", "[fe80::1]:1", "128.0.0.1:1"];
    let peer = |text: &str| text.parse::<SocketAddr>().unwrap();
    let open = with_keys(&["client"]);
    for text in local {
        assert_eq!(status(open.check_admin(Some(peer(text)), &RawHeaders::default())), 200, "{text}");
    }
    for text in remote {
        let client = headers(&[("authorization", "Bearer client")]);
        assert_eq!(status(open.check_admin(Some(peer(text)), &client)), 403, "{text}");
    }
    let keyed =
        AccessControl::new(AccessOptions { admin_key: Some(secret("admin")), ..AccessOptions::default() });
    for text in local.iter().chain(&remote) {
        let with_key = |value| headers(&[("authorization", value)]);
        assert_eq!(status(keyed.check_admin(Some(peer(text)), &RawHeaders::default())), 401, "{text}");
        assert_eq!(status(keyed.check_admin(Some(peer(text)), &with_key("Bearer client"))), 401, "{text}");
        assert_eq!(status(keyed.check_admin(Some(peer(text)), &with_key("Bearer admin"))), 200, "{text}");
    }
}

#[test]
fn pages_of_other_origins_are_forbidden_without_an_admin_key() {
    let access = AccessControl::new(AccessOptions::default());
    let peer = Some("127.0.0.1:1".parse().unwrap());
    for (origin, expected) in [
        ("http://127.0.0.1:29000", 200),
        ("https://127.0.0.1:29000", 200),
        ("http://evil.example", 403),
        ("null", 403),
    ] {
        let request = headers(&[("host", "127.0.0.1:29000"), ("origin", origin)]);
        assert_eq!(status(access.check_admin(peer, &request)), expected, "{origin}");
    }
}

#[test]
fn links_and_images_of_other_sites_are_forbidden_without_an_admin_key() {
    let access = AccessControl::new(AccessOptions::default());
    let peer = Some("127.0.0.1:1".parse().unwrap());
    for (site, expected) in [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)] {
        let request = headers(&[("host", "127.0.0.1:29000"), ("sec-fetch-site", site)]);
        assert_eq!(status(access.check_admin(peer, &request)), expected, "{site}");
    }
}

#[test]
fn an_origin_is_a_scheme_and_a_host_without_path_or_wildcard() {
    for (text, is_valid) in [
        ("*", true),
        ("https://chat.example.com", true),
        ("http://localhost:3000", true),
        ("http://[::1]:3000", true),
        ("chrome-extension://abcdef", true),
        ("https://chat.example.com/", false),
        ("https://Chat.example.com", false),
        ("chat.example.com", false),
        ("https://", false),
        ("https://*.example.com", false),
        ("null", false),
        ("", false),
    ] {
        assert_eq!(Origins::new(vec![text.to_owned()]).is_ok(), is_valid, "{text}");
    }
}

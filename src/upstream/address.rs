//! The address of a backend: its URL, parsed and checked.
//!
//! Names are not resolved here (`dial` does that for each connection).

use hyper::Uri;
use rustls::pki_types::ServerName;

/// Longest base path. It is copied into each request.
const MAX_BASE_PATH: usize = 256;

/// The address of a backend.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    /// `http://host:port` or `https://host:port` and the base path, without a trailing slash: how logs and
    /// errors name the backend.
    pub(crate) url: String,
    /// `host:port` in lower case: the `Host` header.
    pub(crate) authority: String,
    /// What requests to the backend have before the path that the client asked for, such as `/llm-a`: a
    /// gateway in front of servers may tell them apart by it. Empty, or with a slash first and none last.
    pub(crate) base_path: String,
    /// IPv6 in brackets, as SGLang expects its `bootstrap_host`.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The name that the server's certificate must be valid for; `None` for `http://`.
    pub(crate) tls_name: Option<ServerName<'static>>,
}

impl Address {
    /// Parses a server's URL. The error says what is wrong with it.
    pub(crate) fn parse(url: &str) -> Result<Self, &'static str> {
        const NO_URL: &str = "not a URL such as http://10.0.0.1:30000";
        // hyper drops it without an error.
        if url.contains('#') {
            return Err("a fragment (what follows #) is never sent to a server; remove it");
        }
        let uri: Uri = url.parse().map_err(|_| NO_URL)?;
        let (scheme, default_port) = match uri.scheme_str() {
            Some("http") => ("http", 80),
            Some("https") => ("https", 443),
            _ => return Err("a server's URL must begin with http:// or https://"),
        };
        let authority = uri.authority().ok_or(NO_URL)?;
        // They would be ignored: the router authenticates with --worker-api-key.
        if authority.as_str().contains('@') {
            return Err("user names and passwords in a URL are not supported");
        }
        let base_path = checked_base_path(&uri)?;
        // `port_u16` is `None` also for "http://host:" and for a port over 65535, which must not mean the
        // default. Searched for after the last ']': an IPv6 address has colons of its own.
        let has_port = authority.as_str().rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        let port = match authority.port_u16() {
            Some(0) => return Err("port 0 is not a server's port"),
            Some(port) => port,
            None if has_port => return Err("the port is not a number between 1 and 65535"),
            None => default_port,
        };
        let host = checked_host(&authority.host().to_ascii_lowercase())
            .ok_or("the host is not a name or an address")?;
        let authority = format!("{host}:{port}");
        let tls_name = match scheme {
            "https" => Some(tls_name(&host).ok_or("the host is not a name that a certificate can be for")?),
            _ => None,
        };
        let url = format!("{scheme}://{authority}{base_path}");
        Ok(Self { url, authority, base_path, host, port, tls_name })
    }

    /// The identity of a server across configuration, DNS and API: `host:port` and the base path. Without the
    /// scheme: one port does not speak both HTTP and HTTPS.
    pub(crate) fn key(&self) -> &str {
        self.url.split_once("://").map_or(&self.url, |(_, key)| key)
    }
}

/// The path of a server's URL without its last slash, if requests can be sent below it.
fn checked_base_path(uri: &Uri) -> Result<String, &'static str> {
    // It would have to go behind the path of each request, which may have a query of its own.
    if uri.query().is_some() {
        return Err("a query (what follows ?) cannot be part of a server's URL; remove it");
    }
    let path = uri.path().strip_suffix('/').unwrap_or(uri.path());
    // Gateways resolve or merge them, each in its own way: then the requests would go elsewhere.
    let is_named = |segment: &str| !matches!(segment, "" | "." | "..");
    if !path.split('/').skip(1).all(is_named) {
        return Err("the path has an empty segment or a dot segment");
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~:@+,=".contains(&byte);
    if !path.bytes().all(is_plain) {
        return Err("the path may have letters, digits and any of -._~:@+,= only");
    }
    match path.len() {
        ..=MAX_BASE_PATH => Ok(path.to_owned()),
        _ => Err("the path has more than 256 bytes"),
    }
}

fn tls_name(host: &str) -> Option<ServerName<'static>> {
    // Certificates name IPv6 addresses without brackets.
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(bare.to_owned()).ok()
}

/// A host name or address as SGLang expects it in `bootstrap_host`: IPv6 in brackets, which may be missing in
/// `host`. Only characters that need no JSON escapes are accepted, as the field is spliced into request
/// bodies.
pub(crate) fn checked_host(host: &str) -> Option<String> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    if bare.parse::<std::net::Ipv6Addr>().is_ok() {
        return Some(format!("[{bare}]"));
    }
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    (!host.is_empty() && host.bytes().all(is_allowed)).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_parsed_into_host_and_port() {
        let parsed = |url| {
            let address = Address::parse(url).unwrap();
            (address.url, address.host, address.port)
        };
        let expected = |url: &str, host: &str, port| (url.to_owned(), host.to_owned(), port);
        assert_eq!(
            parsed("http://H.example:30000/"),
            expected("http://h.example:30000", "h.example", 30_000)
        );
        assert_eq!(parsed("http://10.0.0.1"), expected("http://10.0.0.1:80", "10.0.0.1", 80));
        assert_eq!(parsed("http://[FD00::1]:8"), expected("http://[fd00::1]:8", "[fd00::1]", 8));
    }

    #[test]
    fn a_path_is_what_requests_begin_with() {
        for (url, base_path, key) in [
            ("http://H/llm-a", "/llm-a", "h:80/llm-a"),
            ("http://h:1/a/B_c~1/", "/a/B_c~1", "h:1/a/B_c~1"),
            ("https://h/", "", "h:443"),
        ] {
            let address = Address::parse(url).unwrap();
            assert_eq!((address.base_path.as_str(), address.key()), (base_path, key), "{url}");
            assert_eq!(address.url, format!("{}{key}", &url[..url.find("://").unwrap() + 3]));
        }
        assert!(Address::parse(&format!("http://h/{}", "a".repeat(MAX_BASE_PATH - 1))).is_ok());
        assert!(Address::parse(&format!("http://h/{}", "a".repeat(MAX_BASE_PATH))).is_err());
    }

    #[test]
    fn what_would_get_lost_of_a_url_is_refused_by_name() {
        let refused = |url| Address::parse(url).unwrap_err();
        for url in ["http://h:1#x", "http://h:1/#", "http://h/a#b"] {
            assert!(refused(url).contains('#'), "{url}");
        }
        for url in ["http://h:1?", "http://h:1/?a=b", "http://h:1/a?b"] {
            assert!(refused(url).contains('?'), "{url}");
        }
        for url in [
            "http://h//",
            "http://h//a",
            "http://h/a//b",
            "http://h/./a",
            "http://h/a/..",
            "http://h/%2e",
            "http://h/a\"b",
        ] {
            assert!(refused(url).contains("path"), "{url}");
        }
        assert!(refused("http://user:pw@h:1").contains("password"));
        assert!(refused("h:1").contains("http://"));
        assert!(refused("http:///a").contains("URL"));
    }

    #[test]
    fn https_has_its_own_default_port_and_a_name_to_verify() {
        let parsed = |url| Address::parse(url).unwrap();
        let name = |url| parsed(url).tls_name.map(|name| name.to_str().into_owned());
        assert_eq!(parsed("https://H.example").url, "https://h.example:443");
        assert_eq!(parsed("https://h:30000").authority, "h:30000");
        assert_eq!(name("https://H.example").as_deref(), Some("h.example"));
        assert_eq!(name("https://10.0.0.1:1").as_deref(), Some("10.0.0.1"));
        assert_eq!(name("https://[fd00::1]").as_deref(), Some("fd00::1"));
        assert_eq!(name("http://h.example"), None);
        assert!(Address::parse("https://-h.").is_err());
    }

    #[test]
    fn hosts_that_need_json_escapes_are_rejected() {
        assert_eq!(checked_host("::1").as_deref(), Some("[::1]"));
        assert_eq!(checked_host("[::1]").as_deref(), Some("[::1]"));
        for host in ["", "a b", "a\"b", "a\\b", "[::1", "[h]", "ü", "a:1"] {
            assert_eq!(checked_host(host), None, "{host}");
        }
    }
}

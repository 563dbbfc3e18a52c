//! CORS: which web pages may read responses (Fetch standard, section 3.3).
//!
//! Only configured origins are answered. Without a list, the backends' CORS headers pass
//! through and none are added.

use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, HeaderMap,
    HeaderName, HeaderValue, VARY,
};

use crate::http1::{HeaderId, RawHeaders};
use crate::wire::client_response::ClientResponseHead;

/// How long a browser may cache a preflight response, in seconds: Chromium before version 76 capped it at
/// this.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
/// Response headers that pages may read besides the CORS-safelisted ones.
const EXPOSED_HEADERS: HeaderValue = HeaderValue::from_static("retry-after, x-request-id");
/// Removed from backends' responses: with a list, the router alone decides.
const CORS_HEADERS: [HeaderName; 6] = [
    ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_ALLOW_CREDENTIALS,
    ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_HEADERS,
    ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE,
];

/// The origins whose pages may read responses.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origins(Vec<String>);

/// The CORS headers of one response.
#[derive(Debug, Default)]
pub(crate) enum CorsDecision {
    /// No list is configured: the backend's headers pass through.
    #[default]
    PassThrough,
    /// No CORS headers: the request has no `Origin`, or one that is not in the list.
    Deny,
    /// This origin may read the response.
    Allow(HeaderValue),
}

impl Origins {
    /// `*` matches every origin. The error is the first text that is not an origin.
    pub(crate) fn new(origins: Vec<String>) -> Result<Self, String> {
        match origins.iter().find(|origin| !is_origin(origin)) {
            Some(invalid) => Err(invalid.clone()),
            None => Ok(Self(origins)),
        }
    }

    /// Whether a list is configured.
    pub(crate) fn is_enabled(&self) -> bool {
        !self.0.is_empty()
    }

    pub(super) fn decide(&self, headers: &RawHeaders) -> CorsDecision {
        if !self.is_enabled() {
            return CorsDecision::PassThrough;
        }
        let mut origins = headers.all(HeaderId::Origin);
        match (origins.next(), origins.next()) {
            (Some(origin), None) if self.contains(origin) => {
                // The origin itself, also for `*`: one rule for both, and `Vary` keeps caches right.
                HeaderValue::from_bytes(origin).map_or(CorsDecision::Deny, CorsDecision::Allow)
            }
            // Two `Origin` headers are no browser's.
            _ => CorsDecision::Deny,
        }
    }

    fn contains(&self, origin: &[u8]) -> bool {
        self.0.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin)
    }
}

/// Whether a text is `*` or an origin as browsers serialize it (RFC 6454, section 6.2): scheme and host in
/// lower case, the port only if it is not the scheme's default, no path. Origins are compared byte by byte,
/// so others would never match.
fn is_origin(text: &str) -> bool {
    let is_authority = |rest: &str| {
        let is_allowed =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._:[]".contains(&byte);
        !rest.is_empty() && rest.bytes().all(is_allowed)
    };
    text == "*"
        || text.split_once("://").is_some_and(|(scheme, rest)| {
            !scheme.is_empty()
                && scheme.bytes().all(|byte| byte.is_ascii_lowercase() || b"+-.".contains(&byte))
                && is_authority(rest)
        })
}

impl CorsDecision {
    /// Whether an `OPTIONS` request is a preflight request that the router answers itself.
    pub(crate) fn answers_preflight(&self, headers: &RawHeaders) -> bool {
        matches!(self, Self::Allow(_)) && headers.has("access-control-request-method")
    }

    /// The headers of a preflight response: the path's methods, and whichever headers the browser asks for.
    /// Backends ignore headers that they do not know, so there is nothing to protect by a list.
    pub(crate) fn preflight(allow: &'static str, request: &RawHeaders) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(allow));
        let requested = request.get("access-control-request-headers").map(HeaderValue::from_bytes);
        if let Some(Ok(requested)) = requested {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, requested);
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        headers
    }

    /// Whether [`apply`](Self::apply) changes anything.
    pub(crate) fn changes_response(&self) -> bool {
        !matches!(self, Self::PassThrough)
    }

    /// Writes the decision into the head of a response.
    pub(crate) fn apply(self, head: &mut ClientResponseHead, is_preflight: bool) {
        let origin = match self {
            Self::PassThrough => return,
            Self::Deny => None,
            Self::Allow(origin) => Some(origin),
        };
        // A preflight response is the router's own and carries its methods and headers already.
        if !is_preflight && head.may_have_cors_headers() {
            CORS_HEADERS.iter().for_each(|name| head.remove(name));
        }
        let Some(origin) = origin else { return };
        head.set(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        // The response differs by origin, so a shared cache must not serve it to another one.
        head.add(VARY, HeaderValue::from_static("Origin"));
        if is_preflight {
            head.add(VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
        } else {
            head.set(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED_HEADERS);
        }
    }
}

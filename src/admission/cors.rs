//! Which pages may read answers: CORS, as browsers ask for it.
//!
//! Only for origins that were named. Without a list, what servers say about it is passed on and
//! nothing is added.

use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, HeaderMap,
    HeaderName, HeaderValue, VARY,
};

use crate::http1::{HeaderId, RawHeaders};
use crate::wire::client_response::ClientResponseHead;

/// How long a browser may remember what it was told, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
/// What pages may read besides what they always may.
const EXPOSED: HeaderValue = HeaderValue::from_static("retry-after, x-request-id");
/// What servers may have said, in which only the router's word counts.
const THEIRS: [HeaderName; 6] = [
    ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_ALLOW_CREDENTIALS,
    ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_HEADERS,
    ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE,
];

/// The origins whose pages may read answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origins(Vec<String>);

/// What an answer says about it.
#[derive(Debug, Default)]
pub(crate) enum CorsDecision {
    /// There is no list: what the server says.
    #[default]
    AsServersSay,
    /// Nothing: no page asks, or not one of the list.
    No,
    /// That this origin may read it.
    With(HeaderValue),
}

impl Origins {
    /// `*` is every origin. The error is what is none.
    pub(crate) fn new(origins: Vec<String>) -> Result<Self, String> {
        match origins.iter().find(|origin| !is_origin(origin)) {
            Some(bad) => Err(bad.clone()),
            None => Ok(Self(origins)),
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        !self.0.is_empty()
    }

    pub(super) fn shared(&self, fields: &RawHeaders) -> CorsDecision {
        if !self.is_on() {
            return CorsDecision::AsServersSay;
        }
        let mut origins = fields.all(HeaderId::Origin);
        match (origins.next(), origins.next()) {
            (Some(origin), None) if self.has(origin) => {
                HeaderValue::from_bytes(origin).map_or(CorsDecision::No, CorsDecision::With)
            }
            _ => CorsDecision::No,
        }
    }

    fn has(&self, origin: &[u8]) -> bool {
        self.0.iter().any(|known| known == "*" || known.as_bytes() == origin)
    }
}

/// As a browser sends it: a scheme and a host in small letters, a port if it is not the scheme's own, and nothing behind.
fn is_origin(text: &str) -> bool {
    let has_host = |rest: &str| {
        let is_part =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._:[]".contains(&byte);
        !rest.is_empty() && rest.bytes().all(is_part)
    };
    text == "*"
        || text.split_once("://").is_some_and(|(scheme, rest)| {
            !scheme.is_empty()
                && scheme.bytes().all(|byte| byte.is_ascii_lowercase() || b"+-.".contains(&byte))
                && has_host(rest)
        })
}

impl CorsDecision {
    /// Whether an `OPTIONS` request is a browser's question that has an answer.
    pub(crate) fn answers_preflight(&self, fields: &RawHeaders) -> bool {
        matches!(self, Self::With(_)) && fields.has("access-control-request-method")
    }

    /// The answer to a browser's question: which methods the path takes, and any headers that it asks for.
    pub(crate) fn preflight(allow: &'static str, asked: &RawHeaders) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(allow));
        let wanted = asked.get("access-control-request-headers").map(HeaderValue::from_bytes);
        if let Some(Ok(wanted)) = wanted {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted);
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        headers
    }

    /// Whether there is anything that [`write`](Self::write) changes.
    pub(crate) fn is_said(&self) -> bool {
        !matches!(self, Self::AsServersSay)
    }

    /// Says it in an answer that is not a preflight's.
    pub(crate) fn write(self, head: &mut ClientResponseHead, is_preflight: bool) {
        let origin = match self {
            Self::AsServersSay => return,
            Self::No => None,
            Self::With(origin) => Some(origin),
        };
        if !is_preflight && head.may_have_cors_headers() {
            THEIRS.iter().for_each(|name| head.remove(name));
        }
        let Some(origin) = origin else { return };
        head.set(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        head.add(VARY, HeaderValue::from_static("Origin"));
        if is_preflight {
            head.add(VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
        } else {
            head.set(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
    }
}

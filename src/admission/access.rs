//! Authentication: API keys of clients, the operators' key, and the key that the router
//! presents to backends.
//!
//! Decides from a request's head and its peer only: the route is not known here, and
//! nothing is read or sent.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use arc_swap::{ArcSwap, Guard};
use hyper::header::HeaderValue;

use super::secret::PresentedKey;
use super::{CorsDecision, Origins, Secret};
use crate::http1::{HeaderId, RawHeaders};

/// Authentication rules. Default: clients unauthenticated, admin requests only from loopback.
#[derive(Debug, Clone, Default)]
pub(crate) struct AccessOptions {
    /// Any of these authorizes a client. Empty: clients need no key.
    pub(crate) client_keys: Vec<Secret>,
    pub(crate) admin_key: Option<Secret>,
    /// What the router presents to backends in its own requests.
    pub(crate) worker_key: Option<Secret>,
    /// Whether `worker_key` also replaces the `Authorization` header of proxied requests.
    pub(crate) worker_key_replaces: bool,
    pub(crate) origins: Origins,
}

/// Headers that show the request was forwarded by a proxy.
const FORWARDING_HEADERS: [&str; 3] = ["forwarded", "x-forwarded-for", "x-real-ip"];

/// The authentication rules in force, shared by all workers and replaced on reload.
pub(crate) struct AccessControl {
    options: ArcSwap<AccessOptions>,
    /// Whether any rule applies to client requests. If none does, a request costs one load of this flag.
    applies_to_clients: AtomicBool,
}

/// The authorization decision for one client request.
#[derive(Debug, Default)]
pub(crate) struct AuthDecision {
    /// The CORS headers of the response.
    pub(crate) cors: CorsDecision,
    result: AuthResult,
    /// The `Authorization` header for backends, if it replaces the client's.
    replacement: Option<HeaderValue>,
}

/// Why a request is not authorized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AuthError {
    /// No key, or not one of the accepted keys.
    MissingKey,
    /// More than one `Authorization` header: proxies and servers differ in which one they read.
    AmbiguousKey,
    /// An admin request that neither comes from loopback nor carries the admin key. The text is for the
    /// client.
    AdminForbidden(&'static str),
}

#[derive(Debug, Default, Clone, Copy)]
enum AuthResult {
    #[default]
    Authorized,
    MissingKey,
    AmbiguousKey,
}

impl AccessControl {
    pub(crate) fn new(options: AccessOptions) -> Self {
        let access = Self {
            options: ArcSwap::from_pointee(AccessOptions::default()),
            applies_to_clients: false.into(),
        };
        access.reload(options);
        access
    }

    /// Replaces the rules, for requests that start from now on.
    pub(crate) fn reload(&self, options: AccessOptions) {
        let applies =
            !options.client_keys.is_empty() || options.worker_key_replaces || options.origins.is_enabled();
        self.options.store(options.into());
        self.applies_to_clients.store(applies, Relaxed);
    }

    fn options(&self) -> Guard<Arc<AccessOptions>> {
        self.options.load()
    }

    /// Applies the rules to a client's request. The caller enforces the decision with
    /// [`AuthDecision::check`], as some endpoints need no key.
    pub(crate) fn authorize(&self, headers: &RawHeaders) -> AuthDecision {
        if !self.applies_to_clients.load(Relaxed) {
            return AuthDecision::default();
        }
        let options = self.options();
        let keys = &options.client_keys;
        let result = if keys.is_empty() { AuthResult::Authorized } else { verify_key(headers, keys) };
        let replacement =
            options.worker_key.as_ref().filter(|_| options.worker_key_replaces).map(Secret::to_header);
        AuthDecision { cors: options.origins.decide(headers), result, replacement }
    }

    /// The headers of the router's own requests to backends (probes, descriptions, role switches):
    /// `Authorization`, if there is a worker key.
    pub(crate) fn backend_headers(&self) -> RawHeaders {
        let key = self.options().worker_key.as_ref().map(Secret::to_header);
        key.iter().map(|key| ("authorization", key.as_bytes())).collect()
    }

    /// Gives an operator's request the headers for backends: the admin key must not leave the router.
    pub(crate) fn replace_admin_key(&self, headers: &mut RawHeaders) {
        let options = self.options();
        // Without an admin key, what the operator sends is for the backends, as in a client's request.
        let is_kept = options.admin_key.is_none() && !options.worker_key_replaces;
        if is_kept && headers.has(HeaderId::Authorization) {
            return;
        }
        headers.remove(HeaderId::Authorization);
        self.backend_headers().iter().for_each(|header| headers.add(header.name, header.value));
    }

    /// Whether an operator shows that it is one with a key.
    pub(crate) fn has_admin_key(&self) -> bool {
        self.options().admin_key.is_some()
    }

    /// Checks that the sender may read and change the router's own state: with the admin key from anywhere
    /// or, if none is configured, from loopback.
    pub(crate) fn check_admin(
        &self,
        peer: Option<SocketAddr>,
        headers: &RawHeaders,
    ) -> Result<(), AuthError> {
        let options = self.options();
        // With a key, loopback is not exempt: on a shared machine any user can connect from it.
        if let Some(key) = &options.admin_key {
            return verify_key(headers, std::slice::from_ref(key)).check();
        }
        // An IPv4 peer of a dual-stack listener arrives as ::ffff:127.0.0.1.
        let is_loopback = peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback());
        // Through a proxy on this machine every client seems to be on loopback.
        if !is_loopback || FORWARDING_HEADERS.iter().any(|name| headers.has(*name)) {
            return Err(AuthError::AdminForbidden(
                "admin endpoints are served to loopback only; set --admin-api-key for remote access",
            ));
        }
        // Cross-site request forgery: any page that the operator's browser shows can send requests to
        // loopback.
        let host = headers.get(HeaderId::Host);
        let is_foreign = headers.get(HeaderId::Origin).is_some_and(|origin| !is_same_origin(origin, host));
        // A link or an image sends no `Origin` with its `GET`, but browsers say where it comes from (Fetch
        // Metadata).
        let site = headers.get("sec-fetch-site");
        if is_foreign || site.is_some_and(|site| ![&b"same-origin"[..], b"none"].contains(&site)) {
            return Err(AuthError::AdminForbidden(
                "admin endpoints are not served to pages of other origins; set --admin-api-key to allow them",
            ));
        }
        Ok(())
    }
}

impl AuthDecision {
    /// Rejects a request that needs a key and has no accepted one.
    pub(crate) fn check(&self) -> Result<(), AuthError> {
        self.result.check()
    }

    /// Replaces the client's `Authorization` header with the backends' key, if that is configured.
    pub(crate) fn replace_authorization(&mut self, headers: &mut RawHeaders) {
        if let Some(value) = self.replacement.take() {
            headers.set("authorization", value.as_bytes());
        }
    }
}

impl AuthResult {
    fn check(self) -> Result<(), AuthError> {
        match self {
            Self::Authorized => Ok(()),
            Self::MissingKey => Err(AuthError::MissingKey),
            Self::AmbiguousKey => Err(AuthError::AmbiguousKey),
        }
    }
}

/// Looks for one of `keys` in the `Authorization` header.
fn verify_key(headers: &RawHeaders, keys: &[Secret]) -> AuthResult {
    let mut values = headers.all(HeaderId::Authorization);
    let (first, second) = (values.next(), values.next());
    // Also if both carry the same key: a proxy in front may have checked the other one.
    if second.is_some() {
        return AuthResult::AmbiguousKey;
    }
    let Some(presented) = first.and_then(bearer_token).and_then(PresentedKey::new) else {
        return AuthResult::MissingKey;
    };
    // No early exit: the time must not reveal which of the keys matched.
    let is_accepted = keys.iter().fold(false, |accepted, key| key.matches(&presented) | accepted);
    if is_accepted { AuthResult::Authorized } else { AuthResult::MissingKey }
}

/// The token of `Bearer TOKEN`. The scheme is case-insensitive (RFC 9110, section 11.1).
fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(6)?;
    let rest = rest.strip_prefix(b" ")?;
    scheme.eq_ignore_ascii_case(b"bearer").then(|| rest.trim_ascii_start())
}

/// Whether an `Origin` is that of the page's own host. The scheme is ignored: TLS may end at a proxy.
fn is_same_origin(origin: &[u8], host: Option<&[u8]>) -> bool {
    let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
    authority.zip(host).is_some_and(|(authority, host)| authority == host)
}

impl fmt::Debug for AccessControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessControl")
    }
}

#[cfg(test)]
mod tests;

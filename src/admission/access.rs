//! Who may ask: keys of clients and of operators, the key that the router shows to
//! servers, and the origins whose pages may read answers.
//!
//! Heads only: what is asked for is not known here, and nothing is read or sent.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use arc_swap::{ArcSwap, Guard};
use hyper::header::HeaderValue;

use super::secret::Shown;
use super::{CorsDecision, Origins, Secret};
use crate::http1::{HeaderId, RawHeaders};

/// What is asked of whom. The default asks nothing of clients, and that operators are on this machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct AccessOptions {
    /// Each of them is good. None: clients need no key.
    pub(crate) client_keys: Vec<Secret>,
    pub(crate) admin_key: Option<Secret>,
    /// What the router shows to servers.
    pub(crate) worker_key: Option<Secret>,
    /// Whether servers get it in the place of what clients sent.
    pub(crate) worker_key_replaces: bool,
    pub(crate) origins: Origins,
}

/// What says that a request is not its peer's own: the word of a proxy.
const FORWARDING_HEADERS: [&str; 3] = ["forwarded", "x-forwarded-for", "x-real-ip"];

/// The rules as they are now, for all workers.
pub(crate) struct AccessControl {
    now: ArcSwap<AccessOptions>,
    /// Whether any of it concerns clients' requests, so that those which it does not look at one flag only.
    concerns_clients: AtomicBool,
}

/// What follows for a client's request from the rules.
#[derive(Debug, Default)]
pub(crate) struct AuthDecision {
    /// Whether a page may read the answer.
    pub(crate) shared: CorsDecision,
    /// Whether the request has a key that is good, or needs none.
    verdict: AuthResult,
    /// What servers get as `Authorization`, instead of the client's.
    instead: Option<HeaderValue>,
}

/// Why a request may not do what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AuthError {
    /// No key, or not one of the accepted keys.
    MissingKey,
    /// More than one `Authorization` header: proxies and servers differ in which one they read.
    AmbiguousKey,
    /// An admin request that is neither from this machine nor has the admin key; the sentence says which.
    AdminForbidden(&'static str),
}

#[derive(Debug, Default, Clone, Copy)]
enum AuthResult {
    #[default]
    Good,
    Missing,
    Ambiguous,
}

impl AccessControl {
    pub(crate) fn new(options: AccessOptions) -> Self {
        let access =
            Self { now: ArcSwap::from_pointee(AccessOptions::default()), concerns_clients: false.into() };
        access.reload(options);
        access
    }

    /// Takes other rules over, for requests that begin from now on.
    pub(crate) fn reload(&self, options: AccessOptions) {
        let concerns =
            !options.client_keys.is_empty() || options.worker_key_replaces || options.origins.is_on();
        self.now.store(options.into());
        self.concerns_clients.store(concerns, Relaxed);
    }

    fn now(&self) -> Guard<Arc<AccessOptions>> {
        self.now.load()
    }

    /// The terms for a client's request.
    pub(crate) fn terms(&self, fields: &RawHeaders) -> AuthDecision {
        if !self.concerns_clients.load(Relaxed) {
            return AuthDecision::default();
        }
        let rules = self.now();
        let verdict =
            if rules.client_keys.is_empty() { AuthResult::Good } else { verdict(fields, &rules.client_keys) };
        let instead = rules.worker_key.as_ref().filter(|_| rules.worker_key_replaces).map(Secret::to_header);
        AuthDecision { shared: rules.origins.shared(fields), verdict, instead }
    }

    /// What the router's own questions to servers say as `Authorization`.
    pub(crate) fn own_fields(&self) -> RawHeaders {
        let key = self.now().worker_key.as_ref().map(Secret::to_header);
        key.iter().map(|key| ("authorization", key.as_bytes())).collect()
    }

    /// Whether whoever sent this may see and change the router's own state: with the operators' key from anywhere, or
    /// if there is none, from this machine.
    pub(crate) fn may_administrate(
        &self,
        peer: Option<SocketAddr>,
        fields: &RawHeaders,
    ) -> Result<(), AuthError> {
        let rules = self.now();
        if let Some(key) = &rules.admin_key {
            return verdict(fields, std::slice::from_ref(key)).check();
        }
        let is_local = peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback());
        // A proxy on this machine says that it speaks for somebody else.
        if !is_local || FORWARDING_HEADERS.iter().any(|name| fields.has(*name)) {
            return Err(AuthError::AdminForbidden(
                "without --admin-api-key this is answered on loopback only",
            ));
        }
        // A page that the operator looks at can send requests from this machine too.
        if fields.get(HeaderId::Origin).is_some_and(|origin| !is_of(origin, fields.get(HeaderId::Host))) {
            return Err(AuthError::AdminForbidden(
                "without --admin-api-key this is not answered to pages of other origins",
            ));
        }
        Ok(())
    }
}

impl AuthDecision {
    /// Refuses a request that needs a key and has none.
    pub(crate) fn check(&self) -> Result<(), AuthError> {
        self.verdict.check()
    }

    /// Puts the servers' key in the place of the client's, if that is asked for.
    pub(crate) fn change(&mut self, fields: &mut RawHeaders) {
        if let Some(value) = self.instead.take() {
            fields.set("authorization", value.as_bytes());
        }
    }
}

impl AuthResult {
    fn check(self) -> Result<(), AuthError> {
        match self {
            Self::Good => Ok(()),
            Self::Missing => Err(AuthError::MissingKey),
            Self::Ambiguous => Err(AuthError::AmbiguousKey),
        }
    }
}

/// Compares with all keys, so that the time says nothing of which one it was.
fn verdict(fields: &RawHeaders, keys: &[Secret]) -> AuthResult {
    let mut values = fields.all(HeaderId::Authorization);
    let (first, second) = (values.next(), values.next());
    if second.is_some() {
        return AuthResult::Ambiguous;
    }
    let Some(shown) = first.and_then(bearer).and_then(Shown::new) else { return AuthResult::Missing };
    let is_good = keys.iter().fold(false, |good, key| key.is(&shown) | good);
    if is_good { AuthResult::Good } else { AuthResult::Missing }
}

/// What comes after the scheme, whose case does not matter (RFC 9110, section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(6)?;
    let rest = rest.strip_prefix(b" ")?;
    scheme.eq_ignore_ascii_case(b"bearer").then(|| rest.trim_ascii_start())
}

/// Whether an origin is the host that was asked.
fn is_of(origin: &[u8], host: Option<&[u8]>) -> bool {
    let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
    authority.zip(host).is_some_and(|(authority, host)| authority == host)
}

impl fmt::Debug for AccessControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Access")
    }
}

#[cfg(test)]
mod tests;

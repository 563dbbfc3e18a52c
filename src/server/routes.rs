//! Which part of the router answers a path, and with which methods.
//!
//! The table of all routes is in `admin`; those that generate are found here first.

use hyper::Method;
use hyper::http::uri::PathAndQuery;

use crate::admin::{Access, RouteAction, RouteEntry, RouterEndpoint, allows};
use crate::error::Error;
use crate::http1::RequestHead;
use crate::observe::record::Endpoint;
use crate::wire::shape::Dialect;

/// Who answers a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    /// A pair of servers or a plain one, through the proxy; without a dialect, a plain one only.
    Generate(Option<Dialect>, Endpoint),
    /// The router itself, from what it knows or what servers say.
    Router(RouterEndpoint, Access),
    /// The API that lists and changes servers, for operators.
    Workers,
}

impl Route {
    /// Finds the route of a path. The endpoint is known even if the method is not one of its. `is_regular`:
    /// whether the servers are plain ones.
    pub(super) fn find(
        method: &Method,
        path: &str,
        is_regular: impl Fn() -> bool,
    ) -> (Endpoint, Result<Self, Error>) {
        let (route, allow) = match path {
            "/generate" => (Self::Generate(Some(Dialect::Generate), Endpoint::Generate), "POST, PUT"),
            "/v1/chat/completions" => (Self::Generate(Some(Dialect::Chat), Endpoint::Chat), "POST"),
            "/v1/completions" => (Self::Generate(Some(Dialect::Completions), Endpoint::Completions), "POST"),
            "/v1/responses" => (Self::Generate(Some(Dialect::Responses), Endpoint::Responses), "POST"),
            "/v1/messages" => (Self::Generate(Some(Dialect::Messages), Endpoint::Messages), "POST"),
            "/invocations" => (Self::Generate(Some(Dialect::Chat), Endpoint::Invocations), "POST"),
            // After the generation routes, which are nearly all requests.
            _ => return Self::find_other(method, path, is_regular()),
        };
        let allowed = if allows(allow, method) { Ok(route) } else { Err(Error::MethodNotAllowed { allow }) };
        (route.endpoint(), allowed)
    }

    /// Finds the route of a path that does not generate.
    fn find_other(method: &Method, path: &str, is_regular: bool) -> (Endpoint, Result<Self, Error>) {
        let Some(entry) = RouteEntry::find(path) else { return (Endpoint::Other, Err(Error::NotFound)) };
        let (endpoint, route) = match entry.action {
            RouteAction::ByRouter(endpoint) => {
                let route = Self::Router(endpoint, entry.access);
                (route.endpoint(), Ok(route))
            }
            RouteAction::ByWorkersApi => (Endpoint::Workers, Ok(Self::Workers)),
            RouteAction::OnPlainServer(_) if is_regular => {
                (Endpoint::OneServer, Ok(Self::Generate(None, Endpoint::OneServer)))
            }
            // What is not for one server of several is not possible, whatever they are.
            RouteAction::NotPossible(reason) if is_regular => {
                (Endpoint::Other, Err(Error::NotServed(reason)))
            }
            RouteAction::NotPossible(reason) | RouteAction::OnPlainServer(reason) => {
                (Endpoint::NotPossible, Err(Error::NotPossible(reason)))
            }
            RouteAction::NotServed(instead) => (Endpoint::Other, Err(Error::NotServed(instead))),
            // All of them were found before.
            RouteAction::OnPair => (Endpoint::Other, Err(Error::NotFound)),
        };
        let allow = entry.allow;
        (endpoint, if allows(allow, method) { route } else { Err(Error::MethodNotAllowed { allow }) })
    }

    /// The endpoint as metrics and logs name it.
    fn endpoint(self) -> Endpoint {
        match self {
            Self::Generate(_, endpoint) => endpoint,
            Self::Router(endpoint, _) => match endpoint {
                RouterEndpoint::Root | RouterEndpoint::Version => Endpoint::Other,
                RouterEndpoint::Health => Endpoint::Health,
                RouterEndpoint::Ready => Endpoint::Ready,
                RouterEndpoint::HealthGenerate => Endpoint::HealthGenerate,
                RouterEndpoint::FlushCache => Endpoint::FlushCache,
                RouterEndpoint::AbortRequest
                | RouterEndpoint::Session
                | RouterEndpoint::AllServers { .. } => Endpoint::FanOut,
                RouterEndpoint::ServerInfo => Endpoint::ServerInfo,
                RouterEndpoint::Loads | RouterEndpoint::WorkerLoads => Endpoint::Loads,
                RouterEndpoint::ModelInfo => Endpoint::ModelInfo,
                RouterEndpoint::OneServer { .. } => Endpoint::OneServer,
            },
            Self::Workers => Endpoint::Workers,
        }
    }
}

/// Makes one path of those that differ in doubled and trailing slashes only, for the servers as well.
/// Segments `.` and `..` stay: no route has them.
pub(super) fn merge_slashes(head: &mut RequestHead) {
    let path = head.path();
    let is_clean =
        memchr::memmem::find(path.as_bytes(), b"//").is_none() && (path.len() == 1 || !path.ends_with('/'));
    // A server's URL may be written out in the path of the workers API.
    if is_clean || path.strip_prefix("/workers/").is_some_and(|id| id.contains("://")) {
        return;
    }
    let mut merged = String::with_capacity(head.target.as_str().len());
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        merged.push('/');
        merged.push_str(segment);
    }
    if merged.is_empty() {
        merged.push('/');
    }
    if let Some(query) = head.query() {
        merged.push('?');
        merged.push_str(query);
    }
    // Valid, as it is made of parts of a valid one; if it were not, the path would have no route.
    if let Ok(target) = PathAndQuery::try_from(merged) {
        head.target = target;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::parse_outgoing_head;

    fn merged(target: &str) -> String {
        let (mut head, _) = parse_outgoing_head(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        merge_slashes(&mut head);
        head.target.to_string()
    }

    #[test]
    fn paths_that_differ_in_slashes_only_are_one() {
        for (target, expected) in [
            ("/generate", "/generate"),
            ("/generate/", "/generate"),
            ("//v1///chat//completions//?a=//b/", "/v1/chat/completions?a=//b/"),
            ("/", "/"),
            ("//", "/"),
            ("/?x", "/?x"),
            ("///?x=/", "/?x=/"),
            ("/v1/./models/../x/", "/v1/./models/../x"),
            ("/workers/", "/workers"),
            ("/workers/http://decode-0:80", "/workers/http://decode-0:80"),
            ("//workers//7/", "/workers/7"),
        ] {
            assert_eq!(merged(target), expected, "{target}");
        }
    }

    #[test]
    fn routes_that_generate_have_the_methods_of_the_table() {
        for path in [
            "/generate",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/invocations",
        ] {
            let entry = RouteEntry::find(path).expect("a row");
            assert_eq!(entry.action, RouteAction::OnPair, "{path}");
            let (_, refused) = Route::find(&Method::TRACE, path, || false);
            assert!(
                matches!(refused, Err(Error::MethodNotAllowed { allow }) if allow == entry.allow),
                "{path}"
            );
        }
    }
}

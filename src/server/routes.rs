//! Which part of the router answers a path, and with which methods.

use hyper::Method;

use crate::admin::{RouterEndpoint, WorkersApi, allows};
use crate::error::Error;
use crate::observe::record::Endpoint;
use crate::wire::shape::Dialect;

/// Who answers a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    /// A pair of servers, through the proxy.
    Generate(Dialect, Endpoint),
    /// The router itself, from what it knows or what servers say.
    Router(RouterEndpoint),
    /// The API that lists and changes servers, for operators.
    Workers,
}

impl Route {
    /// Finds the route of a path. The endpoint is known even if the method is not one of its.
    pub(super) fn find(method: &Method, path: &str) -> (Endpoint, Result<Self, Error>) {
        let (route, allow) = match path {
            "/generate" => (Self::Generate(Dialect::Generate, Endpoint::Generate), "POST, PUT"),
            "/v1/chat/completions" => (Self::Generate(Dialect::Chat, Endpoint::Chat), "POST"),
            "/v1/completions" => (Self::Generate(Dialect::Completions, Endpoint::Completions), "POST"),
            "/v1/responses" => (Self::Generate(Dialect::Responses, Endpoint::Responses), "POST"),
            "/v1/messages" => (Self::Generate(Dialect::Messages, Endpoint::Messages), "POST"),
            "/invocations" => (Self::Generate(Dialect::Chat, Endpoint::Invocations), "POST"),
            // After the generation routes, which are nearly all requests.
            _ => match (RouterEndpoint::at(path), WorkersApi::allow(path)) {
                (Some(endpoint), _) => (Self::Router(endpoint), endpoint.allow()),
                (None, Some(allow)) => (Self::Workers, allow),
                (None, None) => return (Endpoint::Other, Err(Error::NotFound)),
            },
        };
        let allowed = if allows(allow, method) { Ok(route) } else { Err(Error::MethodNotAllowed { allow }) };
        (route.endpoint(), allowed)
    }

    /// Whether a request needs none of the clients' keys: a load balancer that probes the router has none.
    pub(super) fn is_probe(self) -> bool {
        matches!(self, Self::Router(RouterEndpoint::Health | RouterEndpoint::Ready))
    }

    /// The endpoint as metrics and logs name it.
    fn endpoint(self) -> Endpoint {
        match self {
            Self::Generate(_, endpoint) => endpoint,
            Self::Router(RouterEndpoint::Health) => Endpoint::Health,
            Self::Router(RouterEndpoint::Ready) => Endpoint::Ready,
            Self::Router(RouterEndpoint::HealthGenerate) => Endpoint::HealthGenerate,
            Self::Router(RouterEndpoint::FlushCache) => Endpoint::FlushCache,
            Self::Router(RouterEndpoint::ServerInfo) => Endpoint::ServerInfo,
            Self::Router(RouterEndpoint::ModelInfo) => Endpoint::ModelInfo,
            Self::Workers => Endpoint::Workers,
        }
    }
}

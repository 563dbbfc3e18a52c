//! The router's endpoints besides generation.
//!
//! Each is answered by the router itself, by one server, or by all of them. A server that
//! fails is named in the response, never left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Response, StatusCode};
use serde_json::json;

use super::admin_request::query_timeout;
use super::failures::{failure_response, failures};
use super::query::{QueryResponse, ServerQuery, query, query_all};
use super::server_info;
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::RequestHead;
use crate::upstream::{Backend, LiveFleet, Pools, Role};
use crate::wire::client_response::ClientResponseHead;

/// Longest time for a server to answer, unless the request has a `timeout`. `/health_generate` of SGLang
/// takes a second, everything else milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How much longer than `timeout` the router waits: SGLang's `/flush_cache` takes the same parameter and
/// answers at the end of it why it has not flushed.
const ANSWER_MARGIN: Duration = Duration::from_millis(250);

/// An endpoint that does not generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouterEndpoint {
    /// Liveness: the router runs.
    Health,
    /// Readiness: the router has healthy servers of both roles and is not shutting down.
    Ready,
    /// Whether every server can generate.
    HealthGenerate,
    /// Flushes every server's cache.
    FlushCache,
    /// The descriptions of all servers.
    ServerInfo,
    /// The model's description by one server: all serve the same model.
    ModelInfo,
}

/// Whether the router is shutting down; clones share the flag.
#[derive(Clone, Default)]
pub(crate) struct Draining(Arc<AtomicBool>);

impl Draining {
    pub(crate) fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Handles all endpoints of [`RouterEndpoint`].
pub(crate) struct RouterEndpoints {
    fleet: Arc<LiveFleet>,
    pools: Arc<Pools>,
    draining: Draining,
}

impl RouterEndpoints {
    pub(crate) fn new(fleet: Arc<LiveFleet>, pools: Arc<Pools>, draining: Draining) -> Self {
        Self { fleet, pools, draining }
    }

    pub(crate) async fn handle(
        &self,
        endpoint: RouterEndpoint,
        head: RequestHead,
    ) -> Result<OwnResponse, Error> {
        match endpoint {
            // Liveness only: a restart of the router would not help its servers.
            RouterEndpoint::Health => Ok(Response::default()),
            RouterEndpoint::Ready => self.ready(),
            RouterEndpoint::HealthGenerate => self.health_generate(head).await,
            RouterEndpoint::FlushCache => self.flush_cache(head).await,
            RouterEndpoint::ServerInfo => self.server_info(head).await,
            RouterEndpoint::ModelInfo => self.model_info(head).await,
        }
    }

    fn ready(&self) -> Result<OwnResponse, Error> {
        let has_none_ready = |servers: &[Arc<Backend>]| !servers.iter().any(|server| server.is_ready());
        let fleet = self.fleet.now();
        // First: load balancers in front must stop sending requests whatever the servers do.
        let reason = if self.draining.has_begun() {
            "the router is shutting down"
        } else if has_none_ready(fleet.prefill()) {
            "no prefill server is known to be healthy"
        } else if has_none_ready(fleet.decode()) {
            "no decode server is known to be healthy"
        } else {
            return Ok(Response::default());
        };
        Err(Error::NotReady(reason))
    }

    async fn health_generate(&self, head: RequestHead) -> Result<OwnResponse, Error> {
        let responses = self.ask_all(head).await?;
        let failed = failures(&responses);
        if failed.is_empty() {
            return Ok(Response::default());
        }
        let (status, message) = (StatusCode::SERVICE_UNAVAILABLE, "not all servers are healthy");
        Ok(failure_response(status, "unhealthy", message, &failed))
    }

    async fn flush_cache(&self, head: RequestHead) -> Result<OwnResponse, Error> {
        let responses = self.ask_all(head).await?;
        let failed = failures(&responses);
        for response in &responses {
            // One that refuses, being busy, keeps its cache. One that does not answer may have flushed it.
            if response.result.as_ref().is_ok_and(|(head, _)| !head.status.is_success()) {
                continue;
            }
            response.server.forget_cache();
        }
        if failed.is_empty() {
            let servers: Vec<&str> = responses.iter().map(|response| response.server.url()).collect();
            let body = json!({ "message": "The cache of every server was flushed.", "servers": servers });
            return Ok(json_response(StatusCode::OK, body.to_string()));
        }
        // A server's own status (400 while it is busy) says more than 502; of several, the highest is the
        // worst.
        let status = failed.iter().filter_map(|failure| failure.status).max();
        let all_answered = failed.iter().all(|failure| failure.status.is_some());
        let status = status.filter(|_| all_answered).unwrap_or(StatusCode::BAD_GATEWAY);
        Ok(failure_response(status, "flush_cache_failed", "not every server flushed its cache", &failed))
    }

    async fn server_info(&self, head: RequestHead) -> Result<OwnResponse, Error> {
        let timeout = answer_timeout(&head)?;
        let request = forwarded(head, timeout);
        // One snapshot for the query and the split: the fleet may change in between.
        let fleet = self.fleet.snapshot();
        let responses = query_all(&self.pools, fleet.all(), &request).await;
        let (prefill, decode) = responses.split_at(fleet.prefill().len());
        Ok(server_info::merged(prefill, decode))
    }

    /// Forwards the request to one prefill server after the other until one responds, healthy ones first, and
    /// its response to the client.
    async fn model_info(&self, head: RequestHead) -> Result<OwnResponse, Error> {
        let request = forwarded(head, ANSWER_TIMEOUT);
        let fleet = self.fleet.snapshot();
        let mut servers: Vec<_> = fleet.prefill().iter().collect();
        // Stable: among equals the order of the configuration stays. One that hangs costs its timeout, so a
        // server that is known to be unhealthy is asked only if there is no other. One that drains answers.
        servers.sort_by_key(|server| (!server.is_ready(), !server.is_draining()));
        // Of several failures the first is reported: it is that of the healthiest server.
        let mut first = None;
        for server in servers {
            let result = query(&self.pools, Arc::clone(server), request.clone()).await.result;
            let response = result.map(|(head, body)| {
                let head = ClientResponseHead::from(head).into_parts();
                Response::from_parts(head, Full::new(body.into()))
            });
            match response {
                // A 4xx is the answer of every server, such as 404 for a model that none has.
                Ok(response) if !response.status().is_server_error() => return Ok(response),
                failed => first = first.or(Some(failed)),
            }
        }
        first.unwrap_or(Err(Error::NoServer(Role::Prefill)))
    }

    async fn ask_all(&self, head: RequestHead) -> Result<Vec<QueryResponse>, Error> {
        let timeout = answer_timeout(&head)?;
        Ok(query_all(&self.pools, self.fleet.snapshot().all(), &forwarded(head, timeout)).await)
    }
}

/// Longest time for each server to answer, all at once: `timeout` of the query, which they get too. 0 is
/// SGLang's own default for "do not wait" and says nothing about the router.
fn answer_timeout(head: &RequestHead) -> Result<Duration, Error> {
    let wanted = query_timeout(head.query())?.filter(|timeout| !timeout.is_zero());
    Ok(wanted.map_or(ANSWER_TIMEOUT, |timeout| timeout + ANSWER_MARGIN))
}

/// The client's request as it is forwarded: same method, path, query and headers, no body.
fn forwarded(head: RequestHead, timeout: Duration) -> ServerQuery {
    let target = head.target.to_string().into();
    ServerQuery { method: head.method, target, headers: head.headers, body: Bytes::new(), timeout }
}

impl RouterEndpoint {
    /// The methods of this endpoint, as in an `Allow` header.
    pub(crate) fn allow(self) -> &'static str {
        match self {
            Self::FlushCache => "POST",
            Self::Health | Self::Ready => "GET, HEAD",
            Self::HealthGenerate | Self::ServerInfo | Self::ModelInfo => "GET",
        }
    }

    /// The endpoint at a path.
    pub(crate) fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/health_generate" => Self::HealthGenerate,
            "/flush_cache" => Self::FlushCache,
            "/server_info" | "/get_server_info" => Self::ServerInfo,
            "/model_info" | "/get_model_info" | "/v1/models" => Self::ModelInfo,
            // Ids may contain slashes, as in "org/model".
            _ if path.strip_prefix("/v1/models/").is_some_and(|id| !id.is_empty()) => Self::ModelInfo,
            _ => return None,
        })
    }
}

/// Whether the value of an `Allow` header has a method.
pub(crate) fn allows(allow: &str, method: &Method) -> bool {
    let method = method.as_str().as_bytes();
    allow.as_bytes().split(|byte| *byte == b',').any(|allowed| allowed.trim_ascii_start() == method)
}

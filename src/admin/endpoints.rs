//! The router's endpoints besides generation.
//!
//! Each is answered by the router itself, by one server, or by all of them. A server that
//! fails is named in the response, never left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Response, StatusCode};
use serde_json::json;

use super::admin_request::{Abort, AdminRequest, has_parameter, query_timeout};
use super::failures::{failure_response, failures, worst_status};
use super::query::{QueryResponse, ServerQuery, query, query_all};
use super::routes::{ANSWER_TIMEOUT, RouterEndpoint};
use super::{fan_out, loads, server_info, worker_loads};
use crate::error::{Error, OwnResponse, json_response};
use crate::http1::{OutgoingBody, RequestHead};
use crate::upstream::{Backend, LiveFleet, Pools, Role};
use crate::wire::client_response::ClientResponseHead;

/// How much longer than `timeout` the router waits: SGLang's `/flush_cache` takes the same parameter and
/// answers at the end of it why it has not flushed.
const ANSWER_MARGIN: Duration = Duration::from_millis(250);
/// Most servers that are asked for one answer, one after the other: each may cost its timeout.
const MAX_ATTEMPTS: usize = 4;

/// A request to one of these endpoints.
pub(crate) struct RouterRequest {
    pub(crate) head: RequestHead,
    /// What is passed on, or parsed.
    pub(crate) body: OutgoingBody,
    /// Whether the sender may abort the requests of others.
    pub(crate) is_operator: bool,
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
        request: RouterRequest,
    ) -> Result<OwnResponse, Error> {
        match endpoint {
            RouterEndpoint::Root => Ok(json_response(StatusCode::OK, r#""mini-lb is running""#)),
            RouterEndpoint::Version => {
                let body = json!({ "version": env!("CARGO_PKG_VERSION") });
                Ok(json_response(StatusCode::OK, body.to_string()))
            }
            // Liveness only: a restart of the router would not help its servers.
            RouterEndpoint::Health => Ok(Response::default()),
            RouterEndpoint::Ready => self.ready(),
            RouterEndpoint::HealthGenerate => self.health_generate(request).await,
            RouterEndpoint::FlushCache => self.flush_cache(request).await,
            RouterEndpoint::AbortRequest => self.abort_request(request).await,
            RouterEndpoint::Session => {
                AdminRequest::parse(&request.body.pieces().concat())?.check_session()?;
                self.all_servers(request, ANSWER_TIMEOUT, false).await
            }
            RouterEndpoint::AllServers { within, empties_cache } => {
                self.all_servers(request, within, empties_cache).await
            }
            RouterEndpoint::ServerInfo => self.server_info(request).await,
            RouterEndpoint::Loads => self.loads(request).await,
            RouterEndpoint::WorkerLoads => self.worker_loads(request).await,
            RouterEndpoint::ModelInfo => self.one_server(request, ANSWER_TIMEOUT).await,
            RouterEndpoint::OneServer { within } => self.one_server(request, within).await,
        }
    }

    fn ready(&self) -> Result<OwnResponse, Error> {
        let has_none_ready = |servers: &[Arc<Backend>]| !servers.iter().any(|server| server.is_ready());
        let fleet = self.fleet.now();
        // First: load balancers in front must stop sending requests whatever the servers do.
        let reason = if self.draining.has_begun() {
            "the router is shutting down"
        } else if fleet.is_regular() {
            if !has_none_ready(fleet.regular()) {
                return Ok(Response::default());
            }
            "no server is known to be healthy"
        } else if has_none_ready(fleet.prefill()) {
            "no prefill server is known to be healthy"
        } else if has_none_ready(fleet.decode()) {
            "no decode server is known to be healthy"
        } else if fleet.encoders().are_degraded() {
            // Not 503: text is served, which is most of the traffic.
            let reason =
                "no encoder is known to be healthy: requests with images, audio or video may be rejected";
            let body = json!({ "status": "degraded", "reason": reason });
            return Ok(json_response(StatusCode::OK, body.to_string()));
        } else {
            return Ok(Response::default());
        };
        Err(Error::NotReady(reason))
    }

    async fn health_generate(&self, request: RouterRequest) -> Result<OwnResponse, Error> {
        let mut responses = self.ask_all(request, ANSWER_TIMEOUT).await?;
        if let Some(alone) = alone(&mut responses) {
            return alone;
        }
        let failed = failures(&responses);
        if failed.is_empty() {
            return Ok(Response::default());
        }
        let (status, message) = (StatusCode::SERVICE_UNAVAILABLE, "not all servers are healthy");
        Ok(failure_response(status, "unhealthy", message, &failed))
    }

    async fn flush_cache(&self, request: RouterRequest) -> Result<OwnResponse, Error> {
        let mut responses = self.ask_all(request, ANSWER_TIMEOUT).await?;
        forget_caches(&responses);
        if let Some(alone) = alone(&mut responses) {
            return alone;
        }
        let failed = failures(&responses);
        if failed.is_empty() {
            let servers: Vec<&str> = responses.iter().map(|response| response.server.url()).collect();
            let body = json!({ "message": "The cache of every server was flushed.", "servers": servers });
            return Ok(json_response(StatusCode::OK, body.to_string()));
        }
        let (status, message) = (worst_status(&failed), "not every server flushed its cache");
        Ok(failure_response(status, "flush_cache_failed", message, &failed))
    }

    /// Passes the request on to all servers.
    async fn all_servers(
        &self,
        request: RouterRequest,
        within: Duration,
        empties_cache: bool,
    ) -> Result<OwnResponse, Error> {
        let mut responses = self.ask_all(request, within).await?;
        if empties_cache {
            forget_caches(&responses);
        }
        alone(&mut responses).unwrap_or_else(|| fan_out::joined(&responses))
    }

    async fn abort_request(&self, request: RouterRequest) -> Result<OwnResponse, Error> {
        let abort = Abort::parse(&request.body.pieces().concat())?;
        if abort == Abort::All && !request.is_operator {
            return Err(Error::Forbidden(
                "abort_all ends the requests of other clients; it needs the key of --admin-api-key, or loopback \
                 if there is none",
            ));
        }
        let running = self.fleet.running();
        let (known, copies) = match &abort {
            Abort::One(rid) => (running.servers_of(rid), running.copies_of(rid)),
            Abort::All => Default::default(),
        };
        if !copies.is_empty() {
            return self.abort_copies(copies, request).await;
        }
        if !known.is_empty() {
            return self.abort_at(known, request).await;
        }
        // Another router may have sent it.
        let fleet = self.fleet.snapshot();
        // Also servers that were removed: they finish the requests that they have.
        let servers = fleet.all().chain(fleet.draining()).map(Arc::clone).collect();
        self.abort_at(servers, request).await
    }

    /// Aborts all copies of a request for several samples, each by its own id. One that has ended by then is
    /// known to no server.
    async fn abort_copies(&self, copies: Vec<String>, request: RouterRequest) -> Result<OwnResponse, Error> {
        let mut response = None;
        for rid in copies {
            let servers = self.fleet.running().servers_of(&rid);
            if servers.is_empty() {
                continue;
            }
            let body = OutgoingBody::new(vec![serde_json::json!({ "rid": rid }).to_string().into()]);
            let request =
                RouterRequest { head: request.head.clone(), body, is_operator: request.is_operator };
            response = Some(self.abort_at(servers, request).await?);
        }
        Ok(response.unwrap_or_default())
    }

    /// Passes an abort on to these servers. SGLang answers 200 for a request that it does not have.
    async fn abort_at(
        &self,
        servers: Vec<Arc<Backend>>,
        request: RouterRequest,
    ) -> Result<OwnResponse, Error> {
        let timeout = answer_timeout(&request.head, ANSWER_TIMEOUT)?;
        if servers.is_empty() {
            return Err(Error::NoServer(self.fleet.now().roles()[0]));
        }
        let mut responses = query_all(&self.pools, servers.iter(), &forwarded(request, timeout)).await;
        alone(&mut responses).unwrap_or_else(|| fan_out::joined(&responses))
    }

    async fn server_info(&self, request: RouterRequest) -> Result<OwnResponse, Error> {
        let timeout = answer_timeout(&request.head, ANSWER_TIMEOUT)?;
        let request = forwarded(request, timeout);
        // One snapshot for the query and the split: the fleet may change in between.
        let fleet = self.fleet.snapshot();
        let mut responses = query_all(&self.pools, fleet.all(), &request).await;
        if fleet.is_regular() {
            return alone(&mut responses).unwrap_or_else(|| Ok(server_info::merged_plain(&responses)));
        }
        let (prefill, decode) = responses.split_at(fleet.prefill().len());
        Ok(server_info::merged(prefill, decode))
    }

    async fn loads(&self, request: RouterRequest) -> Result<OwnResponse, Error> {
        let is_prometheus = has_parameter(request.head.query(), "format", "prometheus");
        let mut responses = self.ask_all(request, ANSWER_TIMEOUT).await?;
        if let Some(alone) = alone(&mut responses) {
            return alone;
        }
        Ok(if is_prometheus { loads::exposition(&responses) } else { loads::merged(&responses) })
    }

    /// The client asks the router, but the servers are asked for what `sglang_router` sums up.
    async fn worker_loads(&self, mut request: RouterRequest) -> Result<OwnResponse, Error> {
        request.head.target = PathAndQuery::from_static("/v1/loads");
        Ok(worker_loads::summed(&self.ask_all(request, ANSWER_TIMEOUT).await?))
    }

    /// Forwards the request to one prefill or plain server after the other until one responds, healthy ones
    /// first, and its response to the client.
    async fn one_server(&self, request: RouterRequest, timeout: Duration) -> Result<OwnResponse, Error> {
        let request = forwarded(request, timeout);
        let fleet = self.fleet.snapshot();
        let role = fleet.roles()[0];
        let mut servers: Vec<_> = fleet.servers(role).iter().collect();
        // Stable: among equals the order of the configuration stays. One that hangs costs its timeout, so a
        // server that is known to be unhealthy is asked only if there is no other. One that drains answers.
        servers.sort_by_key(|server| (!server.is_ready(), !server.is_draining()));
        // Of several failures the first is reported: it is that of the healthiest server.
        let mut first = None;
        for server in servers.into_iter().take(MAX_ATTEMPTS) {
            let response = query(&self.pools, Arc::clone(server), request.clone()).await;
            match own_response(response) {
                // A 4xx is the answer of every server, such as 404 for a model that none has.
                Ok(response) if !response.status().is_server_error() => return Ok(response),
                failed => first = first.or(Some(failed)),
            }
        }
        first.unwrap_or(Err(Error::NoServer(role)))
    }

    /// Passes the request on to all servers, at most `within` to answer unless it has a `timeout`.
    async fn ask_all(&self, request: RouterRequest, within: Duration) -> Result<Vec<QueryResponse>, Error> {
        let timeout = answer_timeout(&request.head, within)?;
        let fleet = self.fleet.snapshot();
        if fleet.is_regular() && fleet.regular().is_empty() {
            return Err(Error::NoServer(Role::Regular));
        }
        Ok(query_all(&self.pools, fleet.all(), &forwarded(request, timeout)).await)
    }
}

/// The response of a plain server that is the only one: the client gets what the server alone would give it.
fn alone(responses: &mut Vec<QueryResponse>) -> Option<Result<OwnResponse, Error>> {
    let is_alone = matches!(&responses[..], [response] if response.server.role() == Role::Regular);
    responses.pop_if(|_| is_alone).map(own_response)
}

fn own_response(response: QueryResponse) -> Result<OwnResponse, Error> {
    let (head, body) = response.result?;
    let head = ClientResponseHead::from(head).into_parts();
    Ok(Response::from_parts(head, Full::new(body.into())))
}

/// Notes that the servers' caches are empty.
fn forget_caches(responses: &[QueryResponse]) {
    for response in responses {
        // One that refuses, being busy, keeps its cache. One that does not answer may have emptied it.
        if !response.result.as_ref().is_ok_and(|(head, _)| !head.status.is_success()) {
            response.server.forget_cache();
        }
    }
}

/// Longest time for each server to answer, all at once: `timeout` of the query, which they get too. 0 is
/// SGLang's own default for "do not wait" and says nothing about the router.
fn answer_timeout(head: &RequestHead, within: Duration) -> Result<Duration, Error> {
    let wanted = query_timeout(head.query())?.filter(|timeout| !timeout.is_zero());
    Ok(wanted.map_or(within, |timeout| timeout + ANSWER_MARGIN))
}

/// The client's request as it is forwarded: same method, path, query, headers and body.
fn forwarded(request: RouterRequest, timeout: Duration) -> ServerQuery {
    let RouterRequest { head, body, .. } = request;
    // SGLang answers 405 to `HEAD`. The client gets the head of the response to a `GET`.
    let method = if head.method == Method::HEAD { Method::GET } else { head.method };
    let target = head.target.to_string().into();
    ServerQuery { method, target, headers: head.headers, body, timeout }
}

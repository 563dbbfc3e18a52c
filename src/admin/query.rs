//! One small request of the router's own to one server, or to many at once.
//!
//! Responses are held in memory; nothing is retried, and what a response means is for the
//! caller to know.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::task::JoinSet;

use crate::error::{Cause, Error};
use crate::http1::OutgoingBody;
use crate::http1::{RawHeaders, ResponseHead};
use crate::upstream::{Address, Backend, Lease, Pools};
use crate::wire::upstream_request::{UpstreamHead, UpstreamTarget};

/// Largest response of one server. `/server_info` of SGLang has 37 kB.
const MAX_RESPONSE: usize = 16 << 20;

/// The request to send.
#[derive(Clone)]
pub(super) struct ServerQuery {
    pub(super) method: Method,
    /// Path and query.
    pub(super) target: Cow<'static, str>,
    pub(super) headers: RawHeaders,
    /// JSON, or empty.
    pub(super) body: OutgoingBody,
    /// Longest time for the whole exchange with one server, connecting included.
    pub(super) timeout: Duration,
}

impl ServerQuery {
    pub(super) fn get(target: &'static str, headers: RawHeaders, timeout: Duration) -> Self {
        Self { method: Method::GET, target: target.into(), headers, body: OutgoingBody::default(), timeout }
    }
}

/// What came of a query at one server.
pub(super) struct QueryResponse {
    pub(super) server: Arc<Backend>,
    /// The response, whatever its status.
    pub(super) result: Result<(ResponseHead, Bytes), Error>,
}

/// Sends a query to all servers concurrently. The responses are in the order of `servers`.
pub(super) async fn query_all(
    pools: &Arc<Pools>,
    servers: impl Iterator<Item = &Arc<Backend>>,
    request: &ServerQuery,
) -> Vec<QueryResponse> {
    // A task per server: dropping the set, as when the client disconnects, aborts them all.
    let mut pending = JoinSet::new();
    let mut responses = Vec::new();
    for (index, server) in servers.enumerate() {
        let (pools, server, request) = (Arc::clone(pools), Arc::clone(server), request.clone());
        // Filled in the order of completion, returned in the order of `servers`.
        responses.push(None);
        pending.spawn(async move { (index, query(&pools, server, request).await) });
    }
    while let Some(joined) = pending.join_next().await {
        let (index, response) = joined.expect("a query does not panic and is not aborted");
        responses[index] = Some(response);
    }
    responses.into_iter().flatten().collect()
}

/// Sends a query to one server.
pub(super) async fn query(pools: &Pools, server: Arc<Backend>, request: ServerQuery) -> QueryResponse {
    let timeout = request.timeout;
    let result = match tokio::time::timeout(timeout, exchange(pools, &server, request)).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(cause)) => Err(Error::upstream(&server, cause)),
        // The exchange is dropped, which closes its connection and so cancels the request at the server.
        Err(_) => Err(Error::upstream(&server, Cause::Timeout(timeout))),
    };
    QueryResponse { server, result }
}

async fn exchange(
    pools: &Pools,
    server: &Backend,
    request: ServerQuery,
) -> Result<(ResponseHead, Bytes), Cause> {
    let ServerQuery { method, target, headers, body, .. } = request;
    let head = UpstreamHead::new(&method, &target, &headers, !body.is_empty());
    exchange_over(pools.lease(server).await?, server.target(), &head, &body).await
}

async fn exchange_over(
    mut lease: Lease,
    target: &UpstreamTarget,
    head: &UpstreamHead,
    body: &OutgoingBody,
) -> Result<(ResponseHead, Bytes), Cause> {
    let head = lease.send(head.for_readable_response(target, b"", body)).await?;
    let body = lease.collect(MAX_RESPONSE).await?;
    // After the whole body only: a connection with unread data is not reusable.
    lease.park();
    Ok((head, body))
}

/// Sends one request to a server that is no backend, on a new connection. A body is JSON.
pub(super) async fn query_address(
    pools: &Pools,
    address: &Address,
    (method, target): (&Method, &str),
    headers: &RawHeaders,
    body: OutgoingBody,
    timeout: Duration,
) -> Result<(StatusCode, Bytes), Cause> {
    let head = UpstreamHead::new(method, target, headers, !body.is_empty());
    let server = UpstreamTarget::new(&address.authority, &address.base_path);
    let exchange = async {
        let (head, body) = exchange_over(pools.open_to(address).await?, &server, &head, &body).await?;
        Ok((head.status, body))
    };
    tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(Cause::Timeout(timeout)))
}

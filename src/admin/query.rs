//! One small question to one server, or to many at once.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use tokio::task::JoinSet;

use crate::error::{Cause, Error};
use crate::http1::OutgoingBody;
use crate::http1::{RawHeaders, ResponseHead};
use crate::upstream::{Backend, Pools};
use crate::wire::upstream_request::UpstreamHead;

/// Largest answer of one server. `/server_info` has 37 kB.
const MAX_ANSWER: usize = 16 << 20;

/// What is asked: the same of every server.
#[derive(Clone)]
pub(super) struct ServerQuery {
    pub(super) method: Method,
    /// Path and query.
    pub(super) target: Cow<'static, str>,
    pub(super) fields: RawHeaders,
    /// JSON, or nothing.
    pub(super) body: Bytes,
    /// How long one server may take.
    pub(super) timeout: Duration,
}

/// What one server said.
pub(super) struct ProbeResponse {
    pub(super) server: Arc<Backend>,
    pub(super) outcome: Result<(ResponseHead, Bytes), Error>,
}

/// Asks all servers at the same time. The answers come in the order of `servers`.
pub(super) async fn query_all(
    pools: &Arc<Pools>,
    servers: impl Iterator<Item = &Arc<Backend>>,
    question: &ServerQuery,
) -> Vec<ProbeResponse> {
    let mut asked = JoinSet::new();
    let mut answers = Vec::new();
    for (place, server) in servers.enumerate() {
        let (pools, server, question) = (Arc::clone(pools), Arc::clone(server), question.clone());
        answers.push(None);
        asked.spawn(async move { (place, query(&pools, server, question).await) });
    }
    while let Some(answer) = asked.join_next().await {
        let (place, answer) = answer.expect("asking does not panic and is not aborted");
        answers[place] = Some(answer);
    }
    answers.into_iter().flatten().collect()
}

/// Asks one server.
pub(super) async fn query(pools: &Pools, server: Arc<Backend>, question: ServerQuery) -> ProbeResponse {
    let timeout = question.timeout;
    let outcome = match tokio::time::timeout(timeout, exchange(pools, &server, question)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(cause)) => Err(Error::upstream(&server, cause)),
        Err(_) => Err(Error::upstream(&server, Cause::Timeout(timeout))),
    };
    ProbeResponse { server, outcome }
}

async fn exchange(
    pools: &Pools,
    server: &Backend,
    question: ServerQuery,
) -> Result<(ResponseHead, Bytes), Cause> {
    let ServerQuery { method, target, fields, body, .. } = question;
    let head = UpstreamHead::new(&method, &target, &fields, !body.is_empty());
    let body = if body.is_empty() { OutgoingBody::default() } else { OutgoingBody::new(vec![body]) };
    let mut lease = pools.lease(server).await?;
    let head = lease.send(head.for_backend(server.host_header(), b"", &body)).await?;
    let body = lease.collect(MAX_ANSWER).await?;
    lease.park();
    Ok((head, body))
}

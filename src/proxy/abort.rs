//! Asks the servers to abort a request that ends before its response does (`--abort-on-disconnect`).
//!
//! A closed connection does the same, but Python servers notice that of a response that has not begun only at
//! their next poll, which is up to 4 s of decoding for nobody. Requests of clients to `/abort_request` are
//! answered by `admin`.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use rustls::crypto::SecureRandom;
use tracing::debug;

use crate::error::{Cause, Error};
use crate::http1::{HeaderId, OutgoingBody, RawHeaders};
use crate::upstream::{Backend, OWN_RID, Pools, ServerPair};
use crate::wire::upstream_request::UpstreamHead;

/// Longest time for one server to answer: it answers at once.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer that is read. SGLang's is empty.
const MAX_ANSWER: usize = 64 << 10;
/// Most requests that are being aborted at a time. Beyond that servers notice by the closed connections.
const MAX_ABORTS: usize = 1_024;

/// How many there are now.
static ABORTS: AtomicUsize = AtomicUsize::new(0);

static RANDOM: LazyLock<&dyn SecureRandom> =
    LazyLock::new(|| rustls::crypto::ring::default_provider().secure_random);

/// A new `rid` that nobody can guess: who knows it can abort the request. All have the same length, so that
/// none is the prefix of another, by which SGLang aborts, too.
pub(super) fn new_rid() -> Option<String> {
    let mut bytes = [0; 16];
    // It fails only where the kernel has no random numbers; the request then goes without an id.
    RANDOM.fill(&mut bytes).ok()?;
    Some(format!("{OWN_RID}{:032x}", u128::from_ne_bytes(bytes)))
}

/// What is sent to the servers of a request to abort it.
pub(super) struct AbortRequest {
    head: UpstreamHead,
    bodies: Vec<Bytes>,
}

impl AbortRequest {
    /// For a request with these ids, whose `headers` have the key that servers want.
    pub(super) fn new(rids: &[String], headers: &RawHeaders) -> Self {
        let key = headers.get(HeaderId::Authorization).map(|key| ("authorization", key));
        let head = UpstreamHead::new(&Method::POST, "/abort_request", &key.into_iter().collect(), true);
        let body = |rid| serde_json::json!({ "rid": rid }).to_string().into();
        Self { head, bodies: rids.iter().map(body).collect() }
    }
}

/// Aborts a request on its servers when it is dropped, unless its response is complete by then.
pub(super) struct AbortOnDrop {
    request: Arc<AbortRequest>,
    server: Arc<Backend>,
    /// Decode's, besides prefill's.
    other: Option<Arc<Backend>>,
    pools: Arc<Pools>,
    is_armed: bool,
}

impl AbortOnDrop {
    pub(super) fn new(request: &Arc<AbortRequest>, pair: &ServerPair, pools: &Arc<Pools>) -> Self {
        let server = Arc::clone(pair.prefill());
        let other = (!pair.is_single()).then(|| Arc::clone(pair.decode()));
        Self { request: Arc::clone(request), server, other, pools: Arc::clone(pools), is_armed: false }
    }

    /// The request is sent now.
    pub(super) fn arm(&mut self) {
        self.is_armed = true;
    }

    /// The response is complete.
    pub(super) fn disarm(&mut self) {
        self.is_armed = false;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if self.is_armed {
            self.abort_in_background();
        }
    }
}

impl AbortOnDrop {
    #[cfg_attr(not(test), expect(clippy::disallowed_methods, reason = "the request's own task has ended"))]
    fn abort_in_background(&self) {
        // Outside of a runtime a request is only dropped by a worker thread that ends with requests left.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if ABORTS.fetch_add(1, Relaxed) >= MAX_ABORTS {
            ABORTS.fetch_sub(1, Relaxed);
            return;
        }
        let (request, pools) = (Arc::clone(&self.request), Arc::clone(&self.pools));
        let (server, other) = (Arc::clone(&self.server), self.other.clone());
        let under_way = UnderWay;
        runtime.spawn(async move {
            let at_other = async {
                if let Some(other) = &other {
                    abort(&pools, other, &request).await;
                }
            };
            tokio::join!(abort(&pools, &server, &request), at_other);
            drop(under_way);
        });
    }
}

/// Counts a request that is being aborted, until it is dropped.
struct UnderWay;

impl Drop for UnderWay {
    fn drop(&mut self) {
        ABORTS.fetch_sub(1, Relaxed);
    }
}

/// Asks one server to abort a request. A failure changes nothing: the closed connection says the same.
async fn abort(pools: &Pools, server: &Arc<Backend>, request: &AbortRequest) {
    for body in &request.bodies {
        let asked = tokio::time::timeout(ABORT_TIMEOUT, ask(pools, server, request, body)).await;
        if let Err(cause) = asked.unwrap_or(Err(Cause::Timeout(ABORT_TIMEOUT))) {
            debug!("cannot abort a request: {}", Error::upstream(server, cause));
            return;
        }
    }
}

async fn ask(pools: &Pools, server: &Backend, request: &AbortRequest, body: &Bytes) -> Result<(), Cause> {
    let mut lease = pools.lease(server).await?;
    let body = OutgoingBody::new(vec![body.clone()]);
    lease.send(request.head.for_readable_response(server.target(), b"", &body)).await?;
    lease.collect(MAX_ANSWER).await?;
    lease.park();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_none_is_the_prefix_of_another() {
        let ids: Vec<_> = (0..100).map(|_| new_rid().unwrap()).collect();
        assert!(ids.iter().all(|id| id.len() == ids[0].len()));
        assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), 100);
    }
}

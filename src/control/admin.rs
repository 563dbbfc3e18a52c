//! What the admin listener answers.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response};

use super::endpoints::allows;
use super::ui;
use super::workers::Workers;
use crate::error::{Error, Reply};
use crate::gate::Gate;
use crate::metrics::Metrics;
use crate::wire::message::ClientHead;

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers for operators.
pub(crate) struct Admin {
    workers: Arc<Workers>,
    metrics: Arc<Metrics>,
    gate: Arc<Gate>,
}

impl Admin {
    pub(crate) fn new(workers: Arc<Workers>, metrics: Arc<Metrics>, gate: Arc<Gate>) -> Self {
        Self { workers, metrics, gate }
    }

    pub(crate) async fn handle(
        &self,
        head: &ClientHead,
        body: Bytes,
        peer: SocketAddr,
    ) -> Result<Reply, Error> {
        // Probes and Prometheus need no key, and learn of no secret.
        if !["/health", "/metrics", "/ui"].contains(&head.path()) {
            self.workers.access().may_administrate(Some(peer), &head.fields)?;
        }
        match head.path() {
            "/health" => only("GET, HEAD", &head.method).map(|()| Response::default()),
            "/ui" => only("GET, HEAD", &head.method).map(|()| self.page(head, peer)),
            "/metrics" => only("GET, HEAD", &head.method).map(|()| self.metrics()),
            path if Workers::allow(path).is_some() => self.workers.handle(head, body).await,
            _ => Err(Error::NotFound),
        }
    }

    /// The status page, for those who may see it. Its own question is `/metrics`.
    fn page(&self, head: &ClientHead, peer: SocketAddr) -> Reply {
        match self.workers.access().may_administrate(Some(peer), &ui::with_bearer(&head.fields)) {
            Ok(()) => ui::page(),
            Err(error) => ui::refusal(error.to_reply()),
        }
    }

    fn metrics(&self) -> Reply {
        let text = self.metrics.to_text(&self.workers.fleet().snapshot(), &self.gate);
        let mut reply = Response::new(Full::new(Bytes::from(text).into()));
        reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
        reply
    }
}

/// Refuses all methods but those of an `Allow` list.
fn only(allow: &'static str, method: &Method) -> Result<(), Error> {
    if allows(allow, method) { Ok(()) } else { Err(Error::MethodNotAllowed { allow }) }
}

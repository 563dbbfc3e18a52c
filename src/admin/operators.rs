//! What the admin listener answers.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response};

use super::endpoints::allows;
use super::status_page;
use super::workers::WorkersApi;
use crate::admission::AdmissionController;
use crate::error::{Error, OwnResponse};
use crate::http1::RequestHead;
use crate::observe::metrics::Metrics;

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers for operators.
pub(crate) struct OperatorEndpoints {
    workers: Arc<WorkersApi>,
    metrics: Arc<Metrics>,
    gate: Arc<AdmissionController>,
}

impl OperatorEndpoints {
    pub(crate) fn new(
        workers: Arc<WorkersApi>,
        metrics: Arc<Metrics>,
        gate: Arc<AdmissionController>,
    ) -> Self {
        Self { workers, metrics, gate }
    }

    pub(crate) async fn handle(
        &self,
        head: &RequestHead,
        body: Bytes,
        peer: SocketAddr,
    ) -> Result<OwnResponse, Error> {
        // Probes and Prometheus need no key, and learn of no secret.
        if !["/health", "/metrics", "/ui"].contains(&head.path()) {
            self.workers.access().may_administrate(Some(peer), &head.fields)?;
        }
        match head.path() {
            "/health" => only("GET, HEAD", &head.method).map(|()| Response::default()),
            "/ui" => only("GET, HEAD", &head.method).map(|()| self.page(head, peer)),
            "/metrics" => only("GET, HEAD", &head.method).map(|()| self.metrics()),
            path if WorkersApi::allow(path).is_some() => self.workers.handle(head, body).await,
            _ => Err(Error::NotFound),
        }
    }

    /// The status page, for those who may see it. Its own question is `/metrics`.
    fn page(&self, head: &RequestHead, peer: SocketAddr) -> OwnResponse {
        match self.workers.access().may_administrate(Some(peer), &status_page::with_bearer(&head.fields)) {
            Ok(()) => status_page::page(),
            Err(error) => status_page::refusal(Error::from(error).to_response()),
        }
    }

    fn metrics(&self) -> OwnResponse {
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

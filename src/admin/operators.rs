//! The endpoints of the admin listener (`--prometheus-port`): metrics, the status page and
//! the workers API, for operators and monitoring.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response};

use super::routes::allows;
use super::status_page;
use super::workers::WorkersApi;
use crate::admission::AdmissionController;
use crate::error::{Error, OwnResponse};
use crate::http1::RequestHead;
use crate::observe::metrics::Metrics;

/// Prometheus' text exposition format.
pub(super) const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Handles the requests of the admin listener.
pub(crate) struct OperatorEndpoints {
    workers: Arc<WorkersApi>,
    metrics: Arc<Metrics>,
    admission: Arc<AdmissionController>,
}

impl OperatorEndpoints {
    pub(crate) fn new(
        workers: Arc<WorkersApi>,
        metrics: Arc<Metrics>,
        admission: Arc<AdmissionController>,
    ) -> Self {
        Self { workers, metrics, admission }
    }

    pub(crate) async fn handle(
        &self,
        head: &RequestHead,
        body: Bytes,
        peer: SocketAddr,
    ) -> Result<OwnResponse, Error> {
        // Probes and Prometheus need no key: what they read is no secret. The page checks the key itself.
        if !["/health", "/metrics", "/ui"].contains(&head.path()) {
            self.workers.access().check_admin(Some(peer), &head.headers)?;
        }
        match head.path() {
            "/health" => only("GET, HEAD", &head.method).map(|()| Response::default()),
            "/ui" => only("GET, HEAD", &head.method).map(|()| self.page(head, peer)),
            "/metrics" => only("GET, HEAD", &head.method).map(|()| self.metrics()),
            // The same API as on the main listener: operators' tools need this port only.
            path if WorkersApi::allow(path).is_some() => self.workers.handle(head, body).await,
            _ => Err(Error::NotFound),
        }
    }

    /// The status page. It reads `/metrics` and nothing else.
    fn page(&self, head: &RequestHead, peer: SocketAddr) -> OwnResponse {
        let headers = status_page::with_bearer(&head.headers);
        // Checked here and not in `handle`: a browser needs the challenge in the 401 response.
        match self.workers.access().check_admin(Some(peer), &headers) {
            Ok(()) => status_page::page(),
            Err(error) => status_page::challenge(Error::from(error).to_response()),
        }
    }

    fn metrics(&self) -> OwnResponse {
        let text = self.metrics.to_text(&self.workers.fleet().snapshot(), &self.admission);
        let mut response = Response::new(Full::new(Bytes::from(text).into()));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
        response
    }
}

/// Rejects all methods but those of an `Allow` header.
fn only(allow: &'static str, method: &Method) -> Result<(), Error> {
    if allows(allow, method) { Ok(()) } else { Err(Error::MethodNotAllowed { allow }) }
}

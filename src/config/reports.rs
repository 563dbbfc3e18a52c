//! What is told of requests, as a user of the library says it.

use std::sync::Arc;

use tracing::level_filters::LevelFilter;

use super::settings::ConfigError;
use super::{MiniLbConfig, Options};
use crate::observe::report::{RequestLine, RequestLog, check_header};

impl MiniLbConfig {
    /// Logs a line at level info for every request that is over, not only for those that failed. Default: no.
    #[must_use]
    pub fn access_log(mut self, wanted: bool) -> Self {
        self.options.report.access_log = wanted;
        self
    }

    /// Gives lines about requests, of this level or more severe, to this function, and emits no events about them. Where
    /// each request has its line, an event of twenty fields costs more than all else that is told. The function is called
    /// by the worker that had the request: it has to be quick, and must not wait. Default: events of the target
    /// `mini_lb::request`.
    #[must_use]
    pub fn request_log(
        mut self,
        level: LevelFilter,
        write: impl Fn(&RequestLine<'_>) + Send + Sync + 'static,
    ) -> Self {
        self.options.report.log = Some(RequestLog { level, write: Arc::new(write) });
        self
    }

    /// Takes a request's id from the first of these headers that holds a good one: 1 to 128 printable ASCII characters,
    /// without spaces and quotes. If none does, an id is made. Both servers and the client get it as `x-request-id`.
    /// Default: `x-request-id`, `x-correlation-id`, `x-trace-id`, `request-id`.
    #[must_use]
    pub fn request_id_headers<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.options.report.request_id_headers = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sends spans of requests to a collector that takes OTLP over HTTP as JSON: `http://host:port`, to which
    /// `/v1/traces` is added unless it has a path. Default: nowhere.
    #[cfg(feature = "otel")]
    #[must_use]
    pub fn otlp_traces_endpoint(mut self, url: impl Into<String>) -> Self {
        self.options.report.traces = Some(url.into());
        self
    }
}

impl Options {
    pub(super) fn check_reports(&self) -> Result<(), ConfigError> {
        for name in &self.report.request_id_headers {
            check_header(name).map_err(|why| {
                ConfigError::new(format!("--request-id-headers {}: {why}", name.escape_debug()))
            })?;
        }
        #[cfg(feature = "otel")]
        if let Some(url) = &self.report.traces {
            crate::observe::report::traces::CollectorEndpoint::parse(url).map_err(|why| {
                ConfigError::new(format!("--otlp-traces-endpoint {}: {why}", url.escape_debug()))
            })?;
        }
        Ok(())
    }
}

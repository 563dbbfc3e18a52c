//! Request lines, the load trace, request ids and spans.

use std::sync::Arc;

use tracing::level_filters::LevelFilter;

use super::settings::ConfigError;
use super::{MiniLbConfig, Options};
use crate::observe::report::{RequestLine, RequestLog, TraceLine, TraceLog, check_header};

impl MiniLbConfig {
    /// Logs a line at level info for every finished request, not only for those that failed. Default: no.
    #[must_use]
    pub fn access_log(mut self, enabled: bool) -> Self {
        self.options.report.access_log = enabled;
        self
    }

    /// Passes request lines of this level or more severe to this function, instead of emitting events. With a
    /// line for every request, an event of twenty fields would cost more than the rest of the log. The
    /// function is called by the worker thread that had the request: it must be quick and must not block.
    /// Default: events of the target `mini_lb::request`.
    #[must_use]
    pub fn request_log(
        mut self,
        level: LevelFilter,
        write: impl Fn(&RequestLine<'_>) + Send + Sync + 'static,
    ) -> Self {
        self.options.report.log = Some(RequestLog { level, write: Arc::new(write) });
        self
    }

    /// Passes a line for each generation request to this function, when the request has ended: what a trace
    /// of the load consists of, to replay it later. The prompts of requests are hashed then whatever the
    /// policy. The function is called by the worker thread that had the request: it must be quick and must
    /// not block. Default: no trace.
    #[must_use]
    pub fn trace_log(mut self, write: impl Fn(&TraceLine<'_>) + Send + Sync + 'static) -> Self {
        self.options.report.trace_log = Some(TraceLog::new(write));
        self
    }

    /// Takes a request's id from the first of these headers that has a valid one: 1 to 128 printable ASCII
    /// characters, without spaces and quotes. If none has, an id is generated. Both servers and the client
    /// get it as `x-request-id`. Default: `x-request-id`, `x-correlation-id`, `x-trace-id`, `request-id`.
    #[must_use]
    pub fn request_id_headers<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.options.report.request_id_headers = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sends spans of requests to a collector that takes OTLP over HTTP as JSON. The URL is
    /// `http://host:port`, to which `/v1/traces` is added unless it has a path. Default: no spans.
    #[cfg(feature = "otel")]
    #[must_use]
    pub fn otlp_traces_endpoint(mut self, url: impl Into<String>) -> Self {
        self.options.report.traces = Some(url.into());
        self
    }
}

/// Where spans go if only `--enable-trace` is given: the default address of OpenTelemetry's collector.
#[cfg(feature = "otel")]
const DEFAULT_TRACES_ENDPOINT: &str = "http://localhost:4318";

impl Options {
    /// Settles what one option means for another.
    #[cfg(feature = "otel")]
    pub(super) fn apply_trace_switch(&mut self) {
        if self.enable_trace {
            // A collector that was named stays; this flag only turns traces on.
            self.report.traces.get_or_insert_with(|| DEFAULT_TRACES_ENDPOINT.to_owned());
        }
    }

    /// A build without traces has nothing to switch.
    #[cfg(not(feature = "otel"))]
    pub(super) fn apply_trace_switch(&mut self) {}

    pub(super) fn check_reports(&self) -> Result<(), ConfigError> {
        // An error here, because names that cannot be used would be skipped.
        let request_ids = self.report.request_id_headers.iter().map(|name| ("request-id-headers", name));
        let hash_keys = self.hash_key_headers.iter().map(|name| ("hash-key-headers", name));
        for (option, name) in request_ids.chain(hash_keys) {
            check_header(name)
                .map_err(|why| ConfigError::new(format!("--{option} {}: {why}", name.escape_debug())))?;
        }
        #[cfg(feature = "otel")]
        if let Some(url) = &self.report.traces {
            // Parsed again when the exporter is made, where a bad URL could only be ignored.
            crate::observe::report::traces::CollectorEndpoint::parse(url).map_err(|why| {
                ConfigError::new(format!("--otlp-traces-endpoint {}: {why}", url.escape_debug()))
            })?;
        }
        Ok(())
    }
}

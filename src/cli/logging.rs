//! What is logged and traced, as typed.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mini_lb::MiniLbConfig;
use tracing::level_filters::LevelFilter;

#[cfg(not(feature = "otel"))]
use super::refusal;
use crate::log::{self, Format, LogOptions};

#[derive(Debug, Args)]
pub(super) struct Logging {
    /// Least severe events that are logged, to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LogLevel,
    /// How lines are written
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: Format,
    /// Folder in which the log is written too, into a file a day: mini-lb.2026-01-31.log (UTC). The newest 30 are kept
    #[arg(long, value_name = "FOLDER")]
    log_dir: Option<PathBuf>,
    /// Log a line at level info for every request, not only for those that failed
    #[arg(long)]
    access_log: bool,
    /// Headers in which a client may name its request; the first good one counts [default: x-request-id
    /// x-correlation-id x-trace-id request-id]
    #[arg(long, value_name = "HEADER", num_args = 1..)]
    request_id_headers: Vec<String>,
}

impl Logging {
    pub(super) fn add(&self, config: MiniLbConfig) -> MiniLbConfig {
        let config = config.access_log(self.access_log).request_log(self.log_level.filter(), log::tell);
        match self.request_id_headers.as_slice() {
            [] => config,
            names => config.request_id_headers(names.iter().cloned()),
        }
    }

    /// What the library does not know of, by the flags' names.
    pub(super) fn of_the_program(&self) -> Vec<(&'static str, String)> {
        vec![
            ("log-level", format!("{:?}", self.log_level)),
            ("log-format", format!("{:?}", self.log_format)),
            ("log-dir", format!("{:?}", self.log_dir)),
        ]
    }

    pub(super) fn into_options(self) -> LogOptions {
        LogOptions { level: self.log_level.filter(), format: self.log_format, folder: self.log_dir }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

impl LogLevel {
    fn filter(self) -> LevelFilter {
        match self {
            Self::Debug => LevelFilter::DEBUG,
            Self::Info => LevelFilter::INFO,
            Self::Warn => LevelFilter::WARN,
            Self::Error => LevelFilter::ERROR,
        }
    }
}

/// Where spans go with `--enable-trace` alone.
#[cfg(feature = "otel")]
const DEFAULT_ENDPOINT: &str = "http://localhost:4318";

#[derive(Debug, Args)]
pub(super) struct Tracing {
    /// Send spans of requests to an OpenTelemetry collector; needs a build with the feature otel
    #[arg(long)]
    enable_trace: bool,
    /// Where that collector takes OTLP over HTTP as JSON; traces are on with it [default: http://localhost:4318]
    #[arg(long, value_name = "URL")]
    otlp_traces_endpoint: Option<String>,
}

impl Tracing {
    #[cfg(feature = "otel")]
    pub(super) fn add(&self, config: MiniLbConfig) -> Result<MiniLbConfig, clap::Error> {
        Ok(match &self.otlp_traces_endpoint {
            Some(url) => config.otlp_traces_endpoint(url),
            None if self.enable_trace => config.otlp_traces_endpoint(DEFAULT_ENDPOINT),
            None => config,
        })
    }

    #[cfg(not(feature = "otel"))]
    pub(super) fn add(&self, config: MiniLbConfig) -> Result<MiniLbConfig, clap::Error> {
        let flag = match self {
            Self { otlp_traces_endpoint: Some(_), .. } => "--otlp-traces-endpoint",
            Self { enable_trace: true, .. } => "--enable-trace",
            _ => return Ok(config),
        };
        Err(refusal(format_args!(
            "{flag} is not supported: this program was built without the feature otel; build it with \
             `cargo build --release --features otel`, or leave the flag out"
        )))
    }
}

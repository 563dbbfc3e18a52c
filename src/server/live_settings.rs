//! The options that a reload changes, as workers read them.
//!
//! A request keeps the limits that it began with, and a connection its timeouts.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::config::Options;
use crate::http1::ClientTimeouts;
use crate::proxy::RequestLimits;

/// The options as they are now.
pub(crate) struct LiveSettings {
    /// Read once a request.
    limits: Arc<ArcSwap<RequestLimits>>,
    /// Read once a connection, and at a shutdown.
    times: ArcSwap<Times>,
}

/// Times of connections and of a shutdown.
struct Times {
    client_timeouts: ClientTimeouts,
    lame_duck: Duration,
    grace_period: Duration,
}

impl LiveSettings {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            limits: Arc::new(ArcSwap::from_pointee(limits(options))),
            times: ArcSwap::from_pointee(times(options)),
        }
    }

    /// Replaces the options, for requests and connections that begin from now on.
    pub(crate) fn reload(&self, options: &Options) {
        self.limits.store(Arc::new(limits(options)));
        self.times.store(Arc::new(times(options)));
    }

    /// Shared with the proxy.
    pub(super) fn limits(&self) -> &Arc<ArcSwap<RequestLimits>> {
        &self.limits
    }

    pub(super) fn client_timeouts(&self) -> ClientTimeouts {
        self.times.load().client_timeouts
    }

    pub(super) fn lame_duck(&self) -> Duration {
        self.times.load().lame_duck
    }

    pub(super) fn grace_period(&self) -> Duration {
        self.times.load().grace_period
    }
}

fn limits(options: &Options) -> RequestLimits {
    RequestLimits {
        max_payload_size: options.max_payload_size,
        max_merge_size: options.max_merge_size,
        request_timeout: options.request_timeout,
        stream_idle_timeout: options.stream_idle_timeout,
        max_retries: options.max_retries,
        retry_on: options.retry_on.clone(),
        body_idle_timeout: options.request_body_idle_timeout,
    }
}

fn times(options: &Options) -> Times {
    Times {
        client_timeouts: ClientTimeouts {
            head: options.request_head_timeout,
            idle: options.client_idle_timeout,
        },
        lame_duck: options.shutdown_lame_duck,
        grace_period: options.shutdown_grace_period,
    }
}

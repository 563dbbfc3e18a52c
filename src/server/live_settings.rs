//! The settings that a reload can change, as worker threads read them.
//!
//! A request keeps the limits that it started with, and a connection its timeouts: a reload never shortens
//! what runs. Reading and comparing configurations is for the program and for `config`.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::config::Options;
use crate::http1::{BodyTimeouts, ClientTimeouts};
use crate::proxy::RequestLimits;

/// The settings in effect. `ArcSwap`, because a load costs a few nanoseconds and takes no lock.
pub(crate) struct LiveSettings {
    /// Read once per request.
    limits: Arc<ArcSwap<RequestLimits>>,
    /// Read once per connection, and at a shutdown.
    timeouts: ArcSwap<Timeouts>,
}

/// Timeouts of client connections and of a shutdown.
struct Timeouts {
    client_timeouts: ClientTimeouts,
    lame_duck: Duration,
    grace_period: Duration,
}

impl LiveSettings {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            limits: Arc::new(ArcSwap::from_pointee(limits(options))),
            timeouts: ArcSwap::from_pointee(timeouts(options)),
        }
    }

    /// Replaces the settings, for requests and connections that start from now on.
    pub(crate) fn reload(&self, options: &Options) {
        self.limits.store(Arc::new(limits(options)));
        self.timeouts.store(Arc::new(timeouts(options)));
    }

    /// The limits, which each worker thread's proxy shares.
    pub(super) fn limits(&self) -> &Arc<ArcSwap<RequestLimits>> {
        &self.limits
    }

    pub(super) fn client_timeouts(&self) -> ClientTimeouts {
        self.timeouts.load().client_timeouts
    }

    /// The drain delay.
    pub(super) fn lame_duck(&self) -> Duration {
        self.timeouts.load().lame_duck
    }

    pub(super) fn grace_period(&self) -> Duration {
        self.timeouts.load().grace_period
    }
}

fn limits(options: &Options) -> RequestLimits {
    RequestLimits {
        max_payload_size: options.max_payload_size,
        max_merge_size: options.max_merge_size,
        request_timeout: options.request_timeout,
        stream_idle_timeout: options.stream_idle_timeout,
        stream_keepalive: Some(options.stream_keepalive).filter(|interval| !interval.is_zero()),
        max_retries: options.max_retries,
        retry_on: options.retry_on.clone(),
        body_timeouts: body_timeouts(options),
        hash_key_headers: options.hash_key_headers.clone(),
        internal_fields: options.internal_fields,
        abort_on_disconnect: options.abort_on_disconnect,
        max_samples: options.max_samples,
    }
}

fn body_timeouts(options: &Options) -> BodyTimeouts {
    BodyTimeouts { idle: options.request_body_idle_timeout, whole: options.request_body_timeout }
}

fn timeouts(options: &Options) -> Timeouts {
    Timeouts {
        client_timeouts: ClientTimeouts {
            head: options.request_head_timeout,
            idle: options.client_idle_timeout,
            body: body_timeouts(options),
        },
        lame_duck: options.shutdown_lame_duck,
        grace_period: options.shutdown_grace_period,
    }
}

//! What is recorded of requests, and what operators get to see of it.
//!
//! [`record`] follows one request and, when it has ended, makes one event of it, a
//! [`CompletedRequest`](record::CompletedRequest). The event has two readers: [`metrics`] counts it,
//! [`report`] writes its log line and exports its spans. The proxy knows the record only.

pub(crate) mod metrics;
pub(crate) mod record;
pub(crate) mod report;
